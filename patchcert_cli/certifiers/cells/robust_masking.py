"""Robust masking: every class loses its heaviest window of evidence before classes are compared.

PatchGuard (Xiang et al., PatchGuard: A Provably Robust Defense against Adversarial Patches via Small Receptive Fields and
Masking, USENIX Security 2021). Few cells see a patch, so whatever they claim without bound for a class lies in one window,
and the window that is taken away from the class holds at least as much.

Shapes: B images, K classes, N x M cells, P x Q locations of the attacker, R x S masks: the windows of h x w cells wholly inside
the map. Cell i gives class c the evidence ``u_ic >= 0``, a whole number. For a set X of cells, ``U_c(X)`` is the sum of u_ic over
X, S_c that of all cells, and H_c the largest ``U_c(m)`` of a mask m. With a share T in [0, 1), class c is left

    r_c = S_c - H_c if H_c > T S_c, else S_c,

and the answer y is the class of the largest r, the lowest index among equals. The published default is T = 0.

**Theorem.** An attacker at a freely chosen location L replaces the evidence of the cells A = A(L) by any whole numbers >= 0. Let

    low(L)    = U_y(outside A) - max_m U_y(m without A)
    high_j(L) = min over masks m that hold all of A of U_j(outside m),  infinite where no mask does.

For T = 0 the attacker cannot change the answer iff ``low(L) - high_j(L) + [y < j] > 0`` for every L and every j != y.
Proof: for T = 0, r_c is the minimum over masks m of U'_c(outside m), since S_c = 0 where H_c = 0, and it never falls when
evidence grows. So r_y is smallest with zeros in A, where it is low(L). A mask that holds A leaves nothing of the attacker's, so
r_j <= high_j(L), and with every cell of A large enough this is attained, since all other masks leave one of them. Classes have
evidence of their own, so both can be had at once. The answer stays y against j iff r_y > r_j, or r_y = r_j and y < j; all
numbers are whole.

**T > 0.** Write R for ``U_y(outside A)``. The condition above is sufficient with

    low(L)    = R - max_m U_y(m without A)  if that maximum exceeds T R, else R - the same maximum over masks that meet A
    high_j(L) = the whole part of 1 / (1 - T) times the above.

Proof: let the attacker give y the sum a >= 0 inside A. A mask m has U'_y(m) <= U_y(m without A) + a, so if the heaviest is taken
    away,
r_y >= R - max_m U_y(m without A). Let this maximum be at most T R. A heaviest mask that does not meet A has at most T R <= T S'_y
and is not taken away, so if one is, it meets A. If none is, r_y = R + a >= R. For class j, let m hold A. If the heaviest mask
is taken away, r_j <= U_j(outside m) as before. Else U'_j(m) <= H'_j <= T S'_j, and S'_j = U'_j(m) + U_j(outside m), so that
r_j = S'_j <= U_j(outside m) / (1 - T).
(Taking nothing away in the second case of low is not sound: what is added where A meets a heavy mask makes it exceed T, and the
mask goes. Linyi Li found this in the published code, which was then corrected.)

Where A is itself a mask, as for the patch that the masks are made for, these are the published conditions; smaller patches gain
from every mask that holds them. All sums are of whole numbers below 2^53, in int64 or float64: nothing is rounded, and no large
number of an attacker swallows a small one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from patchcert_cli.certifiers.cells.additive import Proof
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.layers.boxes import integral_image
from patchcert_cli.layers.precision import exact_arithmetic, first_largest

MOST = 2**26  # the largest evidence of a cell
FINEST = 1000  # the largest denominator of a share
CHUNK = 1 << 20  # pairs of locations and masks at a time


@dataclass(frozen=True)
class Masking:
    """What is taken away.

    Attributes:
        window: height and width of a mask, in cells.
        share: T, a fraction of thousandths; evidence is taken away where its heaviest window exceeds this share of the whole.
    """

    window: tuple[int, int]
    share: Fraction = Fraction(0)

    def __post_init__(self) -> None:
        if min(self.window) < 1 or not 0 <= self.share < 1 or self.share.denominator > FINEST:
            raise ValueError(f"no masking by windows {self.window} and a share of {self.share}")


def masked_sums(evidence: Tensor, masking: Masking) -> Tensor:
    """r, int64 [B, K], of evidence int64 [B, K, N, M]."""
    heaviest = _window_sums(evidence, masking.window).flatten(2).amax(dim=2)
    total = evidence.sum(dim=(2, 3))
    share = masking.share
    return total - torch.where(heaviest * share.denominator > total * share.numerator, heaviest, 0)


def answer(evidence: Tensor, masking: Masking) -> Tensor:
    """int64 [B], the class of the largest r, the lowest index among equals."""
    return first_largest(masked_sums(evidence, masking))


def prove(evidence: Tensor, masking: Masking, cover: CellCoverage) -> Proof:
    """The theorem for every image, location and class; a margin is -inf where no mask holds what a location touches.

    Args:
        evidence: whole numbers in [0, MOST], int64 [B, K, N, M].
        masking: what is taken away.
        cover: which cells each location touches, neighbours; budget 1.
    """
    keep = (cover.rows.distinct(), cover.columns.distinct())  # margins never grow with A
    chart, rival = _charts(
        evidence, masking, CellCoverage(cover.rows.select(keep[0]), cover.columns.select(keep[1]), cover.budget)
    )
    margin, worst = chart.flatten(1).min(dim=1)
    rival = rival.flatten(1).gather(1, worst[:, None])[:, 0]
    of_row, of_column = (torch.tensor(kept, device=worst.device) for kept in keep)  # numbers of the kept locations -> of all
    worst = of_row[worst // len(keep[1])] * len(cover.columns.touched) + of_column[worst % len(keep[1])]
    return Proof(answer(evidence, masking), margin, worst, rival)


def margin_map(evidence: Tensor, masking: Masking, cover: CellCoverage) -> Tensor:
    """The smallest margin over classes at every location, float64 [B, P, Q]; see :func:`prove`."""
    return _charts(evidence, masking, cover)[0]


@exact_arithmetic()
def forced(evidence: Tensor, masking: Masking, cover: CellCoverage) -> Tensor:
    """What can be forced at each location, bool [B, P * Q, K]: the answer, and every class that has no positive margin there.

    A class with a positive margin stays below y, so it is not the answer, whatever the others do. Of an image without a class
    that can be forced at any location, :func:`prove` has a positive margin, and the other way round.
    """
    parts = []
    for margins, label in _margins(evidence, masking, cover):
        own = label[:, None] == torch.arange(margins.shape[1], device=label.device)
        parts.append((~(margins > 0) | own[:, :, None, None]).flatten(2).transpose(1, 2))
    return torch.cat(parts)


@exact_arithmetic()
def _charts(evidence: Tensor, masking: Masking, cover: CellCoverage) -> tuple[Tensor, Tensor]:
    """Margin and runner-up at every location, float64 and int64 [B, P, Q]."""
    parts = []
    for margins, label in _margins(evidence, masking, cover):
        own = label[:, None] == torch.arange(margins.shape[1], device=label.device)
        parts.append(margins.masked_fill(own[:, :, None, None], float("inf")).min(dim=1))
    return torch.cat([margin for margin, _ in parts]), torch.cat([rival for _, rival in parts])


def _margins(evidence: Tensor, masking: Masking, cover: CellCoverage) -> Iterator[tuple[Tensor, Tensor]]:
    """``low - high_j + [y < j]`` of all classes at every location, float64 [b, K, P, Q], and y [b], a few images at a time."""
    if cover.budget != 1:
        raise ValueError("robust masking is for one location")
    if evidence.dtype != torch.int64:  # which cannot hold NaN
        raise ValueError(f"evidence of type {evidence.dtype}, not whole numbers in int64")
    cells, window = evidence.shape[2] * evidence.shape[3], masking.window
    if window[0] > evidence.shape[2] or window[1] > evidence.shape[3] or cells * MOST * FINEST >= 2**53:
        raise ValueError(f"no masks of {window} cells on a map of {tuple(evidence.shape[2:])}")
    pairs = len(cover.rows.touched) * (evidence.shape[2] + 1 - window[0]) * len(cover.columns.touched)
    for part in torch.split(evidence, max(1, CHUNK // (pairs * (evidence.shape[3] + 1 - window[1])))):
        label = answer(part, masking)
        own = part[torch.arange(len(part), device=part.device), label]  # [b, N, M]
        low = torch.cat(list(_lows(own, masking, cover)), dim=1)  # [b, P, Q]
        yield low[:, None] - _highs(part, label, masking, cover), label


def _window_sums(values: Tensor, window: tuple[int, int]) -> Tensor:
    """The sum of each window, [..., N, M] -> [..., R, S]."""
    height, width = window
    table = integral_image(values)
    bands = table[..., height:, :] - table[..., :-height, :]
    return bands[..., width:] - bands[..., :-width]


def _lows(own: Tensor, masking: Masking, cover: CellCoverage) -> Iterator[Tensor]:
    """low, float64 [b, p, Q], of some rows of locations after others, from the answer's evidence [b, N, M].

    Sums over what a location shares with a mask are products with 0/1 matrices, one along rows and one along columns.
    """
    own, share = own.double(), masking.share
    sums = _window_sums(own, masking.window)[:, None, :, None, :]  # [b, 1, R, 1, S]
    rows, columns = cover.rows.matrix().to(own), cover.columns.matrix().to(own)  # [P, N], [Q, M]
    tall, wide = _masks(cover.rows, masking.window[0]).to(own), _masks(cover.columns, masking.window[1]).to(own)  # [R, N], [S, M]
    across = (columns[:, None] * wide).flatten(0, 1).t()  # [M, Q * S]
    meets = (columns @ wide.t() > 0)[None, None]  # [1, 1, Q, S]
    size = max(1, CHUNK // max(1, across.shape[1] * len(tall) * len(own)))
    for some in torch.split(rows, size):
        down = (some[:, None] * tall).flatten(0, 1)  # [p * R, N]
        shared = (down @ own @ across).reshape(len(own), len(some), len(tall), len(columns), len(wide))
        rest = sums - shared  # U_y(m without A), [b, p, R, Q, S]
        most = rest.amax(dim=4).amax(dim=2)
        outside = own.sum(dim=(1, 2))[:, None, None] - some @ own @ columns.t()  # R, [b, p, Q]
        if share > 0:
            apart = ~((some @ tall.t() > 0)[:, :, None, None] & meets)  # [p, R, Q, S]
            near = rest.masked_fill(apart, 0).amax(dim=4).amax(dim=2)
            most = torch.where(most * share.denominator > outside * share.numerator, most, near)
        yield outside - most


def _highs(evidence: Tensor, label: Tensor, masking: Masking, cover: CellCoverage) -> Tensor:
    """``high_j - [y < j]`` of all classes j, float64 [b, K, P, Q] with inf."""
    held = _window_sums(evidence, masking.window)  # [b, K, R, S]
    heaviest = held.amax(dim=(2, 3), keepdim=True)
    for dim, axis, side in ((2, cover.rows, masking.window[0]), (3, cover.columns, masking.window[1])):
        lines = [held.narrow(dim, first, count).amax(dim=dim) if count else None for first, count in _holding(axis, side)]
        none = held.narrow(dim, 0, 1).squeeze(dim) * 0 - 1  # evidence is never negative
        held = torch.stack([none if line is None else line for line in lines], dim=dim)
    (top, bottom), (first, last) = (_spans(axis, evidence.device) for axis in (cover.rows, cover.columns))
    held = torch.where((top < bottom)[:, None] & (first < last), held, heaviest)  # no cell at all is held by every mask
    high, share = evidence.sum(dim=(2, 3))[:, :, None, None] - held, masking.share
    if share > 0:
        high = high * share.denominator // (share.denominator - share.numerator)
    classes = torch.arange(evidence.shape[1], device=evidence.device)
    return (high - (label[:, None] < classes).long()[:, :, None, None]).double().masked_fill(held < 0, float("inf"))


def _spans(axis: Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """Half-open ranges of the cells that each start touches, int64 [P] each; equal ends where there are none."""
    ranges = [(cells[0], cells[-1] + 1) if cells else (0, 0) for cells in axis.touched]
    if any(stop - first != len(cells) for (first, stop), cells in zip(ranges, axis.touched, strict=True)):
        raise ValueError("robust masking needs locations that touch neighbouring cells")
    first, stop = torch.tensor(ranges, device=device).reshape(-1, 2).unbind(dim=1)
    return first, stop


def _masks(axis: Axis, side: int) -> Tensor:
    """bool [R, N], which cells lie in each mask."""
    first, cell = torch.arange(axis.cells + 1 - side)[:, None], torch.arange(axis.cells)
    return (cell >= first) & (cell < first + side)


def _holding(axis: Axis, side: int) -> list[tuple[int, int]]:
    """The first mask that holds all cells of each start, and how many in a row do."""
    ranges = [(max(0, cells[-1] + 1 - side), min(cells[0], axis.cells - side)) if cells else (0, 0) for cells in axis.touched]
    return [(first, max(0, last - first + 1)) for first, last in ranges]
