"""Certified detection with HiCert's rule (Zhou et al., 2025), for any classifier under masks that cover the threat.

An alarm is raised where the prediction under a mask differs from the one for the whole image, or lacks confidence
(:mod:`patchcert_cli.defenses._detection`). Answer and proof: :mod:`patchcert_cli.certifiers.masks.hicert`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from patchcert_cli.certifiers.masks import hicert
from patchcert_cli.certifiers.masks.masked_detection import Rule
from patchcert_cli.defenses._detection import GRID, DetectingClassifier, DetectionMasking, DetectionOptions
from patchcert_cli.defenses._masked import Share


@dataclass(frozen=True)
class HiCertOptions(DetectionOptions):
    """Training under masks, by default one for each image, and when an alarm is raised.

    Attributes:
        threshold: confidence (softmax of the label) that every mask needs, or an alarm is raised; 0 for none, 1 for an alarm on
            every image. The higher, the more false alarms and the fewer certified answers.
    """

    threshold: Share = 0.8


@dataclass(frozen=True)
class HiCertMasking(DetectionMasking):
    """What is deployed besides the network; see :class:`HiCertOptions`."""

    threshold: Share = 0.8


class HiCert(DetectingClassifier):
    """Any classifier under one mask at a time; contradictions and low confidence raise an alarm."""

    source = "Zhou et al., Toward Patch Robustness Certification and Detection Beyond Consistent Samples, arXiv 2512.06123, 2025"
    methods = hicert.METHODS
    options = HiCertOptions
    deployed_entries = HiCertMasking
    rule: ClassVar[Rule] = hicert
    compared = (*GRID, 1.0)
