"""Certified detection: any classifier under masks that cover the threat, and an alarm where the masks do not agree.

The classifier sees the whole image, and the image under each mask alone. If a mask hides the patch, the attacker cannot change
the prediction under it. There is one round of masks, not two as for a corrected answer
(:mod:`patchcert_cli.defenses.patchcleanser`, whose network, masks and training these are). It promises less, so it costs less and
mostly certifies more. When an alarm is raised, and what is proven then, is a rule:
:mod:`patchcert_cli.certifiers.masks.masked_detection` or :mod:`patchcert_cli.certifiers.masks.hicert`. With a threshold the
certificates are ``measured``: that rounding alters neither a label nor an alarm is measured, not proven
(:mod:`patchcert_cli.certifiers.masks.masked_predictions`).

Shapes: B images, C channels, H x W pixels, K classes, M masks, V = M + 1 views, n passes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchcert_cli import schema
from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certificate import Claim, Proof
from patchcert_cli.certifiers.masks.exact_predictions import Predictor
from patchcert_cli.certifiers.masks.mask_sets import MaskCoverage
from patchcert_cli.certifiers.masks.masked_detection import MaskedOutputs, Rule, weakest_set
from patchcert_cli.certifiers.masks.masked_predictions import TOLERANCE
from patchcert_cli.defenses._masked import MaskedClassifier, MaskedOptions, Masking, Share
from patchcert_cli.defenses._training import Options
from patchcert_cli.schema import Count
from patchcert_cli.threats import Guarantee, Threat

VALUES = 1 << 24  # pixel values of the views of a group of images
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # thresholds to compare


@dataclass(frozen=True)
class DetectionOptions(MaskedOptions):
    """Training under masks, by default one for each image, and when an alarm is raised.

    Attributes:
        threshold: the confidence (softmax of the label) by which the rule decides.
    """

    masks: Count = 1
    threshold: Share = 0.0


@dataclass(frozen=True)
class DetectionMasking(Masking):
    """What is deployed besides the network; see :class:`DetectionOptions`."""

    threshold: Share = 0.0


class DetectingClassifier(MaskedClassifier):
    """Any classifier under one mask at a time, with alarms.

    Attributes:
        rule: when an alarm is raised, and what follows.
        compared: thresholds that are worth a comparison.
        threshold: see :class:`DetectionOptions`.
        grid: other thresholds, for which certificates say as well whether they would hold; costs more passes in float64.
    """

    guarantee = Guarantee.DETECTION
    options: ClassVar[type[DetectionOptions]] = DetectionOptions
    deployed_entries = DetectionMasking
    compared: ClassVar[tuple[float, ...]] = GRID
    grid: tuple[float, ...] = ()

    def __init__(self, network: nn.Module, *, threshold: float | None = None, **given: Any) -> None:
        """Put the defense around ``network``, by default with the threshold of its options; the rest as for
        :class:`MaskedClassifier`."""
        super().__init__(network, **given)
        self.threshold = self.deployed_threshold() if threshold is None else threshold

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        assert isinstance(options, DetectionOptions)
        return {**super().deploy_config(threat, options), "threshold": options.threshold}

    @classmethod
    def deployed_threshold(cls) -> float:
        """The threshold by default."""
        return cls.options().threshold

    @classmethod
    def takes_threshold(cls, threshold: float) -> bool:
        """Whether its options allow this threshold."""
        try:
            schema.read(cls.options, {"threshold": threshold})
        except schema.Invalid:
            return False
        return True

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """When an alarm is raised, and what follows."""

    def alarm_settings(self) -> dict[str, Any]:
        return {"threshold": self.threshold} | ({"compared": list(self.grid)} if self.grid else {})

    def views(self) -> Predictor:
        """The network as it is now, without a mask and under each of the masks."""
        return self._behind(torch.cat([torch.zeros_like(self.masks[:1]), self.masks]))  # nothing is hidden in the first view

    def _outputs(self, x: Tensor, views: Predictor) -> MaskedOutputs:
        """What is seen of images [B, C, H, W], as sure as the network can make it, on the CPU."""
        self.test_once()
        count = len(self.set) + 1
        size = max(1, VALUES // (count * math.prod(self.input_shape)))
        parts = [self._seen(views, part, count) for part in torch.split(x, size)]
        columns = [torch.cat(column).reshape(len(x), count, *column[0].shape[1:]) for column in zip(*parts, strict=True)]
        label, rival, logit_margin, confidence_margin, confidence = columns
        return MaskedOutputs(
            label[:, 0], label[:, 1:], rival[:, 1:], logit_margin[:, 1:], confidence_margin[:, 1:], confidence[:, 1:]
        )

    def _seen(self, views: Predictor, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """What :meth:`_read` makes of every view of some images, [n]; an undetermined label has a logit margin of 0."""
        image, view = torch.arange(len(x) * count) // count, torch.arange(len(x) * count) % count
        seen = views.masked_logits(x, image, view, view, self._clear)
        label, rival, logit_margin, confidence_margin = self._read(seen.logits, seen.scale)
        sure, off = _sure(seen.logits), TOLERANCE["float64"] * seen.scale
        confidence = torch.stack([(sure - off).exp(), (sure + off).exp()], dim=1)
        return label, rival, torch.where(seen.known, logit_margin, 0), confidence_margin, confidence

    def _clear(self, logits: Tensor, scale: Tensor) -> Tensor:
        """How far label and alarm of each pass are from another decision, [n], with any of the thresholds."""
        _, _, logit_margin, confidence_margin = self._read(logits, scale)
        found, sure = torch.minimum(logit_margin, confidence_margin.abs()), _sure(logits)
        for threshold in self.grid:
            if 0 < threshold < 1:
                found = torch.minimum(found, (sure - math.log(threshold)).abs() / scale)
        return found

    def _read(self, logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Label, next label, logit margin and confidence margin of float64 logits [n, K], scale [n]; see
        :class:`patchcert_cli.certifiers.masks.masked_detection.MaskedOutputs`.

        If logits are off by e, so is a logit margin by at most 2 e, and so is the logarithm of a confidence.
        """
        ranked = logits.sort(dim=1, descending=True, stable=True)  # of equals the lowest class first
        floor = math.log(self.threshold) if self.threshold > 0 else -math.inf
        # no softmax reaches 1, although it may be rounded to it
        confidence_margin = _sure(logits) - floor if self.threshold < 1 else -scale
        return (
            ranked.indices[:, 0],
            ranked.indices[:, 1],
            (ranked.values[:, 0] - ranked.values[:, 1]) / scale,
            confidence_margin / scale,
        )

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The label of the whole image, or :data:`patchcert_cli.certificate.ALERT`."""
        self.check_input(x)
        return self.rule.answer(self._outputs(x, self.views())).to(x.device)

    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> list[Proof]:
        """All claims from one pass under every mask."""
        covers, views = [self.set.cover(claim.threat) for claim in claims], self.views()
        outputs = self._outputs(x, views)
        return [self._proof(outputs, views, claim, cover) for claim, cover in zip(claims, covers, strict=True)]

    def _proof(self, outputs: MaskedOutputs, views: Predictor, claim: Claim, cover: MaskCoverage) -> Proof:
        by, location = self.sets(cover, whole=claim.method == "all")
        found = weakest_set(outputs, by, self.rule.mask_margins(outputs))
        exact = self.threshold == 0  # of a confidence the logarithm is rounded
        tolerance, compares = views.tolerance if exact else TOLERANCE["float64"], bool(self.grid)
        between = self.rule.or_alarm(outputs, by, tolerance, len(self.classes))
        return Proof(
            answer=self.rule.answer(outputs),
            margin=found.margin,
            location=location[found.weakest],
            runner_up=found.rival,
            tolerance=tolerance,
            arithmetic=views.arithmetic if exact else Arithmetic.MEASURED,
            or_alarm=(between[..., 0] < self.threshold) & (self.threshold < between[..., 1]),
            thresholds=self.rule.thresholds(outputs, by, TOLERANCE["float64"]) if compares else None,
            silent=self.rule.silent(outputs) if compares else None,
            or_alarm_thresholds=self.rule.or_alarm(outputs, by, TOLERANCE["float64"], len(self.classes)) if compares else None,
            plain=outputs.whole if compares else None,
        )

    def passes_per_image(self) -> tuple[int, int]:
        return (len(self.set) + 1,) * 2

    def mask_margins(self, x: Tensor) -> Tensor:
        """By how much each mask agrees with the answer, float64 [B, M]."""
        return self.rule.mask_margins(self._outputs(x, self.views()))


def _sure(logits: Tensor) -> Tensor:
    """The logarithm of the confidence of logits [n, K]: [n]."""
    return logits.amax(dim=1) - logits.logsumexp(dim=1)
