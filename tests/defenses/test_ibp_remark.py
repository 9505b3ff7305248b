"""What a user is told when a network cannot be bounded in windows."""

from __future__ import annotations

from torch import nn

from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.threats import Patch, Sparse


def test_a_global_layer_in_front_of_the_dense_one_is_named() -> None:
    layers = [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)]
    slow = IntervalDefense(nn.Sequential(*layers), input_shape=(1, 6, 6), classes=("a", "b", "c"))
    assert "from AdaptiveAvgPool2d on" in slow.note(Patch(2, 2))
    assert slow.note(Sparse(2)) == ""
    quick = IntervalDefense(
        nn.Sequential(*layers[:2], nn.Flatten(), nn.Linear(72, 3)), input_shape=(1, 6, 6), classes=("a", "b", "c")
    )
    assert quick.note(Patch(2, 2)) == ""
