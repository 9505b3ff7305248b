"""Training: a killed run continues to the very same weights, and every mistake is refused before anything is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from patchcert_cli import cards, checkpoint, data, defenses, schema
from patchcert_cli.certificate import Tally
from patchcert_cli.defenses import Defense, MaskedOptions, Trainable
from patchcert_cli.defenses.ibp.defense import IntervalOptions
from patchcert_cli.errors import DataError, IntegrityError, Interrupted, UsageError
from patchcert_cli.progress import Silent
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, Sparse, parse_threat
from patchcert_cli.training import loop, overrides, recipe_files, run, steps
from patchcert_cli.training.recipe import Recipe, default_recipe

TINY = Recipe(
    "patch:5x5",
    network_options={"hidden": [12]},
    epochs=3,
    batch_size=25,
    validation=50,
    options={"natural_epochs": 0, "ramp_epochs": 1, "bounded_epochs": 1},
)


def images(count: int = 150) -> data.Images:
    """A few real digits; which split they are from does not matter here."""
    return data.load("mnist", "test").limit(count, 0)


def digest(folder: Path) -> str:
    return files.sha256(folder / files.WEIGHTS)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.training.test_loop import TINY, images
from patchcert_cli.training import loop

class Killer:
    def update(self, done, total, text):
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)
    def note(self, text):
        pass

for step in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
        loop.train(TINY, images(), Path(sys.argv[1], str(step)), progress=Killer())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, killed_at = loop.train(TINY, images(), tmp_path / "whole"), (2, 11)
    program = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, killed_at)]
    killed = subprocess.run(program, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    for step in killed_at:
        cut = tmp_path / str(step)
        assert not (cut / files.WEIGHTS).exists()
        again = loop.train(TINY, images(), cut)
        assert again.epochs_run == 3 - (step - 1) // 4
        assert digest(cut) == digest(tmp_path / "whole")
        rows = [json.loads(line) for line in (cut / files.METRICS).read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        assert again.validation == whole.validation


def test_a_run_stopped_in_its_last_validation_only_validates_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, honest = loop.train(TINY, images(), tmp_path / "whole"), steps.monitor

    def stop(defense: Defense, held: data.Images, recipe: Recipe, **more: Any) -> Tally:
        if len(held) == TINY.validation:
            raise KeyboardInterrupt
        return honest(defense, held, recipe, **more)

    monkeypatch.setattr(steps, "monitor", stop)
    monkeypatch.setattr(Trainable, "validation_size", 25)
    with pytest.raises(Interrupted, match="after 3 of 3 epochs"):
        loop.train(TINY, images(), tmp_path / "cut")
    monkeypatch.setattr(steps, "monitor", honest)
    again = loop.train(TINY, images(), tmp_path / "cut")
    assert again.epochs_run == 0 and again.validation == whole.validation
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    last = [json.loads((tmp_path / run / files.METRICS).read_text().splitlines()[-1]) for run in ("cut", "whole")]
    assert all(last[0][name] == last[1][name] for name in ("epoch", "loss", "validation_images", "clean", "certified"))


GUIDED = replace(
    TINY,
    network_options={"hidden": [12], "norm": True},
    batch_size=8,
    validation=16,
    options={
        **schema.plain(TINY.options),
        "natural_epochs": 1,
        "bounded_epochs": 0,
        "pick": "guided",
        "locations": 1,
        "init": "ibp",
        "tightness": 0.1,
        "balance": 0.1,
        "linear": 0.5,
        "flip": True,
        "shift": 1,
    },
)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_trains_along_is_resumed_to_the_bit_and_not_deployed(tmp_path: Path, precision: str) -> None:
    class Stop:
        def update(self, done: int, total: int, text: str) -> None:
            if done == 11:
                raise KeyboardInterrupt

        def note(self, text: str) -> None:
            pass

    recipe, some = replace(GUIDED, precision=precision), images(48)
    loop.train(recipe, some, tmp_path / "whole")
    with pytest.raises(Interrupted, match="after 2 of 3"):
        loop.train(recipe, some, tmp_path / "cut", progress=Stop())
    assert loop.train(recipe, some, tmp_path / "cut").epochs_run == 1
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    states = [checkpoint.unpack(tmp_path / name / files.STATE)[0] for name in ("cut", "whole")]
    aids = [name for name in states[0] if name.startswith("aid.")]
    assert len(aids) == 22 and states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    deployed = checkpoint.unpack(tmp_path / "whole" / files.WEIGHTS)[0]
    assert not any("aid" in name or "down" in name for name in deployed)
    assert "network.3.running_mean" in deployed
    assert bool((states[0]["model.network.3.running_mean"] != 0).any())


def test_a_run_from_before_an_option_existed_goes_on(tmp_path: Path) -> None:
    loop.train(replace(TINY, epochs=1), images(), tmp_path / "run")
    config = files.read_json(tmp_path / "run" / files.CONFIG)
    for name in ("pick", "flip", "linear"):
        del config["recipe"]["options"][name]
    files.write_json(tmp_path / "run" / files.CONFIG, config)
    assert loop.train(replace(TINY, epochs=1), images(), tmp_path / "run").epochs_run == 0
    with pytest.raises(UsageError, match="made with other settings"):
        loop.train(replace(TINY, epochs=1, options={**schema.plain(TINY.options), "flip": True}), images(), tmp_path / "run")


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    one = loop.train(replace(TINY, epochs=1), images(), tmp_path / "a")
    two = loop.train(replace(TINY, epochs=1), images(), tmp_path / "b")
    other = loop.train(replace(TINY, epochs=1, seed=1), images(), tmp_path / "c")
    assert digest(one.folder) == digest(two.folder) != digest(other.folder)


def test_ctrl_c_keeps_whole_epochs_and_says_how_to_go_on(tmp_path: Path) -> None:
    class Stop:
        def update(self, done: int, total: int, text: str) -> None:
            if done == 6:
                raise KeyboardInterrupt

        def note(self, text: str) -> None:
            pass

    with pytest.raises(Interrupted, match="after 1 of 3 epochs. Resume with the same command") as caught:
        loop.train(TINY, images(), tmp_path / "run", progress=Stop())
    assert caught.value.code == 130
    assert loop.train(TINY, images(), tmp_path / "run").epochs_run == 2


MASKED = Recipe(
    "patch:5x5",
    defense="patchcleanser",
    network_options={"stem": 4, "widths": [6, 8], "takes_mask": True},
    epochs=2,
    batch_size=20,
    learning_rate=0.2,
    optimizer="sgd",
    precision="bfloat16",
    stored="float16",
    validation=60,
    options={
        "per_axis": 3,
        "sides": [6, 8],
        "greedy_from": 0.5,
        "greedy_share": 0.5,
        "candidates": 2,
        "labels": "bfloat16",
        "average": 0.9,
        "shift": 1,
    },
)


WHOLE_NUMBERS = replace(MASKED, optimizer="muon", learning_rate=0.02, network_options={**MASKED.network_options, "bits": 8})


@pytest.mark.parametrize("recipe", [MASKED, WHOLE_NUMBERS], ids=["floats", "whole numbers, muon"])
def test_a_stopped_run_with_averaged_weights_ends_with_those_of_an_uninterrupted_one(recipe: Recipe, tmp_path: Path) -> None:
    class Stop:
        def update(self, done: int, total: int, text: str) -> None:
            if done == 9:
                raise KeyboardInterrupt

        def note(self, text: str) -> None:
            pass

    whole = loop.train(recipe, images(200), tmp_path / "whole")
    with pytest.raises(Interrupted, match="after 1 of 2 epochs"):
        loop.train(recipe, images(200), tmp_path / "cut", progress=Stop())
    again = loop.train(recipe, images(200), tmp_path / "cut")
    assert again.epochs_run == 1 and again.validation == whole.validation
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    assert loop.train(recipe, images(200), tmp_path / "cut").epochs_run == 0
    tensors, note = checkpoint.unpack(tmp_path / "cut" / files.STATE)
    assert note["averaged"] == 14
    saved, config = checkpoint.load_defense(tmp_path / "cut")
    deployed = config["deployed"]
    assert deployed["masks"] == {"covers": ["patch:5x5"], "per_axis": 3} and deployed["prediction_dtype"] == "bfloat16"
    last = False
    for name, value in saved.state_dict().items():
        assert torch.equal(value, tensors[f"average.{name}"].to(value)), "the average is what is saved"
        last |= not torch.equal(value, tensors[f"model.{name}"].to(value))
    assert last


CELLS = Recipe(
    "patch:5x5",
    defense="bagcert",
    network_options={"widths": [8], "kernels": [7], "dilations": [1], "mixes": [1], "whiten": True},
    epochs=2,
    batch_size=40,
    learning_rate=0.02,
    optimizer="muon",
    validation=60,
    options={"every": 4, "warm_up": "cells", "warm_up_epochs": 1, "average": 0.9, "shift": 1},
)


@pytest.mark.parametrize("recipe", [TINY, MASKED, CELLS], ids=["intervals", "masks, averaged", "cells, muon"])
def test_a_run_stopped_within_an_epoch_loses_no_kept_step(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a state after each step, as after each minute of a long one: the steps before the stop are not made again."""
    monkeypatch.setattr(steps, "KEPT_EVERY", 0.0)
    monkeypatch.setattr(steps, "SHARE_KEPT", 0.0)
    some = images(200)
    whole = loop.train(recipe, some, tmp_path / "whole")
    each = recipe.steps_of(0, 200 - recipe.validation)
    made: list[int] = []

    class Stop(Silent):
        def update(self, done: int, total: int, text: str) -> None:
            made.append(done)
            if done in (2, each + 2) and made.count(done) == 1:
                raise KeyboardInterrupt

    for said in ("after 0 of . epochs, and 1 steps of the next", "after 1 of . epochs, and 1 steps of the next"):
        with pytest.raises(Interrupted, match=said):
            loop.train(recipe, some, tmp_path / "cut", progress=Stop())
    again = loop.train(recipe, some, tmp_path / "cut", progress=Stop())
    again_made = [2, each + 2]  # the step that was stopped is made again
    assert sorted(made) == sorted([*range(1, recipe.epochs * each + 1), *again_made])
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole") and again.validation == whole.validation
    first, second = (
        [json.loads(line) for line in (tmp_path / name / files.METRICS).read_text().splitlines()] for name in ("cut", "whole")
    )
    assert [row["loss"] for row in first] == [row["loss"] for row in second]
    assert [row["steps"] for row in first] == [each] * recipe.epochs


def test_a_model_of_sampled_cells_is_stored_with_its_whitening_in_the_weights(tmp_path: Path) -> None:
    made = loop.train(CELLS, images(360), tmp_path / "run")
    saved, _ = checkpoint.load_defense(tmp_path / "run")
    stage = cast(Any, saved).scorer.stages[0]
    assert torch.equal(stage.whitening, torch.eye(49))
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cast(Any, saved).scores(x), cast(Any, made.defense).scores(x))
    frozen, _ = cast(Any, saved).scorer.freeze(torch.float32)
    assert len(frozen) == 3


def test_options_with_several_values_are_read_back_as_they_were_written() -> None:
    recipe = replace(MASKED, options={"sides": (8, 9)})
    assert recipe.to_dict()["options"]["sides"] == [8, 9]
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert "--option sides=8,9" in recipe.command
    several = replace(MASKED, threat="patches:2:3x3")
    assert several.name == "mnist-patchcleanser-2xp3" and "--threat patches:2:3x3" in several.command


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    loop.train(replace(TINY, epochs=1), images(), tmp_path / "run")
    before = digest(tmp_path / "run")
    with pytest.raises(UsageError, match="made with other settings .*seed 0, not 5.*--fresh"):
        loop.train(replace(TINY, epochs=1, seed=5), images(), tmp_path / "run")
    assert digest(tmp_path / "run") == before
    options = {"natural_epochs": 0, "ramp_epochs": 2, "bounded_epochs": 1}
    changed = replace(TINY, epochs=1, network_options={"hidden": [4]}, options=options)
    with pytest.raises(UsageError, match=r"\(network_options.hidden \[12\], not \[4\]; options.ramp_epochs 1, not 2\)"):
        loop.train(changed, images(), tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        loop.train(TINY, images(), tmp_path / "full")
    with pytest.raises(UsageError, match="not empty"):
        loop.train(TINY, images(), tmp_path / "full", fresh=True)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(("threat", "locations"), [("patch:3x3", 0), ("sparse:4", 5)])
def test_training_raises_certified_accuracy(tmp_path: Path, threat: str, locations: int) -> None:
    options = {**schema.plain(TINY.options), "ramp_epochs": 2, "locations": locations}
    recipe = replace(
        TINY, threat=threat, network_options={"hidden": [32]}, epochs=5, batch_size=40, validation=100, options=options
    )
    made = loop.train(recipe, images(900), tmp_path / "run")
    with torch.random.fork_rng():
        torch.manual_seed(9)
        untrained = checkpoint.defenses.build(recipe.config()["deployed"])
    held = images(900).hold_out(recipe.validation, recipe.seed)[1]
    assert made.validation.certified > 2 * steps.monitor(untrained, held, recipe).certified
    assert made.validation.certified >= 20


def test_recipes_name_everything_wrong_at_once_and_spell_out_their_command() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe("patch:40x40", epochs=0, network="transformer", options={"natural": 1.5, "decay": "never"})
    for word in ("40x40", "epochs", "transformer", "natural", "never"):
        assert word in str(caught.value)
    assert default_recipe(Sparse(10)).command == "patchcert train --threat sparse --k 10"
    recipe = replace(Recipe("patch:3x7"), epochs=99, network_options={"hidden": [40, 20]}, options={"decay": "step"})
    words = "--network-option hidden=40,20 --epochs 99 --option decay=step"
    assert recipe.command == f"patchcert train --threat patch --patch 3x7 {words}"
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    older = replace(default_recipe(Patch(5, 5), "patchcleanser"), network_options={})  # made before networks of whole numbers
    assert "--network-option bits=0" in older.command
    one = replace(default_recipe(Patch(5, 5), "patchcleanser", "mnist"), options={"sides": 8})  # a list of one
    assert one.options == MaskedOptions(sides=(8,)) and one.to_dict()["options"]["sides"] == [8]
    assert one.command.startswith(
        "patchcert train --threat patch --patch 5 --defense patchcleanser --dataset mnist --option sides=8"
    )
    assert (
        "network-option" not in one.command and "flip=False" not in default_recipe(Patch(5, 5), "patchcleanser", "mnist").command
    )
    with pytest.raises(UsageError, match="colour is not a known entry"):
        Recipe.from_dict({"threat": "patch:5x5", "colour": "red"})


def test_the_attacker_grows_and_the_learning_rate_falls() -> None:
    options = IntervalOptions(natural_epochs=1, ramp_epochs=15, bounded_epochs=20)
    strengths = [options.epsilon(progress / 4) for progress in range(241)]
    assert strengths == sorted(strengths)
    assert strengths[0] == 0 and strengths[4 * 16] == 1 == strengths[-1]
    rates = [options.lr_multiplier(progress / 4, 60) for progress in range(241)]
    first, last = rates[:160], rates[160:]
    assert first == sorted(first, reverse=True) and last == sorted(last, reverse=True)
    assert (rates[0], rates[160]) == (1.0, 0.5) and rates[-1] == pytest.approx(0, abs=1e-12)
    assert [options.bounded(progress, 60) for progress in (0, 39.9, 40, 59.9)] == [False, False, True, True]
    short = Recipe("patch:5x5", epochs=3).fitted().options
    assert isinstance(short, IntervalOptions)
    assert (short.natural_epochs, short.ramp_epochs, short.bounded_epochs) == (0, 1, 1)


def test_a_run_leaves_a_folder_with_a_valid_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = images()
    monkeypatch.setattr(data.Dataset, "load", lambda *args, **options: some)
    found = run.train(replace(TINY, epochs=1), tmp_path / "small")
    card = cards.Card.read(tmp_path / "small")
    assert card.verify(tmp_path / "small") == found["model_sha256"]
    assert (str(card.threat), card.network, card.status) == ("patch:5x5", "MLP 784-12-10", "trained")
    assert recipe_files.recipe_of(str(tmp_path / "small")) == replace(TINY, epochs=1)
    assert parse_threat(str(found["threat"])).budget == 1


def test_missing_training_data_names_the_one_command_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Fetch it with: patchcert train --patch 5 --download") as caught:
        run.train(TINY, tmp_path / "run", data_dir=tmp_path, fetch="patchcert train --patch 5 --download")
    assert caught.value.code == 6
    assert not (tmp_path / "run").exists()


def test_a_run_can_begin_with_the_weights_of_another(tmp_path: Path) -> None:
    first = loop.train(TINY, images(), tmp_path / "first")
    start = str(tmp_path / "first")
    changes = overrides.Overrides(start=start, learning_rate=1e-9, epochs=1)
    further = overrides.resolved(str(tmp_path / "first" / "recipe.yaml"), changes)
    assert further.start_sha256 == cards.weights_sha256({files.WEIGHTS: cards.File.of(tmp_path / "first" / files.WEIGHTS)})
    made = loop.train(further, images(), tmp_path / "next", beginning=run.begin(further))
    for name, value in made.defense.state_dict().items():
        torch.testing.assert_close(value, first.defense.state_dict()[name], atol=1e-6, rtol=0)
    assert "--start" in further.command


def test_weights_to_begin_with_must_be_the_recipes_and_fit(tmp_path: Path) -> None:
    loop.train(TINY, images(), tmp_path / "first")
    there = replace(TINY, start=str(tmp_path / "first"))
    with pytest.raises(IntegrityError, match="000000000000… as its start"):
        run.begin(replace(there, start_sha256="0" * 64))
    with pytest.raises(UsageError, match="instead of"):  # the weights are intact: what was typed does not go together
        run.begin(replace(there, network_options={"hidden": [13]}))


def test_a_network_of_whole_numbers_may_begin_with_weights_that_have_no_grids(tmp_path: Path) -> None:
    """They are fitted when training ends; whatever else is missing is refused."""
    loop.train(MASKED, images(360), tmp_path / "floats")
    fresh = defenses.build(WHOLE_NUMBERS.config()["deployed"])
    taken = checkpoint.weights_for(fresh, tmp_path / "floats")
    saved, _ = checkpoint.load_defense(tmp_path / "floats")
    assert taken.keys() == fresh.state_dict().keys() > saved.state_dict().keys()
    assert all(torch.equal(taken[name].to(value), value) for name, value in saved.state_dict().items())
    wider = replace(WHOLE_NUMBERS, network_options={**WHOLE_NUMBERS.network_options, "stem": 5})
    with pytest.raises(UsageError, match="shape"):
        checkpoint.weights_for(defenses.build(wider.config()["deployed"]), tmp_path / "floats")


def test_a_limit_takes_a_fixed_subset_and_chance_is_said(tmp_path: Path) -> None:
    """Ten steps of nothing: one and the same answer, which is right as often as the most frequent class is there."""
    recipe = Recipe("patch:5x5", network_options={"hidden": [8]}, epochs=1, validation=40, limit=200, learning_rate=1e-6)
    whole, told = data.load("mnist", "test"), []

    class Note(Silent):
        def update(self, done: int, total: int, text: str) -> None:
            told.append((done, total, text))

    made = loop.train(recipe, whole, tmp_path / "run", progress=Note())
    subset = whole.limit(200, 0)
    _, held = subset.hold_out(40, 0)
    assert made.kept == 160 and made.validation.images == 40
    assert made.chance == float(held.labels.bincount().max()) / 40
    assert told[-1][2].startswith("epoch 1 of 1: loss ") and float(told[-1][2].rsplit(" ", 1)[1]) > 0
    for clean, said in ((round(1.2 * made.chance * 40), True), (20, False), (40, False)):
        assert replace(made, validation=replace(made.validation, clean=clean)).at_chance is said
    few = replace(made, chance=0.9, validation=Tally(100, 90, 0))
    assert few.at_chance and not replace(few, validation=Tally(100, 92, 0)).at_chance
    with pytest.raises(UsageError, match="limit is 40"):
        replace(recipe, limit=40)
