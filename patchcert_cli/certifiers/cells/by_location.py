"""Cells that vote: what an attacker can force at one location, and whether a class stays among the first few.

Shapes and names: :mod:`patchcert_cli.certifiers.cells.additive`. A = P * Q locations, counted row by row.

**Ranges.** An attacker who owns location L chooses the scores of the cells in A(L), each in [0, w_i]; the others stay. So the
sum of class c can be any whole number from ``low_c(L) = sum of s_ic outside A(L)`` to ``high_c(L) = low_c(L) + w(A(L))``. A
score that rounding may have decided is the attacker's too: in low it counts as 0, in high as w_i.

**What can be forced.** An attacker at L can cause the answer j only if high_j(L) beats low_i(L) for every i != j: it is larger,
or equal and j < i. Proof: j is the answer only if its sum, at most high_j, beats every other sum, at least low_i. The condition
is also sufficient where no score is in doubt, since the attacker can give j all of A(L) and the others nothing, whether or not
a cell votes for exactly one class. An image is certified by the exact proof of one location iff the answer is alone in every
set. Proof: let j beat y in this sense at L, and let i have the largest high_i(L), of equals the lowest index, among the classes
besides y. Then i beats y as well, and high_i >= high_c >= low_c for all others, with the lower index where all are equal: i can
be forced. The converse is plain.

**The first k classes** (top-k certificates: CostCert). Class y is lost from the first k iff at least k classes beat it. Let
``need_j = max(0, low_y(L) - S_j(outside A(L)) + [y < j])``, the votes that class j must get at L to beat y, which gets none.

- Independent scores (a cell may give all classes w_i at once): y can be lost at L iff the k-th smallest need is at most
  w(A(L)).
- One vote for each cell (``one_hot``, w_i = 1): y can be lost at L iff the sum of the k smallest needs is at most |A(L)|.

Proof: taking votes from y never helps y, so y gets none in A(L). Then j beats y iff it gets need_j votes there. Independent
scores give every class w(A(L)). Single votes are divided among the classes: k of them can be served iff the k cheapest can, and
votes that are left go to one of the k.

**Several locations.** The condition on independent scores holds with m_j of the budget in :mod:`additive`, for all j at once: y
is lost only if k classes have m_j <= 0. For single votes also: y loses at most Y, the sum of the largest numbers of its votes
in ``budget`` locations, the attacker has at most R votes, the sum of the largest |A(L)|, and j has at most S_j + its share of
R. So y is lost only if the k smallest of ``max(0, S_y - Y - S_j + [y < j])`` add up to at most R. Both are sufficient for y to
stay, and the better one counts. (The second is exact if every location is a cell of its own, no cell in two, and at least
``budget`` of them vote for y.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patchcert_cli.certifiers.cells.additive import CHUNK, Votes, extremes, in_chunks, location_sums, location_weights
from patchcert_cli.certifiers.geometry import CellCoverage
from patchcert_cli.layers.precision import exact_arithmetic, first_largest


@dataclass(frozen=True)
class Ranges:
    """What the sums of all classes can be while one location is the attacker's, whole numbers [b, K, A] each."""

    low: Tensor
    high: Tensor

    @classmethod
    def cat(cls, parts: Iterable[Ranges]) -> Ranges:
        """Join those of consecutive images."""
        lows, highs = zip(*((part.low, part.high) for part in parts), strict=True)
        return cls(torch.cat(lows), torch.cat(highs))

    def plus(self, other: Ranges, weight: int) -> Ranges:
        """The ranges of sums in which the other cells count ``weight`` times, float64: those of all cells together."""
        return Ranges(self.low.double() + weight * other.low.double(), self.high.double() + weight * other.high.double())

    def margins(self, answer: Tensor) -> Tensor:
        """``low_y(L) - high_j(L) + [y < j]`` of answers int64 [b], the m_j(L) of :mod:`additive`: float64 [b, A, K]."""
        own = self.low.gather(1, answer[:, None, None].expand(-1, 1, self.low.shape[2])).double()
        tie = answer[:, None] < torch.arange(self.low.shape[1], device=answer.device)
        return (own - self.high.double() + tie[:, :, None]).transpose(1, 2)


def ranges(votes: Votes, cover: CellCoverage) -> Iterator[Ranges]:
    """The ranges of the theorem, a few images at a time; to be used in exact arithmetic."""
    if cover.budget != 1:
        raise ValueError("ranges are for one location")
    classes, size = votes.scores.shape[1], location_weights(votes, cover.rows, cover.columns).flatten()
    for part in _few_images(votes, classes * len(size)):
        least, most = extremes(part)
        low = _outside(least, cover)
        yield Ranges(low, (low if most is least else _outside(most, cover)) + size)


def _few_images(votes: Votes, entries: int) -> Iterator[Votes]:
    """A few images at a time, of which ``entries`` numbers each fit into a chunk."""
    return in_chunks(votes, max(1, CHUNK // max(1, entries, votes.scores[:1].numel())))


def _outside(scores: Tensor, cover: CellCoverage) -> Tensor:
    """Sums over the cells that a location does not touch, [b, K, A]."""
    return scores.sum(dim=(2, 3))[:, :, None] - location_sums(scores, cover.rows, cover.columns).flatten(2)


def can_win(found: Ranges) -> Tensor:
    """Which classes may be the answer at each location, bool [b, A, K]; NaN rules nothing out."""
    most, first = found.low.amax(dim=1, keepdim=True), first_largest(found.low)[:, None]
    classes = torch.arange(found.low.shape[1], device=most.device)[None, :, None]
    lost = (found.high < most) | ((found.high == most) & (classes > first))
    return ~lost.transpose(1, 2)


@exact_arithmetic()
def forced(parts: Iterable[Ranges]) -> Tensor:
    """What can be forced at each location, bool [B, A, K], from the ranges of some images after others; see the theorem."""
    return torch.cat([can_win(part) for part in parts])


@dataclass(frozen=True)
class Ranking:
    """Whether classes stay among the first few.

    Attributes:
        ranking: int64 [B, k], the first k classes by their sums, of equals the lowest index first.
        margins: float64 [B, k], in votes; such a class stays among the first k if its margin is positive.
        worst: int64 [B], the number of the location where the first of them comes nearest to being lost.
        rival: int64 [B], of the k classes that come nearest to it there, the one that needs the most.
    """

    ranking: Tensor
    margins: Tensor
    worst: Tensor
    rival: Tensor

    @property
    def answer(self) -> Tensor:
        """int64 [B], the first class."""
        return self.ranking[:, 0]

    @property
    def margin(self) -> Tensor:
        """float64 [B], that of the first class."""
        return self.margins[:, 0]


@exact_arithmetic()
def prove_first(votes: Votes, cover: CellCoverage, top: int) -> Ranking:
    """Whether each of the first ``top`` classes stays among them, ``top`` less than K."""
    count = len(cover.rows.touched) * len(cover.columns.touched)
    parts = [_first(part, cover, top) for part in _few_images(votes, votes.scores.shape[1] * count)]
    return Ranking(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _first(votes: Votes, cover: CellCoverage, top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ranking = votes.sums().sort(dim=1, descending=True, stable=True).indices[:, :top]
    size = location_weights(votes, cover.rows, cover.columns).flatten()
    found = [_stay(votes, cover, size, ranking[:, place], top) for place in range(top)]
    margins = torch.stack([margin for margin, _, _ in found], dim=1)
    return ranking, margins.double(), found[0][1], found[0][2]


def _stay(votes: Votes, cover: CellCoverage, size: Tensor, label: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Margin, location and runner-up of one class ``label`` of each image, [b] each."""
    least, most = extremes(votes)
    image, classes = torch.arange(len(label), device=label.device), torch.arange(least.shape[1], device=label.device)
    own = least[image, label][:, None]  # [b, 1, N, M]
    tie, mine = label[:, None] < classes, label[:, None] == classes
    if cover.budget == 1:
        need = _outside(own, cover) - _outside(most, cover) + tie[:, :, None]  # [b, K, A]
        cost, rival = _cheapest(need.masked_fill(mine[:, :, None], float("inf")), top, add=votes.one_hot)
        margin, worst = (cost - size).min(dim=1)
        return margin, worst, rival.gather(1, worst[:, None])[:, 0]
    budget = min(cover.budget, len(size))
    inside = location_sums(own, cover.rows, cover.columns).flatten(2)  # [b, 1, A]
    gap = own.sum(dim=(2, 3)) - most.sum(dim=(2, 3)) + tie  # [b, K]
    loss = size + inside - location_sums(most, cover.rows, cover.columns).flatten(2)
    gone = gap - loss.topk(budget, dim=2).values.sum(dim=2)
    margin, rival = _cheapest(gone.masked_fill(mine, float("inf"))[:, :, None], top, add=False)
    if votes.one_hot:
        need = gap - inside.topk(budget, dim=2).values.sum(dim=2)
        cost, other = _cheapest(need.masked_fill(mine, float("inf"))[:, :, None], top, add=True)
        cost = cost - size.topk(budget).values.sum()
        margin, rival = torch.maximum(margin, cost), torch.where(cost > margin, other, rival)
    return margin[:, 0], inside[:, 0].argmax(dim=1), rival[:, 0]


def _cheapest(need: Tensor, top: int, *, add: bool) -> tuple[Tensor, Tensor]:
    """The ``top``-th smallest need over classes, or with ``add`` the sum of the ``top`` smallest, none below 0.

    Args:
        need: [b, K, A]; if one of them is NaN, so is the result.

    Returns: float64 [b, A], and int64 [b, A], the class of the largest of these needs.
    """
    left, cost = need.clone(), torch.zeros_like(need[:, 0], dtype=torch.float64)
    for _ in range(top):
        lowest, rival = left.min(dim=1)
        cost = cost + lowest.clamp(min=0) if add else lowest.double()
        left.scatter_(1, rival[:, None], float("inf"))
    return cost.masked_fill(need.isnan().any(dim=1), float("nan")), rival
