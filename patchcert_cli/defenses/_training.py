"""What ``patchcert train`` needs of a defense.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.defenses._base import Defense
from patchcert_cli.errors import UsageError
from patchcert_cli.schema import Fraction, Must
from patchcert_cli.threats import Threat

DIGITS = {"flip": False, "shift": 2}  # changes of training images of digits: a mirrored digit is not a digit


@dataclass(frozen=True)
class Augment:
    """Random changes of training images; see :class:`AugmentedOptions`."""

    flip: bool = False
    shift: int = 0
    zoom: float = 0.0
    turn: float = 0.0
    tint: float = 0.0


@dataclass(frozen=True)
class Options:
    """How a defense is trained, besides what every run has; each defense names its own subclass.

    Limits of single fields are in their annotations, as :mod:`patchcert_cli.schema` reads them.
    """

    def fitted(self, epochs: int) -> Options:
        """These options with phases shortened where a run is too short for them."""
        return self

    def scaled(self, epochs: float, steps: float) -> Options:
        """These options for a run of ``epochs`` times as many epochs and ``steps`` times as many steps.

        Phases, fields whose names end in ``_epochs`` or ``_every``, keep their share of the run, and a running average of weights
        looks back over the same share of it.
        """
        changed: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith(("_epochs", "_every")) and value > 0:
                changed[item.name] = max(1, round(value * epochs))
            if item.name == "average" and value > 0:
                changed[item.name] = round(max(1 - (1 - value) / steps, 0.0), 6)
        return replace(self, **changed)

    def lr_multiplier(self, progress: float, epochs: int) -> float:
        """Share of the peak learning rate after ``progress`` of ``epochs`` epochs: a short climb, then linearly to zero."""
        at = progress / epochs
        return min(at / 0.1, 1.0, (1 - at) / 0.9) + 1e-3

    def augment(self, progress: float, epochs: int) -> Augment:
        """What is done to training images after ``progress`` epochs."""
        return Augment()

    @property
    def ema_decay(self) -> float:
        """How much a step keeps of the running average of weights that becomes the model; 0 takes the last weights."""
        return 0.0


@dataclass(frozen=True)
class AugmentedOptions(Options):
    """Options of defenses whose training images are changed at random, alike in all epochs.

    A subclass has the fields ``flip`` (mirror images left to right with probability 1/2) and ``shift`` (move images by up to this
    many pixels; what comes in from outside is 0), with defaults of its own.

    Attributes:
        zoom: make images larger or smaller by up to this share.
        turn: rotate images by up to this many degrees.
        tint: multiply each channel by up to this share more or less, and add as much of the range of values or subtract it.
    """

    zoom: Fraction = 0.0
    turn: Annotated[float, Must(lambda degrees: 0 <= degrees <= 180, "from 0 to 180")] = 0.0
    tint: Fraction = 0.0

    def augment(self, progress: float, epochs: int) -> Augment:
        return Augment(**{item.name: getattr(self, item.name) for item in fields(Augment)})


@dataclass(frozen=True)
class TaughtOptions(AugmentedOptions):
    """Options of defenses that can also learn from the answers of a teacher, another model, where a recipe names one.

    Attributes:
        teacher_weight: with a teacher, the share of the loss that is cross-entropy with the teacher's class probabilities
            instead of the labels.
    """

    teacher_weight: Annotated[float, Must(lambda share: 0 <= share <= 1, "in [0, 1]")] = 0.5


@dataclass(frozen=True)
class TrainingStep:
    """How far a training run has come, as far as a loss needs to know.

    Attributes:
        threat: the threat model to train against.
        options: the defense's own :class:`Options`.
        progress: epochs done; a fraction inside an epoch counts.
        epochs: epochs of the whole run.
        generator: source of all randomness, on the CPU.
        auxiliary_network: what is trained along, as :meth:`Trainable.init_weights` made it; None if the loss needs nothing.
        taught: class probabilities [B, K] that the teacher gives the same images; None without a teacher.
    """

    threat: Threat
    options: Options
    progress: float
    epochs: int
    generator: torch.Generator
    auxiliary_network: nn.Module | None = None
    taught: Tensor | None = None


def cross_entropy(logits: Tensor, label: Tensor, step: TrainingStep, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits [B, K] with labels [B]; with a teacher, a share of it with the teacher's probabilities.

    The share is ``teacher_weight`` of :class:`TaughtOptions`. Source: Hinton, Vinyals & Dean, Distilling the Knowledge in a
    Neural Network, 2015, at temperature 1.
    """
    loss = F.cross_entropy(logits, label, label_smoothing=smoothing)
    if step.taught is None:
        return loss
    options = step.options
    assert isinstance(options, TaughtOptions)
    return torch.lerp(loss, F.cross_entropy(logits, step.taught), options.teacher_weight)


class Trainable(Defense):
    """A defense that ``patchcert train`` can train, save and load.

    Attributes:
        options: its own options of training.
        default_network: the network that it is trained with unless the recipe names another one.
        validation_size: validation images certified now and then during training; at the end it is all of them.
    """

    options: ClassVar[type[Options]] = Options
    default_network: ClassVar[str] = ""
    validation_size: ClassVar[int] = 250

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> Mapping[str, Any]:
        """What :meth:`from_config` reads of a model trained so, besides the entries that all defenses have."""
        return {}

    @classmethod
    def default_recipe(cls, threat: Threat, dataset: str) -> dict[str, Any]:
        """The entries of a recipe that trains this defense against ``threat`` unless the user says otherwise.

        Entries that are left out have the defaults of :class:`patchcert_cli.training.recipe.Recipe`.

        Args:
            threat: the threat model to train against.
            dataset: the data set that the user chose; empty for the defense's default.
        """
        low_precision = {"precision": "bfloat16", "stored": "float16"}
        changed = {"flip", "shift"} <= {item.name for item in fields(cls.options)}
        digits = {"options": dict(DIGITS)} if dataset == "mnist" and changed else {}
        return {"dataset": "cifar10", **low_precision, "optimizer": "adamw", "weight_decay": 1e-4, **digits}

    def init_weights(self, options: Options) -> nn.Module | None:
        """Start a training run: set fresh weights as ``options`` say, and return what is trained along but not deployed."""
        return None

    def fit_before(self, x: Tensor) -> None:
        """Fit what training starts from to some training images [B, C, H, W], before the first epoch."""

    def fit_start(self, x: Tensor) -> None:
        """The same for weights of another model that training starts with, once they are loaded; the function stays as it is."""

    def class_probabilities(self, x: Tensor) -> Tensor:
        """What this defense teaches another one: probabilities [B, K] of images [B, C, H, W], near its answers.

        Raises:
            UsageError: it has none.
        """
        raise UsageError(f"{type(self).__name__} has no class probabilities to teach.", hint="See Teachers in docs/recipes.md.")

    @abstractmethod
    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """The scalar to minimize on a batch, [B, C, H, W] in [0, 1] and int64 [B]."""

    def fuse(self) -> None:
        """Merge into the weights what only training keeps apart from them, once, after the last step."""

    def calibrate(self, x: Tensor) -> None:
        """Fit what training leaves open to some training images [B, C, H, W], before validation and before saving."""
