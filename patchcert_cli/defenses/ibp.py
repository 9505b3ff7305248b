"""Interval bound propagation (Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020).

Any feed-forward network of linear, convolution, ReLU and pooling layers, trained so that its interval bounds stay tight under
the threat, and certified by them, or by linear bounds where they leave something open. Proofs:
:mod:`patchcert_cli.certifiers.intervals` and :mod:`patchcert_cli.certifiers.linear`; rounding rule:
:mod:`patchcert_cli.certifiers.rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers import intervals, refine, rounding
from patchcert_cli.defenses.base import Augment, Claim, Defense, Options, TrainingStep
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.exact import exact_arithmetic
from patchcert_cli.schema import Count, Fraction, Must, Positive
from patchcert_cli.threats import Patch, Threat


@dataclass(frozen=True)
class IntervalOptions(Options):
    """The schedule of Chiang et al.: clean loss, growing attacker, full attacker, and at the end a bounded loss.

    Attributes:
        natural_epochs: first epochs, with the clean loss only.
        ramp_epochs: epochs over which the attacker grows from nothing to full strength.
        decay: ``cosine`` (to zero at the end) or ``step`` (halved every ``decay_every`` epochs), after the ramp.
        decay_every: epochs between halvings for ``decay=step``.
        locations: 0 trains on the exact worst location, otherwise on this many random ones per image.
        natural: weight of the clean cross-entropy once the ramp is over.
        bounded_epochs: last epochs, in which an image's loss is bounded; the learning rate restarts at half.
        bounded_natural: weight of the clean cross-entropy in them.
        bounded_shift: pixels by which an image is moved at random in them, at most; against memorizing.
        flip: mirror images at random, in all epochs.
        shift: pixels by which an image is moved at random in all epochs, at most.
        visits: sparse threats on fully connected networks: pixels or values that the training bound looks at per neuron, those of
            the largest weights; 0 is all, which is exact. Certification always looks at all that matter.
    """

    natural_epochs: Count = 1
    ramp_epochs: Count = 15
    decay: Annotated[str, Must(("cosine", "step").__contains__, "cosine or step")] = "cosine"
    decay_every: Positive = 10
    locations: Count = 0
    natural: Fraction = 0.0
    bounded_epochs: Count = 20
    bounded_natural: Fraction = 0.1
    bounded_shift: Count = 0
    flip: bool = False
    shift: Count = 0
    visits: Count = 0

    def fitted(self, epochs: int) -> IntervalOptions:
        """Phases of a third each if the run is too short for them, as one of 3 epochs would be."""
        if self.natural_epochs + self.ramp_epochs + self.bounded_epochs < epochs:
            return self
        third = epochs // 3
        return replace(self, natural_epochs=0, ramp_epochs=third, bounded_epochs=min(self.bounded_epochs, third))

    def epsilon(self, progress: float) -> float:
        """Strength of the attacker at ``progress`` epochs: 0 to 1."""
        if progress < self.natural_epochs:
            return 0.0
        if self.ramp_epochs == 0:
            return 1.0
        return min(1.0, (progress - self.natural_epochs) / self.ramp_epochs)

    def bounded(self, progress: float, epochs: int) -> bool:
        """Whether ``progress`` epochs lie in the phase of the bounded loss."""
        return progress >= epochs - self.bounded_epochs

    def augment(self, progress: float, epochs: int) -> Augment:
        shift = max(self.shift, self.bounded_shift) if self.bounded(progress, epochs) else self.shift
        return Augment(flip=self.flip, shift=shift)

    def rate(self, progress: float, epochs: int) -> float:
        """Constant until the ramp is over, then falling; again, from half, in the bounded phase."""
        turn = epochs - self.bounded_epochs
        if progress < turn or not self.bounded_epochs:
            peak, start, end = 1.0, self.natural_epochs + self.ramp_epochs, turn
        else:
            peak, start, end = 0.5, turn, epochs
        after = max(0.0, progress - start)
        if self.decay == "step":
            return float(peak * 0.5 ** int(after // self.decay_every))
        return peak * (1 + math.cos(math.pi * after / max(end - start, 1))) / 2


class IntervalDefense(Defense):
    """A plain classifier certified by interval and linear bounds, against patches and sparse changes."""

    source = "Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020"
    methods = ("best", "interval", "linear")  # linear bounds are added to interval bounds, so best and linear are one
    options = IntervalOptions
    numerics: ClassVar[Mapping[str, str]] = {
        "bounds": "float32",
        "near_zero": "float64",
        "linear": "float64",
        "prediction": "float64",
    }
    default_network = "mlp"

    def __init__(self, network: nn.Sequential, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__(input_shape=input_shape, classes=classes)
        self.network = network

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> IntervalDefense:
        shape, classes = tuple(config["input_shape"]), tuple(config["classes"])
        options = {**config["network"]["options"], "input_shape": shape, "classes": len(classes)}
        return cls(models.build(config["network"]["name"], options), input_shape=shape, classes=classes)

    @classmethod
    def tiny(cls) -> IntervalDefense:
        shape = (1, 4, 4)
        options = {"input_shape": shape, "classes": 3, "hidden": (6,), "mean": (0.4,), "std": (0.5,)}
        return cls(models.build("mlp", options), input_shape=shape, classes=("a", "b", "c")).eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Argmax of the logits evaluated in float64, lowest class index first.

        It is the same in every batch and on every device, but for ties closer than float64 can tell, which are never certified.
        """
        self.check_input(x)
        return self._predict(rounding.double(self.network), x)

    @staticmethod
    def _predict(exact: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = exact(x.double())
        if logits.ndim != 2:
            raise UnsupportedThreat(
                f"logits of shape {tuple(logits.shape)} are not [B, K];", hint="end the network with Flatten."
            )
        best = logits.amax(dim=1, keepdim=True)
        return (logits == best).int().argmax(dim=1)

    @torch.no_grad()
    def certify_each(self, x: Tensor, claims: Sequence[Claim]) -> list[Certificate]:
        self.check_input(x)
        for claim in claims:
            self.check_method(claim.method)
        return [self._certify(x, claim.threat, linear=(claim.method or self.methods[0]) != "interval") for claim in claims]

    def _certify(self, x: Tensor, threat: Threat, *, linear: bool) -> Certificate:
        exact = rounding.double(self.network)
        with exact_arithmetic():
            prediction = self._predict(exact, x)
            network = exact if x.dtype == torch.float64 else rounding.frozen(self.network)
            proof = rounding.prove(network, exact, x, prediction, threat)
            if linear:
                proof = refine.improve(exact, x, prediction, threat, proof)
        height, width = self.input_shape[1:]
        return Certificate(
            prediction=prediction,
            certified=proof.margin > proof.slack,
            margin=proof.margin,
            slack=proof.slack,
            worst=threat.atoms(height, width).to(x.device)[proof.worst],
            rival=proof.rival,
            threat=threat,
            method="linear" if linear else "interval",
        )

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """Cross-entropy of the negated margin bounds, each at its worst location (Chiang et al., section 3.2).

        The bounded form is ``1 - exp(-cross-entropy)``, one minus the worst-case softmax probability: like the certified error
        it stops pushing where nothing can be won, so the images near the decision get the gradient.
        """
        options = step.options
        assert isinstance(options, IntervalOptions)
        if step.progress < options.natural_epochs:
            return F.cross_entropy(self(x), label)
        epsilon, bounded = options.epsilon(step.progress), options.bounded(step.progress, step.epochs)
        threat = intervals.resolve(step.threat, *self.input_shape[1:], self.input_shape[0])
        if not isinstance(threat, Patch):
            margins = intervals.lower_margins(self.network, x, label, threat, epsilon=epsilon, visits=options.visits).values
        elif options.locations:
            count = threat.count(*self.input_shape[1:])
            chosen = torch.randint(count, (len(x), options.locations), generator=step.generator).to(x.device)
            margins = intervals.margins_at(self.network, x, label, threat, chosen, per_class=False, epsilon=epsilon)
        else:
            with torch.no_grad():
                worst = intervals.lower_margins(self.network, x, label, threat, epsilon=epsilon).worst
            margins = intervals.margins_at(self.network, x, label, threat, worst, per_class=True, epsilon=epsilon)
        losses = F.cross_entropy(-margins, label, reduction="none")
        loss = (1 - torch.exp(-losses) if bounded else losses).mean()
        natural = options.bounded_natural if bounded else options.natural
        if natural > 0:
            loss = (1 - natural) * loss + natural * F.cross_entropy(self(x), label)
        return loss
