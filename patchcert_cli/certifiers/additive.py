"""Cells that vote: the exact worst case of a sum of bounded scores.

BagCert (Metzen & Yatsura, ICLR 2021) and derandomized smoothing (Levine & Feizi, NeurIPS 2020) both answer with the class whose
cells (places of a small receptive field, or ablations of the image) have the largest sum of scores. An attacker at location L
owns the cells A(L) that see a pixel of L, and no other.

Shapes: B images, K classes, N x M cells, P x Q locations. Cell i gives class c the whole number ``s_ic`` in [0, w_i], with a
whole weight ``w_i >= 0`` that is 1 for votes. ``S_c = sum_i s_ic``; the answer y is the class of the largest S, the lowest index
among equals. Sums stay below 2^24, so float32 holds them exactly.

**Theorem.** Let an attacker replace the scores of the cells in A(L), for one location L of his choice, by any numbers in
[0, w_i]. For a rival j let

    m_j(L) = S_y - S_j - sum_{i in A(L)} (w_i + s_iy - s_ij) + [y < j].

He cannot change the answer iff m_j(L) > 0 for every L and every j != y.
Proof: the scores outside A(L) stay. Of all replacements, ``s_iy = 0, s_ij = w_i`` for all i in A(L) minimizes S'_y - S'_j, which
becomes m_j(L) - [y < j]. The answer stays y against j iff S'_y - S'_j > 0, or = 0 and y < j: iff m_j(L) > 0, for whole numbers.
If the cells can be set independently he can reach that minimum, so the condition is also necessary; the same if each cell votes
for exactly one class, since the minimizing cell votes for j alone. (The published conditions below drop the tie's credit.)

**Budgets.** For an attacker with k locations, the loss is at most the sum of the k largest losses of single locations, since each
cell's loss is non-negative; this is sufficient, not necessary.

**Unknown scores.** Where rounding could have decided a score, it is the attacker's wherever he is: s_iy counts as 0, s_ij as w_i.

**Published conditions** (Metzen & Yatsura, section 3), for comparison:
3.1, any monotone aggregation g per class: ``g_y(worst) > g_j(worst)`` for all L and j, where the worst case has 0 for y and w for
j in A(L). 3.2, of the sum: m_j(L) without the tie's credit. 3.3, without locations: ``S_y - S_j > 2 max_L w(A(L))``, which is
the condition of Levine & Feizi but for ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.exact import exact_arithmetic
from patchcert_cli.geometry import Axis, Cover

METHODS = ("exact", "3.1", "3.2", "3.3")
LARGEST_SUM = 2**24
CHUNK = 1 << 18  # scores at a time, so that a chunk stays in a core's cache
DENSE = 64  # up to this many cells along an axis, a product with a 0/1 matrix beats running sums

Aggregate = Callable[[Tensor], Tensor]  # scores [..., N, M] -> [...], monotone in every score


@dataclass(frozen=True)
class Votes:
    """What the cells say.

    Attributes:
        scores: whole numbers [B, K, N, M] of any type, 0 <= s <= weight.
        unknown: bool of the same shape, scores that rounding may have decided; None for none.
        weight: whole numbers [N, M], None for 1.
    """

    scores: Tensor
    unknown: Tensor | None = None
    weight: Tensor | None = None

    def sums(self) -> Tensor:
        """S, int64 [B, K]."""
        return self.scores.sum(dim=(2, 3), dtype=torch.float32 if self.scores.is_floating_point() else torch.int64).long()

    def answer(self) -> Tensor:
        """int64 [B], the class of the largest sum, the lowest index among equals."""
        sums = self.sums()
        return (sums == sums.amax(dim=1, keepdim=True)).int().argmax(dim=1)


@dataclass(frozen=True)
class Proof:
    """The smallest margin over rivals and locations.

    Attributes:
        margin: float64 [B], in votes; the answer cannot change iff it is positive.
        worst: int64 [B], the number of a location that attains it.
        rival: int64 [B], a class that attains it.
    """

    margin: Tensor
    worst: Tensor
    rival: Tensor


def box_sums(scores: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Sums of float32 scores [..., N, M] over every location's cells: [..., P, Q], exact for whole numbers below 2^24."""
    with exact_arithmetic():
        return _along(_along(scores, columns).transpose(-1, -2), rows).transpose(-1, -2)


def _along(scores: Tensor, axis: Axis) -> Tensor:
    """Sums over the touched cells of the last axis."""
    if axis.cells <= DENSE or any(cells and cells[-1] - cells[0] != len(cells) - 1 for cells in axis.touched):
        return scores @ axis.matrix().to(scores).t()
    running = F.pad(scores.cumsum(dim=-1), (1, 0))
    start = torch.tensor([cells[0] if cells else 0 for cells in axis.touched], device=scores.device)
    stop = torch.tensor([cells[-1] + 1 if cells else 0 for cells in axis.touched], device=scores.device)
    return running.index_select(-1, stop) - running.index_select(-1, start)


def prove(votes: Votes, cover: Cover, method: str = "exact") -> Proof:
    """The theorem, or one of the published conditions, for every image, location and rival.

    Args:
        votes: what the cells say.
        cover: which of them each location touches.
        method: ``exact``, ``3.2`` or ``3.3``; for ``3.1`` see :func:`prove_aggregate`.
    """
    if method == "3.1":
        return prove_aggregate(votes, cover, lambda scores: scores.sum(dim=(-1, -2)))
    keep = (cover.rows.distinct(), cover.columns.distinct()) if cover.budget == 1 else None
    rows, columns = (cover.rows.pick(keep[0]), cover.columns.pick(keep[1])) if keep else (cover.rows, cover.columns)
    size = max(1, CHUNK // max(1, votes.scores[:1].numel()))
    answer = votes.answer()
    parts = [
        _prove(part, y, rows, columns, cover.budget, method)
        for part, y in zip(_chunks(votes, size), torch.split(answer, size), strict=True)
    ]
    margin, worst, rival = (torch.cat(part) for part in zip(*parts, strict=True))
    if keep:  # numbers of the kept locations -> numbers of all
        of_row, of_column = (torch.tensor(kept, device=worst.device) for kept in keep)
        worst = of_row[worst // len(keep[1])] * len(cover.columns.touched) + of_column[worst % len(keep[1])]
    return Proof(margin.double(), worst, rival)


def _chunks(votes: Votes, size: int) -> Iterator[Votes]:
    for begin in range(0, max(1, len(votes.scores)), size):  # no images are one empty chunk
        part = slice(begin, begin + size)
        yield Votes(votes.scores[part], None if votes.unknown is None else votes.unknown[part], votes.weight)


def _ends(votes: Votes) -> tuple[Tensor, Tensor]:
    """The least and the most that every score can be, float32; the same tensor where all are known."""
    scores = votes.scores.float()
    if votes.unknown is None or not bool(votes.unknown.any()):
        return scores, scores
    most = torch.ones_like(scores) if votes.weight is None else votes.weight.to(scores).expand_as(scores)
    return scores.masked_fill(votes.unknown, 0), torch.where(votes.unknown, most, scores)


def _prove(votes: Votes, answer: Tensor, rows: Axis, columns: Axis, budget: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    least, most = _ends(votes)
    size = _sizes(votes, rows, columns)  # [P, Q], the largest sum of scores in each location
    own, all_own = _of(least, answer), _of(least.sum(dim=(2, 3)), answer)  # [B, 1, N, M], [B, 1]
    lead = all_own - most.sum(dim=(2, 3))  # [B, K], S_y - S_j
    if method == "3.3":
        largest, where = size.flatten().max(dim=0)
        margin, worst = lead - 2 * budget * largest, where.expand_as(lead)
    else:
        loss = _losses(own, most, size, rows, columns)  # [B, K, P * Q]
        if budget == 1:
            taken, worst = loss.max(dim=2)
        else:
            several = loss.topk(min(budget, loss.shape[2]), dim=2)
            taken, worst = several.values.sum(dim=2), several.indices[:, :, 0]
        margin = lead - taken
    if method == "exact":
        margin = margin + (answer[:, None] < torch.arange(margin.shape[1], device=margin.device)).to(margin)
    margin = margin.scatter(1, answer[:, None], float("inf"))
    smallest, rival = margin.min(dim=1)
    return smallest, worst.gather(1, rival[:, None])[:, 0], rival


def _sizes(votes: Votes, rows: Axis, columns: Axis) -> Tensor:
    scores = votes.scores
    weight = torch.ones(scores.shape[2:], device=scores.device) if votes.weight is None else votes.weight.float()
    if float(weight.sum()) >= LARGEST_SUM:
        raise ValueError("weights too large for exact sums in float32")
    return box_sums(weight, rows, columns)


def _losses(own: Tensor, most: Tensor, size: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """``sum_{i in A(L)} (w_i + s_iy - s_ij)`` for every rival and location: [B, K, P * Q]."""
    boxes = box_sums(most, rows, columns)
    base = size + box_sums(own, rows, columns)
    return (base - boxes).flatten(2)


def _of(values: Tensor, answer: Tensor) -> Tensor:
    """The entries [B, 1, ...] of values [B, K, ...] at the class int64 [B]."""
    index = answer.reshape(-1, *([1] * (values.ndim - 1))).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index)


def margin_map(votes: Votes, cover: Cover) -> Tensor:
    """The smallest margin over rivals at every location, budget 1, float64 [B, P, Q]; see the theorem."""
    maps = []
    for part in _chunks(votes, max(1, CHUNK // max(1, votes.scores[:1].numel()))):
        answer = part.answer()
        least, most = _ends(part)
        loss = _losses(_of(least, answer), most, _sizes(part, cover.rows, cover.columns), cover.rows, cover.columns)
        lead = _of(least.sum(dim=(2, 3)), answer) - most.sum(dim=(2, 3))
        credit = (answer[:, None] < torch.arange(lead.shape[1], device=lead.device)).to(lead)
        margin = (lead + credit)[:, :, None] - loss
        margin.scatter_(1, answer[:, None, None].expand(-1, 1, margin.shape[2]), float("inf"))
        maps.append(margin.amin(dim=1).reshape(len(answer), len(cover.rows.touched), len(cover.columns.touched)))
    return torch.cat(maps).double()


def prove_aggregate(votes: Votes, cover: Cover, aggregate: Aggregate) -> Proof:
    """Condition 3.1: the worst case of any aggregation that is monotone in every score, one location after another.

    ``aggregate`` maps scores float64 [..., N, M] of one class to its class score [...]; the answer is the class of the largest,
    the lowest index among equals, and the margin ``g_y - g_j`` must be positive.
    """
    if cover.budget != 1:
        raise ValueError("condition 3.1 is for one location")
    least, most = (part.double() for part in _ends(votes))
    weight = least.new_ones(least.shape[2:]) if votes.weight is None else votes.weight.double()
    total = aggregate(votes.scores.double())
    answer = (total == total.amax(dim=1, keepdim=True)).int().argmax(dim=1)
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
            lower = margin < smallest
            smallest = torch.where(lower, margin, smallest)
            worst = torch.where(lower, torch.full_like(worst, p * len(cover.columns.touched) + q), worst)
            rival = torch.where(lower, who, rival)
    return Proof(smallest, worst, rival)
