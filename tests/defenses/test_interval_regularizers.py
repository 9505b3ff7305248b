"""The start and the penalties of Shi et al.: widths that stay, and gradients that push the right way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.certifiers.bounds import pairwise
from patchcert_cli.certifiers.bounds.rules import Box
from patchcert_cli.defenses.ibp import regularizers as regularizers
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.defenses.ibp.options import IntervalOptions
from patchcert_cli.threats import Patch, Sparse, Threat
from tests.examples import section

NETWORKS = {
    "mlp": {"hidden": (300, 300, 300, 300)},
    "cnn": {"channels": (16, 16, 16, 16), "strides": (1, 2, 1, 2), "hidden": (100, 100)},
}


def build(name: str) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"input_shape": (1, 16, 16), "classes": 10, "mean": (0.4,), "std": (0.5,)}
        return models.build(name, {**shape, **NETWORKS[name]})


def growth(network: nn.Sequential, threat: Threat) -> list[float]:
    """Mean radius in front of each ReLU, over the input's."""
    x = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    location = torch.full((8,), 30) if isinstance(threat, Patch) else torch.zeros(8, dtype=torch.int64)
    with torch.no_grad():
        width, boxes = pairwise.relu_boxes(network, x, threat, location)
    return [float((upper - lower).mean() / 2 / width) for lower, upper in boxes]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_initialization_keeps_widths(name: str) -> None:
    """Borders of convolutions see less; the usual initialization grows by an order of magnitude with every few layers."""
    network = build(name)
    usual = growth(network, Patch(8, 8))
    assert usual[-1] > 50 and usual[-1] > 10 * usual[0]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        regularizers.initialize(network)
    kept = growth(network, Patch(8, 8))
    assert all(0.5 < ratio < 4 for ratio in kept)
    assert max(kept) / min(kept) < 3
    assert all(layer.bias is None or not layer.bias.any() for layer in network if isinstance(layer, nn.Linear | nn.Conv2d))


def test_the_input_width_is_that_of_a_boxed_image() -> None:
    network, x = build("mlp"), torch.rand(3, 1, 16, 16)
    for threat, share in ((Patch(4, 2), 8 / 256), (Sparse(5), 5 / 256), (Sparse(5, "value"), 5 / 256)):
        width, _ = pairwise.relu_boxes(network, x, threat, torch.zeros(3, dtype=torch.int64), epsilon=0.3)
        assert float(width) == pytest.approx(share * 0.15 / 0.5)


def test_the_options_decide_the_start() -> None:
    config = {"input_shape": [1, 4, 4], "classes": list("abc")}
    network = {"name": "mlp", "options": {"hidden": [6], "mean": [0.3], "std": [0.4]}}
    defense = IntervalDefense.from_config(section("ibp", {**config, "network": network}))
    before = {name: value.clone() for name, value in defense.state_dict().items()}
    assert defense.init_weights(IntervalOptions()) is None
    assert all(torch.equal(value, before[name]) for name, value in defense.state_dict().items())
    assert defense.init_weights(IntervalOptions(init="ibp")) is None
    assert not any(torch.equal(value, before[name]) for name, value in defense.state_dict().items())


def boxes_of(center: Tensor, radius: Tensor) -> list[Box]:
    return [(center - radius, center + radius)]


def test_the_penalty_for_widening() -> None:
    width, radius = torch.tensor(0.5), torch.tensor([[2.0, 4.0]], requires_grad=True)
    penalty = regularizers.widening(width, boxes_of(torch.zeros(1, 2), radius))
    assert float(penalty.detach()) == pytest.approx((0.5 - 0.5 / 3) / 0.5)
    penalty.backward()  # type: ignore[no-untyped-call]
    assert radius.grad is not None and bool((radius.grad > 0).all())  # descent makes them narrower
    calm = regularizers.widening(width, boxes_of(torch.zeros(1, 2), torch.full((1, 2), 0.9)))
    assert float(calm) == 0


def test_the_penalty_for_imbalance() -> None:
    """On: centers 3 and 5. Off: center -1. Undecided: center 0.5. Means of 8 / 4 and 1 / 4; spreads by hand."""
    center, radius = torch.tensor([[3.0, 5.0, -1.0, 0.5]], requires_grad=True), torch.tensor([[1.0, 1, 0.5, 1]])
    penalty = regularizers.imbalance(boxes_of(center, radius))
    middle = 7.5 / 4
    on, off = (3 - middle) ** 2 + (5 - middle) ** 2, (-1 - middle) ** 2
    expected = ((0.5 - 1 / 8) + max(0.0, 0.5 - min(on / off, off / on))) / 0.5
    assert float(penalty.detach()) == pytest.approx(expected)
    penalty.backward()  # type: ignore[no-untyped-call]
    assert center.grad is not None
    assert center.grad[0, 2] > 0  # descent pushes what is off further off, towards balance
    evenly = regularizers.imbalance(boxes_of(torch.tensor([[2.0, -2.0]]), torch.ones(1, 2)))
    assert float(evenly) == 0


@pytest.mark.parametrize("center", [torch.tensor([[3.0, 5.0]]), torch.tensor([[-3.0, -5.0]]), torch.zeros(1, 2)])
def test_layers_that_are_all_on_or_off_have_finite_gradients(center: Tensor) -> None:
    center.requires_grad_()
    penalty = regularizers.imbalance(boxes_of(center, torch.ones(1, 2)))
    penalty.backward()  # type: ignore[no-untyped-call]
    assert center.grad is not None and bool(center.grad.isfinite().all())
    assert float(penalty.detach()) == pytest.approx(2.0)


def test_descent_on_the_penalties_lowers_growth() -> None:
    network = build("mlp")
    x = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    before = growth(network, Patch(8, 8))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(20):
        optimizer.zero_grad()
        width, boxes = pairwise.relu_boxes(network, x, Patch(8, 8), torch.full((8,), 30))
        regularizers.widening(width, boxes).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = growth(network, Patch(8, 8))
    assert all(a < b for a, b in zip(after, before, strict=True)) and after[-1] < before[-1] / 4
