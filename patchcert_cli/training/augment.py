"""Random changes of training images, on whatever device they are on.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.defenses import Augment


def apply(x: Tensor, how: Augment, generator: torch.Generator) -> Tensor:
    """What ``how`` says, image by image: [B, C, H, W] -> [B, C, H, W]."""
    return shift(flip(x, generator) if how.flip else x, how.shift, generator)


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image [B, C, H, W] left to right with probability 1/2."""
    mirrored = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def shift(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image [B, C, H, W] by up to ``most`` pixels along both axes; what comes in from outside is 0.

    ``generator`` is on the CPU, so that every device moves the images alike.
    """
    if most == 0:
        return x
    batch, _, height, width = x.shape
    moves = torch.randint(2 * most + 1, (2, batch, 1), generator=generator).to(x.device)
    rows = moves[0] + torch.arange(height, device=x.device)  # [B, H], positions in the padded image
    columns = moves[1] + torch.arange(width, device=x.device)
    padded = F.pad(x, (most, most, most, most)).permute(0, 2, 3, 1)  # [B, H', W', C]
    image = torch.arange(batch, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
