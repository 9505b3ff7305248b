"""A teacher: its class probabilities enter the loss as the formula says, it stays as it is, one that does not fit is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from patchcert_cli import cards, checkpoint, data, defenses
from patchcert_cli.catalog.add_to_zoo import of_one_machine
from patchcert_cli.cli.main import app
from patchcert_cli.data.images import to_float
from patchcert_cli.defenses import TrainingStep
from patchcert_cli.defenses._training import cross_entropy
from patchcert_cli.defenses.bagcert import BagCert
from patchcert_cli.errors import IntegrityError, Interrupted, UnknownName, UsageError
from patchcert_cli.progress import Silent
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch
from patchcert_cli.training import loop, overrides, run, steps
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.state import Beginning, State
from tests.training.test_loop import MASKED, TINY, digest, images

VOTES = Recipe(
    "patch:5x5",
    defense="bagcert",
    network_options={"widths": [8], "kernels": [5], "dilations": [1], "mixes": [0]},
    epochs=2,
    batch_size=25,
    validation=50,
    options={"every": 3, "teacher_weight": 0.5},
)
ABLATIONS = Recipe(
    "patch:5x5",
    defense="smoothing",
    network_options={"widths": [8], "blocks": [1], "strides": [2]},
    epochs=2,
    batch_size=25,
    validation=50,
)
STUDENTS = {"bagcert": VOTES, "smoothing": ABLATIONS, "patchcleanser": replace(MASKED, options={"per_axis": 3})}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained model of the same images."""
    folder = tmp_path_factory.mktemp("teacher") / "taught"
    loop.train(TINY, images(), folder)
    return folder


def taught_by(folder: Path, recipe: Recipe) -> Recipe:
    return replace(recipe, teacher=str(folder), teacher_sha256=overrides.hash_of_model(str(folder), "", "teacher"))


def step(recipe: Recipe, taught: Tensor | None) -> TrainingStep:
    return TrainingStep(recipe.threat, recipe.options, 1.5, recipe.epochs, torch.Generator().manual_seed(3), None, taught)


def probabilities(count: int, classes: int) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(dim=1)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_share_of_the_cross_entropy_is_with_the_teachers_probabilities(weight: float) -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label, taught = torch.tensor([0, 1, 2, 3, 0, 1]), probabilities(6, 4)
    recipe = replace(MASKED, options={"teacher_weight": weight})
    likely = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    own = -sum(float(likely[i, label[i]].log()) for i in range(6)) / 6
    theirs = -sum(float(taught[i, k] * likely[i, k].log()) for i in range(6) for k in range(4)) / 6
    assert float(cross_entropy(logits, label, step(recipe, taught))) == pytest.approx((1 - weight) * own + weight * theirs)
    assert float(cross_entropy(logits, label, step(recipe, None))) == pytest.approx(own)


def test_the_votes_of_bagcert_are_pulled_to_the_teachers_probabilities() -> None:
    """What is added to the loss is the weight times the cross-entropy of the softmax of the sharpened mean votes."""
    recipe = replace(VOTES, options={"every": 1, "teacher_weight": 0.2, "teacher_sharpness": 7.0})
    defense, some, taught = Beginning.of(recipe).defense.eval(), images(12), probabilities(12, 10).float()
    assert isinstance(defense, BagCert)
    x, label = to_float(some.read()), some.labels
    sharp = 7.0 * (defense.scorer(x) > 0).float().mean(dim=(2, 3))
    added = -(taught * (sharp - sharp.exp().sum(dim=1, keepdim=True).log())).sum(dim=1).mean()
    with_teacher, without = (defense.training_loss(x, label, step(recipe, given)).detach() for given in (taught, None))
    assert float(with_teacher - without) == pytest.approx(0.2 * float(added), abs=1e-6)


def test_the_teacher_sees_the_images_as_the_defense_does(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same changed images, in the same order, and no gradient reaches the teacher."""
    recipe = taught_by(teacher, replace(VOTES, options={**VOTES.to_dict()["options"], "shift": 3}))
    kept, _ = images().hold_out(recipe.validation, recipe.seed)
    state = State.of(recipe, run.begin(recipe), "cpu", kept)
    asked: list[Tensor] = []
    learned: list[tuple[Tensor, Tensor]] = []
    says, loses = type(state.teacher).class_probabilities, BagCert.training_loss

    def answers(self: Any, x: Tensor) -> Tensor:
        asked.append(x.clone())
        return says(self, x)

    def loss(self: Any, x: Tensor, label: Tensor, at: TrainingStep) -> Tensor:
        assert at.taught is not None and not at.taught.requires_grad
        learned.append((x.clone(), at.taught))
        return loses(self, x, label, at)

    monkeypatch.setattr(type(state.teacher), "class_probabilities", answers)
    monkeypatch.setattr(BagCert, "training_loss", loss)
    before = {name: value.clone() for name, value in state.teacher.state_dict().items()}  # type: ignore[union-attr]
    steps.epoch(recipe, 0, state, kept, Silent())
    known, _ = checkpoint.load_defense(teacher)
    assert len(asked) == len(learned) == 4
    for seen, (x, taught) in zip(asked, learned, strict=True):
        assert torch.equal(seen, x)
        assert torch.allclose(taught, known.network(x).softmax(dim=1), atol=1e-6)  # type: ignore[operator]
        assert torch.allclose(taught.sum(dim=1), torch.ones(len(x)), atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in state.teacher.state_dict().items())  # type: ignore[union-attr]
    assert not any("teacher" in name for name in state.tensors())


@pytest.mark.parametrize("student", list(STUDENTS))
def test_a_stopped_run_with_a_teacher_ends_with_the_weights_of_an_uninterrupted_one(
    student: str, teacher: Path, tmp_path: Path
) -> None:
    recipe = taught_by(teacher, STUDENTS[student])
    alone = loop.train(STUDENTS[student], images(), tmp_path / "alone")
    whole = loop.train(recipe, images(), tmp_path / "whole", beginning=run.begin(recipe))

    class Stop(Silent):
        def note(self, text: str) -> None:
            if text.startswith("epoch 1 of"):
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        loop.train(recipe, images(), tmp_path / "cut", beginning=run.begin(recipe), progress=Stop())
    again = loop.train(recipe, images(), tmp_path / "cut", beginning=run.begin(recipe))
    assert again.epochs_run == 1 and alone.epochs_run == whole.epochs_run == 2
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole") != digest(tmp_path / "alone")


def test_a_recipe_keeps_its_teacher_and_only_one_that_has_one_names_it(teacher: Path, tmp_path: Path) -> None:
    changes = overrides.Overrides(threat=Patch(5, 5), dataset="mnist", defense="bagcert", teacher=str(teacher))
    recipe = overrides.resolved(None, changes)
    assert recipe.teacher_sha256 == overrides.hash_of_model(str(teacher), "", "teacher")
    assert f"--teacher {teacher}" in recipe.command and "teacher-sha256" not in recipe.command
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert not {"teacher", "teacher_sha256"} & set(VOTES.to_dict())
    loop.train(TINY, images(), other := tmp_path / "other")
    again = overrides.resolved(None, replace(changes, teacher=str(other)))
    assert again.teacher_sha256 == recipe.teacher_sha256  # the same weights in another place


def test_only_defenses_that_can_learn_so_take_a_teacher(teacher: Path) -> None:
    assert {"bagcert", "smoothing", "patchcleanser", "minority"} <= set(defenses.taught())
    with pytest.raises(UsageError, match="ibp cannot learn from a teacher; those that can: bagcert"):
        taught_by(teacher, TINY)


def test_a_teacher_must_be_the_recipes_and_fit(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="000000000000… as its teacher"):
        run.begin(replace(taught_by(teacher, VOTES), teacher_sha256="0" * 64))
    with pytest.raises(UsageError, match=r"other images than cifar10, \[1, 28, 28\] in place of \[3, 32, 32\]"):
        run.begin(taught_by(teacher, replace(VOTES, dataset="cifar10")))
    loop.train(replace(VOTES, epochs=1), images(), tmp_path / "votes")
    with pytest.raises(UsageError, match="votes' cannot teach: BagCert has no class probabilities") as caught:
        run.begin(taught_by(tmp_path / "votes", VOTES))
    assert "smoothing or ibp" in caught.value.hint
    with pytest.raises(UsageError, match="teacher_sha256 is given without teacher"):
        replace(VOTES, teacher_sha256="0" * 64)


def test_other_classes_of_the_same_images_are_named(teacher: Path, tmp_path: Path) -> None:
    config = json.loads((teacher / files.CONFIG).read_text())
    config["deployed"]["classes"] = [f"class {number}" for number in range(10)]
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    (other / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(UsageError, match="it has other classes than mnist, .*class 0.* in place of .*'0'"):
        run.begin(taught_by(other, VOTES))


@pytest.mark.parametrize("epochs", [1, 2], ids=["finished", "stopped"])
def test_a_run_is_not_resumed_without_its_teacher_or_its_steps(epochs: int, teacher: Path, tmp_path: Path) -> None:
    recipe = replace(taught_by(teacher, VOTES), epochs=2, steps=(2,))
    folder = tmp_path / "run"

    class Stop(Silent):
        def note(self, text: str) -> None:
            if text.startswith(f"epoch {epochs} of 2") and epochs == 1:
                raise KeyboardInterrupt

    try:
        loop.train(recipe, images(), folder, beginning=run.begin(recipe), progress=Stop())
    except Interrupted:
        assert epochs == 1
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for less, said in (
        (replace(recipe, teacher="", teacher_sha256=""), "teacher '.*', not None"),
        (replace(recipe, steps=()), r"steps \[2\], not None"),
    ):
        with pytest.raises(UsageError, match=said):
            loop.train(less, images(), folder, beginning=run.begin(less))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_teacher_of_a_run_may_move(teacher: Path, tmp_path: Path) -> None:
    """The weights decide. The run keeps the name that it began with, and so its configuration."""
    recipe, folder = taught_by(teacher, VOTES), tmp_path / "run"
    loop.train(recipe, images(), folder, beginning=run.begin(recipe))
    before = (folder / files.CONFIG).read_bytes(), (folder / "recipe.yaml").read_bytes()
    shutil.copytree(teacher, tmp_path / "moved")
    moved = taught_by(tmp_path / "moved", VOTES)
    again = loop.train(moved, images(), folder, beginning=run.begin(moved))
    assert again.epochs_run == 0 and again.recipe.teacher == str(teacher)
    assert ((folder / files.CONFIG).read_bytes(), (folder / "recipe.yaml").read_bytes()) == before


def test_a_recipe_whose_teacher_is_gone_says_how_to_go_on(teacher: Path, tmp_path: Path) -> None:
    recipe = taught_by(teacher, VOTES)
    entries = {**recipe.to_dict(), "teacher": str(tmp_path / "gone")}
    (tmp_path / "recipe.yaml").write_text(json.dumps(entries))
    with pytest.raises(UnknownName, match=f"the recipe's teacher, '.*gone' with weights {recipe.teacher_sha256[:12]}") as caught:
        overrides.resolved(str(tmp_path / "recipe.yaml"), overrides.Overrides())
    assert "--teacher NAME|PATH" in caught.value.hint
    found = overrides.resolved(str(tmp_path / "recipe.yaml"), overrides.Overrides(teacher=str(teacher)))
    assert found == recipe
    without = overrides.resolved(str(tmp_path / "recipe.yaml"), overrides.Overrides(teacher=""))
    assert without.teacher == without.teacher_sha256 == ""


def test_a_run_needs_the_models_that_its_recipe_names(teacher: Path, tmp_path: Path) -> None:
    for recipe in (taught_by(teacher, VOTES), replace(TINY, start=str(teacher))):
        with pytest.raises(UsageError, match="names other models"):
            loop.train(recipe, images(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fresh_run_does_not_delete_its_own_teacher(teacher: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(teacher, mine)
    with pytest.raises(UsageError, match="which is the recipe's teacher"):
        run.train(taught_by(mine, VOTES), mine, fresh=True)
    assert (mine / files.WEIGHTS).exists()


def test_the_card_names_the_teacher(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = images()
    monkeypatch.setattr(data.Dataset, "load", lambda *args, **options: some)
    run.train(taught_by(teacher, replace(VOTES, epochs=1)), tmp_path / "run")
    card = cards.Card.read(tmp_path / "run")
    assert f"Taught by `{teacher}`" in card.render() and card.recipe["teacher"] == str(teacher)
    assert [f"the teacher of this run, '{teacher}', is a folder of this machine" in one for one in of_one_machine(card)] == [True]
    assert of_one_machine(replace(card, recipe={**card.recipe, "teacher": "mnist-ibp-p5"})) == []


def test_the_command_line_refuses_a_teacher_that_does_not_exist(tmp_path: Path) -> None:
    words = ["train", "--patch", "5", "--defense", "bagcert", "--data", "mnist", "--out", str(tmp_path / "run"), "--teacher"]
    done = CliRunner().invoke(app, [*words, "mnist-ibp-p55"])
    assert isinstance(done.exception, UnknownName) and "mnist-ibp-p55" in str(done.exception)
    assert not (tmp_path / "run").exists()
