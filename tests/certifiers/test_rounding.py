"""Rounding bounds, compared with exact rational arithmetic (fractions through ``reference.py``) and with float64."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals, rounding
from patchcert_cli.certifiers.bounds.first_layer import Split
from patchcert_cli.layers import precision
from patchcert_cli.threats import Patch, Sparse, Threat

from . import reference
from .networks import LAYOUTS, images, network, rounding_error

THREATS: list[Threat] = [Patch(2, 2), Sparse(2)]
SHAPE = (1, 3, 3)


def dense(seed: int, kind: str) -> nn.Sequential:
    """A small network with ordinary, huge, or cancelling weights, in float32."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3))
        first, last = net[1], net[3]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        if kind == "huge":
            first.weight.mul_(1e3)
            last.weight.mul_(1e3)
        elif kind == "mixed":
            first.weight.mul_(10 ** (6 * torch.rand_like(first.weight) - 3))
        elif kind == "cancelling":
            first.weight[:, 0::2] = 1000 + first.weight[:, 0::2]
            first.bias.sub_(2000)
            last.weight[1] = last.weight[0] + 1e-4 * last.weight[1]
    return net.requires_grad_(False)


def worst(net: nn.Module, x: Tensor, target: Tensor, threat: Threat) -> Tensor:
    return intervals.lower_margins(net, x, target, threat).values.double()


@pytest.mark.parametrize("kind", ["plain", "huge", "mixed", "cancelling"])
def test_margins_stay_within_their_bound_of_the_exact_ones(kind: str) -> None:
    seen = 0
    for seed in range(6):
        net, x = dense(seed, kind), images(SHAPE, 3, seed)
        target = torch.tensor([0, 1, 2])
        path = reference.steps(net, SHAPE, Fraction)
        for threat, wide in product(THREATS, (False, True)):
            module, pixels = (precision.double(net), x.double()) if wide else (net, x)
            found = worst(module, pixels, target, threat)
            bound = rounding_error(module, pixels, threat, pixels.dtype)
            for i, y in enumerate(target.tolist()):
                v = reference.numbers(x[i], Fraction)
                if isinstance(threat, Patch):
                    table = reference.patch_margins(path, v, SHAPE, (2, 2), y)
                    exact = [min(row[c] for row in table) for c in range(3)]
                else:
                    exact = reference.sparse_margins(path, v, SHAPE, 2, "pixel", y)
                for c in range(3):
                    assert abs(Fraction(float(found[i, c])) - exact[c]) <= Fraction(float(bound[i])), (kind, seed, threat, wide)
                    seen += 1
    assert seen == 6 * 4 * 9


@pytest.mark.parametrize("kind", ["plain", "huge", "mixed", "cancelling"])
def test_forward_error_bounds_the_deployed_differences(kind: str) -> None:
    for seed in range(6):
        net = dense(seed, kind)
        exact = precision.double(net)
        bound = Fraction(rounding.forward_error(Split.of(exact, SHAPE[0]), torch.zeros(1, *SHAPE)))
        path = reference.steps(net, SHAPE, Fraction)
        for image in torch.cat([images(SHAPE, 6, seed), torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)]):
            logits = [Fraction(value) for value in exact(image[None].double())[0].tolist()]
            truth = reference.forward(path, reference.numbers(image, Fraction))
            for a, b in product(range(3), repeat=2):
                assert abs((logits[a] - logits[b]) - (truth[a] - truth[b])) <= bound, (kind, seed)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_float32_stays_within_its_bound_of_float64(name: str, scale: float) -> None:
    layout = LAYOUTS[name]
    threats: list[Threat] = [Patch(2, 2), Patch(*layout.shape[1:]), *([Sparse(3), Sparse(3, "value")] if layout.sparse else [])]
    ratios = []
    for seed in range(3):
        net, x = network(name, seed, scale=scale), images(layout.shape, 5, seed)
        target = torch.tensor([0, 1, 2, 2, 0])
        for threat in threats:
            gap = (worst(net, x, target, threat) - worst(precision.double(net), x.double(), target, threat)).abs().amax(dim=1)
            bound = rounding_error(net, x, threat, torch.float32)
            assert bool((gap <= bound).all()), (seed, threat)
            ratios.append(float((gap / bound).max()))
    assert max(ratios) > 0, "rounding was never seen, so the bound was never tested"


def test_a_large_batch_norm_shift_counts() -> None:
    """``bias - mean * scale`` cancels: the error is that of its terms, not of their difference."""
    norm = nn.BatchNorm2d(1)
    net = nn.Sequential(norm, nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval().requires_grad_(False)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.fill_(1e6)
    norm.running_var.fill_(1.7)
    norm.bias.fill_(1e6 / float((norm.running_var + norm.eps).sqrt()))
    x, target = images((1, 2, 2), 20), torch.arange(20) % 3
    gap = (worst(net, x, target, Patch(1, 1)) - worst(precision.double(net), x.double(), target, Patch(1, 1))).abs().amax(dim=1)
    assert bool((gap <= rounding_error(net, x, Patch(1, 1), torch.float32)).all())


@pytest.mark.parametrize("unit", list(rounding.UNIT))
def test_the_bound_shrinks_with_the_precision(unit: torch.dtype) -> None:
    net, x = network("mlp2"), images(LAYOUTS["mlp2"].shape, 3)
    bound = rounding_error(net, x, Patch(2, 2), unit)
    assert bound.dtype == torch.float64
    assert bool((bound > 0).all())
    assert float(bound.max()) < rounding.UNIT[unit] * 1e4
