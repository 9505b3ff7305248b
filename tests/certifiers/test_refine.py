"""What linear bounds decide: compared with bounding every pair, with everything an attacker can do, and with broken variants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from soundness.arena import Arena, draw_images, random_defense
from torch import Tensor

from patchcert_cli import checkpoint, data
from patchcert_cli.certifiers.bounds import intervals, rounding
from patchcert_cli.certifiers.bounds.linear import linear, refine, relaxations
from patchcert_cli.certifiers.bounds.linear.linear import Engine, Query
from patchcert_cli.certifiers.bounds.rounding import Proof
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.layers import precision
from patchcert_cli.threats import Patch, Sparse

from .networks import LAYOUTS, images, network

Attack = Patch | Sparse
THREATS: list[Attack] = [Patch(1, 1), Patch(2, 2), Patch(1, 3), Sparse(1), Sparse(2), Sparse(2, "value")]
CASES = list(product(("mlp", "deep", "cnn", "strided"), ((1, 4, 4), (2, 3, 3)), range(5)))


@torch.no_grad()
def both(net: Any, x: Tensor, threat: Attack, *, sides: tuple[int, ...] = refine.SIDES) -> tuple[Proof, Proof]:
    """The proof by interval bounds, and what linear bounds make of it."""
    exact = precision.double(net)
    target = exact(x.double()).argmax(dim=1)
    proof = rounding.prove(net, exact, x, target, threat)
    return proof, refine.improve(exact, x, target, threat, proof, sides=sides)


def certified(proof: Proof) -> Tensor:
    return proof.margin > proof.tolerance


@cache
def arenas() -> list[Arena]:
    """Random networks and images of which an attacker breaks some."""
    made = []
    for kind, shape, seed in CASES:
        made.append(Arena(f"{kind} {shape} {seed}", random_defense(kind, shape, seed), draw_images(shape, 12, seed)))
    return made


def wrong(arena: Arena, threat: Attack, **options: Any) -> tuple[int, int, int]:
    """Certified images that some change breaks; and how many interval bounds certify, and linear ones."""
    assert isinstance(arena.defense, IntervalDefense)
    before, after = both(arena.defense.network, arena.images, threat, **options)
    return int((certified(after) & arena.breakable(threat)).sum()), int(certified(before).sum()), int(certified(after).sum())


def test_no_image_is_certified_that_any_change_breaks() -> None:
    gains = dict.fromkeys(THREATS, 0)
    for arena, threat in product(arenas(), THREATS):
        broken, few, more = wrong(arena, threat)
        assert broken == 0, (arena.name, threat)
        assert more >= few
        gains[threat] += more - few
    assert all(gain >= 3 for gain in gains.values()), gains


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_certified_stays_so_and_what_is_not_keeps_its_proof(name: str) -> None:
    for seed in range(2):
        net, x = network(name, seed, scale=1.5), images(LAYOUTS[name].shape, 12, seed)
        for threat in (Patch(1, 1), Patch(2, 2), *((Sparse(1), Sparse(2)) if LAYOUTS[name].sparse else ())):
            before, after = both(net, x, threat)
            assert bool((certified(before) <= certified(after)).all())
            same = certified(before) | ~certified(after)
            for field in fields(Proof):
                assert torch.equal(getattr(before, field.name)[same], getattr(after, field.name)[same])
            assert bool((after.margin >= before.margin).all())


@pytest.mark.parametrize("kind", ["mlp", "deep", "strided"])
def test_the_verdict_is_that_of_bounding_every_pair(kind: str) -> None:
    """Without tiles: an image is certified iff each pair has an interval bound or a linear bound alone above the tolerance."""
    seen = {True: 0, False: 0}
    for seed, threat in product(range(8), (Patch(1, 1), Patch(2, 2), Sparse(2))):
        net, x = random_defense(kind, (1, 4, 4), seed).network, draw_images((1, 4, 4), 12, seed)
        before, after = both(net, x, threat, sides=())
        rows = (~certified(before)).nonzero()[:, 0]
        if not len(rows):
            continue
        exact = precision.double(net)
        engine = Engine(exact, x[rows].double(), exact(x[rows].double()).argmax(dim=1), threat)
        alone, plain = linear.table(engine, 1), engine.intervals(torch.arange(len(rows)))
        alone = torch.where(torch.isinf(plain), plain, alone)
        bound = torch.where(plain > after.tolerance[rows, None, None], plain, torch.maximum(plain, alone))
        margin = bound.flatten(1).amin(dim=1)
        expected = margin > 1e-9
        assert torch.equal(certified(after)[rows], expected), (seed, threat)
        won = rows[expected]
        assert torch.allclose(after.margin[won], margin[expected], rtol=1e-9, atol=1e-12)
        if isinstance(threat, Patch):
            nearest = bound[expected, after.worst[won], after.rival[won]]
            assert torch.allclose(nearest, margin[expected], rtol=1e-9, atol=1e-12)
        for verdict in expected.tolist():
            seen[verdict] += 1
    assert min(seen.values()) >= 5, seen


def test_tiles_only_add() -> None:
    gained = 0
    for arena, threat in product(arenas()[:20], THREATS[:3]):
        assert isinstance(arena.defense, IntervalDefense)
        alone, tiled, deep = (both(arena.defense.network, arena.images, threat, sides=s)[1] for s in ((), (2,), (9, 4, 3, 2)))
        assert bool((certified(alone) <= certified(tiled)).all())
        assert bool((certified(alone) <= certified(deep)).all())
        assert wrong(arena, threat, sides=(9, 4, 3, 2))[0] == 0
        gained += int(certified(alone).sum())
    assert gained > 0


@pytest.mark.parametrize("kind", ["mlp", "strided"])
def test_order_batch_and_precision_do_not_matter(kind: str) -> None:
    for seed, threat in product(range(4), THREATS):
        net, x = random_defense(kind, (2, 3, 3), seed).network, draw_images((2, 3, 3), 12, seed)
        whole = certified(both(net, x, threat)[1])
        assert torch.equal(certified(both(net, x.flip(0), threat)[1]).flip(0), whole)
        assert torch.equal(torch.cat([certified(both(net, image[None], threat)[1]) for image in x]), whole)
        assert torch.equal(certified(both(precision.double(net), x.double(), threat)[1]), whole)


def test_waves_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny waves each pair is asked in turn."""
    chosen = [(arena, threat) for arena in arenas()[::4] for threat in THREATS]
    before = [wrong(*case) for case in chosen]
    for name in ("FEW", "WAVE", "GROWTH"):
        monkeypatch.setattr(refine, name, 1 if name != "GROWTH" else 2)
    assert [wrong(*case) for case in chosen] == before


def test_nothing_to_do_and_nothing_usable() -> None:
    net = network("mlp2")
    exact, x = precision.double(net), images((1, 4, 5), 3)
    target = exact(x.double()).argmax(dim=1)
    proof = rounding.prove(net, exact, x, target, Patch(1, 1))
    clear = replace(proof, margin=proof.tolerance + 1)
    assert refine.improve(exact, x, target, Patch(1, 1), clear) is clear
    lost = replace(proof, margin=torch.full_like(proof.margin, float("-inf")))
    assert refine.improve(exact, x, target, Patch(1, 1), lost) is lost
    empty = rounding.prove(net, exact, x[:0], target[:0], Patch(1, 1))
    assert len(refine.improve(exact, x[:0], target[:0], Patch(1, 1), empty).margin) == 0


@pytest.mark.parametrize("name", ["mlp2", "mlp3", "conv-stride", "conv-norm", "pool-last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_never_certify(name: str, value: float) -> None:
    layout = LAYOUTS[name]
    x, seen = images(layout.shape, 4), 0
    for index in range(len(list(network(name).parameters()))):
        net = network(name)
        list(net.parameters())[index].view(-1)[0] = value
        for threat in (Patch(2, 2), Sparse(2)):
            assert not bool(certified(both(net, x, threat)[1]).any()), (index, threat)
            seen += 1
    assert seen >= 4


Break = Callable[[pytest.MonkeyPatch], None]


def bounds_for_every_location(monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds at the locations of a tile is taken to hold everywhere."""

    def everywhere(table: Tensor, query: Query, values: Tensor) -> None:
        for row, (owner, rival) in enumerate(zip(query.owner.tolist(), query.rival.tolist(), strict=True)):
            image = query.image[owner]
            table[image, :, rival] = torch.maximum(table[image, :, rival], values[row].max())

    monkeypatch.setattr(refine, "raise_to", everywhere)


def bounds_of_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.bounds
    monkeypatch.setattr(Engine, "bounds", lambda self, query: original(self, query).flip(0))


def bounds_a_little_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.bounds
    monkeypatch.setattr(Engine, "bounds", lambda self, query: original(self, query) + 0.2)


def only_the_first_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs besides the first are taken for granted."""
    monkeypatch.setattr(refine._Search, "settle", lambda self, sides: self.table.clamp_(min=float(self.tolerance.max()) * 2))


def runner_up_only(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine.intervals

    def table(self: Engine, chosen: Tensor) -> Tensor:
        found = original(self, chosen)
        rival = found.amin(dim=1).argmin(dim=1)
        return torch.where(torch.arange(found.shape[2]) == rival[:, None, None], found, 1e6)

    monkeypatch.setattr(Engine, "intervals", table)


def negative_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    original = refine.bound_error
    monkeypatch.setattr(refine, "bound_error", lambda *args: original(*args) - 0.2)
    monkeypatch.setattr(relaxations.Magnitudes, "of", _lossless(relaxations.Magnitudes.of))


def _lossless(original: Callable[..., relaxations.Magnitudes]) -> Callable[..., relaxations.Magnitudes]:
    return lambda *args: replace(original(*args), loss=-0.2)


BREAKS: dict[str, Break] = {
    "bounds of a tile for every location": bounds_for_every_location,
    "bounds of other images": bounds_of_other_images,
    "bounds a little higher": bounds_a_little_higher,
    "only the first pair": only_the_first_pair,
    "runner-up only": runner_up_only,
    "negative tolerance": negative_tolerance,
}


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_searches_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[broken](monkeypatch)
    assert any(wrong(arena, threat, sides=(2,))[0] for arena, threat in product(arenas(), THREATS[1:3]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mlp", "deep", "strided"])
def test_the_device_does_not_matter(kind: str) -> None:
    for seed, threat in product(range(4), THREATS):
        defense, x = random_defense(kind, (2, 3, 3), seed), draw_images((2, 3, 3), 12, seed)
        here = both(defense.network, x, threat)[1]
        there = both(defense.to("cuda").network, x.to("cuda"), threat)[1]
        assert torch.equal(certified(here), certified(there).cpu())
        assert bool(((here.margin - there.margin.cpu()).abs() <= here.tolerance + there.tolerance.cpu()).all())


def test_interval_margins_of_the_engine_are_those_of_the_stream() -> None:
    net, x = precision.double(network("mlp3")), images(LAYOUTS["mlp3"].shape, 5).double()
    target = torch.tensor([0, 1, 2, 3, 1])
    table = Engine(net, x, target, Patch(2, 2)).intervals(torch.tensor([3, 0, 4]))
    chosen = torch.tensor([3, 0, 4])
    expected = intervals.lower_margins(net, x[chosen], target[chosen], Patch(2, 2)).values
    others = torch.arange(4) != target[chosen][:, None]
    assert torch.allclose(table.amin(dim=1)[others], expected[others])


def test_the_bundled_model_gains_two_points() -> None:
    """Of the first 300 test images; ``python benchmarks/linear.py --images 300`` prints both numbers."""
    defense, _ = checkpoint.load_defense(Path(__file__).parents[2] / "zoo" / "mnist-ibp-p5")
    assert isinstance(defense, IntervalDefense)
    pictures = data.load("mnist", "test")
    x, label = data.to_float(pictures.pixels[:300]), pictures.labels[:300]
    right = defense.predict(x) == label
    before, after = both(defense.network, x, Patch(5, 5))
    assert (int((certified(before) & right).sum()), int((certified(after) & right).sum())) == (189, 196)
