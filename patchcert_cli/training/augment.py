"""Random changes of training images, on whatever device they are on.

Generators are on the CPU, so that every device changes the images alike. A change that is switched off takes nothing from them.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.defenses import Augment


def apply(x: Tensor, how: Augment, generator: torch.Generator) -> Tensor:
    """What ``how`` says, image by image: [B, C, H, W] -> [B, C, H, W]."""
    x = warp(flip(x, generator) if how.flip else x, how.zoom, how.turn, generator)
    return tint(shift(x, how.shift, generator), how.tint, generator)


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image [B, C, H, W] left to right with probability 1/2."""
    mirrored = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def warp(x: Tensor, zoom: float, turn: float, generator: torch.Generator) -> Tensor:
    """Scale each image [B, C, H, W] around its middle by 1 - ``zoom`` to 1 + ``zoom``, and rotate it by up to ``turn`` degrees.

    Values between pixels are bicubic, which blurs least, and stay in [0, 1]; what comes in from outside is 0.
    """
    if zoom == 0 and turn == 0:
        return x
    drawn = 2 * torch.rand(2, len(x), generator=generator).to(x.device) - 1
    size, angle = 1 + zoom * drawn[0], math.radians(turn) * drawn[1]
    cosine, sine, none = angle.cos() / size, angle.sin() / size, torch.zeros_like(size)
    slant = x.shape[2] / x.shape[3]  # axes are from -1 to 1, whatever their length
    rows = [torch.stack([cosine, -sine * slant, none], dim=1), torch.stack([sine / slant, cosine, none], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid.to(x), mode="bicubic", padding_mode="zeros", align_corners=False).clamp(0, 1)


def tint(x: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Multiply each channel of each image [B, C, H, W] by 1 - ``most`` to 1 + ``most``, and add up to ``most`` or subtract it;
    values stay in [0, 1]."""
    if most == 0:
        return x
    drawn = most * (2 * torch.rand(2, *x.shape[:2], 1, 1, generator=generator).to(x) - 1)
    return (x * (1 + drawn[0]) + drawn[1]).clamp(0, 1)


def shift(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Move each image [B, C, H, W] by up to ``most`` pixels along both axes; what comes in from outside is 0."""
    if most == 0:
        return x
    batch, _, height, width = x.shape
    moves = torch.randint(2 * most + 1, (2, batch, 1), generator=generator).to(x.device)
    rows = moves[0] + torch.arange(height, device=x.device)  # [B, H], positions in the padded image
    columns = moves[1] + torch.arange(width, device=x.device)
    padded = F.pad(x, (most, most, most, most)).permute(0, 2, 3, 1)  # [B, H', W', C]
    image = torch.arange(batch, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
