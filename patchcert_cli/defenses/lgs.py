"""Local Gradients Smoothing (Naseer, Khan & Porikli, WACV 2019): pixels where neighbours differ much are darkened.

The gradient magnitude of an image is scaled to [0, 1]. In windows whose mean is at most ``threshold`` it is set to 0. The image
is then multiplied by ``1 - clip(smoothing * gradient, 0, 1)``.

The paper leaves open what is chosen here. The gradient of a color image is the root of the sum of the squared first differences
of all channels, so a change of color alone counts too. The last windows along an axis end at the border. A pixel keeps its
gradient if one of its windows does. The published windows of 15 pixels with an overlap of 5 are for images of 224x224, and are
scaled with the image.

An attack that knows the defense differentiates through it, with the chosen windows as constants, or takes the identity for the
gradient of the filter, which a pixel needs that is darkened to black.

Shapes: B images, C channels, H x W pixels, w windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from patchcert_cli.defenses._empirical import EmpiricalDefense, scaled, straight_through
from patchcert_cli.errors import UsageError
from patchcert_cli.layers.boxes import box_sums
from patchcert_cli.schema import Count, Must, NonNegative
from patchcert_cli.threats import Patch

PIXEL_STEPS, GRADIENT_STEPS = 2.0**20, 2.0**30  # grids on which all sums below are exact, in any order

Share = Annotated[float, Must(lambda p: 0 <= p <= 1, "in [0, 1]")]


@dataclass(frozen=True)
class Lgs:
    """The published settings.

    Attributes:
        block: side of the windows in pixels; 0 for 15 on an image of 224x224.
        overlap: of neighbouring windows, in pixels; -1 for 5 on an image of 224x224, at least 1.
        threshold: windows of at most this mean gradient are not smoothed.
        smoothing: what gradients are multiplied by.
    """

    block: Count = 0
    overlap: Annotated[int, Must(lambda n: n >= -1, "-1 or more")] = -1
    threshold: Share = 0.1
    smoothing: NonNegative = 2.3


class LocalGradientsSmoothing(EmpiricalDefense):
    """Any classifier of images whose strong local gradients were smoothed."""

    source = "Naseer, Khan & Porikli, Local Gradients Smoothing, WACV 2019"
    settings_type = Lgs
    chosen: Lgs

    windows: Tensor

    def __init__(
        self, network: nn.Module, chosen: Lgs | None = None, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]
    ) -> None:
        super().__init__(network, chosen, input_shape=input_shape, classes=classes)
        self.register_buffer("windows", windows(self.chosen, input_shape), persistent=False)

    def filtered(self, x: Tensor) -> Tensor:
        gradient = gradients(x)
        with torch.no_grad():
            kept = self._kept(gradient)
        factor = 1 - (self.chosen.smoothing * gradient * kept).clamp(0, 1)
        return (x.double() * factor[:, None]).to(x.dtype)

    def _kept(self, gradient: Tensor) -> Tensor:
        """Where a window has more than the threshold, [B, H, W] -> bool [B, H, W]."""
        steps = (gradient * GRADIENT_STEPS).round()
        sums = box_sums(steps, self.windows)  # [B, w], exact
        high = sums > self.chosen.threshold * GRADIENT_STEPS * (self.windows[:, 2] * self.windows[:, 3])
        return _covered(high, self.windows, gradient.shape[1:])


def gradients(x: Tensor) -> Tensor:
    """The magnitude of first differences, each image's scaled to [0, 1]: [B, C, H, W] -> float64 [B, H, W].

    Pixels are put on a grid first, on which sums of squares are whole numbers below 2^53: the same bits in any batch.
    """
    v = x.double() * PIXEL_STEPS
    v = straight_through(v.detach().round(), v)
    squares = torch.zeros_like(v)
    squares[:, :, :-1] += (v[:, :, 1:] - v[:, :, :-1]) ** 2
    squares[:, :, :, :-1] += (v[:, :, :, 1:] - v[:, :, :, :-1]) ** 2
    total = squares.sum(dim=1)
    size = total.where(total > 0, 1).sqrt() * (total > 0)  # the slope of a root at 0 is infinite
    least, most = size.amin(dim=(1, 2), keepdim=True), size.amax(dim=(1, 2), keepdim=True)
    return (size - least) / (most - least).where(most > least, 1)


def windows(chosen: Lgs, shape: tuple[int, int, int]) -> Tensor:
    """The windows on images [C, H, W], int64 [w, 4]: top, left, height, width.

    Raises:
        UsageError: the block is larger than the image, or not larger than the overlap.
    """
    block = chosen.block or max(2, round(scaled(15, shape)))
    overlap = max(1, round(scaled(5, shape))) if chosen.overlap < 0 else chosen.overlap
    if block > min(shape[1:]):
        raise UsageError(f"block {block} does not fit {shape[1]}x{shape[2]} images.", hint=f"Allowed: 1 to {min(shape[1:])}.")
    if overlap >= block:
        raise UsageError(f"overlap {overlap} is not less than block {block}.", hint=f"Allowed: 0 to {block - 1}.")
    locations = Patch(block, block).locations(*shape[1:])
    begins = [torch.tensor([*range(0, side - block, block - overlap), side - block]) for side in shape[1:]]
    return locations[torch.isin(locations[:, 0], begins[0]) & torch.isin(locations[:, 1], begins[1])]


def _covered(high: Tensor, windows: Tensor, size: torch.Size) -> Tensor:
    """The pixels of some windows, bool [B, w] -> bool [B, H, W]."""
    edges = torch.zeros(len(high), size[0] + 1, size[1] + 1, dtype=torch.int64, device=high.device)
    top, left = windows[:, 0], windows[:, 1]
    below, right = top + windows[:, 2], left + windows[:, 3]
    for row, column, sign in ((top, left, 1), (top, right, -1), (below, left, -1), (below, right, 1)):
        at = (row * (size[1] + 1) + column).expand(len(high), -1)
        edges.flatten(1).scatter_add_(1, at, sign * high.long())
    return edges.cumsum(dim=1).cumsum(dim=2)[:, :-1, :-1] > 0
