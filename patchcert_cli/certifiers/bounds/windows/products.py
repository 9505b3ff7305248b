"""Products of weights with windows, wherever these lie.

Shapes: N windows [N, h, w, C], channels last, zero outside; outputs [N, h', w', C'].

An output at the border of a window sees only a part of it. Multiplying that part alone is about half of the work of a convolution
of the window with zeros around it, and needs no copies: a part of a row of a window is consecutive in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.windows.patch_windows import AlignedGroup, SlidingAxis, pair

Size = tuple[int, int]
SlidingAxes = tuple[SlidingAxis, SlidingAxis]


def convolve(
    layer: nn.Conv2d,
    weight: Tensor,
    v: Tensor,
    groups: Sequence[AlignedGroup],
    slides: SlidingAxes,
    size: Size,
    room: Tensor | None = None,
) -> Tensor:
    """The layer's outputs without bias, [N, *size, C'], with ``weight`` [C', kh, kw, C/groups] in place of its own.

    ``room``: memory for the result, where it is known that nothing else needs it.
    """
    if is_plain(layer, v.device):
        stride = (slides[0].stride, slides[1].stride)
        out: Tensor = _Convolution.apply(v, weight, groups, stride, size, room)
        return out

    def slide(seen: Tensor) -> Tensor:
        return F.conv2d(seen, weight.permute(0, 3, 1, 2), None, layer.stride, 0, layer.dilation, layer.groups)

    return on_each_group(slide, v, groups, slides, size, len(weight))


def is_plain(layer: nn.Conv2d, device: torch.device) -> bool:
    """Whether the layer's windows are multiplied as plain matrices here; else by a convolution."""
    return device.type == "cpu" and layer.groups == 1 and pair(layer.dilation) == (1, 1)


def convolve_maps(layer: nn.Conv2d, weight: Tensor, maps: Tensor) -> Tensor:
    """The layer on whole maps [B, H, W, C] by one plain matrix product, bias included: [B, H', W', C']; groups must be 1."""
    (rows, columns), (down, right), (lower, across) = pair(layer.padding), pair(layer.stride), pair(layer.dilation)
    padded = F.pad(maps, (0, 0, columns, columns, rows, rows))
    (kh, kw), (image, line, cell, one) = weight.shape[1:3], padded.stride()
    size = ((padded.shape[1] - lower * (kh - 1) - 1) // down + 1, (padded.shape[2] - across * (kw - 1) - 1) // right + 1)
    steps = (image, line * down, cell * right, line * lower, cell * across, one)
    seen = padded.as_strided((len(maps), *size, kh, kw, maps.shape[3]), steps).reshape(-1, weight[0].numel())
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias
    return torch.addmm(bias, seen, weight.flatten(1).t()).view(len(maps), *size, len(weight))


def on_each_group(
    action: Callable[[Tensor], Tensor], v: Tensor, groups: Sequence[AlignedGroup], slides: SlidingAxes, size: Size, channels: int
) -> Tensor:
    """``action`` on all that the outputs see, [n, C, H', W'], zero outside the windows: [N, *size, channels]."""
    if 0 in (len(v), *size):
        return v.new_zeros(len(v), *size, channels)
    parts = []
    for group in groups:
        seen = widened(v[group.pairs], *group.margins((v.shape[1], v.shape[2]), slides, size))
        parts.append(action(seen.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def widened(v: Tensor, rows: Size, columns: Size) -> Tensor:
    """Windows with ``rows`` more above and below and ``columns`` more left and right, of zeros; or less, if negative."""
    height, width = v.shape[1:3]
    if height + min(rows[0], 0) + min(rows[1], 0) <= 0 or width + min(columns[0], 0) + min(columns[1], 0) <= 0:
        return v.new_zeros(len(v), height + sum(rows), width + sum(columns), v.shape[3])  # nothing of them is left
    return F.pad(v, (0, 0, *columns, *rows))


Product = tuple[int, int, int]  # where its factors begin in a window and in a kernel, and how many entries are multiplied


@cache
def _schedule(window: Size, size: Size, kernel: tuple[int, int, int], stride: Size, offset: Size) -> list[list[Product]]:
    """For each output, the products that it is the sum of: one for each row of the window that it sees."""
    kh, kw, channels = kernel
    found = []
    for i in range(size[0]):
        for j in range(size[1]):
            row, column = offset[0] + i * stride[0], offset[1] + j * stride[1]
            left, right = max(column, 0), min(column + kw, window[1])
            rows = range(max(row, 0), min(row + kh, window[0])) if left < right else ()
            places = [(r * window[1] + left, (r - row) * kw + left - column, right - left) for r in rows]
            found.append([(a * channels, b * channels, n * channels) for a, b, n in places])
    return found


def _block(v: Tensor, begin: int, rows: int, step: int, columns: int) -> Tensor:
    """A matrix [rows, columns] in the memory of ``v``, its rows ``step`` entries apart."""
    return v.as_strided((rows, columns), (step, 1), v.storage_offset() + begin)


class _Parts(dict[tuple[int, int], Tensor]):
    """Consecutive entries of each kernel of a weight [C', kh, kw, C], as matrices [C', terms], by their beginning and number."""

    def __init__(self, weight: Tensor | None) -> None:
        super().__init__()
        self.weight = weight

    def __missing__(self, key: tuple[int, int]) -> Tensor:
        assert self.weight is not None
        self[key] = _block(self.weight, key[0], len(self.weight), self.weight[0].numel(), key[1])
        return self[key]


class _Convolution(torch.autograd.Function):
    """``weight`` is [C', kh, kw, C]; every output is a sum of products of matrices [n, m] and [m, C']."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, weight: Tensor, groups: Sequence[AlignedGroup], stride: Size, size: Size, room: Tensor | None
    ) -> Tensor:
        v, weight = v.contiguous(), weight.contiguous()
        ctx.save_for_backward(v, weight)
        ctx.groups, ctx.stride = groups, stride
        out = v.new_empty(len(v), *size, len(weight)) if room is None else room
        window, parts = v[0].numel(), _Parts(weight)
        for target, begin, products in _outputs(out, v.shape, weight.shape, groups, stride):
            if not products:
                target.zero_()
            for at, (there, here, terms) in enumerate(products):  # what the memory held before is not a summand
                target.addmm_(_block(v, begin + there, len(target), window, terms), parts[here, terms].t(), beta=min(at, 1))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, weight = ctx.saved_tensors
        v_grad = torch.zeros_like(v) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        window, parts, part_grads = v[0].numel(), _Parts(weight), _Parts(weight_grad)
        for target, begin, products in _outputs(grads[0].contiguous(), v.shape, weight.shape, ctx.groups, ctx.stride):
            for there, here, terms in products:
                where = (begin + there, len(target), window, terms)
                if v_grad is not None:
                    _block(v_grad, *where).addmm_(target, parts[here, terms])
                if weight_grad is not None:
                    part_grads[here, terms].addmm_(target.t(), _block(v, *where))
        return v_grad, weight_grad, None, None, None, None


def _outputs(
    out: Tensor, v: Sequence[int], weight: Sequence[int], groups: Sequence[AlignedGroup], stride: Size
) -> Iterator[tuple[Tensor, int, list[Product]]]:
    """Each output of each group, [n, C'], where its windows begin, and its products."""
    size, channels = (out.shape[1], out.shape[2]), out.shape[3]
    cells = size[0] * size[1]
    for group in groups:
        start, stop = (group.pairs.start, group.pairs.stop) if len(out) > 1 else (0, 1)
        plan = _schedule((v[1], v[2]), size, (weight[1], weight[2], weight[3]), stride, group.offset)
        for cell, products in enumerate(plan):
            target = _block(out, (start * cells + cell) * channels, stop - start, cells * channels, channels)
            yield target, start * v[1] * v[2] * v[3], products
