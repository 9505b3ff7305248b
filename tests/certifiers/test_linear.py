"""Linear bounds: compared with ``crown.py``, with everything an attacker can do on tiny images, and with broken variants."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from soundness.arena import changes, draw_images, random_defense
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.linear import linear, relaxations
from patchcert_cli.certifiers.bounds.linear.linear import Engine, Query
from patchcert_cli.errors import UnsupportedThreat, UsageError
from patchcert_cli.layers import precision
from patchcert_cli.threats import Patch, Sparse, parse_threat

from . import crown, reference
from .linear_breaks import BREAKS, THREATS, Attack
from .networks import LAYOUTS, Shape, images, network

SPARSE_NAMES = [name for name, layout in LAYOUTS.items() if layout.sparse]
KINDS = ("mlp", "deep", "cnn", "strided", "linear")
TINY: list[tuple[str, Shape, int]] = list(product(KINDS, ((1, 4, 3), (2, 3, 3)), range(4)))


def engine(net: nn.Module, x: Tensor, target: Tensor, threat: Attack) -> Engine:
    return Engine(precision.double(net).requires_grad_(False), x.double(), target, threat)


def targets(net: nn.Module, x: Tensor) -> Tensor:
    """The first class for the first image, and so on: answers need not be right."""
    return torch.arange(len(x)) % net(x[:1]).shape[1]


def finite(table: Tensor, target: Tensor) -> Tensor:
    """The table without its target's column."""
    rows = [row[:, torch.arange(row.shape[1]) != y] for row, y in zip(table, target.tolist(), strict=True)]
    return torch.stack(rows)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-9 * (1 + expected.abs().max()))


def slopes(one: relaxations.Slope, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SLOPES", (one,))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("choice", [0, 1])
def test_patch_bounds_equal_one_location_after_the_other(name: str, choice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slopes((relaxations.zero, relaxations.adaptive)[choice], monkeypatch)
    shape, net = LAYOUTS[name].shape, network(name)
    x = images(shape, 2).double()
    target = targets(precision.double(net), x)
    path = reference.steps(net, shape)  # type: ignore[arg-type]
    for size, side in product([(1, 1), (2, 2), (3, 2), shape[1:]], [0, 1, 2]):
        found = linear.table(engine(net, x, target, Patch(*size)), side)
        for i, y in enumerate(target.tolist()):
            slow = crown.patch_bounds(path, reference.numbers(x[i]), shape, size, y, side, crown.SLOPES[choice])
            assert close(finite(found[i : i + 1], target[i : i + 1])[0], torch.tensor(np.delete(slow, y, axis=1))), (size, side)


@pytest.mark.parametrize("name", SPARSE_NAMES)
@pytest.mark.parametrize("choice", [0, 1])
def test_sparse_bounds_equal_sorted_gains(name: str, choice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slopes((relaxations.zero, relaxations.adaptive)[choice], monkeypatch)
    shape, net = LAYOUTS[name].shape, network(name)
    x = images(shape, 2).double()
    target = targets(precision.double(net), x)
    path = reference.steps(net, shape)  # type: ignore[arg-type]
    for threat in (Sparse(1), Sparse(3), Sparse(2, "value"), Sparse(5, "value"), Sparse(shape[1] * shape[2])):
        found = linear.table(engine(net, x, target, threat), 0)
        for i, y in enumerate(target.tolist()):
            slow = crown.sparse_bounds(path, reference.numbers(x[i]), shape, threat.k, threat.unit, y, crown.SLOPES[choice])
            assert close(finite(found[i : i + 1], target[i : i + 1])[0], torch.tensor(np.delete(slow, y))[None]), threat


def test_every_layout_was_compared() -> None:
    assert len(LAYOUTS) >= 20
    kinds = {type(layer) for name in LAYOUTS for layer in network(name)}
    assert {nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Conv2d} <= kinds


def tiny(kind: str, shape: Shape, seed: int) -> tuple[nn.Module, Tensor]:
    return random_defense(kind, shape, seed).network, draw_images(shape, 6, seed)


def violations(kind: str, shape: Shape, seed: int, threats: list[Attack]) -> tuple[list[str], float]:
    """Bounds above a margin that an attacker reaches, and the smallest distance between the two."""
    net, x = tiny(kind, shape, seed)
    exact = precision.double(net)
    target = exact(x.double()).argmax(dim=1)
    found, nearest = [], float("inf")
    for threat in threats:
        for side in (0, 1, 2) if isinstance(threat, Patch) else (0,):
            bound = linear.lower_margins(exact, x.double(), target, threat, side=side).values
            reached = lowest(exact, x.double(), target, threat)
            others = torch.arange(bound.shape[1]) != target[:, None]
            gap = (reached - bound)[others]
            nearest = min(nearest, float(gap.min()))
            if bool((gap < -engine(net, x, target, threat).loss).any()):
                found.append(f"{kind} {shape} {seed} {threat} side {side}: {float(gap.min())}")
    return found, nearest


def lowest(exact: nn.Module, x: Tensor, target: Tensor, threat: Attack) -> Tensor:
    """The smallest margins [B, K] over everything the attacker may write."""
    mask, value = changes((x.shape[1], x.shape[2], x.shape[3]), threat)
    rows = []
    for image, y in zip(x, target.tolist(), strict=True):
        logits = exact(torch.where(mask, value.double(), image))
        rows.append((logits[:, y, None] - logits).amin(dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize(("kind", "shape", "seed"), TINY)
def test_no_bound_exceeds_a_margin_that_is_reached(kind: str, shape: Shape, seed: int) -> None:
    found, nearest = violations(kind, shape, seed, THREATS)
    assert found == []
    assert nearest < 0.5, "never near: the bounds were not put to the test"


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_bound_exceeds_a_margin_of_a_sampled_content(name: str) -> None:
    """Every layout, many contents at every location: random ones, and the one that the linear form itself fears most."""
    shape, net = LAYOUTS[name].shape, network(name, 1)
    x, exact = images(shape, 3, 1).double(), precision.double(net).requires_grad_(False)
    target, patch = targets(exact, x), Patch(2, 3)
    bounds = linear.table(engine(net, x, target, patch), 1)
    generator = torch.Generator().manual_seed(0)
    for index, (top, left) in enumerate(patch.locations(*shape[1:])[:, :2].tolist()):
        draw = torch.rand(200, *shape, generator=generator, dtype=torch.float64)
        draw[:100] = draw[:100].round()
        for i, y in enumerate(target.tolist()):
            attacked = x[i].repeat(200, 1, 1, 1)
            attacked[:, :, top : top + 2, left : left + 3] = draw[:, :, top : top + 2, left : left + 3]
            logits = exact(attacked)
            reached = (logits[:, y, None] - logits).amin(dim=0)
            reached[y] = float("inf")
            assert bool((bounds[i, index] <= reached + 1e-9 * (1 + reached.abs())).all())


@pytest.mark.parametrize("name", LAYOUTS)
def test_slope_zero_is_never_below_interval_bounds_at_one_location(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slopes(relaxations.zero, monkeypatch)
    net, better = network(name), 0.0
    x = images(LAYOUTS[name].shape, 5)
    target = targets(net, x)
    threats: list[Attack] = [Patch(2, 2), *([Sparse(2), Sparse(2, "value")] if LAYOUTS[name].sparse else [])]
    for threat in threats:
        bounds = engine(net, x, target, threat)
        gain = finite(linear.table(bounds, 1), target) - finite(bounds.intervals(torch.arange(5)), target)
        assert float(gain.min()) > -1e-9
        better = max(better, float(gain.max()))
    assert better > 1e-3


@pytest.mark.parametrize("name", ["mlp2", "mlp-rgb", "conv-stride"])
def test_smaller_tiles_are_never_looser_with_slope_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one ReLU layer the line below and the line above only get closer as the box shrinks."""
    slopes(relaxations.zero, monkeypatch)
    net = network(name)
    if name == "conv-stride":
        net = nn.Sequential(*list(net)[:3], nn.Flatten(), nn.Linear(27, 3)).requires_grad_(False)
    x = images(LAYOUTS[name].shape, 5)
    target = targets(net, x)
    bounds = engine(net, x, target, Patch(2, 2))
    whole, four, two, one = (finite(linear.table(bounds, side), target) for side in (0, 4, 2, 1))
    for loose, tight in ((whole, four), (four, two), (two, one)):
        assert bool((loose <= tight + 1e-9).all())
    assert bool((whole < one - 1e-6).any())


def test_two_equal_neurons_cancel() -> None:
    """f_0 - f_1 = 0.1 + relu(z) - relu(z): interval bounds lose it, linear bounds keep it where z is mostly positive."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 2), nn.ReLU(), nn.Linear(2, 2)).requires_grad_(False)
    first, last = net[1], net[3]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    first.weight.fill_(1.0)
    first.bias.fill_(-0.05)
    last.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    last.bias.copy_(torch.tensor([0.1, 0.0]))
    bounds = engine(net, torch.zeros(1, 1, 3, 3), torch.tensor([0]), Patch(1, 1))
    assert float(bounds.intervals(torch.tensor([0]))[0, :, 1].max()) == pytest.approx(0.1 - 0.95)
    assert float(linear.table(bounds, 1)[0, :, 1].min()) == pytest.approx(0.1 - 0.05 * 0.95 - 0.05 * 0.05)


@pytest.mark.parametrize("name", ["mlp3", "conv-stride", "average-pool-first"])
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network(name), images(LAYOUTS[name].shape, 4)
    target = targets(net, x)
    bounds = engine(net, x, target, Patch(2, 2))
    whole = [linear.table(bounds, side) for side in (0, 1, 2)]
    monkeypatch.setattr(linear, "CHUNK_BYTES", {"cpu": 1})
    for before, side in zip(whole, (0, 1, 2), strict=True):
        assert close(finite(linear.table(bounds, side), target), finite(before, target))


def test_groups_of_wanted_pairs() -> None:
    wanted = torch.zeros(2, 6, 3, dtype=torch.bool)
    wanted[0, 1, 2] = wanted[0, 4, 0] = wanted[1, 5, 1] = wanted[1, 4, 1] = wanted[1, 0, 0] = True
    query = Query.grouped(wanted, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert query.image.tolist() == [0, 0, 1, 1]
    assert list(zip(query.group.tolist(), query.location.tolist(), strict=True)) == [(0, 1), (1, 4), (2, 0), (3, 4), (3, 5)]
    assert list(zip(query.owner.tolist(), query.rival.tolist(), strict=True)) == [(0, 2), (1, 0), (2, 0), (3, 1)]
    table = torch.full((2, 6, 3), -9.0)
    linear.raise_to(table, query, torch.arange(24.0).reshape(4, 6))
    assert sorted(table[table > -9].tolist()) == [1.0, 10.0, 12.0, 22.0, 23.0]
    assert float(table[1, 5, 1]) == 23


@pytest.mark.parametrize("kind", ["plain", "huge", "mixed", "cancelling"])
def test_rounding_stays_within_its_bound_where_bounds_are_exact(kind: str) -> None:
    """All neurons stay positive, so the bound is the smallest margin itself; that is computed in fractions."""
    ratios = []
    for seed in range(6):
        net, x = positive(seed, kind), images((1, 3, 3), 3, seed).double()
        target = torch.tensor([0, 1, 2])
        path = reference.steps(net, (1, 3, 3), Fraction)
        for threat in (Patch(2, 2), Sparse(2)):
            bounds = engine(net, x, target, threat)
            found = linear.table(bounds, 0)
            for i, y in enumerate(target.tolist()):
                v = reference.numbers(x[i], Fraction)
                for rival in {0, 1, 2} - {y}:
                    for location, exact in enumerate(smallest(path, v, threat, y, rival)):
                        gap = abs(Fraction(float(found[i, location, rival])) - exact)
                        assert gap <= Fraction(bounds.loss), (kind, seed, threat)
                        ratios.append(float(gap) / bounds.loss)
    assert max(ratios) > 0, "rounding was never seen, so the bound was never tested"


def positive(seed: int, kind: str) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3)).requires_grad_(False)
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
            last.weight[1] = last.weight[0] + 1e-4 * last.weight[1]
        first.bias.copy_(first.weight.abs().sum(dim=1) + 0.1)
    return net


def smallest(path: list[Any], v: Any, threat: Attack, target: int, rival: int) -> list[Fraction]:
    """Per location the smallest margin of a network whose neurons all stay positive, exactly."""
    first, last = path[0], path[2]
    row = (last.matrix[target] - last.matrix[rival]) @ first.matrix
    clean = row @ v + (last.matrix[target] - last.matrix[rival]) @ first.offset + last.offset[target] - last.offset[rival]
    change = [min(w * (1 - value), -w * value) for w, value in zip(row, v, strict=True)]
    if isinstance(threat, Sparse):
        return [clean + sum(sorted(change)[: threat.k])]
    starts = product(range(4 - threat.height), range(4 - threat.width))
    return [clean + sum(change[3 * (top + i) + left + j] for i, j in product(range(2), repeat=2)) for top, left in starts]


@pytest.mark.parametrize("name", ["mlp2", "conv-stride", "pool-last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_no_numbers_or_huge_lose_everything(name: str, value: float) -> None:
    for index in range(len(list(network(name).parameters()))):
        net = network(name)
        list(net.parameters())[index].view(-1)[0] = value
        x = images(LAYOUTS[name].shape, 2)
        loss = engine(net, x, torch.tensor([0, 1]), Patch(2, 2)).loss
        assert loss == float("inf") or (value == 1e30 and loss > 1e10)


@pytest.mark.parametrize("threat", ["patch:5x1", "sparse:21"])
def test_threats_that_do_not_fit_are_refused(threat: str) -> None:
    net, x = precision.double(network("mlp2")), images((1, 4, 5), 1).double()
    with pytest.raises(UsageError):
        linear.lower_margins(net, x, torch.tensor([0]), parse_threat(threat))


def test_unknown_layers_are_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.Sigmoid(), nn.Linear(6, 3)).double()
    with pytest.raises(UnsupportedThreat, match="Sigmoid"):
        linear.lower_margins(net, images((1, 3, 3), 1).double(), torch.tensor([0]), Patch(1, 1))


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_bounds_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, threats = BREAKS[broken]
    apply(monkeypatch)
    assert any(violations(*case, threats)[0] for case in TINY)


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_bounds_differ_from_the_reference_too(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, threats = BREAKS[broken]
    apply(monkeypatch)
    monkeypatch.setattr(linear, "SLOPES", (relaxations.zero,))
    shape, net = LAYOUTS["mlp-rgb"].shape, network("mlp-rgb")
    x = images(shape, 2).double()
    target, path = torch.tensor([0, 1]), reference.steps(net, shape)
    threat = threats[-1] if broken != "first location for all" else Patch(2, 2)
    found, slow = linear.table(engine(net, x, target, threat), 0), []
    for i, y in enumerate(target.tolist()):
        v = reference.numbers(x[i])
        if isinstance(threat, Patch):
            slow.append(crown.patch_bounds(path, v, shape, (threat.height, threat.width), y, 0, crown.never))
        else:
            slow.append(crown.sparse_bounds(path, v, shape, threat.k, threat.unit, y, crown.never)[None])
    assert not close(finite(found, target), finite(torch.tensor(np.stack(slow)), target))
