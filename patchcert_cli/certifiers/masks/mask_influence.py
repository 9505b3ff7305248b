"""Which positions of each map of a network of whole numbers see what a mask hides, and from where a part of a map is read.

Shapes: H x W pixels, M masks, n passes, h x w positions of a box.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.layers.levels import Level, Levels

OUTSIDE = -(1 << 30)  # of a row that is not one of the map's
WORTH = 0.7  # share of a map's positions up to which computing boxes alone pays


class MaskInfluence:
    """What each mask changes, map by map, for one network, one set of masks and images of one size.

    Attributes:
        affected: for the pixels and then for each level bool [M, H, W], the positions that see something hidden by each mask.
        boxes: for each level int64 [M, M, 4], top, left, height and width of the smallest box around what two masks have in
            common.
        partial_levels: how many levels are computed in boxes; the others as a whole.
        order: int64 [M, M], a number for the sizes of two masks' boxes, of the last levels first.
    """

    def __init__(self, network: Levels, masks: Tensor) -> None:
        self._levels, self._indices = network.each, dict[tuple[int, int, int], ReadIndex]()
        self.affected, self.boxes, self.partial_levels = [masks], [], 0
        for level in network.each:
            self.affected.append(spread(self.affected[-1], level))
            self.boxes.append(common_boxes(self.affected[-1]))
        for affected, boxes in zip(self.affected[1:], self.boxes, strict=True):
            positions = affected.shape[1] * affected.shape[2]
            if float((boxes[..., 2] * boxes[..., 3]).double().mean()) > WORTH * positions:
                break
            self.partial_levels += 1
        self.order = torch.zeros(len(masks), len(masks), dtype=torch.int64)
        for boxes in self.boxes[: self.partial_levels]:
            sizes = boxes[..., 2] * (1 + boxes[..., 3].max()) + boxes[..., 3]
            both = sizes * (self.order.max() + 1) + self.order
            self.order = torch.unique(both, return_inverse=True)[1]

    def box_index(self, number: int, height: int, width: int) -> ReadIndex:
        """What the boxes of this size in the map of a level see, for all pairs of masks that have such a box."""
        key = (number, height, width)
        if key not in self._indices:
            boxes = self.boxes[number]
            first, second = ((boxes[..., 2] == height) & (boxes[..., 3] == width)).nonzero().T
            corner = boxes[first, second]
            row, column = (_span(self._levels[number], corner[:, axis], (height, width)[axis]) for axis in (0, 1))
            self._indices[key] = self._read_index(number, first, second, row, column)
        return self._indices[key]

    def map_index(self, number: int) -> ReadIndex:
        """What the whole map of a level sees, or for the number of levels the last map, for all pairs of masks."""
        key = (number, 0, 0)
        if key not in self._indices:
            masks, size = len(self.affected[0]), self.affected[number].shape[1:]
            first, second = torch.ones(masks, masks).nonzero().T
            row, column = (torch.arange(length).expand(len(first), -1) for length in size)
            if number < len(self._levels):
                level, zero = self._levels[number], torch.zeros_like(first)
                row, column = (_span(level, zero, level.size(length)) for length in size)
            self._indices[key] = self._read_index(number, first, second, row, column)
        return self._indices[key]

    def _read_index(self, number: int, first: Tensor, second: Tensor, row: Tensor, column: Tensor) -> ReadIndex:
        """Rows [n, h] and columns [n, w] of the map before a level, for pairs of masks int64 [n]."""
        affected, masks = self.affected[number], len(self.affected[0])
        area = affected.shape[1] * affected.shape[2]
        inside = ((row >= 0) & (row < affected.shape[1]))[:, :, None] & ((column >= 0) & (column < affected.shape[2]))[:, None, :]
        place = torch.where(inside, row[:, :, None] * affected.shape[2] + column[:, None, :], 0)
        i, j = first[:, None, None], second[:, None, None]
        moved = affected.flatten()[j * area + place]  # what the second mask does not move is as under the first
        if number == 0:  # of pixels, hidden ones are one and the same row
            own, at, inner = moved | affected.flatten()[i * area + place], place, torch.zeros_like(place)
        else:
            box = self.boxes[number - 1][first, second]
            down, right = row - box[:, :1], column - box[:, 1:2]
            own = ((down >= 0) & (down < box[:, 2:3]))[:, :, None] & ((right >= 0) & (right < box[:, 3:4]))[:, None, :]
            at = torch.where(moved, j, i) * area + place
            inner = down[:, :, None] * box[:, 3, None, None] + right[:, None, :]
        own = own & inside
        slot = torch.full((masks, masks), -1, dtype=torch.int64)
        slot[first, second] = torch.arange(len(first))
        offset = torch.where(inside, torch.where(own, inner, at), OUTSIDE)
        return ReadIndex(slot, offset.flatten(1).int(), own.flatten(1).int(), row.shape[1], column.shape[1])


@dataclass(frozen=True)
class ReadIndex:
    """Where in a table of rows each position of a part of a map is, for some pairs of masks.

    Attributes:
        slot: int64 [M, M], which of the n pairs two masks are.
        offset: int32 [n, h w], counted from the image's rows or from the pass's own; :data:`OUTSIDE` around the map.
        own: int32 [n, h w], 1 for rows of the pass's own box.
        height: h.
        width: w.
    """

    slot: Tensor
    offset: Tensor
    own: Tensor
    height: int
    width: int


def spread(affected: Tensor, level: Level) -> Tensor:
    """Which positions of the map that a level makes see one of ``affected``, bool [M, H, W] -> [M, H', W']."""
    size = [level.size(length) for length in affected.shape[1:]]
    spans = [level.span(0, length) for length in size]
    around = [(-spans[axis][0], sum(spans[axis]) - affected.shape[1 + axis]) for axis in (0, 1)]
    given = F.pad(affected[:, None].float(), (*around[1], *around[0]))
    return F.max_pool2d(given, level.kernel + level.step - 1, stride=level.step)[:, 0] > 0


def common_boxes(affected: Tensor) -> Tensor:
    """The smallest box around the positions that two masks share, int64 [M, M, 4]; of height and width 0 if there is none."""
    both = affected[:, None] & affected[None]  # [M, M, H, W]
    sides = []
    for axis in (3, 2):
        line = both.any(dim=axis)  # rows, then columns
        first, last = line.int().argmax(dim=2), line.shape[2] - line.flip(2).int().argmax(dim=2)
        sides.append((first, (last - first) * line.any(dim=2)))
    return torch.stack([sides[0][0], sides[1][0], sides[0][1], sides[1][1]], dim=2)


def _span(level: Level, first: Tensor, count: int) -> Tensor:
    """The positions that ``count`` positions from ``first`` [n] on see, int64 [n, m]."""
    begin, length = level.span(0, count)
    return first[:, None] * level.step + begin + torch.arange(length)
