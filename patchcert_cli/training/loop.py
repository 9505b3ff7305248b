"""The one training loop: any defense's loss, resumable to the bit.

Everything random in epoch e comes from a generator seeded with (seed, e), and the state after each epoch (weights, the
optimizer's moments, what trains along) is on disk, so a run that was killed continues as if it had not been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import checkpoint
from patchcert_cli.certificate import Tally
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.defenses import Trainable, TrainingStep
from patchcert_cli.errors import IntegrityError, Interrupted, MachineError, UsageError
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage import files, locks
from patchcert_cli.training import augment, recipe_files
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.state import Beginning, State, restore, save, some_images

REPORTS = 10  # points of a run at which some validation images are certified; the last epoch certifies all


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: where config, weights and metrics are.
        defense: in eval mode.
        validation: counts on the whole held-out split.
        epochs_run: epochs that this call trained itself; 0 if the run was finished before.
        seconds: training time of all epochs.
        kept: how many images it was trained on.
        chance: the share of the most frequent class among the held-out images, which needs no training to be reached.
    """

    folder: Path
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

    Raises:
        UsageError: the folder holds a run of another recipe.
        MachineError: out of memory.
        Interrupted: stopped by Ctrl-C; whole epochs are kept.
    """
    progress = progress or Silent()
    files.check_folder(folder, "--out")
    if fresh and (folder / files.CONFIG).exists():  # a folder without one is not a run, and is left alone
        locks.clear(folder)
    config = recipe.config()
    _claim(folder, config)
    recipe_files.write(recipe, folder)
    kept, held = images.limit(recipe.limit or None, recipe.seed).hold_out(recipe.validation, recipe.seed)
    new = not (folder / files.STATE).exists()
    state = State.of(recipe, beginning or Beginning.of(recipe), device, kept if new else None)
    start = restore(folder, state)
    if 0 < start < recipe.epochs:
        progress.note(f"resuming {folder}: {start} of {recipe.epochs} epochs done")
    rows = _kept_metrics(folder, start)
    try:
        for epoch in range(start, recipe.epochs):
            rows.append({})
            _run_epoch(recipe, epoch, state, (kept, held), folder, rows, progress)
        validated = rows and "clean" in rows[-1]
        tally = _validated(rows[-1]) if validated else monitor(state.deployed, held, recipe)
    except torch.OutOfMemoryError as problem:
        raise MachineError(
            "out of memory while training.", hint=f"Try --batch-size {max(recipe.batch_size // 2, 1)}."
        ) from problem
    except KeyboardInterrupt as problem:
        done = len([row for row in rows if row])
        raise Interrupted(
            f"interrupted after {done} of {recipe.epochs} epochs.", hint="Resume with the same command."
        ) from problem
    if rows:
        rows[-1] |= _validation_row(tally)
        _write_metrics(folder, rows)
    checkpoint.save_defense(folder, state.deployed, config, stored=recipe.stored)
    seconds, chance = sum(row["seconds"] for row in rows), float(held.labels.bincount().max()) / len(held)
    return Trained(folder, state.deployed.eval(), tally, recipe.epochs - start, seconds, len(kept), chance)


def _run_epoch(
    recipe: Recipe,
    epoch: int,
    state: State,
    images: tuple[Images, Images],
    folder: Path,
    rows: list[dict[str, Any]],
    progress: Progress,
) -> None:
    """Train an epoch on the first of ``images``, keep its state, and certify some of the second now and then.

    The last of ``rows`` is filled with its metrics.
    """
    kept, held = images
    began = time.perf_counter()
    loss = _epoch(recipe, epoch, state, kept, progress)
    seconds = time.perf_counter() - began
    last = epoch + 1 == recipe.epochs
    rows[-1] |= {"epoch": epoch + 1, "loss": loss, "learning_rate": _rate(recipe, epoch + 1), "seconds": seconds}
    due = last or (epoch + 1) % max(recipe.epochs // REPORTS, 1) == 0
    if due:
        _finish(recipe, state.deployed, kept, rounded=last)
    _write_metrics(folder, rows)
    save(folder, recipe, state, epoch + 1)  # certifying may take longer than the epoch did
    line = f"epoch {epoch + 1} of {recipe.epochs}: loss {loss:.4f} ({seconds:.0f} s)"
    if due and not last:
        tally = monitor(state.deployed, held.limit(state.deployed.validation_size, recipe.seed), recipe)
        rows[-1] |= _validation_row(tally)
        _write_metrics(folder, rows)
        clean, certified = tally.clean_accuracy, tally.certified_accuracy
        line += f", validation clean {clean:.2%}, certified {certified:.2%} of {tally.images}"
    progress.note(line)


def _write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    files.write_atomically(folder / files.METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _validation_row(tally: Tally) -> dict[str, Any]:
    return {"validation_images": tally.images, "clean": tally.clean_accuracy, "certified": tally.certified_accuracy}


def _validated(row: Mapping[str, Any]) -> Tally:
    """Counts of the last epoch's validation, which is that of the finished model."""
    images = int(row["validation_images"])
    return Tally(images, round(row["clean"] * images), round(row["certified"] * images))


def _claim(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration into an empty folder, or check that the folder is this very run."""
    path = folder / files.CONFIG
    if not path.exists():
        if not locks.empty(folder):
            raise UsageError(f"'{folder}' is not empty and holds no training run.", hint="Use another --out.")
        files.write_json(path, config)
        return
    before, now = files.read_json(path).get("recipe", {}), config["recipe"]
    if before:  # what an older run does not mention has its default
        before = Recipe.from_dict(before).to_dict()
    changed = [f"{key} {before.get(key)!r}, not {value!r}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise UsageError(
            f"'{folder}' was made with other settings ({'; '.join(changed)}).",
            hint="Use another --out, or --fresh to start over.",
        )


def _rate(recipe: Recipe, progress: float) -> float:
    return recipe.learning_rate * recipe.options.lr_multiplier(progress, recipe.epochs)


@torch.no_grad()
def _finish(recipe: Recipe, defense: Trainable, images: Images, *, rounded: bool) -> None:
    """What a defense needs before it is validated; at the end its weights are rounded as they will be stored."""
    if rounded:
        defense.fuse()
    if rounded and recipe.stored != "float32":
        for weight in defense.parameters():
            if weight.ndim > 1:
                weight.copy_(weight.to(getattr(torch, recipe.stored)))
    defense.calibrate(some_images(defense, images))


def _epoch(recipe: Recipe, epoch: int, state: State, images: Images, progress: Progress) -> float:
    """One pass over the training images; returns the mean loss."""
    defense, optimizer, average = state.defense, state.optimizer, state.average
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    threat, options, steps = recipe.threat, recipe.options, len(order) // recipe.batch_size or 1
    reduced, total = recipe.precision == "bfloat16", 0.0
    defense.train()
    for number in range(steps):
        at = epoch + number / steps
        picked = order[number * recipe.batch_size : (number + 1) * recipe.batch_size]
        x, label = to_float(images.read(picked).to(defense.device)), images.labels[picked].to(defense.device)
        x = augment.apply(x, options.augment(at, recipe.epochs), generator)
        if reduced:
            x = x.contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = group.get("share", 1.0) * recipe.learning_rate * options.lr_multiplier(at, recipe.epochs)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(defense.device.type, torch.bfloat16, enabled=reduced):
            loss = defense.training_loss(x, label, TrainingStep(threat, options, at, recipe.epochs, generator, state.auxiliary))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if average:
            average.follow(defense, options.ema_decay)
        total += float(loss.detach())
        line = f"epoch {epoch + 1} of {recipe.epochs}: loss {total / (number + 1):.4f}"
        progress.update(epoch * steps + number + 1, recipe.epochs * steps, line)
    defense.eval()
    return total / steps


@dataclass(frozen=True)
class Trial:
    """What two steps of a run took: seconds of each, and bytes of the weights and of the state that every epoch keeps."""

    seconds: tuple[float, float]
    weights: int
    state: int


def trial(recipe: Recipe, images: Images, *, device: str = "cpu", beginning: Beginning | None = None) -> Trial:
    """A step as in the first epoch and one as in the last, on at least one batch of images; nothing is kept.

    The first step of all, which sets things up, is not timed.
    """
    state = State.of(recipe, beginning or Beginning.of(recipe), device)
    batch, spent = images.take(torch.arange(min(recipe.batch_size, len(images)))), []
    for epoch in (0, 0, recipe.epochs - 1):
        began = time.perf_counter()
        _epoch(recipe, epoch, state, batch, Silent())
        spent.append(time.perf_counter() - began)
    weights, kept = (sum(one.nbytes for one in tensors.values()) for tensors in (state.defense.state_dict(), state.tensors()))
    return Trial((spent[1], spent[2]), weights, kept)


@torch.no_grad()
def monitor(defense: Trainable, images: Images, recipe: Recipe, batch: int = 500) -> Tally:
    """Clean and certified counts on held-out training images."""
    defense.eval()
    threat = recipe.threat
    prediction, certified = [], []
    for start in range(0, len(images), batch):
        certificate = defense.certify(to_float(images.read(slice(start, start + batch)).to(defense.device)), threat)
        prediction.append(certificate.prediction.cpu())
        certified.append(certificate.certified.cpu())
    return Tally.of(images.labels, torch.cat(prediction), torch.cat(certified))


def _kept_metrics(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Metrics of the epochs that the restored state has; later lines belong to an epoch that was not saved."""
    path = folder / files.METRICS
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in files.read(path).decode().splitlines()[:epochs]]
    except ValueError as problem:
        raise IntegrityError(f"'{path}' is damaged: {problem}.", hint="Use --fresh to start over.") from problem
