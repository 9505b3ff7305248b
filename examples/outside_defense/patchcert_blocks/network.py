"""A small network for each block of an image.

Shapes: B images, C channels, H x W pixels, K classes, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1024.0  # whole numbers between a weight of 0 and a weight of 1
LARGEST = 4 * STEPS


class BlockScorer(nn.Module):
    """Scores of each block, from its own pixels alone, by two layers that no other block shares."""

    def __init__(self, shape: tuple[int, int, int], classes: int, side: int, width: int) -> None:
        super().__init__()
        channels, height, values = shape[0], shape[1], shape[0] * side**2
        if side < 1 or height % side or shape[2] % side:
            raise ValueError(f"blocks of {side}x{side} do not divide images of {height}x{shape[2]}")
        if 255 * LARGEST * (values + 1) * LARGEST * (width + 1) >= 2**53:
            raise ValueError("sums of whole numbers could be rounded in float64: take smaller blocks or a smaller width")
        self.side, blocks = side, height * shape[2] // side**2
        self.first = nn.Parameter(torch.randn(blocks, values + 1, width) * values**-0.5)
        self.second = nn.Parameter(torch.randn(blocks, width, classes) * width**-0.5)
        self.summary = f"{blocks} blocks of {channels}x{side}x{side}, width {width}"  # for the card

    def blocks(self, x: Tensor, one: float) -> Tensor:
        """[B, C, H, W] -> [N, B, C * side * side + 1], with ``one`` as the last value."""
        return F.pad(F.unfold(x, self.side, stride=self.side).permute(2, 0, 1), (0, 1), value=one)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, N, K], with gradients."""
        return ((self.blocks(x, 1.0) @ self.first).relu() @ self.second).transpose(0, 1)

    def exact(self, x: Tensor) -> Tensor:
        """The scores of the frozen network: pixels and weights are whole numbers, so no sum in float64 is ever rounded."""
        first, second = ((STEPS * weight.double()).round().clamp(-LARGEST, LARGEST) for weight in (self.first, self.second))
        return ((self.blocks((255 * x.double()).round(), 255.0) @ first).relu() @ second).transpose(0, 1)


def build(
    *, input_shape: Sequence[int], classes: int, side: int = 4, width: int = 32, mean: Sequence[float], std: Sequence[float]
) -> BlockScorer:
    """Blocks of ``side`` x ``side`` pixels, with ``width`` hidden values; ``mean`` and ``std`` of the data set are not used."""
    return BlockScorer((input_shape[0], input_shape[1], input_shape[2]), classes, side, width)
