"""Layers of a deployed region scorer, all in whole steps (:mod:`patchcert_cli.layers.fixed_point`).

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchcert_cli.layers import fixed_point
from patchcert_cli.layers.fixed_point import ValueRange
from patchcert_cli.layers.programs import Program


def coordinates(height: int, width: int) -> Tensor:
    """Row and column of each pixel in whole steps from 0 to 255, [1, 2, H, W]."""
    row, column = ((torch.arange(side) * (255 / max(side - 1, 1))).round() for side in (height, width))
    return torch.stack([row[:, None].expand(height, width), column[None, :].expand(height, width)])[None]


class Framed(nn.Module):
    """Pixels in whole steps, with a frame around them that is the same for every image.

    Attributes:
        colour: of the frame, whole steps [C, 1, 1].
    """

    colour: Tensor

    def __init__(self, colour: Tensor, width: int) -> None:
        super().__init__()
        self.register_buffer("colour", colour.round().clamp(0, 255)[:, None, None])
        self.width = width

    def plan(self, program: Program) -> None:
        """See :class:`patchcert_cli.layers.programs.Planned`."""
        program.before.append(self)

    def forward(self, v: Tensor) -> Tensor:
        height, width = (side + 2 * self.width for side in v.shape[2:])
        framed = self.colour.to(v).expand(len(v), -1, height, width).contiguous(memory_format=torch.channels_last)
        framed[:, :, self.width : height - self.width, self.width : width - self.width] = v
        return framed


class Placed(nn.Module):
    """Pixels in whole steps, with maps beside them that are the same for every image, such as coordinates in whole steps."""

    places: Tensor

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", places)

    def plan(self, program: Program) -> None:
        """See :class:`patchcert_cli.layers.programs.Planned`."""
        program.before.append(self)

    def forward(self, v: Tensor) -> Tensor:
        both = torch.cat([v, self.places.to(v).expand(len(v), -1, -1, -1)], dim=1)
        return both.contiguous(memory_format=torch.channels_last)


class WholeStep(nn.Module):
    """Exact convolution, ReLU, with ``residual`` plus what came in, onto a grid."""

    def __init__(self, layer: fixed_point.Affine, value_range: ValueRange, *, residual: bool) -> None:
        super().__init__()
        self.layer, self.value_range, self.residual = layer, value_range, residual

    def plan(self, program: Program) -> None:
        """See :class:`patchcert_cli.layers.programs.Planned`."""
        at = program.last
        program.add((at, self.layer), to=self.value_range, beside=at if self.residual else None, gated=True)

    def forward(self, v: Tensor) -> Tensor:
        out = self.layer(v).relu_()
        return fixed_point.quantize_(out.add_(v) if self.residual else out, self.value_range)
