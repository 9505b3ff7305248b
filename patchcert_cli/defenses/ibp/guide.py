"""A small U-Net that predicts where a patch hurts most, for interval training (Chiang et al., ICLR 2020, section 3.2).

Shapes: B images, C channels, H x W pixels, K classes, A locations, R chosen ones.

It is not part of any proof and is not deployed: it learns, along with the classifier, the bounds that were computed, and proposes
for each class where to compute the next ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.threats import Patch


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, 1, 1), nn.ReLU(), nn.Conv2d(after, after, 3, 1, 1), nn.ReLU())


class Guide(nn.Module):
    """An image [B, C, H, W] -> the margin bound of each class with the patch's upper left corner at each pixel, [B, K, H, W]."""

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([_block(channels, width), _block(width, 2 * width), _block(2 * width, 2 * width)])
        self.up = nn.ModuleList([_block(4 * width, width), _block(2 * width, width)])
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.down[0](2 * x - 1)]
        for block in list(self.down)[1:]:
            seen.append(block(F.max_pool2d(seen[-1], 2, ceil_mode=True)))
        v = seen.pop()
        for block in self.up:
            skip = seen.pop()
            v = block(torch.cat([F.interpolate(v, size=skip.shape[2:]), skip], dim=1))
        bounds: Tensor = self.out(v)
        return bounds


def at_locations(prediction: Tensor, patch: Patch) -> Tensor:
    """[B, K, H, W] -> [B, K, A], in the order of ``patch.locations``."""
    height, width = prediction.shape[2:]
    return prediction[:, :, : height - patch.height + 1, : width - patch.width + 1].flatten(2)


def sample(prediction: Tensor, patch: Patch, count: int, generator: torch.Generator) -> Tensor:
    """``count`` locations for each class, drawn with probability ``softmax(-prediction)``: int64 [B, K * count].

    ``generator`` is on the CPU, and so are the draws.
    """
    probability = (-at_locations(prediction, patch).float()).softmax(dim=2).flatten(0, 1).cpu()
    drawn = torch.multinomial(probability, count, replacement=True, generator=generator)
    return drawn.reshape(len(prediction), -1).to(prediction.device)


def guided(prediction: Tensor, patch: Patch, chosen: Tensor) -> Tensor:
    """The predicted bounds at chosen locations, int64 [B, R] -> [B, R, K]."""
    bounds = at_locations(prediction, patch).float().transpose(1, 2)
    return bounds.gather(1, chosen[:, :, None].expand(-1, -1, bounds.shape[2]))
