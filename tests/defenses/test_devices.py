"""Everything that certifies, attacks and trains works where the model is, and waits for a GPU only where a decision needs it.

There is no GPU here: :mod:`tests.other_device` pretends one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli import defenses, models
from patchcert_cli.attacks import Attack
from patchcert_cli.attacks.patch_pgd import PatchPGD
from patchcert_cli.attacks.patch_rs import PatchRS
from patchcert_cli.attacks.sparse import SparseSearch
from patchcert_cli.attacks.sparse_rs import SparseRS
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.data.images import Images
from patchcert_cli.defenses import Defense, Trainable
from patchcert_cli.defenses.ibp import IntervalDefense
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.defenses.undefended import Undefended
from patchcert_cli.evaluation import hints
from patchcert_cli.progress import Silent
from patchcert_cli.threats import Patch, Sparse, Threat
from patchcert_cli.training import steps
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.state import Beginning, State
from tests.examples import CLASSES, EXAMPLES, SHAPE, tiny
from tests.layers.test_levels import images, network
from tests.other_device import GPU, Mixture, OtherDevice, counted

PATCH = Patch(2, 2)
READS = {  # how often certifying 12 images waits for the device, at most; of masked predictions once for each few masks
    "bagcert": 2,
    "clipped": 2,
    "ensemble": 3,
    "hicert": 4,
    "ibp": 80,
    "minority": 4,
    "partition": 2,
    "patchcleanser": 20,
    "patchguard": 1,
    "roots": 1,
    "smoothing": 2,
}


def pictures(count: int) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", EXAMPLES)
def test_answers_and_proofs_are_computed_where_the_model_is(name: str) -> None:
    there, here, x = tiny(name), tiny(name), pictures(12)
    with OtherDevice() as gpu:
        there.to("cuda")
        answer = there.predict(x.to("cuda"))
        assert answer.device == GPU == there.device and gpu.has(answer)
        assert torch.equal(answer.cpu(), here.predict(x))
        if not there.guarantee.proves:
            return
        found, expected = there.certify(x.to("cuda"), PATCH), here.certify(x, PATCH)
        assert torch.equal(found.certified.cpu(), expected.certified)
        with counted(gpu) as reads:
            there.certify(x.to("cuda"), PATCH)
        assert sum(reads.values()) <= READS[name], reads


def convolutional() -> tuple[Defense, Tensor, Threat]:
    options = {"channels": (3, 3), "strides": (1, 2), "hidden": (4,), "mean": (0.4,), "std": (0.5,), "norm": True}
    made = models.build("cnn", {"input_shape": (1, 8, 8), "classes": 3, **options})
    return IntervalDefense(made, input_shape=(1, 8, 8), classes=CLASSES).eval(), torch.rand(3, 1, 8, 8), Patch(2, 2)


def sparse() -> tuple[Defense, Tensor, Threat]:
    return tiny("ibp"), pictures(3), Sparse(1)


def of_whole_numbers() -> tuple[Defense, Tensor, Threat]:
    masks = MaskSpec(("patch:3x3",), per_axis=3)
    made = PatchCleanser(network(), input_shape=(3, 16, 16), classes=tuple("abcde"), masks=masks, fill=(0.4, 0.5, 0.3))
    return made.eval(), images((3, 16, 16), 3), Patch(3, 3)


@pytest.mark.parametrize("build", [convolutional, sparse, of_whole_numbers])
def test_so_are_other_kinds_of_networks_and_threats(build: Callable[[], tuple[Defense, Tensor, Threat]]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        here, x, threat = build()
    expected, there = here.certify(x, threat), copy.deepcopy(here)
    with OtherDevice():
        found = there.to("cuda").certify(x.to("cuda"), threat)
        assert torch.equal(found.certified.cpu(), expected.certified)
        assert torch.equal(found.prediction.cpu(), expected.prediction)


CLIMBED = ("bagcert", "ibp", "minority", "partition", "patchcleanser", "patchguard", "roots", "smoothing", "watermark")
ATTACKS: list[tuple[str, Attack, Threat]] = [
    *((name, PatchPGD(steps=2, locations=2, restarts=1, carried=2, rounds=1), PATCH) for name in CLIMBED),
    ("patchcleanser", PatchRS(budget=4), PATCH),
    ("ibp", SparseSearch(steps=2, iterations=3), Sparse(1)),
    ("bagcert", SparseRS(budget=4), Sparse(1)),
]


@pytest.mark.parametrize(("name", "attack", "threat"), ATTACKS, ids=lambda value: getattr(type(value), "__name__", str(value)))
def test_attacks_work_where_the_model_is(name: str, attack: Attack, threat: Threat) -> None:
    there, x = tiny(name), pictures(2)
    with OtherDevice() as gpu:
        there.to("cuda")
        proves = there.guarantee.proves
        outcome, certificate = hints.search(there, x.to("cuda"), threat, attack, torch.arange(2), join=proves)
        assert gpu.has(outcome.adversarial) and gpu.has(outcome.success)
        assert certificate is None or not (outcome.success & certificate.certified).any()


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in defenses.trained()),
    ("bagcert", {"warm_up_epochs": 1, "every": 2}),
    ("patchcleanser", {"greedy_from": 0.0, "greedy_share": 1.0}),
    *(("ibp", {"pick": pick, "locations": 2, "screened": 4}) for pick in ("random", "guided", "mined")),
    ("ibp", {"ramp_epochs": 40, "tightness": 0.1, "balance": 0.1, "linear": 0.5, "locations": 2, "init": "ibp"}),
]
STEP_READS = {"ibp": 20}  # how often a step of training waits for the device, at most; of others never


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_a_step_of_training_is_where_the_model_is_and_waits_for_nothing(name: str, options: dict[str, Any]) -> None:
    phases = {"natural_epochs": 0, "bounded_epochs": 0} if name == "ibp" else {}
    epochs = 50 if name == "ibp" else 2
    recipe = Recipe("patch:2x2", defense=name, epochs=epochs, batch_size=4, options={**phases, **options})
    there = cast(Trainable, tiny(name))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, *SHAPE), dtype=torch.uint8, generator=generator)
    few = Images(pixels, torch.arange(24) % 3, torch.arange(24), "mnist", "train", "here", classes=CLASSES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auxiliary = there.init_weights(recipe.options) or nn.Module()
    with OtherDevice() as gpu:
        state = State.of(recipe, Beginning(there, auxiliary), "cuda", few)
        spent = []
        for count in (2, 6):
            with counted(gpu) as reads:
                assert steps.epoch(recipe, 1, state, few, Silent(), choose=lambda _, count=count: count) > 0
            spent.append(sum(reads.values()))
        assert all(gpu.has(weight) and gpu.has(weight.grad) for weight in state.defense.parameters() if weight.grad is not None)
        assert (spent[1] - spent[0]) / 4 <= STEP_READS.get(name, 0), reads
        steps.finish(recipe, state.deployed, few, rounded=True)
        assert all(gpu.has(tensor) for tensor in state.deployed.state_dict().values())


def test_mixtures_are_refused() -> None:
    x = pictures(2)
    with OtherDevice() as gpu:
        y = x.to("cuda")
        for mixed in (lambda: y + x, lambda: torch.cat([x, y]), lambda: y[torch.arange(1)], lambda: y.numpy()):
            with pytest.raises(Mixture):
                mixed()
        assert gpu.has(y * torch.tensor(2.0)) and gpu.has(torch.zeros(3, device=y.device)) and not gpu.has(torch.zeros(3))
        assert gpu.has(torch.zeros_like(y)) and gpu.has(y.view(-1)[:3]) and not gpu.has(y.cpu()) and not gpu.has(x)
        assert gpu.has(copy.deepcopy(y)) and gpu.has(torch.nn.functional.one_hot(torch.arange(3).to("cuda")))
        with counted(gpu) as reads:
            float(y.sum()), bool((y > 2).any()), y.tolist(), y.cpu(), y[y > 0.5], y.nonzero(), (y > 1).nonzero()
        assert reads == {"item": 2, "cpu": 2, "shape": 3}
        with pytest.raises(Mixture):
            torch.rand(2, generator=torch.Generator(), device="cuda")


class Careless(Undefended):
    def predict(self, x: Tensor) -> Tensor:
        return super().predict(x) + torch.zeros(len(x), dtype=torch.int64)


def test_a_defense_that_makes_a_tensor_on_the_cpu_is_noticed() -> None:
    careless = Careless(tiny("undefended").network, input_shape=SHAPE, classes=CLASSES).eval()
    x = pictures(2)
    assert careless.predict(x).shape == (2,)
    with OtherDevice(), pytest.raises(Mixture):
        careless.to("cuda").predict(x.to("cuda"))
