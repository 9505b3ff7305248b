"""Sums of the k largest gains of a dense layer, for every image and neuron, without sorting them.

Shapes: B images, N neurons, C channels, P pixels (or single values, then C = 1).

Changing pixel p of image b to anything in [0, 1] raises neuron n by at most ``gain = sum_c max(w (1 - x), -w x)``, which is
``sum_c max(w, 0) - w x``, and lowers it by at most ``loss = sum_c |w| - gain``. Neither exceeds the reach ``sum_c |w|``.

**Claim.** Visit the pixels of a neuron in the order of falling reach and keep the k largest gains seen. Once the smallest kept
gain is at least the reach of the next pixel, no later pixel can enter, so the kept ones are the k largest of all. All images
and neurons are visited together, one pixel rank at a time, and a neuron leaves when every image is settled. Keeping k sorted
values takes k maxima and minima a visit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SETTLE_EVERY = 8  # visits between two checks of which neurons are settled


def largest_gains(weight: Tensor, x: Tensor, k: int, *, topk_limit: int = 0) -> tuple[Tensor, Tensor]:
    """Sums of the k largest gains and of the k largest losses, [B, N] each, with gradient in ``weight`` only.

    Args:
        weight: [N, C, P], with respect to pixels in [0, 1].
        x: [B, C, P] in [0, 1].
        k: how many pixels may change; more than P means all.
        topk_limit: look at no more pixels per neuron than this, those of the largest reach; 0 is all. For training: a bound that
            has not looked at all of them is none.
    """
    up, down = _LargestGains.apply(weight, x, min(k, weight.shape[2]), topk_limit)
    return up, down


@dataclass(frozen=True)
class _Visit:
    """The pixel at one rank of each open neuron's order; U neurons are open."""

    pixel: Tensor  # int64 [U]
    weight: Tensor  # [U, C]
    x: list[Tensor]  # per channel [U, B]
    gain: Tensor  # [U, B]
    loss: Tensor  # [U, B]


class _Order:
    """Pixels of each neuron by falling largest change, found in pieces so that settled neurons cost no sorting."""

    def __init__(self, weight: Tensor, k: int) -> None:
        self.weight, self.pixels = weight, weight.shape[2]
        self.patch_windows = weight.abs().sum(dim=1)  # [N, P]
        self.count = min(self.pixels, 6 * k + 32)
        self.sorted, self.order = self.patch_windows.topk(self.count, dim=1)

    def extend(self) -> None:
        """Sort the rest after the first piece: called only if a neuron needs more than that."""
        if self.count < self.pixels:
            left = self.patch_windows.scatter(1, self.order, -1.0)  # equal reaches must not be taken twice, nor missed
            reach, order = left.topk(self.pixels - self.count, dim=1)
            self.sorted, self.order = torch.cat([self.sorted, reach], dim=1), torch.cat([self.order, order], dim=1)
            self.count = self.pixels

    def next_reach(self, rank: int, neurons: Tensor | None) -> Tensor:
        """PatchWindows of the pixel at ``rank``: [U]."""
        if rank >= self.count:
            self.extend()
        column = self.sorted[:, rank]
        return column if neurons is None else column[neurons]


def _visit(order: _Order, columns: Tensor, rank: int, neurons: Tensor | None) -> _Visit:
    if rank >= order.count:
        order.extend()
    pixel = order.order[:, rank] if neurons is None else order.order[neurons, rank]
    rows = order.weight if neurons is None else order.weight[neurons]
    weight = rows.gather(2, pixel[:, None, None].expand(-1, rows.shape[1], 1))[:, :, 0]  # [U, C]
    x = [channel.index_select(0, pixel) for channel in columns]  # [U, B] each
    gain: Tensor | None = None
    for channel, seen in enumerate(x):
        w = weight[:, channel, None]
        part = torch.addcmul(w.clamp(min=0), w, seen, value=-1)
        gain = part if gain is None else gain.add_(part)
    assert gain is not None
    loss = weight.abs().sum(dim=1, keepdim=True) - gain
    return _Visit(pixel, weight, x, gain, loss)


class _Largest:
    """The k largest values seen per entry, sorted: k tensors [U, B], largest first."""

    def __init__(self, k: int, like: Tensor) -> None:
        self.kept = [torch.full_like(like, float("-inf")) for _ in range(k)]
        self.spare = torch.empty_like(like)

    def insert(self, value: Tensor) -> None:
        """Take one more value per entry; ``value`` is used up."""
        for slot, kept in enumerate(self.kept):
            torch.maximum(kept, value, out=self.spare)
            torch.minimum(kept, value, out=value)
            self.kept[slot], self.spare = self.spare, kept

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        self.kept = [kept[rows] for kept in self.kept]
        self.spare = torch.empty_like(self.kept[0])


class _LargestGains(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, k: int, topk_limit: int) -> tuple[Tensor, Tensor]:
        order, columns = _Order(weight, k), x.permute(1, 2, 0).contiguous()
        neurons, images = weight.shape[0], x.shape[0]
        sums = weight.new_zeros(2, neurons, images)
        least = weight.new_zeros(2, neurons, images)  # the k-th largest: what belongs to the sum is at least this
        like = weight.new_empty(neurons, images)
        best = (_Largest(k, like), _Largest(k, like))
        open_: Tensor | None = None
        ranks: list[Tensor | None] = []

        def close(rows: Tensor, which: Tensor) -> None:
            for side in (0, 1):
                kept = best[side].kept
                sums[side][which] = torch.stack([value[rows] for value in kept]).sum(dim=0)
                least[side][which] = kept[-1][rows]

        every = torch.arange(neurons, device=weight.device)
        for rank in range(order.pixels):
            visit = _visit(order, columns, rank, open_)
            ranks.append(open_)
            best[0].insert(visit.gain)
            best[1].insert(visit.loss)
            last = rank + 1 in (order.pixels, topk_limit)
            if last or (rank + 1 >= k and (rank + 1) % SETTLE_EVERY == 0):
                names = every if open_ is None else open_
                if last:
                    settled = torch.ones_like(names, dtype=torch.bool)
                else:
                    smallest = torch.minimum(best[0].kept[-1], best[1].kept[-1]).amin(dim=1)
                    settled = smallest >= order.next_reach(rank + 1, open_)
                if bool(settled.any()):
                    close(settled.nonzero()[:, 0], names[settled])
                    rest = (~settled).nonzero()[:, 0]
                    if not len(rest):
                        break
                    open_ = names[rest]
                    best[0].keep(rest)
                    best[1].keep(rest)
        ctx.save_for_backward(weight, least)
        ctx.order, ctx.columns, ctx.ranks = order, columns, ranks
        return sums[0].t(), sums[1].t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """``d gain / d w = [w > 0] - x`` and ``d loss / d w = x - [w < 0]`` on the pixels that entered the sums."""
        weight, least = ctx.saved_tensors
        outer = torch.stack([grad.t() for grad in grads])  # [2, N, B]
        zero, result = weight.new_zeros(()), torch.zeros_like(weight)
        names = torch.arange(weight.shape[0], device=weight.device)
        before: Tensor | None = None
        for rank, neurons in enumerate(ctx.ranks):
            if neurons is not before:  # some neurons have settled since
                rows = neurons if before is None else torch.isin(before, neurons).nonzero()[:, 0]
                least, outer, names, before = least[:, rows], outer[:, rows], neurons, neurons
            visit = _visit(ctx.order, ctx.columns, rank, neurons)
            gained = torch.where(visit.gain >= least[0], outer[0], zero)  # [U, B]
            lost = torch.where(visit.loss >= least[1], outer[1], zero)
            raised, lowered, net = gained.sum(dim=1), lost.sum(dim=1), lost.sub_(gained)
            for channel, seen in enumerate(visit.x):
                w = visit.weight[:, channel]
                result[names, channel, visit.pixel] += (w > 0) * raised - (w < 0) * lowered + net.mul(seen).sum(dim=1)
        return result, None, None, None
