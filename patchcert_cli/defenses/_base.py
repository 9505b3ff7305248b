"""What every defense is: one network, one deployed answer, one proof about that answer.

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchcert_cli.certificate import ALERT, Certificate, Guarantee
from patchcert_cli.errors import DataError, UsageError
from patchcert_cli.threats import Threat, parse_threat


@dataclass(frozen=True)
class Augment:
    """Random changes of training images: mirrored left to right with probability 1/2, and moved by up to ``shift`` pixels."""

    flip: bool = False
    shift: int = 0


@dataclass(frozen=True)
class Options:
    """How a defense is trained, besides what every run has; each defense names its own subclass.

    Limits of single fields stand in their annotations, as :mod:`patchcert_cli.schema` reads them.
    """

    def fitted(self, epochs: int) -> Options:
        """These options with phases shortened where a run is too short for them."""
        return self

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
class TrainingStep:
    """How far a training run has come, as far as a loss needs to know.

    Attributes:
        threat: the threat model to train against.
        options: the defense's own :class:`Options`.
        progress: epochs done; a fraction inside an epoch counts.
        epochs: epochs of the whole run.
        generator: source of all randomness, on the CPU.
        auxiliary_network: what trains along, as :meth:`Defense.init_weights` made it; None if the loss needs nothing.
    """

    threat: Threat
    options: Options
    progress: float
    epochs: int
    generator: torch.Generator
    auxiliary_network: nn.Module | None = None


@dataclass(frozen=True)
class Claim:
    """What is to be certified: a threat model, and the name of a proof, by default the defense's best."""

    threat: Threat
    method: str | None = None


class Surrogate:
    """A stand-in for the deployed answer that has gradients, for attacks: class scores on any scale, the highest answers.

    Changes inside a box often reach a small part of the network. A defense that can compute this part alone overrides
    :meth:`near` and :meth:`rest`, such that ``whole(x') == rest(x, boxes) + near(x', boxes)`` wherever x' differs from x inside
    the box alone.

    Attributes:
        slack: how far the deployed answer may be from this one: a margin above ``-slack`` is worth asking it.
    """

    slack: float = 0.0

    def __init__(self, scores: Callable[[Tensor], Tensor]) -> None:
        self._scores = scores

    def whole(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, K]."""
        return self._scores(x)

    def near(self, x: Tensor, boxes: Tensor) -> Tensor:
        """The part that boxes can alter, [B, C, H, W] and int64 [B, 4], all of one size -> [B, K]."""
        return self.whole(x)

    def rest(self, x: Tensor, boxes: Tensor) -> Tensor:
        """The other part, [B, C, H, W] and S boxes for each image, int64 [B, S, 4] -> [B, S, K], or 1 for K where it is zero."""
        return x.new_zeros(*boxes.shape[:2], 1)


class Defense(nn.Module, ABC):
    """A classifier whose answer can be certified.

    ``predict`` and ``certify`` are about the same function: the certificate's ``prediction`` is what ``predict`` returns, and a
    certified image keeps that answer under every change that the threat allows.

    Attributes:
        source: the paper it comes from.
        methods: names of its proofs, the best one first.
        guarantee: what they prove; a defense of ``detection`` may answer :data:`patchcert_cli.certificate.ALERT`.
        options: how it is trained.
        precision: what its answers and proofs are computed in, for manifests.
        default_network: the network that it is trained with unless told otherwise.
        validation_size: validation images certified now and then during training; at the end it is all of them.
        unit: what the margins of :meth:`margin_map` count.
    """

    source: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ()
    guarantee: ClassVar[Guarantee] = Guarantee.RECOVERY
    options: ClassVar[type[Options]] = Options
    precision: Mapping[str, str] = {}
    default_network: ClassVar[str] = ""
    validation_size: ClassVar[int] = 1000
    unit: ClassVar[str] = "votes"

    def __init__(self, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__()
        self._tested = False
        self.input_shape = input_shape
        self.classes = classes

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Defense:
        """Build the defense, with fresh weights, from what ``config.json`` holds."""

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        """What the ``config.json`` of a model trained so holds besides the entries that all have."""
        return {}

    @classmethod
    @abstractmethod
    def tiny(cls) -> Defense:
        """A small random member of the family on 1x4x4 images with 3 classes, for soundness tests."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, K], a smooth surrogate for losses and gradient attacks."""

    def surrogates(self) -> tuple[Surrogate, ...]:
        """What attacks climb, the most faithful one first; candidates are compared by it."""
        return (Surrogate(self),)

    @property
    def activations(self) -> int:
        """How many numbers the largest layer holds for one image, at least about; passes of attacks are cut accordingly."""
        return math.prod(self.input_shape)

    @abstractmethod
    def predict(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> int64 [B], the deployed answer; it depends on neither threat nor label."""

    @abstractmethod
    def certify_claims(self, x: Tensor, claims: Sequence[Claim]) -> list[Certificate]:
        """Prove, image by image and claim by claim, that no change allowed by the threat alters ``predict(x)``.

        Raises:
            UnsupportedThreat: the defense has no proof for a threat model.
            UsageError: a threat does not fit the image, or the defense has no proof of a claim's method.
        """

    def plain(self, x: Tensor) -> Tensor | None:
        """What the classifier inside the defense says of whole images [B, C, H, W], int64 [B]; None if there is none."""
        return None

    def class_name(self, answer: int) -> str:
        """What an answer is called: the name of its class, or ``alarm``."""
        return "alarm" if answer == ALERT else self.classes[answer]

    def certify(self, x: Tensor, threat: Threat | str, method: str | None = None) -> Certificate:
        """One claim; see :meth:`certify_claims`. A threat model may be given as its text, such as ``patch:5x5``."""
        meant = parse_threat(threat) if isinstance(threat, str) else threat
        if not isinstance(meant, Threat):
            raise UsageError(f"{type(meant).__name__} is no threat model.", hint="Give Patch(5, 5), or its text: 'patch:5x5'.")
        return self.certify_claims(x, [Claim(meant, method)])[0]

    def check_method(self, method: str | None) -> None:
        """Raise :class:`UsageError` unless the defense has a proof of this name."""
        if method is not None and method not in self.methods:
            raise UsageError(f"this defense has no proof '{method}'.", hint=f"Allowed: {', '.join(self.methods)}.")

    def note(self, threat: Threat) -> str:
        """What a user should know about this threat model besides the numbers, in one line; may be empty."""
        return ""

    def passes_per_image(self) -> tuple[int, int] | None:
        """The fewest and the most passes of the network that a certificate takes, if the defense counts them."""
        return None

    def margin_map(self, x: Tensor, patch: Threat) -> Tensor:
        """The margin at every location of a patch, float64 [B, P, Q]: positive where the patch cannot do harm.

        Raises:
            UsageError: the defense has no margins by location, or the threat is not a patch.
        """
        raise UsageError("this defense has no margins by location.", hint="--map is for models with votes or masks.")

    def self_test(self) -> None:
        """Check what the proof assumes of the network, when a model is loaded.

        Raises:
            IntegrityError: the network is not what the proof takes it for.
        """

    def test_once(self) -> None:
        """Run :meth:`self_test` at the first use of a defense that was made in Python and never loaded; afterwards do nothing."""
        if not self._tested:
            self.self_test()
            self._tested = True

    def trust(self) -> None:
        """Leave :meth:`self_test` out from now on: for networks whose cost is measured and whose answers mean nothing."""
        self._tested = True

    def init_weights(self, options: Options) -> nn.Module | None:
        """Start a training run: set fresh weights as ``options`` say, and return what trains along but is not deployed."""
        return None

    def fit_before(self, x: Tensor) -> None:
        """Fit what training starts from to some training images [B, C, H, W], before the first epoch."""

    def fuse(self) -> None:
        """Put into the weights what only training keeps apart from them, once, after the last step."""

    def calibrate(self, x: Tensor) -> None:
        """Fit what training leaves open to some training images [B, C, H, W], before validation and before saving."""

    @abstractmethod
    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """The scalar to minimize on a batch, [B, C, H, W] in [0, 1] and int64 [B]."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(chain(self.parameters(), self.buffers()), torch.zeros(())).device

    def check_input(self, x: Tensor) -> None:
        """Raise :class:`DataError` unless ``x`` is [B, C, H, W] of this model's size with pixels in [0, 1]."""
        if not isinstance(x, Tensor):
            said = f"images are {type(x).__module__.partition('.')[0]}.{type(x).__name__}, not a tensor."
            raise DataError(said, hint="Give torch.as_tensor(images), float [B, C, H, W] in [0, 1].")
        if x.ndim == 3 and tuple(x.shape) == self.input_shape:
            raise DataError(f"one image of shape {tuple(x.shape)} is no batch.", hint="Give x[None], which is a batch of one.")
        if x.dtype not in (torch.float32, torch.float64):
            raise DataError(f"images of type {x.dtype}.", hint="Give float32 in [0, 1]: divide 8-bit images by 255.")
        if x.ndim != 4 or tuple(x.shape[1:]) != self.input_shape:
            raise DataError(f"images of shape {tuple(x.shape[1:])} do not fit this model.", hint=f"It takes {self.input_shape}.")
        if len(x) and not bool(((x >= 0) & (x <= 1)).all()):  # also refuses NaN
            raise DataError("pixels outside [0, 1].", hint="Divide 8-bit images by 255; normalization lives inside the model.")
