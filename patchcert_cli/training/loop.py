"""The one training loop: any defense's loss, resumable to the bit.

Everything random in epoch e comes from a generator seeded with (seed, e), and the state after each epoch (weights, the
optimizer's moments, what trains along) is on disk, so a run that was killed continues as if it had not been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchcert_cli import checkpoint, defenses
from patchcert_cli.certificate import Tally
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.defenses import Trainable, TrainingStep
from patchcert_cli.errors import IntegrityError, Interrupted, MachineError, UsageError
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage import files, locks
from patchcert_cli.training import augment
from patchcert_cli.training.average import Average
from patchcert_cli.training.muon import Muon
from patchcert_cli.training.recipe import Recipe

FITTED = 500  # training images that a defense is finished with
REPORTS = 10  # points of a run at which some validation images are certified; the last epoch certifies all


@dataclass
class _State:
    """What steps change: a defense, what trains along with it, the average of its weights if there is one, the optimizer."""

    defense: Trainable
    aid: nn.Module
    average: Average | None
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, recipe: Recipe, device: str, begin: Callable[[Trainable], None] | None = None) -> _State:
        """What a run of ``recipe`` starts with, after ``begin`` has been done to the defense."""
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            defense = defenses.build_trainable(recipe.config())
            aid = (defense.init_weights(recipe.training) or nn.Module()).to(device)
            defense = _laid_out(defense.to(device), recipe)
        if begin is not None:
            begin(defense)
        average = Average(defense) if recipe.training.ema_decay > 0 else None
        return cls(defense, aid, average, _optimizer([*defense.parameters(), *aid.parameters()], recipe))

    @property
    def made(self) -> Trainable:
        """What is validated and saved."""
        return self.average.defense if self.average else self.defense

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as it is kept."""
        tensors: dict[str, Tensor] = {}
        for prefix, part in self.parts().items():
            tensors |= {f"{prefix}.{name}": value for name, value in part.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        return tensors

    def parts(self) -> dict[str, nn.Module]:
        """What has weights, by name."""
        parts = {"model": self.defense, "aid": self.aid}
        return parts | ({"average": self.average.defense} if self.average else {})


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: where config, weights and metrics are.
        defense: in eval mode.
        validation: counts on the whole held-out split.
        epochs_run: epochs this call trained itself; 0 if the run was finished before.
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
    prepare: Callable[[Trainable], None] | None = None,
) -> Trained:
    """Train ``recipe`` on ``images`` (the training split) into ``folder``, continuing a stopped run of the same recipe.

    ``prepare`` brings in the weights to begin with, if they are not fresh ones.

    Raises:
        UsageError: the folder holds a run of another recipe.
    """
    progress = progress or Silent()
    recipe = recipe.validate()
    files.check_folder(folder, "--out")
    if fresh and (folder / files.CONFIG).exists():  # never somebody's other folder
        locks.clear(folder)
    config = recipe.config()
    _claim(folder, config)
    kept, held = images.limit(recipe.limit or None, recipe.seed).hold_out(recipe.validation, recipe.seed)

    def begin(defense: Trainable) -> None:
        if not (folder / files.STATE).exists():
            defense.fit_before(_some(defense, kept))
            if prepare is not None:
                prepare(defense)

    state = _State.of(recipe, device, begin)
    start = _restore(folder, state)
    made = state.made
    if 0 < start < recipe.epochs:
        progress.note(f"resuming {folder}: {start} of {recipe.epochs} epochs done")
    lines = _kept_metrics(folder, start)
    try:
        for epoch in range(start, recipe.epochs):
            began = time.perf_counter()
            loss = _epoch(recipe, epoch, state, kept, progress)
            seconds, last = time.perf_counter() - began, epoch + 1 == recipe.epochs
            row = {"epoch": epoch + 1, "loss": loss, "learning_rate": _rate(recipe, epoch + 1), "seconds": seconds}
            looked_at = last or (epoch + 1) % max(recipe.epochs // REPORTS, 1) == 0
            if looked_at:
                _finish(recipe, made, kept, rounded=last)
            lines.append(row)
            _note(folder, lines)
            _save(folder, recipe, state, epoch + 1)  # certifying may take longer than the epoch did
            said = f"epoch {epoch + 1} of {recipe.epochs}: loss {loss:.4f} ({seconds:.0f} s)"
            if looked_at and not last:
                tally = monitor(made, held.limit(made.validation_size, recipe.seed), recipe)
                row |= _seen(tally)
                _note(folder, lines)
                clean, certified = tally.clean_accuracy, tally.certified_accuracy
                said += f", validation clean {clean:.2%}, certified {certified:.2%} of {tally.images}"
            progress.note(said)
        tally = _validated(lines[-1]) if lines and "clean" in lines[-1] else monitor(made, held, recipe)
    except torch.OutOfMemoryError as problem:
        raise MachineError(
            "out of memory while training.", hint=f"Try --batch-size {max(recipe.batch_size // 2, 1)}."
        ) from problem
    except KeyboardInterrupt as problem:
        raise Interrupted(
            f"interrupted after {len(lines)} of {recipe.epochs} epochs.", hint="Resume with the same command."
        ) from problem
    if lines:
        lines[-1] |= _seen(tally)
        _note(folder, lines)
    checkpoint.save_defense(folder, made, config, stored=recipe.stored)
    seconds, chance = sum(line["seconds"] for line in lines), float(held.labels.bincount().max()) / len(held)
    return Trained(folder, made.eval(), tally, recipe.epochs - start, seconds, len(kept), chance)


def _note(folder: Path, lines: list[dict[str, Any]]) -> None:
    files.write_atomically(folder / files.METRICS, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _seen(tally: Tally) -> dict[str, Any]:
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
        before = Recipe.from_dict(before).validate().to_dict()
    changed = [f"{key} {before.get(key)!r}, not {value!r}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise UsageError(
            f"'{folder}' was made with other settings ({'; '.join(changed)}).",
            hint="Use another --out, or --fresh to start over.",
        )


def _laid_out(defense: Trainable, recipe: Recipe) -> Trainable:
    """Channels last where it is trained with bfloat16 convolutions, which are faster so."""
    return defense.to(memory_format=torch.channels_last) if recipe.precision == "bfloat16" else defense


def _optimizer(weights: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
    if recipe.optimizer == "muon":
        return Muon(weights, rate, decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    return torch.optim.Adam(weights, lr=rate, weight_decay=decay)


def _rate(recipe: Recipe, progress: float) -> float:
    return recipe.learning_rate * recipe.training.lr_multiplier(progress, recipe.epochs)


@torch.no_grad()
def _finish(recipe: Recipe, defense: Trainable, images: Images, *, rounded: bool) -> None:
    """What a defense needs before it is validated; at the end its weights are rounded as they will be stored."""
    if rounded:
        defense.fuse()
    if rounded and recipe.stored != "float32":
        for weight in defense.parameters():
            if weight.ndim > 1:
                weight.copy_(weight.to(getattr(torch, recipe.stored)))
    defense.calibrate(_some(defense, images))


def _some(defense: Trainable, images: Images) -> Tensor:
    """A few training images, where the defense is."""
    count = min(FITTED, len(images))
    ordered = bool((images.labels.diff() >= 0).all())  # by class, as folders are: then the first ones do not stand for all
    some = torch.arange(count) * (len(images) // count if ordered else 1)
    return to_float(images.read(some).to(defense.device))


def _epoch(recipe: Recipe, epoch: int, state: _State, images: Images, progress: Progress) -> float:
    """One pass over the training images; returns the mean loss."""
    defense, optimizer, average = state.defense, state.optimizer, state.average
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    order = torch.randperm(len(images), generator=generator)
    threat, options, steps = recipe.threat_model, recipe.training, len(order) // recipe.batch_size or 1
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
            loss = defense.training_loss(x, label, TrainingStep(threat, options, at, recipe.epochs, generator, state.aid))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if average:
            average.follow(defense, options.ema_decay)
        total += float(loss.detach())
        said = f"epoch {epoch + 1} of {recipe.epochs}: loss {total / (number + 1):.4f}"
        progress.update(epoch * steps + number + 1, recipe.epochs * steps, said)
    defense.eval()
    return total / steps


@dataclass(frozen=True)
class Trial:
    """What two steps of a run took: seconds of each, and bytes of the weights and of the state that every epoch keeps."""

    seconds: tuple[float, float]
    weights: int
    state: int


def trial(recipe: Recipe, images: Images, *, device: str = "cpu") -> Trial:
    """A step as in the first epoch and one as in the last, on at least one batch of images; nothing is kept.

    The first step of all, which sets things up, is not timed.
    """
    state = _State.of(recipe, device)
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
    threat = recipe.threat_model
    prediction, certified = [], []
    for start in range(0, len(images), batch):
        certificate = defense.certify(to_float(images.read(slice(start, start + batch)).to(defense.device)), threat)
        prediction.append(certificate.prediction.cpu())
        certified.append(certificate.certified.cpu())
    return Tally.of(images.labels, torch.cat(prediction), torch.cat(certified))


def _save(folder: Path, recipe: Recipe, state: _State, epoch: int) -> None:
    note = {"recipe": recipe.to_dict(), "epoch": epoch, "averaged": state.average.steps if state.average else 0}
    files.write_atomically(folder / files.STATE, checkpoint.pack(state.tensors(), note))


def _restore(folder: Path, state: _State) -> int:
    """Load the state of the last whole epoch, if there is one; returns how many epochs it has."""
    if not (folder / files.STATE).exists():
        return 0
    tensors, note = checkpoint.unpack(folder / files.STATE)
    for prefix, part in state.parts().items():
        part.load_state_dict(_under(tensors, f"{prefix}."), strict=True)
    if state.average:
        state.average.steps = int(note["averaged"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            moments.setdefault(int(index), {})[key] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return int(note["epoch"])


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _kept_metrics(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Metrics of the epochs that the restored state has; later lines belong to an epoch that was not saved."""
    path = folder / files.METRICS
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in files.read(path).decode().splitlines()[:epochs]]
    except ValueError as problem:
        raise IntegrityError(f"'{path}' is damaged: {problem}.", hint="Use --fresh to start over.") from problem
