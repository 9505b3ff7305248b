"""Certified detection: Minority Reports (McCoyd et al., 2020), asked of any classifier behind masks that cover the threat.

The image is shown whole and behind each mask alone. If a mask hides the patch, what is seen behind it is the truth; where it
contradicts the whole image with enough confidence, an alarm is raised. One round of masks, against two for a corrected answer
(:mod:`patchcert_cli.defenses.patchcleanser`, whose network, masks and training these are): it promises less, and so it costs
less and mostly certifies more.
Answer and proof: :mod:`patchcert_cli.certifiers.masks.masked_detection`. Its certificates say ``measured``: that rounding alters
    neither
a label nor an alarm is measured, not proven (:mod:`patchcert_cli.certifiers.masks.masked_predictions`).

Shapes: B images, C channels, H x W pixels, K classes, M masks, V = M + 1 views, n passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certificate import Certificate, Guarantee
from patchcert_cli.certifiers.masks import masked_detection
from patchcert_cli.certifiers.masks.exact_predictions import Predictor
from patchcert_cli.certifiers.masks.mask_sets import MaskCoverage
from patchcert_cli.certifiers.masks.masked_detection import MaskedOutputs
from patchcert_cli.certifiers.masks.masked_predictions import TOLERANCE
from patchcert_cli.defenses._base import Claim, Options
from patchcert_cli.defenses.patchcleanser import MaskedOptions, PatchCleanser
from patchcert_cli.errors import IntegrityError
from patchcert_cli.schema import Count, Fraction
from patchcert_cli.threats import Threat

VALUES = 1 << 24  # pixel values of the views of a group of images
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # thresholds to compare


@dataclass(frozen=True)
class MinorityOptions(MaskedOptions):
    """Training behind masks, one an image unless told otherwise, and when an alarm is raised.

    Attributes:
        threshold: confidence (softmax of the label) from which on a mask that contradicts the whole image raises an alarm; 0 for
            any contradiction. The higher, the fewer false alarms and the fewer certificates.
    """

    masks: Count = 1
    threshold: Fraction = 0.0


class Minority(PatchCleanser):
    """Any classifier behind one mask at a time; contradictions raise an alarm.

    Attributes:
        threshold: see :class:`MinorityOptions`.
        grid: other thresholds, for which certificates say as well whether they would hold; costs more passes in float64.
    """

    source = "McCoyd et al., Minority Reports Defense: Defending Against Adversarial Patches, 2020"
    methods = masked_detection.METHODS
    guarantee = Guarantee.DETECTION
    options = MinorityOptions
    threshold: float = 0.0
    grid: tuple[float, ...] = ()

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        assert isinstance(options, MinorityOptions)
        return {**super().deploy_config(threat, options), "threshold": options.threshold}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Minority:
        made = cast(Minority, super().from_config(config))
        made.threshold = float(config.get("threshold", 0.0))
        if not 0 <= made.threshold < 1:
            raise IntegrityError(f"threshold is {made.threshold}, not in [0, 1).")
        return made

    @classmethod
    def tiny(cls) -> Minority:
        made = cast(Minority, super().tiny())
        made.threshold = (0.0, 0.4)[int(torch.randint(2, ()))]
        return made

    def views(self) -> Predictor:
        """The network as it is now, behind no mask and behind each of the masks."""
        return self._behind(torch.cat([torch.zeros_like(self.masks[:1]), self.masks]))  # nothing is hidden in the first view

    def _reports(self, x: Tensor, views: Predictor) -> MaskedOutputs:
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
        """What :meth:`_read` makes of every view of some images, [n]; what nobody can tell has a logit margin of 0."""
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
        return masked_detection.answer(self._reports(x, self.views())).to(x.device)

    @torch.no_grad()
    def certify_claims(self, x: Tensor, claims: Sequence[Claim]) -> list[Certificate]:
        """All claims from one look at every view."""
        self.check_input(x)
        for claim in claims:
            self.check_method(claim.method)
        covers, views = [self.set.cover(claim.threat) for claim in claims], self.views()
        reports = self._reports(x, views)
        return [self._proven(reports, views, claim, cover) for claim, cover in zip(claims, covers, strict=True)]

    def _proven(self, reports: MaskedOutputs, views: Predictor, claim: Claim, cover: MaskCoverage) -> Certificate:
        method = claim.method or self.methods[0]
        by, location = cover.by, cover.location
        if method == "all":
            by = torch.eye(len(self.set), dtype=torch.bool)
            location = cover.location[cover.by.int().argmax(dim=0)]
        proof, device = masked_detection.prove(reports, by), self.masks.device
        exact = self.threshold == 0  # of a confidence the logarithm is rounded
        tolerance = torch.full_like(proof.margin, views.tolerance if exact else TOLERANCE["float64"])
        return Certificate(
            prediction=masked_detection.answer(reports).to(device),
            certified=(proof.margin > tolerance).to(device),
            margin=proof.margin.to(device),
            slack=tolerance.to(device),
            worst=claim.threat.locations(*self.input_shape[1:])[location[proof.weakest]].to(device),
            rival=proof.rival.to(device),
            threat=claim.threat,
            method=method,
            guarantee=self.guarantee,
            arithmetic=views.arithmetic if exact else Arithmetic.MEASURED,
            thresholds=masked_detection.thresholds(reports, by, TOLERANCE["float64"]).to(device) if self.grid else None,
            plain=reports.whole.to(device) if self.grid else None,
        )

    def passes_per_image(self) -> tuple[int, int]:
        return (len(self.set) + 1,) * 2

    def _by_mask(self, x: Tensor) -> Tensor:
        """By how much each mask agrees with the answer, float64 [B, M]."""
        return masked_detection.mask_margins(self._reports(x, self.views()))


def _sure(logits: Tensor) -> Tensor:
    """The logarithm of the confidence of logits [n, K]: [n]."""
    return logits.amax(dim=1) - logits.logsumexp(dim=1)
