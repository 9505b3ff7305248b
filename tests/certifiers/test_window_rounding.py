"""Rounding of bounds in windows, compared with exact fractions (``reference.py``) and with float64."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals, rounding
from patchcert_cli.certifiers.bounds.first_layer import Split
from patchcert_cli.certifiers.bounds.margin_chunks import WindowMargins, margin_iterator
from patchcert_cli.certifiers.bounds.rules import UNIT
from patchcert_cli.certifiers.bounds.windows.rounding import Errors
from patchcert_cli.layers import precision
from patchcert_cli.threats import Patch

from . import reference
from .networks import LAYOUTS, images, network, rounding_error
from .test_windows import EVERY, MORE

PATCH = Patch(2, 2)
KINDS = ("plain", "huge", "mixed", "cancelling", "dead")


@pytest.fixture(autouse=True)
def more_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, layout in MORE.items():
        monkeypatch.setitem(LAYOUTS, name, layout)


def convolutional(seed: int, kind: str) -> nn.Sequential:
    """Two convolutions with ordinary, huge, unequal, cancelling weights, or with hardly a neuron alive, in float32."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Conv2d(1, 2, 2, 1, 1), nn.ReLU(), nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1)),
            *(nn.Flatten(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)),
        )
        first, second, last = net[0], net[2], net[-1]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        assert isinstance(last, nn.Linear)
        if kind == "huge":
            first.weight.mul_(1e3)
            second.weight.mul_(1e3)
        elif kind == "mixed":
            first.weight.mul_(10 ** (6 * torch.rand_like(first.weight) - 3))
        elif kind == "cancelling":
            first.weight[:, :, :, 0] += 1000
            first.bias.sub_(1000)  # type: ignore[union-attr]
            last.weight[1] = last.weight[0] + 1e-4 * last.weight[1]
        elif kind == "dead":
            first.bias.sub_(1)  # type: ignore[union-attr]
            second.bias.sub_(0.5)  # type: ignore[union-attr]
    return net.eval().requires_grad_(False)


def watched(net: nn.Sequential, x: Tensor, target: Tensor, patch: Patch) -> tuple[Tensor, Errors]:
    """Margins and what the stream found out about their rounding."""
    stream = margin_iterator(Split.of(net, x.shape[1]), x, patch, 1.0, watch=True)
    with torch.no_grad():
        values = intervals.minimum(stream, target).values
    assert isinstance(stream, WindowMargins)
    assert stream.errors is not None
    return values, stream.errors


@pytest.mark.parametrize("kind", KINDS)
def test_margins_stay_within_their_bounds_of_the_exact_ones(kind: str) -> None:
    shape, seen = (1, 4, 4), 0
    for seed in range(3):
        net, x, target = convolutional(seed, kind), images(shape, 3, seed), torch.tensor([0, 1, 2])
        path = reference.steps(net, shape, Fraction)
        exact = [
            reference.patch_margins(path, reference.numbers(x[i], Fraction), shape, (2, 2), y)
            for i, y in enumerate(target.tolist())
        ]
        for wide in (False, True):
            module, pixels = (precision.double(net), x.double()) if wide else (net, x)
            found, errors = watched(module, pixels, target, PATCH)  # type: ignore[arg-type]
            bound = errors.double if wide else errors.single
            for i, table in enumerate(exact):
                for c in range(3):
                    off = abs(Fraction(float(found[i, c])) - min(row[c] for row in table))
                    assert off <= Fraction(float(bound[i])), (seed, wide, c)
                    seen += 1
    assert seen == 3 * 2 * 9


@pytest.mark.parametrize("kind", KINDS)
def test_the_deployed_pass_stays_within_its_bound_under_attack(kind: str) -> None:
    shape, generator = (1, 4, 4), torch.Generator().manual_seed(0)
    for seed in range(4):
        net, x = convolutional(seed, kind), images(shape, 2, seed)
        exact, path = precision.double(net), reference.steps(net, shape, Fraction)
        _, errors = watched(net, x, torch.tensor([0, 1]), PATCH)
        for top, left in product(range(3), range(3)):
            attacked = x.clone()
            attacked[:, :, top : top + 2, left : left + 2] = torch.rand(2, 1, 2, 2, generator=generator).round(decimals=1)
            for i, row in enumerate(exact(attacked.double()).tolist()):
                truth = reference.forward(path, reference.numbers(attacked[i], Fraction))
                for a, b in product(range(3), repeat=2):
                    off = abs(Fraction(row[a]) - Fraction(row[b]) - (truth[a] - truth[b]))
                    assert off <= Fraction(float(errors.double[i])), (seed, top, left)


@pytest.mark.parametrize("name", [name for name in EVERY if not name.startswith("mlp") and name != "relu-last"])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_float32_stays_within_its_bound_of_float64(name: str, scale: float) -> None:
    shape, ratios = EVERY[name].shape, []
    for seed in range(2):
        net, x, target = network(name, seed, scale=scale), images(shape, 5, seed), torch.arange(5) % 3
        for patch in (PATCH, Patch(*shape[1:])):
            found, errors = watched(net, x, target, patch)
            wide, same = watched(precision.double(net), x.double(), target, patch)  # type: ignore[arg-type]
            off = (found - wide).abs().amax(dim=1)
            assert bool((off <= errors.single + errors.double).all()), (seed, patch)
            before = rounding_error(net, x, patch, torch.float32)
            assert bool((errors.single <= before * (1 + 1e-6)).all()), "knowing more made the bound worse"
            before = rounding_error(precision.double(net), x, patch, torch.float64)  # type: ignore[arg-type]
            assert bool((same.double <= before * (1 + 1e-6)).all())
            ratios.append(float((off / errors.single).max()))
    assert max(ratios) > 0, "rounding was never seen, so the bound was never tested"


def test_neurons_that_stay_dead_carry_no_error() -> None:
    net, x = network("five-layers", 0), images(MORE["five-layers"].shape, 4)
    blind = rounding_error(net, x, PATCH, torch.float32)
    _, errors = watched(net, x, torch.arange(4) % 3, PATCH)
    assert bool((errors.single < blind / 2).all())
    for layer in net:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            layer.bias.sub_(2)
    _, none = watched(net, x, torch.arange(4) % 3, PATCH)
    assert bool((none.single < errors.single / 10).all())
    assert bool((none.single > 0).all())


@pytest.mark.parametrize("exponent", [-60, -20])
def test_a_margin_within_rounding_is_not_certified_and_a_clear_one_is(exponent: int) -> None:
    """The margin is 2**exponent, but for rounding: lost in float64 for -60, beyond float32 but clear in float64 for -20."""
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2)).requires_grad_(False)
    first, last = net[0], net[-1]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Linear)
    last.weight[1] = last.weight[0]
    last.bias.copy_(torch.tensor([2.0**exponent, 0.0]))
    x = images((1, 4, 4), 12)
    exact, target = precision.double(net), torch.zeros(12, dtype=torch.int64)
    assert bool((rounding_error(net, x, PATCH, torch.float32) > 2.0**-20).all())
    proof = rounding.prove(net, exact, x, target, PATCH)
    assert (proof.margin > proof.tolerance).tolist() == [exponent == -20] * 12


@pytest.mark.parametrize("name", ["five-layers", "conv-stride", "overlapping-pools", "global-average", "uneven-average"])
def test_few_locations_in_float64_decide_like_all_of_them(name: str) -> None:
    """A bias is moved so that the margin of one image after the other is next to nothing, and float32 leaves it open."""
    shape, decided = EVERY[name].shape, []
    margins = []
    for index in range(3):
        exact, one = precision.double(network(name, index)), images(shape, 3, index).double()[index : index + 1]
        target = exact(one).argmax(dim=1)
        margins.append((int(target), float(_whole(exact, one, target).margin)))
    for (index, (label, margin)), shift in product(enumerate(margins), (-1e-9, 1e-9, 1e-6)):
        net, x = network(name, index), images(shape, 3, index)
        net[-1].bias[label] -= margin - shift  # type: ignore[operator, index]
        exact = precision.double(net)
        target = exact(x.double()).argmax(dim=1)
        proof, whole = rounding.prove(net, exact, x, target, PATCH), _whole(exact, x.double(), target)
        certified = proof.margin > proof.tolerance
        assert torch.equal(certified, whole.margin > whole.tolerance)
        assert bool(((proof.margin - whole.margin).abs() <= proof.tolerance + whole.tolerance).all())
        assert bool(((proof.margin - whole.margin).abs() <= 1e-12)[certified & (proof.tolerance < 1e-9)].all())
        decided += certified.tolist()
    assert 0 < sum(decided) < len(decided)


def _whole(exact: nn.Module, x: Tensor, target: Tensor) -> rounding.Proof:
    """The proof from all locations in float64."""
    return rounding.prove(exact, exact, x, target, PATCH)


def test_overflow_in_a_window_is_not_certified() -> None:
    """Sums overflow float32 to minus infinity, which the ReLU turns into an innocent zero."""
    net = nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)).requires_grad_(False)
    first, last = net[0], net[-1]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Linear)
    first.weight.copy_(torch.tensor([-3e38, -3e38, 3e38, 3e38]).reshape(1, 1, 2, 2))
    first.bias.fill_(1e38)  # type: ignore[union-attr]
    last.weight.copy_(torch.tensor([[0.0] * 4, [1e-38] * 4]))
    last.bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.cat([torch.ones(1, 1, 3, 3), images((1, 3, 3), 9)])
    exact = precision.double(net)
    target = exact(x.double()).argmax(dim=1)
    proof = rounding.prove(net, exact, x, target, Patch(1, 1))
    certified = proof.margin > proof.tolerance
    for row, column, value in product(range(3), range(3), (0.0, 1.0)):
        changed = x.clone()
        changed[:, :, row, column] = value
        moved = exact(changed.double()).argmax(dim=1) != target
        assert not bool((moved & certified).any())
    assert UNIT[torch.float32] == 2.0**-24
