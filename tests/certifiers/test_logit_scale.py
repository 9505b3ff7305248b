"""Scales of logits, and whether float64 is float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.masks import logit_scale
from patchcert_cli.certifiers.masks.logit_scale import Calibration, CalibrationCache


def small(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 3)).requires_grad_(False).eval()


class Around(nn.Module):
    """A classifier that does something to its last layer's output, or calls it more than once."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how, self.scale = nn.Flatten(), how, 100.0
        self.other, self.head = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        v = self.body(x)
        if self.how == "plain":
            self.other(v)
            return self.head(v)  # type: ignore[no-any-return]
        if self.how == "earlier":
            logits: Tensor = self.head(v)
            self.other(v)
            return logits
        if self.how == "in place":
            return self.head(v).mul_(self.scale)  # type: ignore[no-any-return]
        if self.how == "mirrored":
            return (self.head(v) + self.head(v.flip(1))) / 2  # type: ignore[no-any-return]
        return self.head(v) * self.scale  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("how", "name"), [("plain", "head"), ("earlier", "head"), ("in place", None), ("mirrored", None), ("times", None)]
)
def test_the_last_layer_is_the_one_whose_output_the_logits_are(how: str, name: str | None) -> None:
    network, x = Around(how).requires_grad_(False), torch.rand(5, 1, 4, 4)
    assert logit_scale.head_of(network, lambda: network(x)) == name


def test_a_convolution_may_be_the_last_layer() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten()).requires_grad_(False)
    x = torch.rand(5, 1, 4, 4)
    assert logit_scale.head_of(network, lambda: network(x)) == "2"
    maps = nn.Sequential(nn.Conv2d(1, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).requires_grad_(False)
    assert logit_scale.head_of(maps, lambda: maps(x)) is None, "its output is averaged"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_is_the_largest_sum_of_terms(dtype: torch.dtype) -> None:
    network, x = small().to(dtype), torch.rand(5, 1, 4, 4, dtype=dtype)
    with logit_scale.recording_head(network, "3") as watch:
        logits = network(x)
    v, layer = network[:3](x), network[3]
    expected = (v.abs() @ layer.weight.abs().T + layer.bias.abs()).amax(dim=1).double()
    assert torch.allclose(watch.scale(logits), expected, rtol=1e-5)
    with logit_scale.recording_head(network, None) as none:
        network(x)
    assert torch.equal(none.scale(logits), logits.double().abs().amax(dim=1))
    with logit_scale.recording_head(network, "3") as twice:
        network(x)
        network(x)
    assert torch.equal(twice.scale(logits), logits.double().abs().amax(dim=1)), "which call is meant is not known"
    assert not network[3]._forward_hooks


def test_logits_that_vanish_keep_their_scale() -> None:
    network = small()
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    near = logit_scale.shrunk(network, x, steps=40)
    assert near is not None and torch.equal((near * 255).round(), near * 255)
    with logit_scale.recording_head(network, "3") as watch:
        logits = network(near)
    spread = logits - logits.mean(dim=1, keepdim=True)
    before = network(x) - network(x).mean(dim=1, keepdim=True)
    assert float(spread.abs().amax()) < 0.2 * float(before.abs().amax())
    assert bool((watch.scale(logits) > 3 * spread.abs().amax(dim=1)).all())


def test_a_network_without_gradients_is_not_driven_anywhere() -> None:
    def quantized(x: Tensor) -> Tensor:
        return x.detach().flatten(1)[:, :3]

    assert logit_scale.shrunk(quantized, torch.rand(2, 1, 4, 4)) is None


class Fake(nn.Module):
    """Computes in float32, and says float64."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.wide, self.how = [inner], copy.deepcopy(inner).double(), how  # a list, which nothing converts

    def forward(self, x: Tensor) -> Tensor:
        inner: Any = self.inner[0]
        if self.how == "whole":
            logits: Tensor = inner(x.float())
        elif self.how == "end":  # a third of a float32 is none
            logits = inner(x.float()).to(x) / 3
        else:  # all but the last layer is float64
            wide: Any = self.wide if x.dtype == torch.float64 else inner
            logits = inner[3](wide[:3](x).float())
        return logits.to(x)


@pytest.mark.parametrize("how", ["whole", "end", "middle"])
def test_a_float64_that_is_none_is_not_believed(how: str) -> None:
    x = 0.05 + 0.9 * torch.rand(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fake, honest = Fake(small(), how), small().double()
    assert fake(x).dtype == torch.float64 and torch.allclose(fake(x), honest(x) / (3 if how == "end" else 1), atol=1e-5)
    assert not logit_scale.responds(fake, x)
    assert logit_scale.responds(honest, x)


def test_what_does_not_respond_is_not_believed() -> None:
    def steps(x: Tensor) -> Tensor:
        return (x * 255).round().flatten(1)[:, :3]

    x = torch.full((1, 1, 4, 4), 0.501, dtype=torch.float64)
    assert not logit_scale.responds(steps, x)
    assert not logit_scale.responds(lambda x: torch.ones(len(x), 3, dtype=x.dtype), x)


def test_what_was_found_out_is_kept_until_the_weights_change() -> None:
    network, memory, asked = small(), CalibrationCache(), [0]

    def find() -> Calibration:
        asked[0] += 1
        return Calibration(None, float(asked[0]), True)

    assert [memory.of(network, 1, find).least for _ in range(3)] == [1, 1, 1]
    with torch.no_grad():
        network[3].weight.add_(1)
    assert memory.of(network, 1, find).least == 2
    assert memory.of(network, 2, find).least == 3, "another setting"
    network.train()
    assert memory.of(network, 2, find).least == 4
    assert memory.of(small(), 2, find).least == 5


@pytest.mark.parametrize(("value", "power"), [(1.0, 1.0), (1.01, 2.0), (0.3, 0.5), (5.0, 8.0)])
def test_the_smallest_scale_is_a_power_of_two(value: float, power: float) -> None:
    assert logit_scale.power_above(value) == power
    assert logit_scale.power_above(0.0) > 0
