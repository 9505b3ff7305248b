"""Certified detection: Minority Reports (McCoyd et al., 2020), for any classifier under masks that cover the threat.

An alarm is raised where the prediction under a mask contradicts the one for the whole image with enough confidence
(:mod:`patchcert_cli.defenses._detection`). Answer and proof: :mod:`patchcert_cli.certifiers.masks.masked_detection`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from patchcert_cli.certifiers.masks import masked_detection
from patchcert_cli.certifiers.masks.masked_detection import Rule
from patchcert_cli.defenses._detection import DetectingClassifier, DetectionMasking, DetectionOptions
from patchcert_cli.schema import Fraction


@dataclass(frozen=True)
class MinorityOptions(DetectionOptions):
    """Training under masks, by default one for each image, and when an alarm is raised.

    Attributes:
        threshold: confidence (softmax of the label) from which on a mask that contradicts the whole image raises an alarm; 0 for
            any contradiction. The higher, the fewer false alarms and the fewer certificates.
    """

    threshold: Fraction = 0.0


@dataclass(frozen=True)
class MinorityMasking(DetectionMasking):
    """What is deployed besides the network; see :class:`MinorityOptions`."""

    threshold: Fraction = 0.0


class Minority(DetectingClassifier):
    """Any classifier under one mask at a time; contradictions raise an alarm."""

    source = "McCoyd et al., Minority Reports Defense: Defending Against Adversarial Patches, 2020"
    methods = masked_detection.METHODS
    options = MinorityOptions
    deployed_entries = MinorityMasking
    rule: ClassVar[Rule] = masked_detection
