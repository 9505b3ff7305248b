"""Interval bounds under a patch, computed only where the patch can have an effect.

Shapes: B images, N pairs (image, location), maps of C channels and H x W cells, windows [N, h, w, C], channels last, F features.

**Theorem.** Let c be the clean activations before a layer, and let the box of location L be c outside the window that L
reaches (:mod:`patch_windows`), and inside it ``c + d - r`` to ``c + d + r``: d is the *deviation* of the box's middle from the
clean value, r its radius, both 0 outside the window. Then interval arithmetic (:func:`rules.box`) gives the same form after the
layer:

* affine ``W v + b`` (linear, convolution, average pooling, normalization): the clean value is ``W c + b``, the deviation ``W d``
  and the radius ``|W| r``: sums over the window alone;
* ReLU and max pooling, entry by entry on the ends of the box, which outside the window both are the clean value.

So the clean activations are computed once per image, every location costs what its windows cost, and the bounds equal those of a
boxed copy of the image per location in exact arithmetic. Where a layer joins all cells (the first dense layer), the deviation
enters through the columns of the window, and from there on bounds go on as vectors. Other layers get whole maps, filled in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.rules import Box, box, channel_affine, ordered
from patchcert_cli.certifiers.bounds.windows.partition import Partition
from patchcert_cli.certifiers.bounds.windows.patch_windows import PatchWindows, WindowBatch, is_sliding
from patchcert_cli.certifiers.bounds.windows.products import convolve, convolve_maps, is_plain, on_each_group, widened
from patchcert_cli.layers.supported_layers import IDENTITY
from patchcert_cli.threats import Patch

UNFOLDED = 16  # images whose maps are unfolded at a time
LONG = 32  # fewer pairs at one location take as long as this many in the first dense layer


@dataclass(frozen=True)
class DeviationBox:
    """The box of each pair: deviation [N, h, w, C], radius likewise or [1, h, w, C]; both count from the clean activations.

    ``closed``: what the windows have outside of their maps is 0.
    """

    deviation: Tensor
    radius: Tensor
    closed: bool = True

    def close(self, batch: WindowBatch, t: int) -> DeviationBox:
        """With 0 outside of the maps."""
        outside = batch.outside(t)
        if self.closed or not len(outside):
            return DeviationBox(self.deviation, self.radius)
        both = self.deviation, self.radius.expand_as(self.deviation)
        deviation, radius = (v.flatten(0, 2).index_fill(0, outside, 0).reshape(v.shape) for v in both)
        return DeviationBox(deviation, radius)


class Windows:
    """Bounds of some images' activations after ``layers``, at any location of a patch.

    Args:
        layers: in eval mode, for images [B, C, H, W] in [0, 1].
        epsilon: touched pixels move at most this fraction of their way to 0 or 1.
        clip: end windows at the borders of their maps. That is the least work, but makes classes of windows of many sizes;
            without it, all are of one size, and pairs (image, location) may be mixed at will.
        watch: keep, for each ReLU, the largest input over all locations that :meth:`everywhere` was asked for.

    Attributes:
        highest: those inputs, [B, H, W, C] or [B, F], by the layer's position.
    """

    def __init__(
        self, layers: list[nn.Module], x: Tensor, patch: Patch, epsilon: float, *, clip: bool, watch: bool = False
    ) -> None:
        self.x, self.epsilon, self.clip = x, epsilon, clip
        self.partition = Partition.of(layers, x[:1])
        self.patch_windows = PatchWindows(self.partition.path, (x.shape[2], x.shape[3]), patch, clip=clip)
        self.clean = [x.contiguous(memory_format=torch.channels_last)]  # before each inner layer, and after the last
        for layer in self.partition.inner:
            self.clean.append(self._clean(layer, self.clean[-1]))
        self.highest: dict[int, Tensor] | None = {} if watch else None
        self._memory: dict[str, Tensor] = {}

    def _clean(self, layer: nn.Module, v: Tensor) -> Tensor:
        """Clean activations after a layer; without gradient by plain matrix products, whose rounding errors are smaller."""
        if torch.is_grad_enabled() or not isinstance(layer, nn.Conv2d) or not is_plain(layer, v.device):
            clean: Tensor = layer(v)
            return clean
        maps = v.permute(0, 2, 3, 1).contiguous()
        parts = [convolve_maps(layer, self._weights[layer][0], part) for part in torch.split(maps, UNFOLDED)]
        return torch.cat(parts).permute(0, 3, 1, 2)

    def widest(self, together: int) -> int:
        """Entries of a pair's largest tensor, if ``together`` pairs share a location."""
        maps = [self.clean[0], *(self.clean[at + 1] for at, layer in enumerate(self.partition.inner) if is_sliding(layer))]
        cells: list[int] = torch.stack([axis.length.amax(dim=1) for axis in self.patch_windows.axes]).prod(dim=0).tolist()
        largest = max(v.shape[1] * count for v, count in zip(maps, cells, strict=True))
        window = self.partition.shape[0] * cells[-1]
        return largest if self._in_runs(1, together, window) else max(largest, math.prod(self.partition.shape))

    def _in_runs(self, runs: int, pairs: int, window: int) -> bool:
        """Whether ``runs`` products with a window's columns beat one product with all of them, for the first dense layer."""
        if (
            self.partition.dense_entry is None or torch.is_grad_enabled()
        ):  # the gradient of a part of a weight is as large as the weight
            return False
        return runs * max(pairs // max(runs, 1), LONG) * window <= pairs * math.prod(self.partition.shape)

    def everywhere(self, location: Tensor) -> Box:
        """As :meth:`bounds` for every image at every ``location`` [L]; images vary fastest."""
        owner = torch.arange(len(self.x), device=self.x.device)
        return self._bounds(owner.repeat(len(location)), location.repeat_interleave(len(self.x)))

    def bounds(self, owner: Tensor, location: Tensor) -> Box:
        """Lower and upper activations after the last layer, [N, ...], of images ``owner`` at ``location``, int64 [N] each.

        All locations must belong to one of the classes of :meth:`PatchWindows.classes`; :meth:`PatchWindows.order` is the best
        order.
        """
        assert self.highest is None, "only everywhere() knows which pairs to compare"
        return self._bounds(owner, location)

    def _bounds(self, owner: Tensor, location: Tensor) -> Box:
        batch = self.patch_windows.batch(owner, location)
        field, t = self._pixels(batch), 0
        for at, layer in enumerate(self.partition.inner):
            if isinstance(layer, nn.ReLU):
                field = self._rectify(field, at, batch, t)
            elif (affine := channel_affine(layer)) is not None:
                field = DeviationBox(field.deviation * affine[0], field.radius * affine[0].abs(), field.closed)
            elif not isinstance(layer, IDENTITY):
                field = self._slide(layer, field.close(batch, t), at, batch, t)
                t += 1
        field = field.close(batch, t)
        found = self._fill(field, batch) if self.partition.dense_entry is None else self._enter(field, batch)
        for at, layer in enumerate(self.partition.tail, len(self.partition.layers) - len(self.partition.tail)):
            if isinstance(layer, nn.ReLU) and self.highest is not None:
                upper = found[1].reshape(-1, len(self.x), *found[1].shape[1:]).amax(dim=0)
                self.highest[at] = torch.maximum(self.highest[at], upper) if at in self.highest else upper
            found = box(layer, found)
        return ordered(found)

    def _pixels(self, batch: WindowBatch) -> DeviationBox:
        """What the attacker may do: entries move at most ``epsilon`` of their way to 0 or 1."""
        pixels = self._gather(0, batch.cells(0), "pixels")
        return DeviationBox((0.5 - pixels) * self.epsilon, torch.full_like(pixels[:1], self.epsilon / 2))

    def _watch(self, at: int, upper: Tensor, batch: WindowBatch, t: int) -> None:
        """Take note of the upper ends [N, h, w, C] of :meth:`everywhere` before layer ``at``."""
        assert self.highest is not None
        if at not in self.highest:
            self.highest[at] = self.clean[at].permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        images, whole = len(self.x), self.highest[at]
        for start, (top, left) in zip(range(0, len(upper), images), batch.first[:, t, ::images].t().tolist(), strict=True):
            part = whole[:, max(top, 0) : top + upper.shape[1], max(left, 0) : left + upper.shape[2]]
            inside = upper[start : start + images, max(-top, 0) :, max(-left, 0) :]
            torch.maximum(part, inside[:, : part.shape[1], : part.shape[2]], out=part)

    def _room(self, name: str, *shape: int) -> Tensor | None:
        """Memory that is used again and again: what ``name`` held before is lost. None where a gradient may need it."""
        if torch.is_grad_enabled():
            return None
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = self.x.new_empty(size)
        return self._memory[name][:size].view(shape)

    def _rows(self, at: int) -> Tensor:
        """Clean activations before layer ``at`` as rows, one for each cell of each image: [B*H*W, C]."""
        return self.clean[at].permute(0, 2, 3, 1).reshape(-1, self.clean[at].shape[1])

    def _gather(self, at: int, cells: Tensor, name: str) -> Tensor:
        """Clean activations of ``cells`` [N, h, w]: [N, h, w, C]."""
        rows = self._rows(at)
        out = self._room(name, cells.numel(), rows.shape[1])
        return torch.index_select(rows, 0, cells.flatten(), out=out).reshape(*cells.shape, rows.shape[1])

    def _rectify(self, field: DeviationBox, at: int, batch: WindowBatch, t: int) -> DeviationBox:
        """After a ReLU. Outside its map a window's clean value is taken as minus infinity, so that it is 0 there again."""
        cells, outside, deviation, radius = batch.cells(t), batch.outside(t), field.deviation, field.radius
        if torch.is_grad_enabled():
            return DeviationBox(*_Rectified.apply(deviation, radius, self._rows(at), cells, outside))
        clean = self._gather(at, cells, "clean")
        clean.view(-1, clean.shape[3]).index_fill_(0, outside, float("-inf"))
        middle = deviation.add_(clean)
        lower = torch.sub(middle, radius, out=self._room("lower", *middle.shape)).relu_()
        upper = torch.add(middle, radius, out=self._room("upper", *middle.shape))
        if self.highest is not None:
            self._watch(at, upper, batch, t)
        middle = torch.lerp(lower, upper.relu_(), 0.5, out=lower)
        return DeviationBox(torch.sub(middle, clean.relu_(), out=deviation), torch.sub(upper, middle, out=upper))

    @cached_property
    def _weights(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Weight and its magnitude of each convolution, [C', kh, kw, C/groups], and of the next dense layer, [F, H, W, C]."""
        found: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for layer in (*self.partition.inner, self.partition.dense_entry):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                shape = self.partition.shape if isinstance(layer, nn.Linear) else layer.weight.shape[1:]
                weight = layer.weight.reshape(-1, *shape).permute(0, 2, 3, 1).contiguous()
                found[layer] = weight, weight.abs()
        return found

    def _slide(self, layer: nn.Module, field: DeviationBox, at: int, batch: WindowBatch, t: int) -> DeviationBox:
        """After a convolution or pooling, whose input is 0 outside of the maps; ``t`` counts such layers."""
        size, groups, path = batch.sizes[t + 1], batch.groups[t], self.partition.path[t]
        deviation, radius = field.deviation, field.radius
        if len(radius) != len(deviation) and (len(groups) > 1 or isinstance(layer, nn.MaxPool2d)):
            radius = radius.expand_as(deviation)
        if isinstance(layer, nn.MaxPool2d):
            return self._largest(layer, DeviationBox(deviation, radius), at, batch, t)
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            cells = path[0].kernel * path[1].kernel
            parts = [v.sum(dim=(1, 2), keepdim=True)[:, : size[0], : size[1]] / cells for v in (deviation, radius)]
            return DeviationBox(parts[0], parts[1])
        if isinstance(layer, nn.AvgPool2d):

            def average(seen: Tensor) -> Tensor:
                return F.avg_pool2d(seen, layer.kernel_size, layer.stride, divisor_override=layer.divisor_override)

            parts = [on_each_group(average, v, groups, path, size, v.shape[3]) for v in (deviation, radius)]
            return DeviationBox(parts[0], parts[1], closed=self.clip)
        assert isinstance(layer, nn.Conv2d)
        parts = []
        for name, weight, v in zip(("deviation", "radius"), self._weights[layer], (deviation, radius), strict=True):
            room = self._room(f"{name} {t % 2}", len(v), *size, len(weight))
            parts.append(convolve(layer, weight, v, groups, path, size, room))
        return DeviationBox(parts[0], parts[1], closed=self.clip)

    def _largest(self, layer: nn.MaxPool2d, field: DeviationBox, at: int, batch: WindowBatch, t: int) -> DeviationBox:
        """After max pooling: the ends of the box need all that the outputs see, and padding is minus infinity."""
        size, path, parts = batch.sizes[t + 1], self.partition.path[t], []
        channels = field.deviation.shape[3]
        for group in batch.groups[t] if 0 not in size else ():
            rows, columns = group.margins(batch.sizes[t], path, size)
            some = batch.some(group.pairs)
            clean = self._gather(at, some.cells(t, (*rows, *columns)), "clean")
            clean = clean.flatten(0, 2).index_fill(0, some.outside(t, (*rows, *columns)), float("-inf")).reshape(clean.shape)
            middle = clean + widened(field.deviation[group.pairs], rows, columns)
            radius = widened(field.radius[group.pairs], rows, columns)
            lower, upper = (
                F.max_pool2d(v.permute(0, 3, 1, 2), layer.kernel_size, layer.stride, 0, layer.dilation).permute(0, 2, 3, 1)
                for v in (middle - radius, middle + radius)
            )
            middle = torch.lerp(lower, upper, 0.5)
            clean = self._gather(at + 1, some.cells(t + 1), "clean")
            parts.append((middle - clean, upper - middle))
        none = field.deviation.new_zeros(len(batch.owner), *size, channels)
        deviation, radius = (torch.cat(part) for part in zip(*parts, strict=True)) if parts else (none, none)
        return DeviationBox(deviation, radius, closed=False).close(batch, t + 1)  # at once: outside of the map they are NaN

    @cached_property
    def _dense(self) -> Tensor:
        """Clean activations after the first dense layer, [B, F]."""
        assert self.partition.dense_entry is not None
        features: Tensor = self.partition.dense_entry(self.clean[-1].flatten(1))
        return features

    def _enter(self, field: DeviationBox, batch: WindowBatch) -> Box:
        """Lower and upper features after the first dense layer, [N, F] each."""
        assert self.partition.dense_entry is not None
        fields = (field.deviation, field.radius.expand_as(field.deviation))
        clean, runs = self._dense.index_select(0, batch.owner), batch.aligned_runs()
        if self._in_runs(len(runs), len(clean), field.deviation[0].numel()):
            sums = (clean, torch.zeros_like(clean))
            for total, v, weight in zip(sums, fields, self._weights[self.partition.dense_entry], strict=True):
                for pairs, rows, columns in runs:
                    for i, row in rows:
                        part = weight[:, row, columns[1]].flatten(1)
                        total[pairs].addmm_(v[pairs, i, columns[0]].flatten(1), part.t())
            return clean - sums[1], clean + sums[1]
        middle, radius = (
            self._spread(v, batch, name).flatten(1) @ weight.flatten(1).t()
            for v, weight, name in zip(
                fields, self._weights[self.partition.dense_entry], ("whole deviation", "whole radius"), strict=True
            )
        )
        middle = clean + middle
        return middle - radius, middle + radius

    def _spread(self, v: Tensor, batch: WindowBatch, name: str) -> Tensor:
        """Windows at their places in whole maps of zeros: [N, H, W, C]."""
        channels, height, width = self.partition.shape
        size = len(v) * height * width
        cells = batch.numbered().cells(-1).flatten().index_fill(0, batch.outside(-1), size)
        whole = self._room(name, size + 1, channels)
        whole = v.new_zeros(size + 1, channels) if whole is None else whole.zero_()
        return whole.index_copy(0, cells, v.reshape(-1, channels))[:-1].view(len(v), height, width, channels)

    def _fill(self, field: DeviationBox, batch: WindowBatch) -> Box:
        """Lower and upper maps, [N, C, H, W] each."""
        middle, radius = (
            self._spread(v, batch, name).permute(0, 3, 1, 2)
            for v, name in ((field.deviation, "whole deviation"), (field.radius.expand_as(field.deviation), "whole radius"))
        )
        middle = middle + self.clean[-1].index_select(0, batch.owner)
        return middle - radius, middle + radius


class _Rectified(torch.autograd.Function):
    """Deviation and radius after a ReLU, from those before it and from the clean activations' rows [M, C]."""

    @staticmethod
    def forward(
        ctx: Any, deviation: Tensor, radius: Tensor, rows: Tensor, cells: Tensor, outside: Tensor
    ) -> tuple[Tensor, Tensor]:
        clean = rows.index_select(0, cells.flatten()).index_fill_(0, outside, float("-inf")).reshape(deviation.shape)
        middle = deviation + clean
        lower, upper = (middle - radius).relu_(), middle.add_(radius).relu_()
        clean = clean.relu_()
        ctx.save_for_backward(lower, upper, clean, cells)
        ctx.rows, ctx.radius = rows.shape, radius.shape
        middle = torch.lerp(lower, upper, 0.5)
        radius = upper - middle
        return middle.sub_(clean), radius

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Upper gets (g + h) / 2 and lower (g - h) / 2, where positive, from gradients g of the middle and h of the radius."""
        lower, upper, clean, cells = ctx.saved_tensors
        toward = torch.ops.aten.threshold_backward
        high, low = grads[0] + grads[1], grads[0] - grads[1]
        toward.grad_input(high, upper, 0, grad_input=high)
        toward.grad_input(low, lower, 0, grad_input=low)
        middle = torch.lerp(low, high, 0.5)
        radius = high.sub_(middle)
        rows = None
        if ctx.needs_input_grad[2]:
            own = toward.grad_input(grads[0], clean, 0, grad_input=low)
            rows = clean.new_zeros(ctx.rows).index_add_(0, cells.flatten(), torch.sub(middle, own, out=own).flatten(0, 2))
        return middle, radius.sum_to_size(ctx.radius), rows, None, None
