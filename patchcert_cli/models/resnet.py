"""Residual networks (He et al., Deep Residual Learning for Image Recognition, CVPR 2016) for small images, such as ResNet-18.

A 3x3 stem without pooling, basic blocks, a 1x1 projection where a block changes the shape, the mean over all positions, a linear
head. Convolutions are padded with zeros. Where a map is so narrow that a column of a 3x3 kernel would meet nothing but padding,
as after a band of a few pixels, the kernel has no such column: the same function with fewer weights.

Shapes: B images, C channels, H x W pixels, K classes, n positions of the last map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import fixed_point, precision
from patchcert_cli.layers.fixed_point import Quantizer, ValueRange
from patchcert_cli.layers.programs import Program
from patchcert_cli.models._stages import stages
from patchcert_cli.schema import Bits, Positive


def convolution(before: int, width: int, size: tuple[int, int], stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution with padding 1 of maps of ``size``, without the rows and columns of its kernel that meet padding only.

    (Their gradients are zero, and where oneDNN computes them in bfloat16 they may be whatever was in memory before, or NaN.)
    """
    padding = [int(length > stride) for length in size]  # the first row of the kernel meets a pixel iff there are two outputs
    kernel = [pad + 1 + int(length > 1) for pad, length in zip(padding, size, strict=True)]
    return nn.Conv2d(before, width, (kernel[0], kernel[1]), stride, (padding[0], padding[1]), bias=False)


def strided(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """The size of a map after a convolution with this stride: divided and rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)


class Block(nn.Module):
    """``relu(norm(conv(relu(norm(conv(v))))) + shortcut(v))``; the shortcut is a projection where the shape changes.

    ``inner`` is the width between the two convolutions, by default that of the result.
    """

    def __init__(self, before: int, width: int, size: tuple[int, int], stride: int, bits: int, inner: int = 0) -> None:
        super().__init__()
        inner = inner or width
        self.first = convolution(before, inner, size, stride)
        self.first_norm, self.first_grid = nn.BatchNorm2d(inner), Quantizer(bits)
        self.second = convolution(inner, width, strided(size, stride))
        self.second_norm, self.grid = nn.BatchNorm2d(width), Quantizer(bits)
        straight = before == width and stride == 1
        self.projection = None if straight else nn.Conv2d(before, width, 1, stride, bias=False)
        self.projection_norm = None if straight else nn.BatchNorm2d(width)

    def forward(self, v: Tensor) -> Tensor:
        beside = v
        if self.projection is not None and self.projection_norm is not None:
            beside = self.projection_norm(self.projection(v))
        inner = self.first_grid(F.relu(self.first_norm(self.first(v))))
        return cast(Tensor, self.grid(F.relu(self.second_norm(self.second(inner)) + beside)))

    def freeze(self, value_range: ValueRange, precision: torch.dtype) -> tuple[nn.Module, int]:
        """The exact block after ``value_range``, and the fewest bits of a channel's largest weight; 0 where only float64 will
        do.

        The second convolution and the shortcut are one sum over the channels of both, to which the theorem applies as a whole;
        the step of what the shortcut carries is moved into its weights, and out again afterwards.
        """
        first, bits = fixed_point.affine(
            *fixed_point.fold_batchnorm(self.first, self.first_norm), self.first, value_range, precision
        )
        inner = self.first_grid.value_range
        weight, bias = fixed_point.fold_batchnorm(self.second, self.second_norm)
        straight = torch.eye(len(weight), dtype=torch.float64)[:, :, None, None]
        aside, offset = straight, torch.zeros_like(bias)
        if self.projection is not None:
            aside, offset = fixed_point.fold_batchnorm(self.projection, self.projection_norm)
        scale = 2.0 ** (value_range.exponent - inner.exponent)
        up, left = cast(tuple[int, int], self.second.padding)  # the middle of the kernel, where the shortcut is
        both = torch.cat([weight, F.pad(aside * scale, (left, left, up, up))], dim=1)
        common = ValueRange(inner.exponent, max(inner.most, value_range.most / scale))
        joint, fewest = fixed_point.affine(both, bias + offset, self.second, common, precision)
        width = weight.shape[1]
        second = fixed_point.Affine(joint.weight[:, :width].contiguous(), joint.bias, self.second)
        beside = joint.weight[:, width:, up : up + 1, left : left + 1] / scale
        if self.projection is not None:
            shortcut = fixed_point.Affine(beside.contiguous(), torch.zeros_like(joint.bias), self.projection)
            return _Block(first, second, shortcut, inner, self.grid.value_range), min(bits, fewest)
        if not torch.equal(beside, straight.to(beside)):  # the shortcut's steps are too fine for what is added to them
            if precision == torch.float64:
                raise IntegrityError("weights too far apart in size to compute with exactly.", hint="Train the network again.")
            fewest = 0
        return _Block(first, second, None, inner, self.grid.value_range), min(bits, fewest)


class ResNet(nn.Module):
    """[B, C, H, W] in [0, 1] -> logits [B, K], for the C, H and W that it was built for.

    Attributes:
        positions: n, how many positions the last map has.
        most: activations of its largest layer per image.
    """

    def __init__(self, shape: Sequence[int], classes: int, plan: Sequence[tuple[int, int, int]], bits: int) -> None:
        super().__init__()
        channels, size, before = shape[0], (shape[1], shape[2]), plan[0][0]
        self.stem = convolution(channels, before, size)
        self.norm, self.grid = nn.BatchNorm2d(before), Quantizer(bits)
        blocks, self.most = [], before * size[0] * size[1]
        for width, count, stride in plan:
            for step in (stride, *[1] * (count - 1)):
                blocks.append(Block(before, width, size, step, bits))
                before, size = width, strided(size, step)
            self.most = max(self.most, width * size[0] * size[1])
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(before, classes, 1)
        self.positions = size[0] * size[1]

    @property
    def summary(self) -> str:
        """Kind and widths, for cards."""
        widths = dict.fromkeys(cast(Block, block).second_norm.num_features for block in self.blocks)
        return f"ResNet-{2 * len(self.blocks) + 2} {'-'.join(map(str, widths))}"

    def forward(self, x: Tensor) -> Tensor:
        v = self.blocks(self.grid(F.relu(self.norm(self.stem(x)))))
        return cast(Tensor, self.head(v.mean(dim=(2, 3), keepdim=True)).flatten(1))

    def freeze(self, precision: torch.dtype) -> tuple[nn.Module, int]:
        """The deployed network of whole steps 0 to 255 (:mod:`patchcert_cli.layers.fixed_point`), and the fewest bits of a
        largest weight.

        The mean over positions is a sum, which is exact, and 1/n is part of the head's weights. The head, which adds up the most
        and costs the least, is always computed in float64.
        """
        weight, bias = fixed_point.fold_batchnorm(self.stem, self.norm)
        stem, fewest = fixed_point.affine(weight / 255, bias, self.stem, fixed_point.PIXELS, precision)
        value_range = self.grid.value_range
        layers: list[nn.Module] = [ExactStem(stem, value_range)]
        for block in cast(list[Block], list(self.blocks)):
            layer, bits = block.freeze(value_range, precision)
            layers.append(layer)
            fewest, value_range = min(fewest, bits), block.grid.value_range
        weight, bias = fixed_point.fold_batchnorm(self.head, None)
        total = ValueRange(value_range.exponent, value_range.most * self.positions)
        head, _ = fixed_point.affine(weight / self.positions, bias, self.head, total, torch.float64)
        return nn.Sequential(*layers, _Head(head)), fewest


class ExactStem(nn.Module):
    """Exact convolution, ReLU, onto a grid."""

    def __init__(self, layer: fixed_point.Affine, value_range: ValueRange) -> None:
        super().__init__()
        self.layer, self.value_range = layer, value_range

    def plan(self, program: Program) -> None:
        """See :class:`patchcert_cli.layers.programs.Planned`."""
        program.add((program.last, self.layer), to=self.value_range)

    def forward(self, v: Tensor) -> Tensor:
        return fixed_point.quantize_(self.layer(v).relu_(), self.value_range)


class _Block(nn.Module):
    """An exact :class:`Block`."""

    def __init__(
        self,
        first: fixed_point.Affine,
        second: fixed_point.Affine,
        shortcut: fixed_point.Affine | None,
        inner: ValueRange,
        value_range: ValueRange,
    ) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = first, second, shortcut
        self.inner, self.value_range = inner, value_range

    def plan(self, program: Program) -> None:
        """See :class:`patchcert_cli.layers.programs.Planned`."""
        at = program.last
        inner = program.add((at, self.first), to=self.inner)
        if self.shortcut is None:
            program.add((inner, self.second), to=self.value_range, beside=at)
        else:
            program.add((inner, self.second), (at, self.shortcut), to=self.value_range)

    def forward(self, v: Tensor) -> Tensor:
        out: Tensor = self.second(fixed_point.quantize_(self.first(v).relu_(), self.inner))
        return fixed_point.quantize_(out.add_(v if self.shortcut is None else self.shortcut(v)).relu_(), self.value_range)


class _Head(nn.Module):
    """Exact sum over positions and linear layer, float64 [B, K]."""

    def __init__(self, layer: fixed_point.Affine) -> None:
        super().__init__()
        self.layer = layer

    def plan(self, program: Program) -> None:
        """See :class:`patchcert_cli.layers.programs.Planned`."""
        step = 2.0 ** program.value_ranges[program.last].exponent
        program.after = lambda q: self.total(q.sum(dim=(2, 3), keepdim=True).double() * step)

    def forward(self, v: Tensor) -> Tensor:
        return self.total(v.sum(dim=(2, 3), keepdim=True).double())

    def total(self, v: Tensor) -> Tensor:
        """Of the sums [B, C, 1, 1]."""
        with precision.exact_sums(v.device):
            return cast(Tensor, self.layer(v)).flatten(1)


def build(
    *,
    input_shape: Sequence[int],
    classes: int,
    widths: Sequence[Positive] = (64, 128, 256, 512),
    blocks: Sequence[Positive] = (2, 2, 2, 2),
    strides: Sequence[Positive] = (1, 2, 2, 2),
    bits: Bits = 8,
    mean: Sequence[float],
    std: Sequence[float],
) -> Any:
    """A :class:`ResNet`; each stage has a width, a number of blocks and the stride of its first block. Default: ResNet-18.

    ``input_shape`` is what the network is given: its channels are already encoded, and in [0, 1]. ``mean`` and ``std``, which
    every network is offered, are not used: smoothing gives pixels as they are, x and 1 - x, as published, so that an absent
    pixel (0, 0) differs from a black one (0, 1). Activations of the deployed network have ``bits`` bits.
    """
    plan = cast(list[tuple[int, int, int]], stages(widths=widths, blocks=blocks, strides=strides))
    return ResNet(input_shape, classes, plan, bits)
