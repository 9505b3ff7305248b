"""Channels last: for networks of convolutions and batch norm, as far as the self-test allows, with the same verdicts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.masks import masked_predictions
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.errors import UsageError
from patchcert_cli.evaluation import models
from patchcert_cli.threats import Patch

SHAPE = (3, 12, 12)


class Noting(nn.Module):
    """Notes the memory formats of its inputs, and errs by ``much`` where they are channels last, in batches from ``size`` on."""

    def __init__(self, much: float = 0.0, size: int = 1) -> None:
        super().__init__()
        self.much, self.size, self.seen = much, size, set[tuple[str, bool]]()

    def forward(self, x: Tensor) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        self.seen.add((str(x.dtype), last))
        return x + self.much * (last and len(x) >= self.size)


def around(*layers: nn.Module, classes: int = 3) -> PatchCleanser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *layers,
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, classes),
        )
    plan, names = MaskSpec(("patch:2x2",), per_axis=3), tuple(map(str, range(classes)))
    return PatchCleanser(network.eval(), input_shape=SHAPE, classes=names, masks=plan, fill=(0.4,) * 3).eval()


def images() -> Tensor:
    return torch.rand(24, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_quick_passes_are_channels_last_and_passes_in_doubt_are_not() -> None:
    noting = Noting()
    made = around(noting)
    made.test_once()
    noting.seen.clear()
    x = images()
    found = made.certify(x, Patch(2, 2))
    assert ("torch.float32", True) in noting.seen and ("torch.float64", True) not in noting.seen
    assert ("torch.float32", False) not in noting.seen
    plain = around(Noting())
    plain.test_once()
    views_of = plain.views()
    plain._memory.amend(masked_predictions.replace(views_of.calibration, last=False))  # type: ignore[union-attr]
    same = plain.certify(x, Patch(2, 2))
    assert torch.equal(found.certified, same.certified) and torch.equal(found.prediction, same.prediction)
    assert 0 < int(found.certified.sum()) < 24 and torch.equal(found.passes, same.passes)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 50])
def test_a_network_that_errs_so_is_used_without(size: int) -> None:
    """At once where six images show it, or in the self-test where only large batches do."""
    noting = Noting(1e-2, size)
    made = around(noting)
    made.test_once()
    noting.seen.clear()
    made.certify(images(), Patch(2, 2))
    assert ("torch.float32", True) not in noting.seen


def test_other_networks_stay_as_they_are() -> None:
    noting = Noting()
    network = nn.Sequential(noting, nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 3)).eval()
    plan = MaskSpec(("patch:2x2",), per_axis=3)
    made = PatchCleanser(network, input_shape=SHAPE, classes=("a", "b", "c"), masks=plan, fill=(0.4,) * 3).eval()
    made.certify(images(), Patch(2, 2))
    assert not any(last for _, last in noting.seen)


def test_bfloat16_is_not_offered_where_it_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_predictions, "computes_in_bfloat16", lambda device: True)
    made = around(classes=3)
    made.prediction_dtype = "bfloat16"
    assert made.views().quick == ("bfloat16", "float32")  # type: ignore[union-attr]
    many = around(classes=masked_predictions.MANY)
    many.labels = "bfloat16"
    assert many.views().quick == ("float32",)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="with 1000 classes --precision bfloat16 gains nothing"):
        models.put_around(many.network, "patchcleanser", SHAPE, many.classes, many.plan, None, "bfloat16")
