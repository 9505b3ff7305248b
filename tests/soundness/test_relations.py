"""Order relations between certificates, for random networks drawn by hypothesis; the reference is ``relations.py``.

Those that a known mistake (``breaks.py``) would breach are shown to catch it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcert_cli import defenses
from patchcert_cli.certifiers.cells import additive
from patchcert_cli.defenses import Defense
from patchcert_cli.threats import Patch, Sparse, Threat

from . import breaks, relations
from .arena import REGIONS, draw_images, random_defense, random_region, registered_arenas

SHAPES = [(1, 3, 3), (2, 3, 4), (1, 4, 3), (3, 3, 3)]
DEFENSES = st.builds(
    random_defense,
    st.sampled_from(["mlp", "deep", "cnn", "strided", "linear"]),
    st.sampled_from(SHAPES),
    st.integers(0, 10_000),
    whole=st.booleans(),
)
THREATS = st.sampled_from([Patch(1, 1), Patch(2, 2), Patch(1, 3), Sparse(1), Sparse(2, "value")])
few = settings(max_examples=15, derandomize=True, deadline=None)


def images(defense: Defense, seed: int, count: int = 6) -> torch.Tensor:
    return draw_images(defense.input_shape, count, seed)


@few
@given(DEFENSES, st.integers(0, 1000))
def test_smaller_patches_and_rectangles_are_certified_too(defense: Defense, seed: int) -> None:
    assert relations.smaller_patches(defense, images(defense, seed)) == []


@few
@given(DEFENSES, st.integers(0, 1000))
def test_smaller_budgets_are_certified_too(defense: Defense, seed: int) -> None:
    assert relations.smaller_budgets(defense, images(defense, seed)) == []


@few
@given(DEFENSES, st.integers(0, 1000))
def test_values_are_certified_where_pixels_are(defense: Defense, seed: int) -> None:
    assert relations.values_within_pixels(defense, images(defense, seed)) == []


@few
@given(DEFENSES, st.integers(0, 1000), THREATS)
def test_linear_bounds_certify_all_that_interval_bounds_do(defense: Defense, seed: int, threat: Threat) -> None:
    assert relations.weaker_proofs(defense, images(defense, seed), threat, ("linear", "interval")) == []


@few
@given(DEFENSES, st.integers(0, 1000), st.integers(1, 100))
def test_a_percentage_is_certified_as_its_square(defense: Defense, seed: int, percent: int) -> None:
    assert relations.percent_is_a_square(defense, images(defense, seed), percent) == []


@few
@given(DEFENSES, st.integers(0, 1000), THREATS, st.permutations(range(6)))
def test_batch_size_and_order_do_not_matter(defense: Defense, seed: int, threat: Threat, order: list[int]) -> None:
    assert relations.batches_do_not_matter(defense, images(defense, seed), threat, torch.tensor(order)) == []


VOTING = [name for name in defenses.names() if defenses.by_name(name).methods == additive.METHODS]
VOTERS = st.one_of(
    st.builds(random_region, st.sampled_from(sorted(REGIONS)), st.integers(0, 10_000), lean=st.sampled_from([1.0, 3.0])),
    st.builds(lambda name, seed: registered_arenas(name)[seed].defense, st.sampled_from(VOTING), st.integers(0, 9)),
)


@few
@given(VOTERS, st.integers(0, 1000))
def test_weaker_attackers_of_votes(defense: Defense, seed: int) -> None:
    x = images(defense, seed)
    assert relations.smaller_patches(defense, x) == []
    assert relations.smaller_budgets(defense, x, ("pixel",)) == []
    assert relations.one_pixel_is_a_patch(defense, x) == []


@few
@given(VOTERS, st.integers(0, 1000), THREATS.filter(lambda threat: threat != Sparse(2, "value")), st.permutations(range(6)))
def test_batches_and_proofs_of_votes(defense: Defense, seed: int, threat: Threat, order: list[int]) -> None:
    x = images(defense, seed)
    assert relations.batches_do_not_matter(defense, x, threat, torch.tensor(order)) == []
    assert relations.percent_is_a_square(defense, x, 1 + seed % 100) == []
    methods = ("exact", "3.2", "3.1", "3.3") if threat.budget == 1 else ("exact", "3.2", "3.3")
    assert relations.weaker_proofs(defense, x, threat, methods) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(REGIONS))
def test_votes_are_the_same_on_every_device(name: str) -> None:
    for seed in range(5):
        defense = random_region(name, seed)
        x = images(defense, seed, 32)
        threats = (Patch(1, 1), Patch(2, 2), Sparse(2))
        here, maps = [defense.certify(x, threat) for threat in threats], defense.margin_map(x, Patch(2, 1))
        defense.to("cuda")
        for mine, threat in zip(here, threats, strict=True):
            there = defense.certify(x.to("cuda"), threat)
            assert torch.equal(mine.prediction, there.prediction.cpu())
            assert torch.equal(mine.margin, there.margin.cpu())
        assert torch.equal(maps, defense.margin_map(x.to("cuda"), Patch(2, 1)).cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mlp", "deep", "cnn", "strided"])
@pytest.mark.parametrize("threat", [Patch(1, 1), Patch(2, 2), Sparse(1), Sparse(2, "value")], ids=str)
def test_the_device_does_not_matter(kind: str, threat: Threat) -> None:
    for seed in range(5):
        defense = random_defense(kind, (2, 4, 4), seed)
        x = images(defense, seed, 32)
        here = defense.certify(x, threat)
        there = defense.to("cuda").certify(x.to("cuda"), threat)
        assert torch.equal(here.prediction, there.prediction.cpu())
        assert torch.equal(here.certified, there.certified.cpu())
        assert bool(((here.margin - there.margin.cpu()).abs() <= here.tolerance + there.tolerance.cpu()).all())


Relation = Callable[[Defense, torch.Tensor], list[str]]


def percent(defense: Defense, x: torch.Tensor) -> list[str]:
    return relations.percent_is_a_square(defense, x, 40)


def order(defense: Defense, x: torch.Tensor) -> list[str]:
    return relations.batches_do_not_matter(defense, x, Patch(1, 1), torch.arange(len(x)).flip(0))


VOTES_CAUGHT: dict[str, tuple[breaks.Break, Relation]] = {
    "margins given to other images": (breaks.VOTE_BREAKS["margins given to other images"][0], order),
    "percentage rounded down": (breaks.percent_rounded_down, percent),
}


@pytest.mark.parametrize("name", VOTES_CAUGHT)
def test_relations_catch_broken_proofs_of_votes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, relation = VOTES_CAUGHT[name]
    tried = [(defense, images(defense, seed, 12)) for seed in range(8) for defense in [random_region("single", seed)]]
    assert [breach for defense, x in tried for breach in relation(defense, x)] == []
    apply(monkeypatch)
    assert any(relation(defense, x) for defense, x in tried)


CAUGHT: dict[str, tuple[breaks.Break, Relation]] = {
    "upper bounds seem to grow with the patch": (breaks.wrong_side, relations.smaller_patches),
    "upper bounds seem to grow with the budget": (breaks.wrong_side, relations.smaller_budgets),
    "pixels and values mixed up": (breaks.SPARSE_BREAKS["pixels and values mixed up"], relations.values_within_pixels),
    "percentage rounded down": (breaks.percent_rounded_down, percent),
    "margins given to other images": (breaks.PATCH_BREAKS["margins given to other images"], order),
}


def interval_defense(seed: int) -> Defense:
    """One that is asked for interval bounds alone, whose margins are ordered too."""
    defense = random_defense("mlp", (2, 3, 3), seed)
    defense.methods = ("interval",)  # type: ignore[misc]
    return defense


@pytest.mark.parametrize("name", CAUGHT)
def test_relations_catch_broken_certifiers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, relation = CAUGHT[name]
    tried = [(defense, images(defense, seed, 12)) for seed in range(8) for defense in [interval_defense(seed)]]
    assert [breach for defense, x in tried for breach in relation(defense, x)] == []
    apply(monkeypatch)
    assert any(relation(defense, x) for defense, x in tried)
