"""Interval bound propagation (Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020).

Any feed-forward network of linear, convolution, ReLU and pooling layers, trained so that its interval bounds stay tight under
the threat, and certified by them. Proof: :mod:`patchcert_cli.certifiers.intervals`; rounding rule:
:mod:`patchcert_cli.certifiers.rounding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers import intervals, rounding
from patchcert_cli.defenses.base import Defense, TrainingStep
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.threats import Patch, Threat


class IntervalDefense(Defense):
    """A plain classifier certified by interval bounds, against patches and sparse changes."""

    source = "Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020"

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
    def certify(self, x: Tensor, threat: Threat) -> Certificate:
        self.check_input(x)
        exact = rounding.double(self.network)
        with rounding.exact_arithmetic():
            prediction = self._predict(exact, x)
            network = exact if x.dtype == torch.float64 else rounding.frozen(self.network)
            proof = rounding.prove(network, exact, x, prediction, threat)
        height, width = self.input_shape[1:]
        return Certificate(
            prediction=prediction,
            certified=proof.margin > proof.slack,
            margin=proof.margin,
            slack=proof.slack,
            worst=threat.atoms(height, width).to(x.device)[proof.worst],
            rival=proof.rival,
            threat=threat,
            method="interval",
        )

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """Cross-entropy of the negated margin bounds, each at its worst location (Chiang et al., section 3.2).

        The bounded form is ``1 - exp(-cross-entropy)``, one minus the worst-case softmax probability: like the certified error
        it stops pushing where nothing can be won, so the images near the decision get the gradient.
        """
        threat = intervals.resolve(step.threat, *self.input_shape[1:], self.input_shape[0])
        if not isinstance(threat, Patch):
            margins = intervals.lower_margins(self.network, x, label, threat, epsilon=step.epsilon).values
        elif step.locations:
            count = threat.count(*self.input_shape[1:])
            chosen = torch.randint(count, (len(x), step.locations), generator=step.generator).to(x.device)
            margins = intervals.margins_at(self.network, x, label, threat, chosen, per_class=False, epsilon=step.epsilon)
        else:
            with torch.no_grad():
                worst = intervals.lower_margins(self.network, x, label, threat, epsilon=step.epsilon).worst
            margins = intervals.margins_at(self.network, x, label, threat, worst, per_class=True, epsilon=step.epsilon)
        losses = F.cross_entropy(-margins, label, reduction="none")
        loss = (1 - torch.exp(-losses) if step.bounded else losses).mean()
        if step.natural > 0:
            loss = (1 - step.natural) * loss + step.natural * F.cross_entropy(self(x), label)
        return loss
