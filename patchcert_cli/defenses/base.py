"""What every defense is: one network, one deployed answer, one proof about that answer.

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchcert_cli.certificate import Certificate
from patchcert_cli.errors import DataError
from patchcert_cli.threats import Threat


@dataclass(frozen=True)
class TrainingStep:
    """How far a training run has come, as far as a loss needs to know.

    Attributes:
        threat: the threat model to train against.
        epsilon: fraction of the way to 0 or 1 that touched entries may move, ramped from 0 to 1.
        locations: 0 for every location of a patch, else the number of random locations per image.
        natural: weight of the clean cross-entropy in [0, 1].
        bounded: whether the loss of an image is bounded, as the certified error is.
        generator: source of all randomness, on the CPU.
    """

    threat: Threat
    epsilon: float
    locations: int
    natural: float
    bounded: bool
    generator: torch.Generator


class Defense(nn.Module, ABC):
    """A classifier whose answer can be certified.

    ``predict`` and ``certify`` are about the same function: the certificate's ``prediction`` is what ``predict`` returns, and a
    certified image keeps that answer under every change that the threat allows. ``source`` names the paper it comes from.
    """

    source: ClassVar[str] = ""

    def __init__(self, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.classes = classes

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Defense:
        """Build the defense, with fresh weights, from what ``config.json`` holds."""

    @classmethod
    @abstractmethod
    def tiny(cls) -> Defense:
        """A small random member of the family on 1x4x4 images with 3 classes, for soundness tests."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, K], a smooth surrogate for losses and gradient attacks."""

    @abstractmethod
    def predict(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> int64 [B], the deployed answer; it depends on neither threat nor label."""

    @abstractmethod
    def certify(self, x: Tensor, threat: Threat) -> Certificate:
        """Prove, image by image, that no change allowed by ``threat`` alters ``predict(x)``.

        Raises:
            UnsupportedThreat: the defense has no proof for this threat model.
            UsageError: the threat does not fit the image.
        """

    @abstractmethod
    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """The scalar to minimize on a batch, [B, C, H, W] in [0, 1] and int64 [B]."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.parameters())).device

    def check_input(self, x: Tensor) -> None:
        """Raise :class:`DataError` unless ``x`` is [B, C, H, W] of this model's size with pixels in [0, 1]."""
        if x.dtype not in (torch.float32, torch.float64):
            raise DataError(f"images of type {x.dtype};", hint="give float32 in [0, 1]: divide 8-bit images by 255.")
        if x.ndim != 4 or tuple(x.shape[1:]) != self.input_shape:
            raise DataError(f"images of shape {tuple(x.shape[1:])} do not fit this model;", hint=f"it takes {self.input_shape}.")
        if len(x) and not bool(((x >= 0) & (x <= 1)).all()):  # also refuses NaN
            raise DataError("pixels outside [0, 1];", hint="divide 8-bit images by 255; normalization lives inside the model.")
