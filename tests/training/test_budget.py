"""``--max-minutes``: a schedule that fits, that ends in time at any speed, and that its recipe repeats by steps."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from patchcert_cli import schema
from patchcert_cli.defenses.bagcert import BagCertOptions
from patchcert_cli.defenses.ibp.options import IntervalOptions
from patchcert_cli.errors import Interrupted, UsageError
from patchcert_cli.progress import Silent
from patchcert_cli.storage import files
from patchcert_cli.training import budget, loop, recipe_files, steps
from patchcert_cli.training.budget import Budget, Pace, fitted
from patchcert_cli.training.recipe import Recipe
from tests.training.test_loop import TINY, digest, images

LONG = replace(
    TINY,
    batch_size=50,
    epochs=40,
    options=IntervalOptions(natural_epochs=2, ramp_epochs=16, bounded_epochs=8, decay="step", decay_every=4),
)
PACE = Pace(step=2.0, validation=60.0, saving=1.0)


def test_the_course_is_scaled_to_what_fits() -> None:
    found = fitted(LONG, 61, 200, PACE)  # 3,660 s; 4 steps of 2 s an epoch
    assert found.epochs == -(-int((3660 * 0.98 - 61) / 2) // 4)
    options = found.options
    assert isinstance(options, IntervalOptions)
    share = found.epochs / 40
    assert (options.natural_epochs, options.ramp_epochs) == (round(2 * share), round(16 * share))
    assert (options.bounded_epochs, options.decay_every) == (round(8 * share), round(4 * share))
    assert (found.batch_size, found.learning_rate, found.seed) == (LONG.batch_size, LONG.learning_rate, LONG.seed)


def test_a_short_time_has_short_epochs_and_phases() -> None:
    found = fitted(LONG, 2, 50 * 1000, PACE)  # 28 steps of a thousand
    assert found.epochs == budget.FEWEST_EPOCHS
    assert found.options == replace(LONG.options, natural_epochs=1, ramp_epochs=6, bounded_epochs=3, decay_every=2)


def test_an_average_of_weights_looks_back_over_the_same_share() -> None:
    scaled = BagCertOptions(average=0.998, warm_up_epochs=16).scaled(0.25, 0.25)
    assert scaled == BagCertOptions(average=0.992, warm_up_epochs=4)
    assert BagCertOptions(average=0.9).scaled(1.0, 0.01) == BagCertOptions(average=0.0)
    assert BagCertOptions(average=0.9).scaled(10.0, 10.0) == BagCertOptions(average=0.99)


def test_too_little_time_is_one_line() -> None:
    with pytest.raises(
        UsageError, match=r"--max-minutes 1 is too little: beginning took 9 s, a step takes 2 s.* --max-minutes 1\.3 or more"
    ):
        fitted(LONG, 1, 200, PACE, spent=9.0)


class Clock:
    """Seconds that pass as a machine of changing speed would let them pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("speeds", [[1.0], [1.0, 3.0], [3.0, 1.0], [1.0, 1.0, 1.0, 0.2]])
def test_the_end_is_in_time_whatever_the_speed(speeds: list[float]) -> None:
    clock = Clock()
    time = Budget(30, PACE, clock=clock)
    recipe, last = fitted(LONG, 30, 50 * 100, PACE), PACE.step
    for epoch in range(recipe.epochs):
        count = time.steps(recipe.epochs - epoch, last, 100)
        last = PACE.step * speeds[epoch * len(speeds) // recipe.epochs]
        clock.now += count * last
    clock.now += PACE.validation + PACE.saving
    assert clock.now <= 1.05 * 30 * 60
    if speeds[-1] >= 1:
        assert clock.now >= 0.93 * 30 * 60  # a faster machine has no more than all images of each epoch


def test_the_reserve_follows_what_certifying_takes() -> None:
    time = Budget(10, PACE, clock=Clock())
    before = time.steps(4, 1.0, 10_000)
    time.validated(8, 16.0, 100)
    assert time.reserve == 200.0 + PACE.saving and time.steps(4, 1.0, 10_000) == before - (200 - 60) // 4


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Ticking(Silent):
    """Each step takes a second, from some step on three."""

    def __init__(self, clock: Clock, stop: int = 0) -> None:
        self.clock, self.stop, self.calls = clock, stop, 0

    def update(self, done: int, total: int, text: str) -> None:
        self.calls += 1
        self.clock.now += 1.0
        if self.calls == self.stop:
            raise KeyboardInterrupt


def test_a_run_with_a_budget_is_repeated_by_its_recipe(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchcert_cli.training.loop.time.perf_counter", clock)
    recipe = replace(TINY, epochs=3)

    def time(spent: float = 0.0) -> Budget:
        return Budget(12 / 60, Pace(1.0, 0.0, 0.0), spent=spent, clock=clock)

    whole = loop.train(recipe, images(), tmp_path / "whole", budget=time(), progress=Ticking(clock))
    rows = [json.loads(line) for line in (tmp_path / "whole" / files.METRICS).read_text().splitlines()]
    made = [row["steps"] for row in rows]
    assert sum(made) <= 12 and max(made) <= 4 and rows[-1]["spent"] <= 12
    assert list(whole.recipe.steps) == (made if len(set(made)) > 1 else made[:1])
    read = Recipe.from_dict(recipe_files.read(tmp_path / "whole" / "recipe.yaml"))
    assert read == whole.recipe == Recipe.from_dict(files.read_json(tmp_path / "whole" / files.CONFIG)["recipe"])
    loop.train(read, images(), tmp_path / "again")
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")
    assert f"--steps {','.join(map(str, made))}" in whole.recipe.command or len(set(made)) == 1
    with pytest.raises(Interrupted):
        loop.train(recipe, images(), tmp_path / "cut", budget=time(), progress=Ticking(clock, stop=made[0] + 1))
    spent = budget.spent(tmp_path / "cut")
    assert 0 < spent < 12
    assert loop.train(recipe, images(), tmp_path / "cut", budget=time(spent)).epochs_run == 2


class Phases(Silent):
    """Steps of the first four epochs take a second, and of the others four."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def update(self, done: int, total: int, text: str) -> None:
        self.clock.now += 1.0 if int(text.split()[1]) <= 4 else 4.0


def test_a_costly_phase_has_fewer_steps_from_its_first_epoch_on(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchcert_cli.training.loop.time.perf_counter", clock)
    recipe, pace = replace(TINY, epochs=8), Pace(1.0, 0.0, 0.0)
    loop.train(recipe, images(), tmp_path, budget=Budget(40 / 60, pace, clock=clock), progress=Phases(clock))
    made = [json.loads(line)["steps"] for line in (tmp_path / files.METRICS).read_text().splitlines()]
    assert made[:4] == [4, 4, 4, 4] and made[4:] == [1, 1, 1, 2] and clock.now == 36


class Slow(Silent):
    """Every step takes three seconds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def update(self, done: int, total: int, text: str) -> None:
        self.clock.now += 3.0


def test_epochs_are_left_out_where_not_each_has_the_time_for_a_step(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchcert_cli.training.loop.time.perf_counter", clock)
    recipe, pace = replace(TINY, epochs=40), Pace(1.0, 0.0, 0.0)
    made = loop.train(recipe, images(), tmp_path / "run", budget=Budget(1, pace, clock=clock), progress=Slow(clock)).recipe
    assert 0.9 * 60 < clock.now <= 60 and sum(made.steps) == clock.now / 3 and len(made.steps) == 40
    assert made.steps[0] > 0 and max(b - a for a, b in pairwise([at for at, count in enumerate(made.steps) if count])) <= 3
    loop.train(made, images(), tmp_path / "again")
    assert digest(tmp_path / "again") == digest(tmp_path / "run")
    assert min(made.steps) == 0 < steps.trial(replace(made, steps=made.steps[::-1]), images()).weights


def test_a_plan_is_kept_and_another_one_is_refused(tmp_path: Path) -> None:
    assert budget.planned(tmp_path, LONG, 10) is None
    fits = fitted(LONG, 10, 200, PACE)
    budget.write(tmp_path, LONG, 10, fits, PACE)
    assert budget.planned(tmp_path, LONG, 10) == (fits, PACE)
    with pytest.raises(UsageError, match="was begun for 10 minutes, not 20"):
        budget.planned(tmp_path, LONG, 20)
    with pytest.raises(UsageError, match="was begun with another recipe"):
        budget.planned(tmp_path, replace(LONG, seed=1), 10)


@pytest.mark.parametrize("steps", [(3,), (2, 3, 4)])
def test_steps_are_part_of_a_recipe(steps: tuple[int, ...]) -> None:
    recipe = replace(TINY, batch_size=50, steps=steps)
    assert Recipe.from_dict(recipe.to_dict()) == recipe and "steps" not in TINY.to_dict()
    assert [recipe.steps_of(epoch, 1000) for epoch in range(3)] == list(steps * 3)[:3]
    assert recipe.steps_of(2, 50) == 1, "no more than there are images for"
    assert schema.plain(recipe)["steps"] == list(steps)


def test_steps_that_fit_no_epochs_are_refused() -> None:
    with pytest.raises(UsageError, match="steps has 2 numbers, neither 1 nor one for each of 3 epochs"):
        replace(TINY, steps=(1, 2))
    with pytest.raises(UsageError, match="steps has no step"):
        replace(TINY, steps=(0,))
