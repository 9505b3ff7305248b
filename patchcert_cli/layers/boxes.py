"""Boxes of pixels: as masks, and sums of maps over them.

Shapes: A boxes, rows ``top, left, height, width`` in pixels; maps of H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """The pixels in each box: int64 [..., 4] -> bool [..., H, W]."""
    top, left, tall, wide = (side[..., None] for side in boxes.unbind(-1))
    row, column = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    rows, columns = (row >= top) & (row < top + tall), (column >= left) & (column < left + wide)
    return rows[..., :, None] & columns[..., None, :]


def integral_image(maps: Tensor) -> Tensor:
    """The sums of all entries above and left, in the type of ``maps``: [..., H, W] -> [..., H + 1, W + 1]."""
    return F.pad(maps, (1, 0, 1, 0)).cumsum(dim=-2).cumsum(dim=-1)


def box_sums(maps: Tensor, boxes: Tensor) -> Tensor:
    """The sum of each map over each box, [..., H, W] and int64 [A, 4] -> [..., A]; exact for whole numbers in range."""
    total = integral_image(maps)
    top, left, height, width = boxes.unbind(dim=1)
    bottom, right = top + height, left + width
    return total[..., bottom, right] - total[..., top, right] - total[..., bottom, left] + total[..., top, left]
