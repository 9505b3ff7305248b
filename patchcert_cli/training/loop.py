"""The one training loop: any defense's loss, resumable to the bit.

Everything random in epoch e comes from a generator seeded with (seed, e), and the state after each epoch and each minute
(weights, the optimizer's moments, what trains along, that generator) is on disk, so a run that was killed continues as if it had
not been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import checkpoint
from patchcert_cli.certificate import Tally
from patchcert_cli.data.images import Images
from patchcert_cli.defenses import Trainable
from patchcert_cli.errors import IntegrityError, Interrupted, MachineError, UsageError
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.schema import differences
from patchcert_cli.storage import files, locks
from patchcert_cli.training import ranks, recipe_files, steps
from patchcert_cli.training.budget import PLAN, Budget
from patchcert_cli.training.ranks import Ranks
from patchcert_cli.training.recipe import OPTIONAL, ROLES, Recipe
from patchcert_cli.training.state import Beginning, Place, State, restore, save
from patchcert_cli.training.trackers import Tracking

MONITORED = 0.05  # share of a given time that may go into certifying on the way
REPORTS = 10  # points of a run at which some validation images are certified; the last epoch certifies all


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: where config, weights and metrics are.
        recipe: what was done; with a budget its steps are those that were made.
        defense: in eval mode.
        validation: counts on the whole held-out split.
        epochs_run: epochs that this call trained itself; 0 if the run was finished before.
        seconds: training time of all epochs.
        kept: how many images it was trained on.
        chance: the share of the most frequent class among the held-out images, which needs no training to be reached.
    """

    folder: Path
    recipe: Recipe
    defense: Trainable
    validation: Tally
    epochs_run: int
    seconds: float
    kept: int
    chance: float

    @property
    def at_chance(self) -> bool:
        """Whether the model is right hardly more often than the answer that is always the same."""
        return self.validation.clean_accuracy <= min(1.25 * self.chance, self.chance + 0.05 * (1 - self.chance))


def train(
    recipe: Recipe,
    images: Images,
    folder: Path,
    *,
    device: str = "cpu",
    fresh: bool = False,
    progress: Progress | None = None,
    beginning: Beginning | None = None,
    budget: Budget | None = None,
    workers: Workers | None = None,
    tracking: Tracking | None = None,
) -> Trained:
    """Train ``recipe`` into ``folder``, continuing a stopped run of the same recipe.

    Args:
        recipe: what is trained.
        images: the training split.
        folder: empty, or a run of this recipe.
        device: where to compute.
        fresh: start over, even if there is a run.
        progress: hears how far the run is.
        beginning: fresh weights of this recipe, and what loads others into them; None for the fresh ones alone.
        budget: decides how many steps each epoch takes; None for the recipe's.
        workers: the processes that share the work; by default this one alone.
        tracking: gets the metrics of each epoch.

    Raises:
        UsageError: the folder holds a run of another recipe, or ``beginning`` lacks a model that the recipe names.
        MachineError: out of memory.
        Interrupted: stopped by Ctrl-C; whole epochs are kept, and steps up to a minute ago.
    """
    progress, workers, tracking = progress or Silent(), workers or Workers(), tracking or Tracking()
    if (recipe.teacher and (beginning is None or beginning.teacher is None)) or (recipe.start and beginning is None):
        raise UsageError("this recipe names other models, and they are not given.", hint="Give beginning=run.begin(recipe).")
    images = images.limit(recipe.limit or None, recipe.seed)
    workers.agree({**{name: str(value) for name, value in recipe.to_dict().items()}, "images": images.digest()})
    workers.lead("begun", lambda: _begin(recipe, folder, fresh=fresh, budgeted=budget is not None))
    workers.check_shared(folder / files.CONFIG)
    recipe = _as_begun(recipe, folder)
    kept, held = images.hold_out(recipe.validation, recipe.seed)
    new = not (folder / files.STATE).exists()
    state = State.of(recipe, beginning or Beginning.of(recipe), device, kept if new else None)
    place = restore(folder, state)
    start = place.epochs
    if start < recipe.epochs and (start or place.steps):
        progress.note(f"resuming {folder}: {start} of {recipe.epochs} epochs done{place.further}")
    tracked = tracking.of(recipe.to_dict(), folder, recipe.epochs)
    with ranks.joined(workers, device, recipe.batch_size) as together, tracked:
        course = _Course(recipe, state, kept, held, folder, together, budget, progress, tracking, place)
        course.rows = _kept_metrics(folder, start)
        try:
            for epoch in range(start, recipe.epochs):
                course.run(epoch)
            tally = course.validated()
        except torch.OutOfMemoryError as problem:
            raise MachineError(
                "out of memory while training.", hint=f"Try --batch-size {max(recipe.batch_size // 2, 1)}."
            ) from problem
        except KeyboardInterrupt as problem:
            done = len([row for row in course.rows if row])
            further = course.place.further if course.place.epochs == done else ""
            raise Interrupted(
                f"interrupted after {done} of {recipe.epochs} epochs{further}.", hint="Resume with the same command."
            ) from problem
    recipe = course.done()
    if workers.first:
        files.write_json(folder / files.CONFIG, recipe.config())
        recipe_files.write(recipe, folder)
        checkpoint.save_defense(folder, state.deployed, recipe.config(), stored=recipe.stored)
    seconds, chance = sum(row["seconds"] for row in course.rows), float(held.labels.bincount().max()) / len(held)
    return Trained(folder, recipe, state.deployed.eval(), tally, recipe.epochs - start, seconds, len(kept), chance)


def clear(folder: Path) -> None:
    """Delete a run; a folder that holds none is left alone."""
    if (folder / files.CONFIG).exists():
        locks.clear(folder)


def _begin(recipe: Recipe, folder: Path, *, fresh: bool, budgeted: bool) -> None:
    """Claim the run folder, and write the recipe into it."""
    files.check_folder(folder, "--out")
    if fresh:
        clear(folder)
    _claim(folder, recipe.config(), budgeted=budgeted)
    recipe_files.write(_as_begun(recipe, folder), folder)


def _as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the names that the run in a folder has for its other models: the same weights may be elsewhere by now."""
    before = files.read_json(folder / files.CONFIG).get("recipe", {})
    names = {role: str(before[role]) for role in ROLES if before.get(role)}
    return replace(recipe, **names) if names else recipe  # type: ignore[arg-type]


@dataclass
class _Course:
    """A run on its way.

    Attributes:
        place: of the state that was kept last.
        rows: the metrics of each epoch so far, as ``metrics.jsonl`` has them.
    """

    recipe: Recipe
    state: State
    kept: Images
    held: Images
    folder: Path
    ranks: Ranks
    budget: Budget | None
    progress: Progress
    tracking: Tracking
    place: Place
    rows: list[dict[str, Any]] = field(default_factory=list)

    def run(self, epoch: int) -> None:
        """Train an epoch, keep its state, and certify some held-out images now and then."""
        recipe, last = self.recipe, epoch + 1 == self.recipe.epochs
        place = self.place if self.place.epochs == epoch else Place(epoch)
        self.rows.append({})
        began, count = time.perf_counter(), recipe.steps_of(epoch, len(self.kept))

        def chosen(first: float) -> int:
            nonlocal count
            count = self._steps(epoch, first)
            return count

        if self._late(epoch):
            count = 0
        loss = self.rows[-2]["loss"] if len(self.rows) > 1 else 0.0
        if count:
            choose = None if self.budget is None else chosen
            keep = self._keep_state if self.budget is None and self.ranks.alone else None
            loss = steps.epoch(recipe, epoch, self.state, self.kept, self.progress, self.ranks, choose, place=place, keep=keep)
        seconds = place.seconds + time.perf_counter() - began
        rate = steps.rate_at(recipe, epoch + 1)
        self.rows[-1] |= {"epoch": epoch + 1, "loss": loss, "learning_rate": rate, "seconds": seconds, "steps": count}
        if not count and not last:
            return
        due = last or (epoch + 1) % max(recipe.epochs // REPORTS, 1) == 0
        some = due and not last and self._time_for_some()
        probed = self.budget is not None and epoch + 1 in (recipe.epochs // 2, 3 * recipe.epochs // 4)
        if last or some or probed:
            steps.finish(recipe, self.state.deployed, self.kept, rounded=last)
        self._keep()
        if self.ranks.workers.first:
            self._keep_state(Place(epoch + 1))  # certifying may take longer than the epoch did
        line = f"epoch {epoch + 1} of {recipe.epochs}: loss {loss:.4f} ({seconds:.0f} s)"
        if some:
            tally = self._monitor(self.held.limit(self.state.deployed.validation_size, recipe.seed))
            self.rows[-1] |= _validation_row(tally)
            self._keep()
            clean, certified = tally.clean_accuracy, tally.certified_accuracy
            line += f", validation clean {clean:.2%}, certified {certified:.2%} of {tally.images}"
        if self.budget is not None and probed:  # what certifying takes by now
            self.budget.validated(*steps.probe(self.state.deployed, self.held, recipe, self.ranks), len(self.held))
        self.progress.note(line)
        self.tracking.update(self.rows[:-1] if last else self.rows)  # the last row is whole when the model is validated

    def validated(self) -> Tally:
        """Counts on all held-out images, which were made before if the run was finished."""
        if self.rows and "clean" in self.rows[-1]:
            tally = _validated(self.rows[-1])
        else:
            self.progress.note(f"certifying {len(self.held)} held-out images")
            tally = self._monitor(self.held)
            if self.rows:
                self.rows[-1] |= _validation_row(tally)
                self._keep()
        self.tracking.update(self.rows)
        return tally

    def done(self) -> Recipe:
        """The recipe of what was done: with a budget it has the steps of each epoch."""
        if self.budget is None:
            return self.recipe
        made = tuple(int(row["steps"]) for row in self.rows)
        return replace(self.recipe, steps=made[:1] if len(set(made)) == 1 else made)

    def _steps(self, epoch: int, first: float) -> int:
        """How many steps the epoch takes in a given time, now that its first one has taken ``first`` seconds.

        A step takes what it took in the epoch before, unless its first one takes twice or half of that: then the recipe has
        come to another phase.
        """
        assert self.budget is not None
        each = self._each
        each = each if each / 2 < first < 2 * each else first
        count = self.budget.steps(self.recipe.epochs - epoch, each, self.recipe.steps_of(epoch, len(self.kept)), made=1)
        return int(self.ranks.first_of(count))

    @property
    def _each(self) -> float:
        """Seconds of a step, lately."""
        assert self.budget is not None
        before = next((row for row in reversed(self.rows) if row.get("steps")), None)
        return self.budget.step if before is None else float(before["seconds"] / before["steps"])

    def _late(self, epoch: int) -> bool:
        """Whether a given time has no room for a step of this epoch; the first one that is made always has."""
        if self.budget is None or not any(row.get("steps") for row in self.rows):
            return False
        return bool(self.ranks.first_of(self.budget.late(self.recipe.epochs - epoch, self._each)))

    def _time_for_some(self) -> bool:
        """Whether certifying some images on the way takes a small part of a given time."""
        if self.budget is None:
            return True
        size = min(self.state.deployed.validation_size, len(self.held))
        cost = (self.budget.reserve * size / len(self.held) + self.budget.finishing) * REPORTS
        return bool(self.ranks.first_of(cost < MONITORED * self.budget.total))

    def _monitor(self, images: Images) -> Tally:
        began = time.perf_counter()
        tally = steps.monitor(self.state.deployed, images, self.recipe, ranks=self.ranks)
        if self.budget is not None:
            self.budget.validated(len(images), time.perf_counter() - began, len(self.held))
        return tally

    def _keep_state(self, place: Place) -> None:
        save(self.folder, self.recipe, self.state, place)
        self.place = place

    def _keep(self) -> None:
        """Write the metrics."""
        if self.budget is not None:
            self.rows[-1]["spent"] = self.budget.spent
        if self.ranks.workers.first:
            _write_metrics(self.folder, self.rows)


def _write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    files.write_atomically(folder / files.METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _validation_row(tally: Tally) -> dict[str, Any]:
    return {"validation_images": tally.images, "clean": tally.clean_accuracy, "certified": tally.certified_accuracy}


def _validated(row: Mapping[str, Any]) -> Tally:
    """Counts of the last epoch's validation, which is that of the finished model."""
    images = int(row["validation_images"])
    return Tally(images, round(row["clean"] * images), round(row["certified"] * images))


def _claim(folder: Path, config: dict[str, Any], *, budgeted: bool) -> None:
    """Write the configuration into an empty folder, or check that the folder is this very run.

    Other models are the same if their weights are. With a budget the steps are those that there was time for.
    """
    path = folder / files.CONFIG
    if not path.exists():
        if not locks.empty(folder, PLAN):
            raise UsageError(f"'{folder}' is not empty and holds no training run.", hint="Use another --out.")
        files.write_json(path, config)
        return
    absent = dict.fromkeys(OPTIONAL)
    before, now = files.read_json(path).get("recipe", {}), absent | config["recipe"]
    if before:  # what an older run does not mention has its default
        before = absent | Recipe.from_dict(before).to_dict()
    for role in ROLES:
        if now.get(f"{role}_sha256") and before.get(f"{role}_sha256") == now[f"{role}_sha256"]:
            now[role] = before[role]
    if budgeted:
        now["steps"] = before.get("steps")
    changed = list(differences(before, now))
    if changed:
        raise UsageError(
            f"'{folder}' was made with other settings ({'; '.join(changed)}).",
            hint="Use another --out, or --fresh to start over.",
        )


def _kept_metrics(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Metrics of the epochs that the restored state has; later lines belong to an epoch that was not saved."""
    path = folder / files.METRICS
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in files.read(path).decode().splitlines()[:epochs]]
    except ValueError as problem:
        raise IntegrityError(f"'{path}' is damaged: {problem}.", hint="Use --fresh to start over.") from problem
