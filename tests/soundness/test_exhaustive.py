"""No allowed change moves a certified answer: every location, subset and content, enumerated by ``arena.py``.

The same check runs against certifiers that are wrong in one known way (``breaks.py``), and must catch each.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from patchcert_cli import defenses, models
from patchcert_cli.certifiers.cells import additive
from patchcert_cli.defenses import Defense
from patchcert_cli.defenses.bagcert import BagCert
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import IntegrityError
from patchcert_cli.threats import Patch, Sparse
from tests import examples
from tests.examples import tiny

from .arena import (
    Arena,
    Attack,
    Score,
    changes,
    check,
    draw_images,
    framed_arena,
    pixel_arena,
    random_arenas,
    random_defense,
    registered_arenas,
    voting_arenas,
)
from .breaks import (
    COMMON_BREAKS,
    PATCH_BREAKS,
    SPARSE_BREAKS,
    VOTE_BREAKS,
    VOTE_SPARSE_BREAKS,
    WINDOW_BREAKS,
    Break,
    frame_forgotten,
    mirrored_cells_left_there,
)

PATCHES: list[Attack] = [Patch(1, 1), Patch(1, 2), Patch(2, 1), Patch(2, 2), Patch(1, 3)]
PIXELS: list[Attack] = [Sparse(1), Sparse(2)]
VALUES: list[Attack] = [Sparse(1, "value"), Sparse(2, "value")]
SPARSE = [*PIXELS, *VALUES]


def seeds_for(family: str, threats: list[Attack]) -> int:
    """How many seeds of random networks catch every break."""
    return 4 if family == "convolutional" and isinstance(threats[0], Sparse) else 2


def assert_sound(score: Score, least: int) -> None:
    assert score.violations == []
    assert score.certified >= least, "too few certified images to conclude anything"
    assert score.uncertified >= least
    assert score.broken >= least, "the enemy is too weak: hardly any uncertified image was broken"


@pytest.mark.parametrize("family", ["dense", "convolutional"])
@pytest.mark.parametrize("threats", [PATCHES, SPARSE], ids=["patch", "sparse"])
@pytest.mark.parametrize("factor", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_random_networks_are_certified_soundly(family: str, threats: list[Attack], factor: int) -> None:
    """On as many networks as it takes to catch every break, see below."""
    found, seeds = {}, factor * seeds_for(family, threats)
    for method in ("interval", "linear"):
        score = check(random_arenas(family, seeds), threats, method=method)
        assert score.unsupported == 0
        assert_sound(score, 40 * seeds)
        found[method] = score.certified
    assert found["linear"] > found["interval"]


@pytest.mark.parametrize("name", [name for name in defenses.names() if defenses.by_name(name).guarantee.proves])
@pytest.mark.parametrize("seeds", [6, pytest.param(10, marks=pytest.mark.slow)])  # with 6, each option of the examples is drawn
def test_registered_defenses_are_certified_soundly(name: str, seeds: int) -> None:
    seeds = 10 if name in ("ensemble", "roots") else seeds  # of which few images are certified, or few broken
    arenas = registered_arenas(name)[:seeds]
    patches, pixels, values = (check(arenas, some) for some in ([*PATCHES, Patch(2, 3)], PIXELS, VALUES))
    assert patches.unsupported == 0, "every defense knows patches"
    assert_sound(patches + pixels + values, 6 * seeds)
    assert patches.certified >= 3 * seeds and patches.broken >= 3 * seeds
    if pixels.unsupported == 0:
        assert pixels.certified >= 3 * seeds and pixels.broken >= 3 * seeds


@pytest.mark.parametrize("name", [name for name in defenses.names() if defenses.by_name(name).methods == additive.METHODS])
def test_votes_are_certified_against_patches_and_pixels_but_not_values(name: str) -> None:
    arenas = registered_arenas(name)
    assert check(arenas[:1], [*PATCHES, *PIXELS]).unsupported == 0
    assert check(arenas[:1], VALUES).unsupported == (0 if name == "partition" else len(VALUES))
    for method in additive.METHODS[1:]:
        assert check(arenas[:4], [*PATCHES, Sparse(1)], method=method).violations == []


@pytest.mark.parametrize("threat", [*PATCHES, Patch(2, 3), Patch(1, 5), *PIXELS], ids=str)
def test_random_regions_are_certified_soundly(threat: Attack) -> None:
    largest = isinstance(threat, Patch) and threat.height * threat.width > 4  # too many contents of two channels
    arenas = [arena for arena in voting_arenas() if not (largest and arena.defense.input_shape[0] == 2)]
    assert_sound(check(arenas, [threat]), 5 if largest else 15)


def test_independent_cells_are_certified_wherever_no_attack_exists() -> None:
    """One pixel per cell: the proof is exact, and the published conditions are not."""
    arena, certified = pixel_arena(), dict.fromkeys(additive.METHODS, 0)
    for threat in [*PATCHES, Patch(2, 3), Patch(4, 1), Patch(3, 3), Sparse(1), Sparse(2)]:
        for method in additive.METHODS:
            if method == "3.1" and threat.budget > 1:
                continue
            proven = arena.defense.certify(arena.images, threat, method).certified
            assert not bool((proven & arena.breakable(threat)).any()), (threat, method)
            if method == "exact" and threat.budget == 1:
                assert torch.equal(proven, ~arena.breakable(threat)), threat
            certified[method] += int(proven.sum()) if threat.budget == 1 else 0
    assert certified["exact"] > certified["3.2"] == certified["3.1"] > certified["3.3"] > 0


@pytest.mark.parametrize("broken", VOTE_BREAKS)
def test_broken_proofs_of_votes_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, method = VOTE_BREAKS[broken]
    assert_votes_caught(apply, method, PATCHES, monkeypatch)


@pytest.mark.parametrize("broken", VOTE_SPARSE_BREAKS)
def test_broken_budgets_of_votes_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_votes_caught(VOTE_SPARSE_BREAKS[broken], "exact", [Sparse(2)], monkeypatch)


def assert_votes_caught(apply: Break, method: str, threats: list[Attack], monkeypatch: pytest.MonkeyPatch) -> None:
    arenas = [pixel_arena(), *voting_arenas()]
    assert check(arenas[:3], threats, method=method).violations == []
    apply(monkeypatch)
    assert check(arenas, threats, method=method, until_found=True).violations != []


def test_mirrored_cells_that_are_not_put_back_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check([pixel_arena(mirrored=True)], PATCHES).violations == []
    mirrored_cells_left_there(monkeypatch)
    broken = pixel_arena.__wrapped__(mirrored=True)  # whose answers are not known yet
    with pytest.raises(IntegrityError, match="reaches"):
        broken.defense.self_test()
    monkeypatch.setattr(BagCert, "self_test", lambda self: None)  # so that the proof is asked at all
    assert check([broken], PATCHES, until_found=True).violations != []


def test_cells_of_a_framed_image_that_are_misnumbered_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_sound(check([framed_arena()], PATCHES), 5)
    frame_forgotten(monkeypatch)
    broken = framed_arena()
    with pytest.raises(IntegrityError, match="reaches"):
        broken.defense.self_test()
    monkeypatch.setattr(BagCert, "self_test", lambda self: None)  # so that the proof is asked at all
    assert check([broken], PATCHES, until_found=True).violations != []


@pytest.mark.parametrize("name", ["clipped", "patchguard", "roots"])
def test_other_readers_of_framed_cells_are_certified_soundly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def region(kernel: int) -> Any:
        plan = {"widths": (4,), "kernels": (2,), "dilations": (1,), "mixes": (1,), "padding": 1}
        return models.build("region", {"input_shape": examples.SHAPE, "classes": 3, **examples.SCALING, **plan})

    monkeypatch.setattr(examples, "_region", region)
    made = [(seed, tiny(name, seed)) for seed in range(16)]
    arenas = [Arena(f"framed {name} {seed}", one, draw_images(one.input_shape, 16, seed)) for seed, one in made]
    for arena in arenas:
        arena.defense.self_test()
    assert_sound(check(arenas, [Patch(1, 1), Patch(1, 2), Patch(2, 1)]), 3)


def test_every_defense_of_the_folder_is_registered() -> None:
    folder = Path(defenses.__file__).parent
    assert defenses.names() == sorted(path.stem for path in folder.iterdir() if not path.stem.startswith("_"))
    for name in [path.stem for path in folder.glob("_*.py") if path.stem != "__init__"]:  # no defense here goes untested
        module = importlib.import_module(f"{defenses.__name__}.{name}")
        kinds = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, Defense)]
        assert all(inspect.isabstract(kind) for kind in kinds), name
    assert len(defenses.names()) >= 1


def test_whole_images_and_larger_budgets() -> None:
    shape = (1, 3, 3)
    arenas = [Arena("mlp", random_defense("mlp", shape, seed), draw_images(shape, 16, seed)) for seed in range(20)]
    assert_sound(check(arenas, [Patch(3, 3), Patch(3, 1), Patch(2, 3), Sparse(3), Sparse(4), Sparse(9)]), 20)


@pytest.mark.parametrize("kind", ["linear", "strided"])
def test_two_channels_with_pixel_and_value_budgets(kind: str) -> None:
    shape = (2, 3, 3)
    arenas = [Arena(kind, random_defense(kind, shape, seed), draw_images(shape, 16, seed)) for seed in range(12)]
    assert_sound(check(arenas, [Sparse(1), Sparse(2), Sparse(3, "value"), Patch(2, 2)]), 20)


@pytest.mark.parametrize("family", ["dense", "convolutional"])
@pytest.mark.parametrize("broken", [*PATCH_BREAKS, *COMMON_BREAKS])
def test_broken_patch_certifiers_are_caught(family: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught({**PATCH_BREAKS, **COMMON_BREAKS}[broken], family, PATCHES, monkeypatch)


@pytest.mark.parametrize("broken", WINDOW_BREAKS)
def test_broken_windows_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_caught(WINDOW_BREAKS[broken], "convolutional", PATCHES, monkeypatch)


@pytest.mark.parametrize("family", ["dense", "convolutional"])
@pytest.mark.parametrize("broken", [*SPARSE_BREAKS, *COMMON_BREAKS])
def test_broken_sparse_certifiers_are_caught(family: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # a budget of k - 1 = 0 is not a threat, so k = 1 is left out
    threats = [threat for threat in SPARSE if isinstance(threat, Sparse) and threat.k > 1]
    assert_caught({**SPARSE_BREAKS, **COMMON_BREAKS}[broken], family, list(threats), monkeypatch)


def assert_caught(apply: Break, family: str, threats: list[Attack], monkeypatch: pytest.MonkeyPatch) -> None:
    # what is broken here are interval bounds; linear ones have breaks of their own
    arenas = random_arenas(family, seeds_for(family, threats))
    assert check(arenas[:6], threats, method="interval").violations == []
    apply(monkeypatch)
    assert check(arenas, threats, method="interval", until_found=True).violations != []


def test_the_enemy_only_does_what_the_threat_allows() -> None:
    shape = (2, 3, 3)
    for threat in [*PATCHES, *SPARSE, Sparse(3, "value")]:
        mask, value = changes(shape, threat)
        assert bool(threat.contains(mask).all()), threat
        assert bool(((value >= 0) & (value <= 1)).all())
        larger = torch.zeros(1, *shape, dtype=torch.bool)
        larger[0, :, 0, 0] = larger[0, :, 2, 2] = larger[0, :, 0, 2] = larger[0, :, 1, 1] = True
        assert not bool(threat.contains(larger).any())


def test_one_outstanding_pixel_among_equal_weights() -> None:
    """60 equal weights, k = 1: only changing the one dark pixel moves the answer."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(60, 1), nn.ReLU(), nn.Linear(1, 2))
    first, last = network[1], network[3]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        first.weight.fill_(1)
        first.bias.fill_(-29.5)  # 59 pixels at one half and a dark one: the neuron is at 0, and at 1 once that one is lit
        last.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        last.bias.copy_(torch.tensor([0.8, -0.8]))
    defense = IntervalDefense(network.requires_grad_(False), input_shape=(1, 6, 10), classes=("a", "b")).eval()
    x = torch.full((60, 1, 60), 0.5)
    x[torch.arange(60), 0, torch.arange(60)] = 0
    attacked = x.clone()
    attacked[torch.arange(60), 0, torch.arange(60)] = 1
    certificate = defense.certify(x.reshape(60, 1, 6, 10), Sparse(1))
    assert bool((defense.predict(attacked.reshape(60, 1, 6, 10)) != certificate.prediction).all())
    assert int(certificate.certified.sum()) == 0
