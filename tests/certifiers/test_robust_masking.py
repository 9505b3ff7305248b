"""Robust masking: against the theorem's sums as loops over sets, and against an enemy who writes every evidence he could.

The reference (:func:`left`, :func:`conditions`, :func:`breakable`) is written from the rule and the theorem alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli.certifiers.cells import robust_masking
from patchcert_cli.certifiers.cells.additive import Proof
from patchcert_cli.certifiers.cells.robust_masking import MOST, Masking, margin_map, masked_sums, prove
from patchcert_cli.certifiers.geometry import Axis, CellCoverage

from .ballots import Cells, Line

SHARES = [Fraction(0), Fraction(1, 5), Fraction(1, 2), Fraction(3, 4)]
LARGE = 400  # more than all evidence of a drawn image


@dataclass(frozen=True)
class Case:
    """Evidence of some images under one geometry and one masking."""

    rows: Line
    columns: Line
    window: tuple[int, int]
    share: Fraction
    evidence: Tensor  # int64 [B, K, N, M]

    def cover(self) -> CellCoverage:
        return CellCoverage(self.rows.axis(), self.columns.axis())

    def masking(self) -> Masking:
        return Masking(self.window, self.share)

    def places(self) -> list[Cells]:
        return [frozenset(product(r, c)) for r, c in product(self.rows.touched(), self.columns.touched())]

    def masks(self) -> list[Cells]:
        (n, m), (h, w) = self.evidence.shape[2:], self.window
        return [frozenset(product(range(i, i + h), range(j, j + w))) for i, j in product(range(n - h + 1), range(m - w + 1))]


Plane = dict[tuple[int, int], int]


def planes(evidence: Tensor) -> list[Plane]:
    """One image's evidence by cell, class by class."""
    return [{(r, c): v for r, line in enumerate(of) for c, v in enumerate(line)} for of in evidence.tolist()]


def over(plane: Plane, cells: Any) -> int:
    return sum(plane[cell] for cell in cells)


def left(plane: Plane, masks: list[Cells], share: Fraction) -> int:
    """What a class is left."""
    total, heaviest = sum(plane.values()), max(over(plane, mask) for mask in masks)
    return total - heaviest if heaviest > share * total else total


def first_best(sums: list[int]) -> int:
    return sums.index(max(sums))


def conditions(case: Case, index: int) -> list[dict[int, float]]:
    """The theorem's margin of every rival, for each location."""
    given, masks, share = planes(case.evidence[index]), case.masks(), case.share
    y = first_best([left(plane, masks, share) for plane in given])
    found = []
    for touched in case.places():
        own = {cell: 0 if cell in touched else v for cell, v in given[y].items()}
        rest, most = sum(own.values()), max(over(own, mask) for mask in masks)
        if share > 0 and most <= share * rest:
            most = max((over(own, mask) for mask in masks if mask & touched), default=0)
        of: dict[int, float] = {}
        for j, plane in enumerate(given):
            if j != y:
                outside = [sum(plane.values()) - over(plane, mask) for mask in masks if touched <= mask]
                high = min(outside, default=float("inf"))
                if high < float("inf"):
                    high = high / (1 - share) // 1
                of[j] = rest - most - high + (y < j)
        found.append(of)
    return found


def reachable(plane: Plane, touched: Cells, masks: list[Cells], share: Fraction, values: tuple[int, ...]) -> list[int]:
    """What a class can be left when each touched cell is given each of these values."""
    return [
        left({**plane, **dict(zip(sorted(touched), written, strict=True))}, masks, share)
        for written in product(values, repeat=len(touched))
    ]


def breakable(case: Case, index: int) -> bool:
    """Whether evidence that an enemy writes at one location changes the answer: every combination of many values is tried."""
    given, masks = planes(case.evidence[index]), case.masks()
    y = first_best([left(plane, masks, case.share) for plane in given])
    for touched in set(case.places()):
        values = (0, 1, 2, 4, 8, LARGE) if len(touched) <= 2 else (0, 3, LARGE) if len(touched) <= 4 else (0, LARGE)
        reached = [reachable(plane, touched, masks, case.share, values) for plane in given]
        for own in set(reached[y]):  # classes have evidence of their own, so every combination can be had
            if any(max(of) > own or (max(of) == own and j < y) for j, of in enumerate(reached) if j != y):
                return True
    return False


GEOMETRIES: list[tuple[Line, Line, tuple[int, int]]] = [
    (Line(5, 1, 1), Line(1, 1, 1), (1, 1)),
    (Line(6, 2, 1), Line(1, 1, 1), (2, 1)),
    (Line(7, 1, 1), Line(1, 1, 1), (2, 1)),  # masks larger than what is touched
    (Line(4, 1, 1), Line(3, 1, 1), (1, 1)),
    (Line(4, 1, 1), Line(4, 1, 1), (2, 2)),
    (Line(5, 1, 2), Line(4, 1, 1), (2, 1)),  # border pixels touch one cell, others two
    (Line(5, 1, 2), Line(5, 1, 2), (2, 2)),
    (Line(9, 1, 2, 3), Line(5, 1, 1), (1, 2)),  # a stride beyond the receptive field: some touch nothing
    (Line(4, 2, 1), Line(3, 1, 1), (1, 2)),  # no mask holds what is touched
    (Line(6, 1, 3, 2, 1), Line(3, 1, 1), (2, 1)),
]


def draw(rows: Line, columns: Line, window: tuple[int, int], share: Fraction, *, classes: int, count: int, seed: int) -> Case:
    """Random images, from nearly undecided to clearly won; some with one heavy cell."""
    generator = torch.Generator().manual_seed(seed)
    n, m = len(rows.shown()), len(columns.shown())
    evidence = torch.randint(4, (count, classes, n, m), generator=generator)
    favourite = torch.randint(classes, (count,), generator=generator)
    gain = torch.randint(7, (count, 1, 1), generator=generator)
    evidence[torch.arange(count), favourite] += (gain * torch.rand(count, n, m, generator=generator)).round().long()
    heavy = torch.rand(count, classes, n, m, generator=generator) < 0.03
    return Case(rows, columns, window, share, evidence + 9 * heavy)


@cache
def some_cases(share: Fraction) -> list[Case]:
    return [
        draw(*geometry, share, classes=2 + seed % 2, count=24, seed=seed)
        for seed, geometry in enumerate([*GEOMETRIES, *GEOMETRIES])
    ]


@cache
def truth(share: Fraction, at: int) -> tuple[bool, ...]:
    case = some_cases(share)[at]
    return tuple(breakable(case, index) for index in range(len(case.evidence)))


@dataclass
class Verdicts:
    """How the proof compares with the enemy."""

    unsound: list[str] = field(default_factory=list)
    lazy: int = 0
    certified: int = 0
    broken: int = 0


def compare(share: Fraction) -> Verdicts:
    found = Verdicts()
    for at, case in enumerate(some_cases(share)):
        certified = (robust_masking.prove(case.evidence, case.masking(), case.cover()).margin > 0).tolist()
        for index, (bad, good) in enumerate(zip(truth(share, at), certified, strict=True)):
            if bad and good:
                found.unsound.append(f"{case.rows} {case.columns} {case.window} image {index}")
            found.lazy += not bad and not good
        found.certified += sum(certified)
        found.broken += sum(truth(share, at))
    return found


def test_certified_if_and_only_if_no_attack_exists() -> None:
    found = compare(Fraction(0))
    assert (found.unsound, found.lazy) == ([], 0)
    assert found.certified >= 60 and found.broken >= 100


@pytest.mark.parametrize("share", SHARES[1:], ids=str)
def test_a_share_is_certified_soundly(share: Fraction) -> None:
    found = compare(share)
    assert found.unsound == []
    assert found.certified >= (15 if share < Fraction(3, 4) else 3) and found.broken >= 100


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_margins_are_those_of_the_theorem(share: Fraction) -> None:
    """The margin, a location and a rival that attain it, and the map of all locations, against loops over sets."""
    credits_ = 0
    for case in some_cases(share):
        given = (case.evidence, case.masking(), case.cover())
        proof, chart = prove(*given), margin_map(*given)
        assert torch.equal(proof.margin, chart.flatten(1).amin(dim=1))
        sums = masked_sums(case.evidence, case.masking()).tolist()
        for index in range(len(case.evidence)):
            slow = conditions(case, index)
            assert sums[index] == [left(plane, case.masks(), share) for plane in planes(case.evidence[index])]
            assert int(proof.answer[index]) == first_best(sums[index])
            assert chart[index].flatten().tolist() == [min(of.values()) for of in slow]
            assert slow[int(proof.worst[index])][int(proof.rival[index])] == float(proof.margin[index])
            credits_ += float(proof.margin[index]) == 1 and int(proof.answer[index]) < int(proof.rival[index])
    assert credits_ >= (3 if share == 0 else 1 if share < Fraction(3, 4) else 0), "the tie's credit never decided"


def test_nothing_is_certified_where_no_mask_holds_what_is_touched() -> None:
    case = draw(Line(4, 2, 1), Line(3, 1, 1), (1, 2), Fraction(0), classes=3, count=20, seed=0)
    assert prove(case.evidence, case.masking(), case.cover()).margin.tolist() == [-float("inf")] * 20


def test_evidence_of_any_size_is_added_exactly() -> None:
    """One cell of the largest evidence beside cells of 1: in floating point the small ones would be lost."""
    evidence = torch.zeros(1, 2, 1, 40, dtype=torch.int64)
    evidence[0, 1, 0, 0] = MOST
    evidence[0, 1, 0, 1:21] = 1
    evidence[0, 0, 0, 21:40] = 1
    masking, cover = Masking((1, 1)), CellCoverage(Line(1, 1, 1).axis(), Line(40, 1, 1).axis())
    assert masked_sums(evidence, masking).tolist() == [[18, 20]]
    proof = prove(evidence, masking, cover)
    assert proof.answer.tolist() == [1]
    # without its heaviest cell and one that the enemy empties class 1 keeps 19; the enemy's evidence for class 0 is taken away
    assert proof.margin.tolist() == [min(20 - 18, 19 - 19)]


@pytest.mark.parametrize("chunk", [1, 60, 1 << 24])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for share in SHARES[:2]:
        case = draw(Line(12, 2, 3), Line(11, 3, 2), (4, 5), share, classes=4, count=7, seed=1)
        given = (case.evidence, case.masking(), case.cover())
        before, chart = prove(*given), margin_map(*given)
        monkeypatch.setattr(robust_masking, "CHUNK", chunk)
        after = prove(*given)
        assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in ("answer", "margin", "worst", "rival"))
        assert torch.equal(chart, margin_map(*given))


def test_no_images_and_refusals() -> None:
    cover = CellCoverage(Line(4, 1, 1).axis(), Line(4, 1, 1).axis())
    empty = prove(torch.zeros(0, 3, 4, 4, dtype=torch.int64), Masking((2, 2)), cover)
    assert empty.answer.shape == empty.margin.shape == empty.worst.shape == empty.rival.shape == (0,)
    some = torch.zeros(1, 3, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="one location"):
        prove(some, Masking((2, 2)), CellCoverage(cover.rows, cover.columns, 2))
    with pytest.raises(ValueError, match="no masks of"):
        prove(some, Masking((5, 1)), cover)
    with pytest.raises(ValueError, match="neighbouring cells"):
        prove(some, Masking((2, 2)), CellCoverage(cover.rows, Axis(4, ((0, 2),))))
    for window, share in (((0, 1), Fraction(0)), ((1, 1), Fraction(1)), ((1, 1), Fraction(1, 3000))):
        with pytest.raises(ValueError, match="no masking"):
            Masking(window, share)


Prove = Callable[[Tensor, Masking, CellCoverage], Proof]


def runner_up_only(evidence: Tensor, masking: Masking, cover: CellCoverage) -> Proof:
    """Nobody but the two classes that lead before the attack is left anything."""
    lead = masked_sums(evidence, masking).double() - torch.arange(evidence.shape[1]) / 1000
    kept = torch.zeros_like(lead, dtype=torch.int64).scatter(1, lead.topk(2, dim=1).indices, 1)
    return prove(evidence * kept[:, :, None, None], masking, cover)


def equality_accepted(evidence: Tensor, masking: Masking, cover: CellCoverage) -> Proof:
    proof = prove(evidence, masking, cover)
    return Proof(proof.answer, proof.margin + (proof.answer > proof.rival), proof.worst, proof.rival)


def window_one_short(end: int) -> Prove:
    """What a location touches is one cell short along both axes, where it is more than one."""

    def short(axis: Axis) -> Axis:
        cut = slice(end, None) if end else slice(-1)
        return Axis(axis.cells, tuple(cells[cut] if len(cells) > 1 else cells for cells in axis.touched))

    return lambda evidence, masking, cover: prove(evidence, masking, CellCoverage(short(cover.rows), short(cover.columns)))


def overlap_rule_dropped(evidence: Tensor, masking: Masking, cover: CellCoverage) -> Proof:
    """Where the heaviest window is below the share nothing is taken away, whatever the enemy adds."""
    proof, margins = prove(evidence, masking, cover), []
    for alone, chart in zip(evidence.split(1), margin_map(evidence, masking, cover), strict=True):
        y = int(robust_masking.answer(alone, masking))
        for (p, rows), (q, columns) in product(enumerate(cover.rows.touched), enumerate(cover.columns.touched)):
            if not rows or not columns:
                continue
            own = alone[0, y].clone()
            own[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
            windows = own.unfold(0, masking.window[0], 1).unfold(1, masking.window[1], 1).sum(dim=(2, 3))
            if int(windows.max()) <= masking.share * int(own.sum()):
                ends = zip((rows, columns), masking.window, windows.shape, strict=True)
                near = tuple(slice(max(0, cells[0] + 1 - side), min(count, cells[-1] + 1)) for cells, side, count in ends)
                chart[p, q] += int(windows[near].max())
        margins.append(chart.amin())
    return Proof(proof.answer, torch.stack(margins), proof.worst, proof.rival)


def what_he_takes_is_forgotten(evidence: Tensor, masking: Masking, cover: CellCoverage) -> Proof:
    """What the enemy empties is forgotten: the answer keeps all that it had."""
    proof = prove(evidence, masking, cover)
    return Proof(proof.answer, proof.margin + 3, proof.worst, proof.rival)


def any_mask_holds(evidence: Tensor, masking: Masking, cover: CellCoverage) -> Proof:
    """A mask that misses a cell of what is touched is taken for one that holds it."""
    first = CellCoverage(*(Axis(a.cells, tuple(cells[:1] for cells in a.touched)) for a in (cover.rows, cover.columns)))
    return prove(evidence, masking, first)


BREAKS: dict[str, tuple[Prove, Fraction]] = {
    "only the clean runner-up": (runner_up_only, Fraction(0)),
    "equality accepted": (equality_accepted, Fraction(0)),
    "window one short at the end": (window_one_short(0), Fraction(0)),
    "window one short at the start": (window_one_short(1), Fraction(0)),
    "overlap rule dropped": (overlap_rule_dropped, Fraction(1, 2)),
    "a little too much room": (what_he_takes_is_forgotten, Fraction(0)),
    "a mask that does not hold all": (any_mask_holds, Fraction(0)),
    "a share proven as none": (lambda e, m, c: prove(e, Masking(m.window), c), Fraction(3, 4)),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_proofs_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, share = BREAKS[name]
    assert compare(share).unsound == []
    monkeypatch.setattr(robust_masking, "prove", broken)
    assert compare(share).unsound != []
