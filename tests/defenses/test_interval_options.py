"""Options of interval training: what they refuse, and the schedules that they make."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from patchcert_cli.cli import main
from patchcert_cli.defenses import Augment
from patchcert_cli.defenses.ibp.options import IntervalOptions
from patchcert_cli.errors import UsageError
from patchcert_cli.training.recipe import Recipe


def test_defaults_mean_what_they_meant() -> None:
    """The recipes of older cards name only the first nine options."""
    old = IntervalOptions()
    assert (old.picked, old.augment(0, 60), old.augment(59, 60)) == ("worst", Augment(), Augment())
    assert IntervalOptions(locations=7).picked == "random"
    assert Recipe("patch:5x5", options={"locations": 7}).command.endswith("--option locations=7")
    assert Recipe("patch:5x5").command == "patchcert train --threat patch --patch 5"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pick": "best"}, "pick is 'best', not auto, worst, random, guided or mined"),
        ({"pick": "worst", "locations": 3}, "locations is 3, not 0"),
        ({"pick": "random"}, "pick=random needs 1 or more"),
        ({"pick": "mined"}, "screened is 0, but pick=mined needs 1"),
        ({"pick": "mined", "screened": 4, "locations": 5}, "screened is 4, but pick=mined needs 5"),
        ({"pick": "guided"}, "pick=guided needs 1 or more"),
        ({"init": "he"}, "init is 'he', not torch or ibp"),
        ({"tightness": -0.1}, "tightness is -0.1, not 0 or more"),
        ({"linear": 1.0}, "linear is 1.0, not in"),
        ({"shift": -1}, "shift is -1, not 0 or more"),
        ({"flip": 1}, "flip is 1, not true or false"),
        ({"visits": 0.5}, "visits is 0.5, not a whole number"),
        ({"decay_by": 1.5}, "decay_by is 1.5, not in"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe("patch:5x5", options=options)


def test_images_are_moved_further_in_the_bounded_phase_if_asked() -> None:
    options = IntervalOptions(bounded_epochs=5, flip=True, shift=2, bounded_shift=1)
    assert {options.augment(at, 60) for at in (0, 30, 56)} == {Augment(True, 2)}
    further = IntervalOptions(bounded_epochs=5, shift=2, bounded_shift=4)
    assert [further.augment(at, 60).shift for at in (0, 54, 55, 59)] == [2, 2, 4, 4]


def test_a_running_average_is_off_unless_asked_for() -> None:
    assert IntervalOptions().ema_decay == 0.0 and IntervalOptions(average=0.9).ema_decay == 0.9
    assert IntervalOptions(average=0.9).scaled(1.0, 0.5).ema_decay == 0.8, "half the steps: it looks back over the same share"


def test_steps_of_the_learning_rate() -> None:
    """Chiang et al.: 10 natural epochs, 121 of the ramp, then half of it every 10."""
    options = IntervalOptions(natural_epochs=10, ramp_epochs=121, bounded_epochs=0, decay="step")
    assert [options.lr_multiplier(at, 200) for at in (0, 130.9, 140.9, 141, 151, 199)] == [1, 1, 1, 0.5, 0.25, 0.5**6]
    assert [options.epsilon(at) for at in (9.9, 10, 131, 200)] == [0, 0, 1, 1]
    steeper = IntervalOptions(natural_epochs=1, ramp_epochs=20, bounded_epochs=0, decay="step", decay_every=20, decay_by=0.2)
    assert steeper.lr_multiplier(61, 70) == pytest.approx(0.04)


def test_the_schedules_of_the_docs_are_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / "ibp-training.md").read_text()
    commands = [line for block in re.findall(r"```\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--dry-run"])
        with pytest.raises(SystemExit) as stop:
            main.run()
        captured = capsys.readouterr()
        assert not stop.value.code, f"{command}: {captured.err}"
    said = "".join(one.__doc__ or "" for one in IntervalOptions.__mro__)
    assert all(f"{item.name}:" in said for item in fields(IntervalOptions))
