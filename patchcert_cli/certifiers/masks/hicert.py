"""Certified detection with HiCert's rule: an alarm unless all masks agree with the whole image and are confident.

HiCert (Zhou, Wei, Wang, Wang & Chan, Toward Patch Robustness Certification and Detection for Deep Learning Systems Beyond
Consistent Samples, 2025, arXiv 2512.06123). Let f be the label that a classifier gives to the whole image, f_i the one under mask
i alone, and p_i its confidence there.

**The answer.** An alarm if ``f_i != f`` for some i, or if the least confidence of the masks that agree with f is below the
threshold; else f. So f is answered if and only if ``f_i = f`` and ``p_i >= threshold`` for all i.

**Theorem.** Let y be any class. If for every set L of pixels that an attack may touch, the masks that hide all of L do not have
all one label j != y, each with ``p_i >= threshold`` on the clean image, then the answer is y or an alarm, for any content of L.

*Proof.* Let the answer be a class j. Then all masks have the label j and at least the threshold's confidence under attack. Those
that hide L never see it, so they have the same label and confidence on the clean image. By the condition j = y. QED.
It is also necessary if the attacker at L can set label and confidence of the whole image, and under every mask that does not hide
all of L: it sets them to j with enough confidence, and the answer is j.

The published condition asks the same of each mask alone: ``p_i < threshold`` wherever ``f_i != y``. It implies this one, which
needs only one mask of those that hide L, with ``f_i = y`` or ``p_i < threshold``, or two with different labels.

**What it is about.** The theorem does not ask that the clean image is answered y, nor that it is answered at all: an image whose
masks contradict it without confidence raises an alarm and still counts for y, and if no set L has a confident label that all its
masks share, it counts for every class, since each attack raises an alarm. That is the published metric (:func:`or_alarm`).
A certificate of this project is about an answer: of images that raise no alarm. For these all masks agree with the answer, so the
condition holds at once, except where rounding may decide: silent, right and certified are the same images. Their number is
largest at threshold 0, where the rule is that of :mod:`patchcert_cli.certifiers.masks.masked_detection` with threshold 0. A
higher threshold adds to the published metric, never to the certified answers. At threshold 1 every image raises an alarm, since
no softmax of finite logits reaches 1, and the published metric counts every image.

**Rounding.** ``f_i = y`` counts only if its logit margin exceeds ``tolerance``, ``p_i < threshold`` only for the largest
confidence that rounding allows, and an answer is certified only if no confidence is within ``tolerance`` of the threshold.

Shapes: B images, M masks, K classes, U sets of masks of which an attack leaves one whole (:class:`mask_sets.MaskCoverage`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchcert_cli.certificate import ALERT
from patchcert_cli.certifiers.masks.masked_detection import (
    ABOVE,
    BELOW,
    METHODS,
    MaskedOutputs,
    Proof,
    largest_elsewhere,
    weakest_set,
)

__all__ = ["METHODS", "answer", "mask_margins", "or_alarm", "prove", "silent", "thresholds"]

LARGEST = 1 - 2.0**-53  # the largest confidence: the next number is 1, which no softmax reaches


def answer(reports: MaskedOutputs) -> Tensor:
    """The deployed answer, int64 [B], :data:`patchcert_cli.certificate.ALERT` for an alarm."""
    fine = (reports.label == reports.whole[:, None]) & (reports.confidence_margin >= 0)
    return torch.where(fine.all(dim=1), reports.whole, ALERT)


def mask_margins(reports: MaskedOutputs) -> Tensor:
    """By how much each mask agrees with the answer, float64 [B, M]; not positive after an alarm.

    No logit margin counts for more than the least confidence margin of the image's masks, any of which may raise an alarm.
    """
    right = reports.label == reports.whole[:, None]
    least = reports.confidence_margin.amin(dim=1, keepdim=True)
    found = torch.where(right, torch.minimum(reports.logit_margin, least), -reports.logit_margin)
    return torch.where((answer(reports) == ALERT)[:, None], found.clamp(max=0), found)


def prove(reports: MaskedOutputs, by: Tensor) -> Proof:
    """Whether the answer is certified, for the sets of masks ``by``, bool [U, M]."""
    return weakest_set(reports, by, mask_margins(reports))


def silent(reports: MaskedOutputs) -> Tensor:
    """Between which two thresholds no alarm is raised, float64 [B, 2]: below the least confidence, if all masks agree."""
    assert reports.confidence is not None
    agreed = (reports.label == reports.whole[:, None]).all(dim=1)
    high = torch.where(agreed, reports.confidence[..., 0].amin(dim=1), BELOW)
    return torch.stack([torch.full_like(high, BELOW), high], dim=1)


def thresholds(reports: MaskedOutputs, by: Tensor, tolerance: float) -> Tensor:
    """Between which two thresholds no alarm is raised and the answer is certified, float64 [B, 2]: where each set of masks
    ``by``, bool [U, M], has one whose logit margin exceeds ``tolerance``."""
    sure = (by & (reports.logit_margin > tolerance)[:, None]).any(dim=2).all(dim=1)
    return torch.where(sure[:, None], silent(reports), BELOW)


def or_alarm(reports: MaskedOutputs, by: Tensor, tolerance: float, classes: int) -> Tensor:
    """Above which threshold the theorem holds for each class: float64 [B, K, 2], see :meth:`masked_detection.Rule.or_alarm`.

    Of a set of masks, only labels with a logit margin above ``tolerance`` count. With two different ones it holds with every
    threshold. With one, j, it holds for j with every threshold, and for all other classes above the least confidence of the set;
    with none, it holds for every class above that.
    """
    assert reports.confidence is not None
    label, sure = reports.label[:, None], by & (reports.logit_margin > tolerance)[:, None]  # [B, U, M]
    least = torch.where(by, reports.confidence[..., 1].clamp(max=LARGEST)[:, None], ABOVE).amin(dim=2)  # [B, U]
    first, last = torch.where(sure, label, classes).amin(dim=2), torch.where(sure, label, -1).amax(dim=2)
    unknown = torch.where(last < 0, least, BELOW).amax(dim=1, keepdim=True)
    needed = torch.where((first == last), least, BELOW)
    each = needed.new_full((len(needed), classes), BELOW).scatter_reduce(1, last.clamp(min=0), needed, "amax")
    low = torch.maximum(largest_elsewhere(each), unknown)
    return torch.stack([low, torch.full_like(low, ABOVE)], dim=2)
