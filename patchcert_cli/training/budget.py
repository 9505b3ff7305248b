"""A run that is to end in a given time: a schedule that fits, and how many steps the next epoch may take.

Some steps are measured first. The recipe keeps its course, scaled: its epochs become as many as fit, phases and the running
average keep their shares of the whole, and an epoch may be a random part of the images. While it runs, the steps of each epoch
are chosen so that the rest, with certifying held-out images and saving, ends in time. What was done is written as the recipe of
the run (``steps``), which repeats it by steps, whatever they take then.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from patchcert_cli.errors import UsageError
from patchcert_cli.storage import files
from patchcert_cli.training.recipe import Recipe

PLAN = "plan.json"  # what was asked for and what it became
FEWEST_EPOCHS = 16  # the steps are chosen again at least as often, where there is time for as many
SPARE = 0.02  # share of the time that is left for what was not measured
Clock = Callable[[], float]


@dataclass(frozen=True)
class Pace:
    """What was measured before a run.

    Attributes:
        step: seconds of a step.
        validation: seconds of certifying all held-out images.
        saving: seconds of keeping the state once.
        finishing: seconds of what a defense needs before it certifies.
    """

    step: float
    validation: float
    saving: float
    finishing: float = 0.0

    @property
    def end(self) -> float:
        """Seconds of all that follows the last step."""
        return self.finishing + self.validation + self.saving


class Budget:
    """The time of a run.

    Attributes:
        total: seconds that all of it may take.
        step: seconds of a step, as it was measured before.
        finishing: seconds of what a defense needs before it certifies.
        reserve: seconds for all that follows the last step.
    """

    def __init__(self, minutes: float, pace: Pace, *, spent: float = 0.0, clock: Clock = time.perf_counter) -> None:
        """Begin now; measuring, and earlier processes of the run, took ``spent`` seconds."""
        self.total, self._clock = 60 * minutes, clock
        self.step, self.finishing, self.reserve, self._saving = pace.step, pace.finishing, pace.end, pace.saving
        self._began = clock() - spent

    @property
    def spent(self) -> float:
        """Seconds so far, those of earlier processes included."""
        return self._clock() - self._began

    def validated(self, images: int, seconds: float, held: int) -> None:
        """Certifying ``images`` took so long: the reserve is for ``held`` of them."""
        self.reserve = self.finishing + seconds / max(images, 1) * held + self._saving

    def late(self, epochs: int, seconds: float) -> bool:
        """Whether the next of ``epochs`` epochs is to be left out: not each of them has the time for one step of ``seconds``."""
        fits = int(self._left / max(seconds, 1e-9))
        return fits < 1 or epochs % -(-epochs // fits) != 0

    def steps(self, epochs: int, seconds: float, most: int, made: int = 0) -> int:
        """How many steps, of ``seconds`` each, the next of ``epochs`` epochs may take: 1 to ``most``, those ``made`` included."""
        return max(1, min(most, int((self._left + made * seconds) / max(epochs, 1) / max(seconds, 1e-9))))

    @property
    def _left(self) -> float:
        return self.total * (1 - SPARE) - self.reserve - self.spent


def fitted(recipe: Recipe, minutes: float, images: int, pace: Pace, *, spent: float = 0.0) -> Recipe:
    """The recipe whose course takes ``minutes`` with ``images`` training images, of which ``spent`` seconds are over.

    Raises:
        UsageError: not even a step fits.
    """
    each = max(images // recipe.batch_size, 1)
    seconds = 60 * minutes * (1 - SPARE) - pace.end - spent
    steps = int(seconds / pace.step)
    if steps < 1:
        least = (spent + pace.end + pace.step) / (1 - SPARE) / 60
        raise UsageError(
            f"--max-minutes {minutes:g} is too little: beginning took {spent:.0f} s, a step takes {pace.step:.2g} s,"
            f" and certifying {recipe.validation} held-out images about {pace.validation:.0f} s.",
            hint=f"Use --max-minutes {math.ceil(10 * least) / 10:.1f} or more, or fewer --validation images.",
        )
    epochs = max(-(-steps // each), min(FEWEST_EPOCHS, steps))
    share = epochs / recipe.epochs
    options = recipe.options.scaled(share, steps / (each * recipe.epochs))
    return replace(recipe, epochs=epochs, options=options, steps=()).fitted()


def planned(folder: Path, recipe: Recipe, minutes: float) -> tuple[Recipe, Pace] | None:
    """The recipe that a run in ``folder`` was given to take ``minutes``, and what was measured then; None if it is a new run.

    Raises:
        UsageError: the folder has a plan for another recipe or another time.
    """
    path, asked = folder / PLAN, _asked(recipe, minutes)
    if not path.exists():
        return None
    plan: dict[str, Any] = files.read_json(path)
    if {name: plan.get(name) for name in asked} != asked:
        before = plan.get("max_minutes")
        what = f"for {before:g} minutes, not {minutes:g}" if before != minutes else "with another recipe"
        raise UsageError(f"'{folder}' was begun {what}.", hint="Use another --out, or --fresh to start over.")
    config = files.read_json(folder / files.CONFIG) if (folder / files.CONFIG).exists() else {}
    return Recipe.from_dict(config.get("recipe", plan["planned"])), Pace(**plan["pace"])


def write(folder: Path, recipe: Recipe, minutes: float, fits: Recipe, pace: Pace) -> None:
    """Keep the plan of a run in its folder."""
    files.write_json(folder / PLAN, {**_asked(recipe, minutes), "planned": fits.to_dict(), "pace": asdict(pace)})


def spent(folder: Path) -> float:
    """Seconds that earlier processes of a run have spent on whole epochs."""
    path = folder / files.METRICS
    rows = [json.loads(line) for line in files.read(path).decode().splitlines()] if path.exists() else []
    return float(rows[-1].get("spent", 0.0)) if rows else 0.0


def _asked(recipe: Recipe, minutes: float) -> dict[str, Any]:
    return {"recipe": recipe.to_dict(), "max_minutes": minutes}
