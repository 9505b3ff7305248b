"""Random changes of training images, against moving each image pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import torch

from patchcert_cli.defenses import Augment
from patchcert_cli.defenses._masked import MaskedOptions
from patchcert_cli.defenses.bagcert import BagCertOptions
from patchcert_cli.defenses.ibp.options import IntervalOptions
from patchcert_cli.training import augment


def test_a_shift_moves_whole_images_and_fills_with_black() -> None:
    x = torch.rand(40, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    moved = augment.shift(x, 2, torch.Generator().manual_seed(1))
    moves = torch.randint(5, (2, 40, 1), generator=torch.Generator().manual_seed(1))[:, :, 0].t() - 2
    for image, (down, right) in enumerate(moves.tolist()):
        for row in range(5):
            for column in range(6):
                r, c = row + down, column + right
                expected = x[image, :, r, c] if 0 <= r < 5 and 0 <= c < 6 else torch.zeros(2)
                assert torch.equal(moved[image, :, row, column], expected)


def test_no_shift_is_the_same_tensor() -> None:
    x = torch.rand(3, 1, 4, 4)
    assert augment.shift(x, 0, torch.Generator()) is x


def test_a_warp_samples_the_image_where_the_turned_and_scaled_pixel_lies() -> None:
    ramp = torch.stack([torch.arange(9.0)[:, None].expand(9, 13), torch.arange(13.0)[None].expand(9, 13)])
    x = (ramp / 20 + 0.1).expand(30, 2, 9, 13)
    found = augment.warp(x, 0.2, 30.0, torch.Generator().manual_seed(2))
    drawn = 2 * torch.rand(2, 30, generator=torch.Generator().manual_seed(2)) - 1
    for image, (zoom, turn) in enumerate(drawn.t().tolist()):
        size, angle = 1 + 0.2 * zoom, math.radians(30.0) * turn
        for row, column in ((4, 6), (3, 4), (5, 8), (4, 3)):  # far enough inside that four pixels on each side exist
            down, right = row - 4, column - 6
            there = (
                4 + (math.sin(angle) * right + math.cos(angle) * down) / size,
                6 + (math.cos(angle) * right - math.sin(angle) * down) / size,
            )
            if all(2 <= at <= last - 2 for at, last in zip(there, (8, 12), strict=True)):
                expected = torch.tensor(there) / 20 + 0.1  # bicubic values of a ramp are it, up to 0.05 pixels
                torch.testing.assert_close(found[image, :, row, column], expected, atol=4e-3, rtol=0)


def test_a_tint_is_one_factor_and_one_offset_for_each_channel_of_each_image() -> None:
    x = 0.3 + 0.4 * torch.rand(8, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = augment.tint(x, 0.2, torch.Generator().manual_seed(3))
    drawn = 0.2 * (2 * torch.rand(2, 8, 3, 1, 1, generator=torch.Generator().manual_seed(3)) - 1)
    torch.testing.assert_close(found, (x * (1 + drawn[0]) + drawn[1]).clamp(0, 1))
    assert float(augment.tint(x, 0.9, torch.Generator().manual_seed(3)).amax()) <= 1


def test_changes_that_are_switched_off_draw_nothing() -> None:
    x, generator = torch.rand(3, 3, 4, 4), torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert augment.apply(x, Augment(), generator) is x
    assert torch.equal(generator.get_state(), before)


def test_every_change_is_made_from_the_options_of_a_defense() -> None:
    chosen: dict[str, Any] = {"flip": False, "shift": 1, "zoom": 0.1, "turn": 5.0, "tint": 0.2}
    assert BagCertOptions(**chosen).augment(0, 1) == Augment(**chosen)
    assert MaskedOptions(**chosen).augment(0, 1) == Augment(**chosen)
    assert IntervalOptions(**chosen, bounded_epochs=1, bounded_shift=2).augment(0, 2) == Augment(**chosen)
    assert IntervalOptions(**chosen, bounded_epochs=1, bounded_shift=2).augment(1, 2) == Augment(**{**chosen, "shift": 2})
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, value in chosen.items():
        if value:
            alone = Augment(**{name: value})
            assert not torch.equal(augment.apply(x, alone, torch.Generator().manual_seed(1)), x), name
