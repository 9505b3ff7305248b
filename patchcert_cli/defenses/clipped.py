"""Clipped BagNet (Zhang et al., Clipped BagNet: Defending Against Sticker Attacks with Clipped Bag-of-features, DLS 2020).

A network with a small receptive field scores each class at every cell, each score is clipped to an interval, and the class with
the largest sum is the answer. A patch reaches few cells, and clipping bounds what each of them can say.

Clipped scores are put in whole steps by comparing exact scores with fixed thresholds, so nothing is rounded, and the proof is the
exact one of :mod:`patchcert_cli.certifiers.cells.additive` for every other class. (The published certificate checks the runner-up
of the clean image alone, and accepts equality: neither is sound.)

Shapes: B images, C channels, H x W pixels, K classes, N x M cells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._base import own_entries, size_and_classes
from patchcert_cli.defenses._cells import CellSurrogate, RegionDefense, VotingDefense
from patchcert_cli.defenses._training import AugmentedOptions, Options, TrainingStep
from patchcert_cli.models.region import RegionScorer
from patchcert_cli.schema import Count, Must
from patchcert_cli.threats import Threat

STEPS = 255  # of a clipped score, from one end of its interval to the other
FINE = 2.0**-20  # thresholds are multiples of it, so that they are the same numbers on every machine

Positive = Annotated[float, Must(lambda v: v > 0, "more than 0")]


@dataclass(frozen=True)
class Clip:
    """How scores are clipped, as it is deployed.

    Attributes:
        clip: ``tanh``, a score u becomes ``tanh(slope * (u - middle))``; or ``linear``, the same without tanh,
            cut off at -1 and 1.
        slope: of the clipped score at ``middle``; the paper has 0.05, and 20 for ``middle``, for a network that was trained
            without clipping.
        middle: the score that becomes 0.
    """

    clip: Annotated[str, Must(("tanh", "linear").__contains__, "tanh or linear")] = "tanh"
    slope: Positive = 1.0
    middle: float = 0.0


@dataclass(frozen=True)
class ClippedOptions(Clip, AugmentedOptions):
    """How scores are clipped, see :class:`Clip`, and the training.

    Attributes:
        sharpness: the training loss is the cross-entropy of the mean clipped scores times this.
        flip: mirror images at random.
        shift: move images by up to this many pixels.
    """

    sharpness: Positive = 4.0
    flip: bool = True
    shift: Count = 4


class Clipped(RegionDefense[Votes], VotingDefense):
    """Sums of a region scorer's clipped scores.

    Attributes:
        how: how scores are clipped.
        thresholds: float64 [STEPS], increasing; a score counts one step for each threshold that it reaches.
    """

    source = "Zhang et al., Clipped BagNet: Defending Against Sticker Attacks with Clipped Bag-of-features, DLS 2020"
    options = ClippedOptions
    thresholds: Tensor

    def __init__(self, scorer: RegionScorer, how: Clip, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__(scorer, input_shape=input_shape, classes=classes)
        self.how = how
        self.register_buffer("thresholds", torch.tensor(thresholds(how), dtype=torch.float64), persistent=False)

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        return {item.name: getattr(options, item.name) for item in fields(Clip)}

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> Clipped:
        return cls(cls.scorer_of(deployed), own_entries(Clip, deployed), **size_and_classes(deployed))

    def clipped(self, scores: Tensor) -> Tensor:
        """Scores of any shape, clipped to -1 to 1."""
        away = self.how.slope * (scores - self.how.middle)
        return away.tanh() if self.how.clip == "tanh" else away.clamp(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Smooth surrogate: the mean clipped score, [B, K]."""
        return self.clipped(self.scorer(x).float()).mean(dim=(2, 3))

    def surrogates(self) -> tuple[Surrogate, ...]:
        """Clipped scores in steps, and the plain ones, whose gradients never vanish."""
        return (
            CellSurrogate(self, lambda scores: STEPS / 2 * (self.clipped(scores) + 1), tolerance=2.0 * STEPS),
            CellSurrogate(self, lambda scores: scores),
        )

    def count(self, scores: Tensor) -> Votes:
        """Clipped scores in whole steps, 0 to STEPS; comparing exact scores with thresholds rounds nothing."""
        steps = torch.bucketize(scores.double().contiguous(), self.thresholds, right=True)
        return Votes(steps, weight=torch.full(scores.shape[2:], STEPS, device=scores.device))

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """Cross-entropy of the mean clipped scores."""
        options = step.options
        assert isinstance(options, ClippedOptions)
        return F.cross_entropy(options.sharpness * cast(Tensor, self(x)), label)


def thresholds(how: Clip) -> list[float]:
    """The scores from which on a clipped score is nearer to step k than to step k - 1, for k from 1 to STEPS."""
    ends = [2 * (k - 0.5) / STEPS - 1 for k in range(1, STEPS + 1)]
    undo = math.atanh if how.clip == "tanh" else float
    return [round((how.middle + undo(end) / how.slope) / FINE) * FINE for end in ends]
