"""Random translation, against moving each image pixel by pixel."""

from __future__ import annotations

import torch

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
