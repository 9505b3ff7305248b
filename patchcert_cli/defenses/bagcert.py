"""BagCert (Metzen & Yatsura, Efficient Certified Defenses Against Patch Attacks, ICLR 2021).

A network with a small receptive field scores every class at every cell; a positive score is one vote, and the class with the most
votes is the answer. A patch reaches the few cells that see it. The deployed network computes without rounding error
(:mod:`patchcert_cli.layers.fixed_point`), so no vote is ever in doubt, and the proof is exact
(:mod:`patchcert_cli.certifiers.cells.additive`).

Shapes: B images, C channels, H x W pixels, K classes, N x M cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._base import own_entries, size_and_classes
from patchcert_cli.defenses._cells import CellSurrogate, RegionDefense, VotingDefense
from patchcert_cli.defenses._training import Options, TaughtOptions, TrainingStep
from patchcert_cli.models.region import RegionScorer
from patchcert_cli.schema import Count, Fraction, Must, NonNegative, Positive
from patchcert_cli.threats import Threat

STEPS = 255  # the largest weight of a position


class Step(torch.autograd.Function):
    """1 where a score is positive, else 0; its gradient is that of a sigmoid (straight-through)."""

    @staticmethod
    def forward(context: Any, scores: Tensor) -> Tensor:
        context.save_for_backward(scores)
        return (scores > 0).to(scores)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> Tensor:
        likelihood = context.saved_tensors[0].sigmoid()
        return cast(Tensor, slope * likelihood * (1 - likelihood))


Aggregate = Annotated[str, Must(("sum", "weighted").__contains__, "sum or weighted")]


@dataclass(frozen=True)
class Aggregation:
    """How cells count, as it is deployed; see :class:`BagCertOptions`."""

    aggregate: Aggregate = "sum"


@dataclass(frozen=True)
class BagCertOptions(TaughtOptions):
    """Training of BagCert.

    Attributes:
        margin: M; the loss of an image is ``max(0, M - D)`` with D the smallest mean vote difference to another class. It
            stands for patches of unknown size: a patch that reaches a share r of the cells is certified about when D > 2 r.
        sharpness: T; the share of the other classes is the soft maximum ``logsumexp(T s) / T``, which gives each of them a
            gradient; 0 takes the maximum itself.
        one_hot: weight of ``mean((sum_c s_c - 1)^2)`` over cells, which asks each cell to vote for one class.
        warm_up_epochs: first epochs, with cross-entropy.
        warm_up: of what, ``mean``, the mean scores, or ``cells``, the scores of each cell.
        every: train on each ``every``-th cell along both axes, at a random phase; the deployed network uses all cells.
        teacher_weight: with a teacher, the weight of what is added to the loss: the cross-entropy of the softmax of
            ``teacher_sharpness`` times the mean votes with the teacher's class probabilities; not in the paper.
        teacher_sharpness: what the mean votes, from 0 to 1, are multiplied by for that softmax.
        aggregate: ``sum``, every cell counts alike, or ``weighted``, each position has a learned weight; monotone either way.
        flip: mirror images at random.
        shift: move images by up to this many pixels.
        average: what a step keeps of the running average of weights that becomes the model; 0 for none.
    """

    margin: NonNegative = 0.5
    sharpness: NonNegative = 15.0
    one_hot: NonNegative = 0.0
    warm_up_epochs: Count = 0
    warm_up: Annotated[str, Must(("mean", "cells").__contains__, "mean or cells")] = "mean"
    every: Positive = 2
    teacher_weight: NonNegative = 0.05
    teacher_sharpness: NonNegative = 25.0
    aggregate: Aggregate = "sum"
    flip: bool = True
    shift: Count = 4
    average: Fraction = 0.0

    @property
    def ema_decay(self) -> float:
        return self.average


class BagCert(RegionDefense[Votes], VotingDefense):
    """Cells of a region scorer vote by the signs of their scores."""

    source = "Metzen & Yatsura, Efficient Certified Defenses Against Patch Attacks, ICLR 2021"
    options = BagCertOptions

    def __init__(
        self,
        scorer: RegionScorer,
        *,
        input_shape: tuple[int, int, int],
        classes: tuple[str, ...],
        aggregate: str = "sum",
    ) -> None:
        super().__init__(scorer, input_shape=input_shape, classes=classes)
        cells = [scorer.cells(side) for side in input_shape[1:]]
        self.position = nn.Parameter(torch.ones(cells)) if aggregate == "weighted" else None

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        assert isinstance(options, BagCertOptions)
        return {"aggregate": options.aggregate}

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> BagCert:
        own = own_entries(Aggregation, deployed)
        return cls(cls.scorer_of(deployed), **size_and_classes(deployed), aggregate=own.aggregate)

    def forward(self, x: Tensor) -> Tensor:
        """Smooth surrogate: the (weighted) mean over cells of the sigmoid of the scores, [B, K]."""
        return self._share(self.scorer(x).sigmoid())

    def surrogates(self) -> tuple[Surrogate, ...]:
        """Votes with the gradient of sigmoids (straight-through), and the plain scores."""
        weights = self.weights
        tolerance = 2.0 if weights is None else 2 * float(weights.amax())
        return CellSurrogate(self, Step.apply, weights, tolerance), CellSurrogate(self, lambda scores: scores, weights, tolerance)

    def _share(self, votes: Tensor, down: int = 0, right: int = 0, every: int = 1) -> Tensor:
        """The mean of votes [B, K, n, m] of each ``every``-th cell from (down, right) on, weighted by position: [B, K]."""
        if self.position is None:
            return votes.mean(dim=(2, 3))
        weight = F.softplus(self.position)[down::every, right::every]
        return (votes * (weight / weight.sum())).sum(dim=(2, 3))

    @property
    def weights(self) -> Tensor | None:
        """Whole numbers [N, M], how much each position counts; None for 1."""
        if self.position is None:
            return None
        weight = F.softplus(self.position.detach().double())
        return (weight * (STEPS / weight.amax())).round()

    def count(self, scores: Tensor) -> Votes:
        """``s = [score > 0]``, times the weight of its position; no score is in doubt, since none is rounded."""
        weights = self.weights
        votes = (scores > 0).contiguous()
        return Votes(votes) if weights is None else Votes(votes * weights.float(), weight=weights)

    def fit_before(self, x: Tensor) -> None:
        self.scorer.whiten(x)

    def fit_start(self, x: Tensor) -> None:
        self.scorer.whiten(x, keep=True)

    def fuse(self) -> None:
        self.scorer.fuse()

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """Margin hinge over the mean vote differences, straight-through, with the one-hot penalty (section 3.3 of the paper).

        The scores of ``every``-th cells equal those of the whole map at these cells.
        """
        options = step.options
        assert isinstance(options, BagCertOptions)
        down = right = 0
        if options.every > 1:
            cells = self.scorer.cells(min(self.input_shape[1:]))
            down, right = torch.randint(min(options.every, cells), (2,), generator=step.generator).tolist()
        apart = self.scorer.stride
        scores = self.scorer.score(self.scorer.prepare(x)[:, :, down * apart :, right * apart :], options.every)
        if step.progress < options.warm_up_epochs:
            if options.warm_up == "cells":
                return F.cross_entropy(scores.float(), label[:, None, None].expand(-1, *scores.shape[2:]))
            return F.cross_entropy(scores.mean(dim=(2, 3)).float(), label)
        votes: Tensor = Step.apply(scores.float())
        share = self._share(votes, down, right, options.every)
        own = share.gather(1, label[:, None])[:, 0]
        others = share.scatter(1, label[:, None], -1.0)
        soft = options.sharpness
        rival = torch.logsumexp(soft * others, dim=1) / soft if soft > 0 else others.amax(dim=1)
        loss = F.relu(options.margin - (own - rival)).mean()
        if step.taught is not None:
            loss = loss + options.teacher_weight * F.cross_entropy(options.teacher_sharpness * share, step.taught)
        if options.one_hot > 0:
            loss = loss + options.one_hot * (votes.sum(dim=1) - 1).square().mean()
        return loss
