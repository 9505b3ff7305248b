"""Certified detection: Minority Reports (McCoyd et al., 2020), for any classifier under masks that cover the threat.

The classifier sees the whole image, and the image under each mask alone. If a mask hides the patch, the attacker cannot change
the prediction under it; where it contradicts the whole image with enough confidence, an alarm is raised. There is one round of
masks, not two as for a corrected answer (:mod:`patchcert_cli.defenses.patchcleanser`, whose network, masks and training these
are). It promises less, so it costs less and mostly certifies more.
Answer and proof: :mod:`patchcert_cli.certifiers.masks.masked_detection`. Its certificates are ``measured``: that rounding alters
neither a label nor an alarm is measured, not proven (:mod:`patchcert_cli.certifiers.masks.masked_predictions`).

Shapes: B images, C channels, H x W pixels, K classes, M masks, V = M + 1 views, n passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certificate import Claim, Proof
from patchcert_cli.certifiers.masks import masked_detection
from patchcert_cli.certifiers.masks.exact_predictions import Predictor
from patchcert_cli.certifiers.masks.mask_sets import MaskCoverage
from patchcert_cli.certifiers.masks.masked_detection import MaskedOutputs
from patchcert_cli.certifiers.masks.masked_predictions import TOLERANCE
from patchcert_cli.defenses._masked import MaskedClassifier, MaskedOptions, Masking
from patchcert_cli.defenses._training import Options
from patchcert_cli.schema import Count, Fraction
from patchcert_cli.threats import Guarantee, Threat

VALUES = 1 << 24  # pixel values of the views of a group of images
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # thresholds to compare


@dataclass(frozen=True)
class MinorityOptions(MaskedOptions):
    """Training under masks, by default one for each image, and when an alarm is raised.

    Attributes:
        threshold: confidence (softmax of the label) from which on a mask that contradicts the whole image raises an alarm; 0 for
            any contradiction. The higher, the fewer false alarms and the fewer certificates.
    """

    masks: Count = 1
    threshold: Fraction = 0.0


@dataclass(frozen=True)
class MinorityMasking(Masking):
    """What is deployed besides the network; see :class:`MinorityOptions`."""

    threshold: Fraction = 0.0


class Minority(MaskedClassifier):
    """Any classifier under one mask at a time; contradictions raise an alarm.

    Attributes:
        threshold: see :class:`MinorityOptions`.
        grid: other thresholds, for which certificates say as well whether they would hold; costs more passes in float64.
    """

    source = "McCoyd et al., Minority Reports Defense: Defending Against Adversarial Patches, 2020"
    methods = masked_detection.METHODS
    guarantee = Guarantee.DETECTION
    options = MinorityOptions
    deployed_entries = MinorityMasking
    grid: tuple[float, ...] = ()

    def __init__(self, network: nn.Module, *, threshold: float = 0.0, **given: Any) -> None:
        super().__init__(network, **given)
        self.threshold = threshold

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        assert isinstance(options, MinorityOptions)
        return {**super().deploy_config(threat, options), "threshold": options.threshold}

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
            if threshold > 0:
                found = torch.minimum(found, (sure - math.log(threshold)).abs() / scale)
        return found

    def _read(self, logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Label, next label, logit margin and confidence margin of float64 logits [n, K], scale [n]; see
        :class:`masked_detection.MaskedOutputs`.

        If logits are off by e, so is a logit margin by at most 2 e, and so is the logarithm of a confidence.
        """
        ranked = logits.sort(dim=1, descending=True, stable=True)  # of equals the lowest class first
        floor = math.log(self.threshold) if self.threshold > 0 else -math.inf
        confidence_margin = _sure(logits) - floor
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
        return masked_detection.answer(self._outputs(x, self.views())).to(x.device)

    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> list[Proof]:
        """All claims from one pass under every mask."""
        covers, views = [self.set.cover(claim.threat) for claim in claims], self.views()
        outputs = self._outputs(x, views)
        return [self._proof(outputs, views, claim, cover) for claim, cover in zip(claims, covers, strict=True)]

    def _proof(self, outputs: MaskedOutputs, views: Predictor, claim: Claim, cover: MaskCoverage) -> Proof:
        by, location = self.sets(cover, whole=claim.method == "all")
        found = masked_detection.prove(outputs, by)
        exact = self.threshold == 0  # of a confidence the logarithm is rounded
        return Proof(
            answer=masked_detection.answer(outputs),
            margin=found.margin,
            location=location[found.weakest],
            runner_up=found.rival,
            tolerance=views.tolerance if exact else TOLERANCE["float64"],
            arithmetic=views.arithmetic if exact else Arithmetic.MEASURED,
            thresholds=masked_detection.thresholds(outputs, by, TOLERANCE["float64"]) if self.grid else None,
            plain=outputs.whole if self.grid else None,
        )

    def passes_per_image(self) -> tuple[int, int]:
        return (len(self.set) + 1,) * 2

    def mask_margins(self, x: Tensor) -> Tensor:
        """By how much each mask agrees with the answer, float64 [B, M]."""
        return masked_detection.mask_margins(self._outputs(x, self.views()))


def _sure(logits: Tensor) -> Tensor:
    """The logarithm of the confidence of logits [n, K]: [n]."""
    return logits.amax(dim=1) - logits.logsumexp(dim=1)
