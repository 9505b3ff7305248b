"""Voting cells the slow way: pixel sets for the axes, the theorem's sums as loops, and an enemy that tries every replacement.

Nothing of the package is called here except to name its axes. Shapes: B images, K classes, N x M cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor

from patchcert_cli.certifiers.geometry import Axis, CellCoverage

Array = np.ndarray
Cells = frozenset[tuple[int, int]]


@dataclass(frozen=True)
class Line:
    """One axis under a patch of ``side`` pixels: a sliding layer with kernel ``seen``, or bands of ``seen`` pixels that wrap."""

    length: int
    side: int
    seen: int
    stride: int = 1
    padding: int = 0
    wraps: bool = False

    def axis(self) -> Axis:
        if self.wraps:
            return Axis.bands(self.length, self.side, band=self.seen, stride=self.stride)
        return Axis.sliding(self.length, self.side, kernel=self.seen, stride=self.stride, padding=self.padding)

    def shown(self) -> list[set[int]]:
        """The pixels that each cell sees, numbers outside the image for padding."""
        if self.wraps:
            return [{(first + step) % self.length for step in range(self.seen)} for first in range(0, self.length, self.stride)]
        firsts = range(-self.padding, self.length + self.padding - self.seen + 1, self.stride)
        return [set(range(first, first + self.seen)) for first in firsts]

    def touched(self) -> list[list[int]]:
        patches = [set(range(start, start + self.side)) for start in range(self.length - self.side + 1)]
        return [[cell for cell, pixels in enumerate(self.shown()) if pixels & patch] for patch in patches]


@dataclass(frozen=True)
class Ballots:
    """Scores of some images under one geometry; with ``one`` each cell votes for exactly one class."""

    rows: Line
    columns: Line
    scores: Tensor  # int64 [B, K, N, M]
    weight: Tensor | None = None  # int64 [N, M]
    one: bool = False
    unknown: Tensor | None = None  # bool [B, K, N, M]

    def cover(self, budget: int = 1) -> CellCoverage:
        return CellCoverage(self.rows.axis(), self.columns.axis(), budget)

    def locations(self) -> list[Cells]:
        """Row by row, the cells that each location touches."""
        return [frozenset(product(r, c)) for r, c in product(self.rows.touched(), self.columns.touched())]

    def weights(self) -> list[list[int]]:
        n, m = self.scores.shape[2:]
        return [[1] * m for _ in range(n)] if self.weight is None else self.weight.tolist()


def answer(sums: list[int]) -> int:
    """The class of the largest sum, the lowest index among equals."""
    return sums.index(max(sums))


def sums(scores: list[list[list[int]]]) -> list[int]:
    return [sum(map(sum, plane)) for plane in scores]


def margins(ballots: Ballots, index: int, *, credit: bool = True) -> list[dict[int, int]]:
    """m_j(L) of one image, for every location the rivals' margins."""
    scores, weight = ballots.scores[index].tolist(), ballots.weights()
    total = sums(scores)
    y = answer(total)
    found = []
    for cells in ballots.locations():
        of: dict[int, int] = {}
        for j in range(len(total)):
            if j == y:
                continue
            m = total[y] - total[j]
            for row, column in cells:
                m -= weight[row][column] + scores[y][row][column] - scores[j][row][column]
            of[j] = m + (1 if credit and y < j else 0)
        found.append(of)
    return found


@cache
def replacements(weights: tuple[int, ...], classes: int, one: bool) -> Array:
    """All sums per class that cells of these weights can be made to add up to: [R, K]."""
    reached = {(0,) * classes}
    for weight in weights:
        if one:
            options = [tuple(weight * (c == chosen) for c in range(classes)) for chosen in range(classes)]
        else:
            options = list(product(range(weight + 1), repeat=classes))
        reached = {tuple(a + b for a, b in zip(before, option, strict=True)) for before in reached for option in options}
    return np.array(sorted(reached))


def breakable(ballots: Ballots, index: int, budget: int = 1) -> bool:
    """Whether some replacement at ``budget`` locations changes the answer."""
    scores, weight = ballots.scores[index].numpy(), np.array(ballots.weights())
    y = answer(scores.sum(axis=(1, 2)).tolist())
    places = ballots.locations()
    for several in {frozenset().union(*chosen) for chosen in combinations(places, min(budget, len(places)))}:
        outside = np.ones_like(weight)
        for cell in several:
            outside[cell] = 0
        base = (scores * outside).sum(axis=(1, 2))
        weights = tuple(sorted(int(weight[cell]) for cell in several))
        for settings in unknown_sums(ballots, index, outside):
            after = base + settings + replacements(weights, len(scores), ballots.one)
            if (after.argmax(axis=1) != y).any():  # numpy's argmax is the first of equals
                return True
    return False


def unknown_sums(ballots: Ballots, index: int, outside: Array) -> Iterator[Array]:
    """What every setting of the unknown scores outside the patch adds to the scores that were given."""
    scores, weight = ballots.scores[index].numpy(), np.array(ballots.weights())
    if ballots.unknown is None:
        yield np.zeros(len(scores), dtype=int)
        return
    doubt = [(c, row, column) for c, row, column in np.argwhere(ballots.unknown[index].numpy()) if outside[row, column]]
    for values in product(*(range(weight[row, column] + 1) for _, row, column in doubt)):
        added = np.zeros(len(scores), dtype=int)
        for (c, row, column), value in zip(doubt, values, strict=True):
            added[c] += value - scores[c, row, column]
        yield added


def draw(
    rows: Line, columns: Line, *, classes: int, count: int, seed: int, one: bool = False, heaviest: int = 0, doubts: int = 0
) -> Ballots:
    """Random images, from nearly unanimous to undecided.

    ``heaviest`` gives random weights up to it, ``doubts`` makes about so many scores unknown.
    """
    generator = torch.Generator().manual_seed(seed)
    n, m = len(rows.shown()), len(columns.shown())
    weight = torch.randint(heaviest + 1, (n, m), generator=generator) if heaviest else None
    favourite = torch.randint(classes, (count,), generator=generator)
    sure = torch.rand(count, 1, 1, generator=generator) ** 0.3  # [B, 1, 1]
    if one:
        other = torch.randint(classes, (count, n, m), generator=generator)
        chosen = torch.where(torch.rand(count, n, m, generator=generator) < sure, favourite[:, None, None], other)
        scores = torch.nn.functional.one_hot(chosen, classes).permute(0, 3, 1, 2)
    else:
        high, low = sure, 1 - torch.rand(count, 1, 1, generator=generator) ** 0.3
        chance = low[:, None].repeat(1, classes, 1, 1)
        chance[torch.arange(count), favourite] = high
        if weight is None:
            scores = (torch.rand(count, classes, n, m, generator=generator) < chance).long()
        else:
            noise = torch.rand(count, classes, n, m, generator=generator) * 0.5 - 0.25
            scores = (weight * (chance + noise)).round().long().clamp(min=0).minimum(weight)
    if weight is not None and one:
        scores = scores * weight
    unknown = torch.rand(scores.shape, generator=generator) < doubts / scores[0].numel() if doubts else None
    return Ballots(rows, columns, scores, weight, one, unknown)
