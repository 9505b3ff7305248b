"""Boxes as masks and sums over them, against loops over pixels."""

from __future__ import annotations

import torch

from patchcert_cli.layers.boxes import box_mask, box_sums
from patchcert_cli.threats import Patch


def test_masks_and_sums_are_those_of_loops() -> None:
    boxes = Patch(2, 3).locations(4, 5)
    masks = box_mask(boxes, 4, 5)
    maps = torch.randint(-9, 10, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    sums = box_sums(maps, boxes)
    assert masks.shape == (9, 4, 5) and masks.dtype == torch.bool and sums.dtype == maps.dtype
    for at, (top, left, height, width) in enumerate(boxes.tolist()):
        inside = {(row, column) for row in range(top, top + height) for column in range(left, left + width)}
        assert set(map(tuple, masks[at].nonzero().tolist())) == inside
        assert sums[:, at].tolist() == [sum(int(one[pixel]) for pixel in inside) for one in maps]


def test_boxes_keep_their_leading_axes_and_may_be_empty() -> None:
    boxes = torch.tensor([[[0, 0, 2, 2], [1, 1, 0, 3]]])
    masks = box_mask(boxes, 3, 3)
    assert masks.shape == (1, 2, 3, 3) and int(masks[0, 0].sum()) == 4 and not bool(masks[0, 1].any())
