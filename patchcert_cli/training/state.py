"""The state of a training run: what it starts with, what steps change, and how that is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from patchcert_cli import checkpoint, defenses
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.defenses import Trainable
from patchcert_cli.device import computes_in_bfloat16, sent
from patchcert_cli.storage import files
from patchcert_cli.training.average import Average
from patchcert_cli.training.muon import Muon
from patchcert_cli.training.recipe import Recipe

FITTED = 500  # training images that a defense is fitted to


@dataclass(frozen=True)
class Beginning:
    """What a run starts with, on the CPU.

    Attributes:
        defense: with fresh weights.
        auxiliary: what trains along without being deployed; has no weights if nothing does.
        load: puts the weights to begin with into the defense; None if it begins with the fresh ones.
        teacher: the model whose class probabilities are also learned; None without one.
    """

    defense: Trainable
    auxiliary: nn.Module
    load: Callable[[Trainable], None] | None = None
    teacher: Trainable | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Beginning:
        """What the seed of ``recipe`` gives.

        Raises:
            IntegrityError: no network can be built from its options.
        """
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            defense = defenses.build_trainable(recipe.config())
            return cls(defense, defense.init_weights(recipe.options) or nn.Module())


@dataclass
class State:
    """What steps change: a defense, what trains along with it, the average of its weights if there is one, the optimizer.

    Attributes:
        teacher: stays as it is, and is not kept; None without one.
    """

    defense: Trainable
    auxiliary: nn.Module
    average: Average | None
    optimizer: torch.optim.Optimizer
    teacher: Trainable | None = None

    @classmethod
    def of(cls, recipe: Recipe, beginning: Beginning, device: str, images: Images | None = None) -> State:
        """The state before the first step; ``images`` are those that the defense is fitted to, if the run is a new one."""
        auxiliary = beginning.auxiliary.to(device)
        defense = _laid_out(beginning.defense.to(device), recipe)
        if images is not None:
            some = some_images(defense, images)
            defense.fit_before(some)
            if beginning.load is not None:
                beginning.load(defense)
                defense.fit_start(some)
        average = Average(defense) if recipe.options.ema_decay > 0 else None
        optimizer = _optimizer([*defense.parameters(), *auxiliary.parameters()], recipe)
        teacher = None if beginning.teacher is None else _laid_out(beginning.teacher.to(device), recipe)
        return cls(defense, auxiliary, average, optimizer, teacher)

    @property
    def deployed(self) -> Trainable:
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
        """What has weights, by the prefix of their names in the state file."""
        parts = {"model": self.defense, "aid": self.auxiliary}
        return parts | ({"average": self.average.defense} if self.average else {})


@dataclass(frozen=True)
class Place:
    """How far a run is.

    Attributes:
        epochs: whole epochs that are done.
        steps: steps of the next one that are done.
        loss: the sum of their losses.
        seconds: what they took.
        drawn: the state of the generator that everything random in this epoch comes from; None before its first step.
    """

    epochs: int = 0
    steps: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    drawn: Tensor | None = None

    @property
    def further(self) -> str:
        """The steps as text, to follow the epochs; empty if there are none."""
        return f", and {self.steps} steps of the next" if self.steps else ""


def reduced(recipe: Recipe, device: torch.device) -> bool:
    """Whether the network computes in bfloat16: if the recipe says so, and it is not many times slower there than float32."""
    return recipe.precision == "bfloat16" and computes_in_bfloat16(device)


def save(folder: Path, recipe: Recipe, state: State, place: Place) -> None:
    """Keep the state after ``place``."""
    note = {"recipe": recipe.to_dict(), "epoch": place.epochs, "averaged": state.average.steps if state.average else 0}
    tensors = state.tensors()
    if place.drawn is not None:
        note |= {"steps": place.steps, "loss": place.loss, "seconds": place.seconds}
        tensors["drawn"] = place.drawn
    files.write_atomically(folder / files.STATE, checkpoint.pack(tensors, note))


def restore(folder: Path, state: State) -> Place:
    """Load the state that was kept last, if there is one; returns how far the run was."""
    if not (folder / files.STATE).exists():
        return Place()
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
    if "drawn" not in tensors:
        return Place(int(note["epoch"]))
    return Place(int(note["epoch"]), int(note["steps"]), float(note["loss"]), float(note["seconds"]), tensors["drawn"])


def some_images(defense: Trainable, images: Images) -> Tensor:
    """A few training images, where the defense is."""
    count = min(FITTED, len(images))
    ordered = bool((images.labels.diff() >= 0).all())  # by class, as folders are: then the first ones do not stand for all
    some = torch.arange(count) * (len(images) // count if ordered else 1)
    return to_float(sent(images.read(some), defense.device))


def _laid_out(defense: Trainable, recipe: Recipe) -> Trainable:
    """Channels last where it is trained with bfloat16 convolutions, which are faster so."""
    return defense.to(memory_format=torch.channels_last) if recipe.precision == "bfloat16" else defense


def _optimizer(weights: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
    if recipe.optimizer == "muon":
        lower = reduced(recipe, weights[0].device)
        return Muon(weights, rate, decay, torch.bfloat16 if lower else torch.float32)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    return torch.optim.Adam(weights, lr=rate, weight_decay=decay)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
