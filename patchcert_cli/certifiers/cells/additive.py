"""Cells that vote: the exact worst case of a sum of bounded scores.

BagCert (Metzen & Yatsura, ICLR 2021) and derandomized smoothing (Levine & Feizi, NeurIPS 2020) both answer with the class whose
cells (places of a small receptive field, or ablations of the image) have the largest sum of scores. An attacker at location L
owns the cells A(L) that see a pixel of L, and no other.

Shapes: B images, K classes, N x M cells, P x Q locations. Cell i gives class c the whole number ``s_ic`` in [0, w_i], with a
whole weight ``w_i >= 0`` that is 1 for votes. ``S_c = sum_i s_ic``; the answer y is the class of the largest S, the lowest index
among equals. Sums stay below 2^24, so float32 holds them exactly.
A score that is NaN makes margins that are NaN, and these certify nothing.

**Theorem.** Let an attacker replace the scores of the cells in A(L), for one location L of the attacker's choice, by any numbers
in [0, w_i]. For a class j != y let

    m_j(L) = S_y - S_j - sum_{i in A(L)} (w_i + s_iy - s_ij) + [y < j].

The attacker cannot change the answer iff m_j(L) > 0 for every L and every j != y.
Proof: the scores outside A(L) stay. Of all replacements, ``s_iy = 0, s_ij = w_i`` for all i in A(L) minimizes S'_y - S'_j, which
becomes m_j(L) - [y < j]. The answer stays y against j iff S'_y - S'_j > 0, or = 0 and y < j: iff m_j(L) > 0, for whole numbers.
If the cells can be set independently, the attacker can reach that minimum, so the condition is also necessary; the same if each
cell votes for exactly one class, since the minimizing cell votes for j alone. (The published conditions below drop the tie's
credit.)

**Budgets.** For an attacker with k locations, the loss is at most the sum of the k largest losses of single locations, since each
cell's loss is non-negative; this is sufficient, not necessary.

**Unknown scores.** Where rounding could have decided a score, it is the attacker's at every location: s_iy counts as 0, s_ij as
w_i.

**Published conditions** (Metzen & Yatsura, section 3), for comparison:
3.1, any monotone aggregation g per class: ``g_y(worst) > g_j(worst)`` for all L and j, where the worst case has 0 for y and w for
j in A(L). 3.2, of the sum: m_j(L) without the tie's credit. 3.3, without locations: ``S_y - S_j > 2 max_L w(A(L))``, which is
the condition of Levine & Feizi except for ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.layers.precision import exact_arithmetic, first_largest

METHODS = ("exact", "3.1", "3.2", "3.3")
LARGEST_SUM = 2**24
CHUNK = 1 << 19  # scores at a time, so that a chunk stays in a core's cache
DENSE = 64  # up to this many cells along an axis, a product with a 0/1 matrix beats sums of neighbours

Aggregate = Callable[[Tensor], Tensor]  # scores [..., N, M] -> [...], monotone in every score


@dataclass(frozen=True)
class Votes:
    """What the cells say.

    Attributes:
        scores: whole numbers [B, K, N, M] of any type, 0 <= s <= weight.
        unknown: bool of the same shape, scores that rounding may have decided; None for none.
        weight: whole numbers [N, M], None for 1.
        one_hot: each cell votes for exactly one class, whatever it sees, and there are no weights.
    """

    scores: Tensor
    unknown: Tensor | None = None
    weight: Tensor | None = None
    one_hot: bool = False

    def sums(self) -> Tensor:
        """S, int64 [B, K]."""
        parts = torch.split(self.scores, max(1, CHUNK // max(1, self.scores[:1].numel())))
        return torch.cat([part.float().sum(dim=(2, 3)) for part in parts]).long()  # exact below 2^24

    def answer(self) -> Tensor:
        """int64 [B], the class of the largest sum, the lowest index among equals."""
        return first_largest(self.sums())

    def of(self, label: Tensor) -> Votes:
        """The scores of one class, int64 [B], of each image: [B, 1, N, M]."""
        return Votes(_of(self.scores, label), None if self.unknown is None else _of(self.unknown, label), self.weight)


@dataclass(frozen=True)
class Proof:
    """The smallest margin over classes and locations.

    Attributes:
        answer: int64 [B], the class that is proven.
        margin: float64 [B], in votes; the answer cannot change iff it is positive.
        worst: int64 [B], the number of a location that attains it.
        rival: int64 [B], a class that attains it.
    """

    answer: Tensor
    margin: Tensor
    worst: Tensor
    rival: Tensor


def location_sums(scores: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Sums of float32 scores [..., N, M] over every location's cells: [..., P, Q], exact for whole numbers below 2^24."""
    return _turned_sums(scores, rows, columns).transpose(-1, -2)


def _turned_sums(scores: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """:func:`location_sums` as contiguous [..., Q, P]."""
    if max(rows.cells, columns.cells) > DENSE and rows.sweep and columns.sweep:
        return _swept(scores, rows, columns).transpose(-1, -2).contiguous()
    return _along(_along(scores, columns).transpose(-1, -2).contiguous(), rows)


def _along(scores: Tensor, axis: Axis) -> Tensor:
    """Sums over the touched cells of the last axis."""
    return scores @ axis.matrix().to(scores).t()


def _swept(scores: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Sums over neighbouring windows of one shape, as a view [..., P, Q].

    The maps are taken as one long row each, so that every addition runs over neighbours in memory; windows that run over the end
    of a row of cells are computed too, and left out of the view.
    """
    assert rows.sweep is not None and columns.sweep is not None
    (top, height), (left, width) = rows.sweep, columns.sweep
    length = scores.shape[-1]
    sums = _windows(_windows(scores.flatten(-2), width, 1), height, length)
    shape = (*scores.shape[:-2], len(rows.touched), len(columns.touched))
    return sums.as_strided(shape, (*sums.stride()[:-1], length, 1), sums.storage_offset() + top * length + left)


def _windows(row: Tensor, width: int, apart: int) -> Tensor:
    """Sums of ``width`` entries that lie ``apart`` along the last axis, from every entry that has as many after it.

    Windows of 2, 4, 8, ... entries are made of two of half the width.
    """
    count = row.shape[-1] - (width - 1) * apart
    doubled, span, at, total = row, 1, 0, None
    while True:
        if width & span:
            part = doubled.narrow(-1, at * apart, count)
            total = part if total is None else total + part
            at += span
        if 2 * span > width:
            break
        rest = doubled.shape[-1] - span * apart
        doubled = doubled.narrow(-1, 0, rest) + doubled.narrow(-1, span * apart, rest)
        span *= 2
    assert total is not None
    return total


@exact_arithmetic()
def prove(votes: Votes, cover: CellCoverage, method: str = "exact") -> Proof:
    """The theorem, or one of the published conditions, for every image, location and class.

    Args:
        votes: what the cells say.
        cover: which of them each location touches.
        method: ``exact``, ``3.1``, ``3.2`` or ``3.3``.
    """
    if method == "3.1":
        return prove_aggregate(votes, cover, lambda scores: scores.sum(dim=(-1, -2)))
    keep = (cover.rows.distinct(), cover.columns.distinct())
    if cover.budget > 1:  # several locations may be alike
        keep = (tuple(range(len(cover.rows.touched))), tuple(range(len(cover.columns.touched))))
    rows, columns = cover.rows.select(keep[0]), cover.columns.select(keep[1])
    size = max(1, CHUNK // max(1, votes.scores[:1].numel()))
    parts = [_prove(part, CellCoverage(rows, columns, cover.budget), method) for part in in_chunks(votes, size)]
    answer, margin, worst, rival = (torch.cat(part) for part in zip(*parts, strict=True))
    of_row, of_column = (torch.tensor(kept, device=worst.device) for kept in keep)  # numbers of the kept locations -> of all
    worst = of_row[worst % len(keep[0])] * len(cover.columns.touched) + of_column[worst // len(keep[0])]
    return Proof(answer, margin.double(), worst, rival)


def in_chunks(votes: Votes, size: int) -> Iterator[Votes]:
    """``size`` images after others; one empty part of no images."""
    for begin in range(0, max(len(votes.scores), 1), size):
        part = slice(begin, begin + size)
        unknown = None if votes.unknown is None else votes.unknown[part]
        yield replace(votes, scores=votes.scores[part], unknown=unknown)


def extremes(votes: Votes, classes: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The least and the most that every score of some classes can be, float32; the same tensor where all are known."""
    scores = votes.scores[:, classes].float()
    if votes.unknown is None:
        return scores, scores
    unknown = votes.unknown[:, classes]
    most = torch.ones_like(scores) if votes.weight is None else votes.weight.to(scores).expand_as(scores)
    return scores.masked_fill(unknown, 0), torch.where(unknown, most, scores)


def _prove(votes: Votes, cover: CellCoverage, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Answer, margin, location (counted column by column) and runner-up of one chunk of images, a block of classes at a time."""
    rows, columns, budget = cover.rows, cover.columns, cover.budget
    classes = votes.scores.shape[1]
    block = max(1, CHUNK // max(1, votes.scores[:, :1].numel()))
    ends = extremes(votes) if block >= classes else None
    answer = first_largest(ends[0].sum(dim=(2, 3))) if ends and votes.unknown is None else votes.answer()
    own = _of(ends[0], answer) if ends else extremes(votes.of(answer))[0]  # [B, 1, N, M]
    size = location_weights(votes, rows, columns).t().contiguous()  # [Q, P], the largest sum of scores in each location
    total = own.sum(dim=(2, 3))  # [B, 1]
    base = (size + _turned_sums(own, rows, columns)).flatten(2)  # [B, 1, Q * P]
    margins, places = [], []
    for first in range(0, classes, block):
        most = ends[1] if ends else extremes(votes, slice(first, first + block))[1]  # [B, K', N, M]
        difference = total - most.sum(dim=(2, 3))  # [B, K'], S_y - S_j
        if method == "3.3":
            largest, where = size.flatten().max(dim=0)
            taken, worst = 2 * budget * largest, where.expand_as(difference)
        else:  # sum_{i in A(L)} (w_i + s_iy - s_ij)
            loss = base - _turned_sums(most, rows, columns).flatten(2)
            if budget == 1:
                taken, worst = loss.max(dim=2)
            else:
                several = loss.topk(min(budget, loss.shape[2]), dim=2)
                taken, worst = several.values.sum(dim=2), several.indices[:, :, 0]
        margins.append(difference - taken)
        places.append(worst)
    margin, worst = torch.cat(margins, dim=1), torch.cat(places, dim=1)
    if method == "exact":
        margin = margin + (answer[:, None] < torch.arange(classes, device=margin.device))
    smallest, rival = margin.scatter(1, answer[:, None], float("inf")).min(dim=1)
    return answer, smallest, worst.gather(1, rival[:, None])[:, 0], rival


def location_weights(votes: Votes, rows: Axis, columns: Axis) -> Tensor:
    """w(A(L)), float32 [P, Q].

    Raises:
        ValueError: sums of all weights would not be exact in float32.
    """
    scores = votes.scores
    weight = torch.ones(scores.shape[2:], device=scores.device) if votes.weight is None else votes.weight.float()
    if float(weight.sum()) >= LARGEST_SUM:
        raise ValueError("weights too large for exact sums in float32")
    return location_sums(weight, rows, columns)


def _of(values: Tensor, answer: Tensor) -> Tensor:
    """The entries [B, 1, ...] of values [B, K, ...] at the class int64 [B]."""
    return values[torch.arange(len(answer), device=answer.device), answer][:, None]


@exact_arithmetic()
def margin_map(votes: Votes, cover: CellCoverage) -> Tensor:
    """The smallest margin over classes at every location, budget 1, float64 [B, P, Q]; see the theorem."""
    rows, columns = cover.rows, cover.columns
    size, maps = location_weights(votes, rows, columns), []
    for part in in_chunks(votes, max(1, CHUNK // max(1, votes.scores[:1].numel()))):
        answer = part.answer()
        least, most = extremes(part)
        own = _of(least, answer)
        difference = own.sum(dim=(2, 3)) - most.sum(dim=(2, 3))  # [B, K]
        difference = difference + (answer[:, None] < torch.arange(difference.shape[1], device=difference.device))
        margin = difference[:, :, None, None] - (size + location_sums(own, rows, columns) - location_sums(most, rows, columns))
        rivals = torch.arange(difference.shape[1], device=difference.device) != answer[:, None]
        maps.append(margin.masked_fill(~rivals[:, :, None, None], float("inf")).amin(dim=1))
    return torch.cat(maps).double()


@exact_arithmetic()
def prove_aggregate(votes: Votes, cover: CellCoverage, aggregate: Aggregate) -> Proof:
    """Condition 3.1: the worst case of any aggregation that is monotone in every score, one location after another.

    ``aggregate`` maps scores float64 [..., N, M] of one class to its class score [...]; the answer is the class of the largest,
    the lowest index among equals, and the margin ``g_y - g_j`` must be positive.
    """
    if cover.budget != 1:
        raise ValueError("condition 3.1 is for one location")
    least, most = (part.double() for part in extremes(votes))
    weight = least.new_ones(least.shape[2:]) if votes.weight is None else votes.weight.double()
    total = aggregate(votes.scores.double())
    answer = first_largest(total)
    own = _of(least, answer)
    smallest = torch.full((len(answer),), float("inf"), dtype=torch.float64, device=least.device)
    worst, rival = torch.zeros_like(answer), torch.zeros_like(answer)
    keep_rows, keep_columns = cover.rows.distinct(), cover.columns.distinct()
    row_mask, column_mask = cover.rows.matrix().bool().to(least.device), cover.columns.matrix().bool().to(least.device)
    for p in keep_rows:
        for q in keep_columns:
            inside = row_mask[p][:, None] & column_mask[q][None, :]
            gap = aggregate(own.masked_fill(inside, 0)) - aggregate(torch.where(inside, weight, most))  # [B, K]
            margin, who = gap.scatter(1, answer[:, None], float("inf")).min(dim=1)
            lower = ~(margin >= smallest)  # NaN is lower than any number, and stays
            smallest = torch.minimum(margin, smallest)
            worst = torch.where(lower, torch.full_like(worst, p * len(cover.columns.touched) + q), worst)
            rival = torch.where(lower, who, rival)
    return Proof(answer, smallest, worst, rival)
