"""Certified detection: an alarm is raised where a masked prediction contradicts the prediction on the whole image.

Minority Reports (McCoyd et al., Minority Reports Defense: Defending Against Adversarial Patches, 2020) in the form of
its first round with masks that cover the threat, which PatchCleanser's mask sets provide; the confidence is that of PatchGuard++
(Xiang & Mittal, 2021).

Let f be the label that a classifier gives to the whole image, f_i the one under mask i alone, and p_i its confidence there.

**The answer.** An alarm if ``f_i != f`` and ``p_i >= threshold`` for some i, else f.

**Theorem.** Let the answer on the clean image be y, no alarm. If for every set L of pixels that an attack may touch there is a
mask i that hides all of L, with ``f_i = y`` and ``p_i >= threshold`` on the clean image, then the answer is y or an alarm,
for any content of L.

*Proof.* f_i and p_i never see L, so they are the same under attack. If the whole image now has another label than y, mask i
contradicts it with enough confidence: an alarm. If it has the label y, the answer is y or an alarm. QED.
It is also necessary if the attacker at L can set label and confidence of the whole image, and under every mask that does not hide
all of L: it sets the labels to a class j != y. Masks that hide L and predict y lack the confidence, and so do those that predict
another class, or the clean image would have raised an alarm. So no alarm is raised, and the answer is j.

The published condition requires the same of all masks, which implies this one. (In the published code a confidence equal to the
threshold certifies but raises no alarm; here it raises one.) A set of masks that leaves out a location at a corner, as windows of
votes do in the paper, proves nothing about it.

**Any class, and images that raise an alarm.** The published metric of such defenses (PatchGuard++, ViP, PatchCensor) counts an
image of label y if no attack changes the answer to a class other than y without an alarm, although the clean image itself may
raise one. For any class y this holds if and only if each set L has a mask that hides it, with ``f_i = y`` and
``p_i >= threshold``, or two masks that hide it with different labels, both with ``p_i >= threshold``.
*Proof.* A mask of the first kind contradicts each other class than y. Of two with different labels one contradicts whatever label
the whole image has, so there always is an alarm. Otherwise all masks that hide L and are confident enough have one label j != y,
or there are none and j is any other class: the attacker sets all else to j. QED.
:func:`or_alarm` decides it for each class; it never decides ``certified``.

**Rounding.** ``f_i = y`` and ``p_i >= threshold`` count only if both hold by more than ``tolerance``: a certificate holds as far
as rounding moves neither by more than that, which :mod:`patchcert_cli.certifiers.masks.masked_predictions` measures and does not
prove.

Shapes: B images, M masks, U sets of masks of which an attack leaves one whole (:class:`mask_sets.MaskCoverage`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from patchcert_cli.certificate import ALERT

METHODS = ("agreement", "all")  # the theorem, and the published condition
BELOW, ABOVE = -1.0, 2.0  # thresholds below and above all others


@dataclass(frozen=True)
class MaskedOutputs:
    """What is seen of B images.

    Attributes:
        whole: int64 [B], the label of the whole image.
        label: int64 [B, M], the label under each mask.
        rival: int64 [B, M], the next one.
        logit_margin: float64 [B, M], how far the label is ahead of the next one, in units in which rounding is at most
            ``tolerance``.
        confidence_margin: float64 [B, M], how far its confidence is above the threshold, in such units; 0 is enough for an alarm.
        confidence: float64 [B, M, 2], its confidence at least and at most, as far as float64 rounds; for other thresholds.
    """

    whole: Tensor
    label: Tensor
    rival: Tensor
    logit_margin: Tensor
    confidence_margin: Tensor
    confidence: Tensor | None = None


@dataclass(frozen=True)
class Proof:
    """What is proven of one claim.

    Attributes:
        margin: float64 [B]; certified if it exceeds ``tolerance``: by how much what the proof rests on holds.
        weakest: int64 [B], which of the U sets of masks holds by so little.
        rival: int64 [B], the class that comes nearest there.
    """

    margin: Tensor
    weakest: Tensor
    rival: Tensor


class Rule(Protocol):
    """When an alarm is raised, and what follows: this module is one, :mod:`patchcert_cli.certifiers.masks.hicert` another."""

    def answer(self, reports: MaskedOutputs) -> Tensor:
        """The deployed answer, int64 [B], :data:`patchcert_cli.certificate.ALERT` for an alarm."""

    def mask_margins(self, reports: MaskedOutputs) -> Tensor:
        """By how much each mask agrees with the answer, float64 [B, M]; not positive where it does not, or after an alarm."""

    def silent(self, reports: MaskedOutputs) -> Tensor:
        """Between which two thresholds no alarm is raised, float64 [B, 2], ends excluded."""

    def thresholds(self, reports: MaskedOutputs, by: Tensor, tolerance: float) -> Tensor:
        """Between which two thresholds no alarm is raised and the proof holds, float64 [B, 2], ends excluded.

        Args:
            reports: what is seen of the images.
            by: the sets of masks, bool [U, M].
            tolerance: what a logit margin must exceed.
        """

    def or_alarm(self, reports: MaskedOutputs, by: Tensor, tolerance: float, classes: int) -> Tensor:
        """Between which two thresholds, for each of the K classes, every attack is answered with it or with an alarm, whether or
        not the clean image raises one: float64 [B, K, 2], ends excluded; arguments as for :meth:`thresholds`."""


def answer(reports: MaskedOutputs) -> Tensor:
    """The deployed answer, int64 [B], :data:`patchcert_cli.certificate.ALERT` for an alarm."""
    alarm = ((reports.label != reports.whole[:, None]) & (reports.confidence_margin >= 0)).any(dim=1)
    return torch.where(alarm, ALERT, reports.whole)


def mask_margins(reports: MaskedOutputs) -> Tensor:
    """By how much each mask agrees with the answer, float64 [B, M]; not positive where it does not, or after an alarm."""
    right = reports.label == reports.whole[:, None]
    found = torch.where(right, torch.minimum(reports.logit_margin, reports.confidence_margin), -reports.logit_margin)
    return torch.where((answer(reports) == ALERT)[:, None], found.clamp(max=0), found)


def silent(reports: MaskedOutputs) -> Tensor:
    """Between which two thresholds no alarm is raised, float64 [B, 2]: above the confidence of all masks that contradict."""
    low = _surest_contradiction(reports)
    return torch.stack([low, torch.full_like(low, ABOVE)], dim=1)


def thresholds(reports: MaskedOutputs, by: Tensor, tolerance: float) -> Tensor:
    """Between which two thresholds the theorem's condition holds for the sets of masks ``by``, bool [U, M]: float64 [B, 2].

    Above the first no mask that contradicts the whole image is confident enough for an alarm; below the second each set has a
    mask that agrees with it, by a logit margin above ``tolerance``, and is confident enough. -1 where nothing contradicts, or
    nothing agrees.
    """
    right = reports.label == reports.whole[:, None]
    agreeing = torch.where(right, _surely(reports, tolerance), BELOW)
    held = torch.where(by, agreeing[:, None], BELOW).amax(dim=2).amin(dim=1)
    return torch.stack([_surest_contradiction(reports), held], dim=1)


def or_alarm(reports: MaskedOutputs, by: Tensor, tolerance: float, classes: int) -> Tensor:
    """Below which threshold the condition for any class holds, see :meth:`Rule.or_alarm`; -1 is the lower end.

    For each set, with j the label of its most confident mask and q the confidence of the most confident one with another label:
    for j below the confidence of the first, for all other classes below q.
    """
    sure = torch.where(by, _surely(reports, tolerance)[:, None], BELOW)  # [B, U, M]
    most, mask = sure.max(dim=2)
    label = reports.label.gather(1, mask)  # [B, U]
    others = torch.where(reports.label[:, None] != label[:, :, None], sure, BELOW).amax(dim=2)
    above = most.new_full((len(most), classes), ABOVE)
    held = above.scatter_reduce(1, label, most, "amin")
    held = torch.minimum(held, -largest_elsewhere(above.scatter_reduce(1, label, others, "amin").neg()))
    return torch.stack([torch.full_like(held, BELOW), held], dim=2)


def largest_elsewhere(values: Tensor) -> Tensor:
    """For each class the largest value of all other classes, [B, K], K of two or more."""
    (first, second), (at, _) = (part.unbind(dim=1) for part in values.topk(2, dim=1))
    own = torch.arange(values.shape[1]) == at[:, None]
    return torch.where(own, second[:, None], first[:, None])


def _surely(reports: MaskedOutputs, tolerance: float) -> Tensor:
    """The confidence of each mask at least, float64 [B, M]; -1 where the logit margin does not exceed ``tolerance``."""
    assert reports.confidence is not None
    return torch.where(reports.logit_margin > tolerance, reports.confidence[..., 0], BELOW)


def _surest_contradiction(reports: MaskedOutputs) -> Tensor:
    """The largest confidence of a mask that contradicts the whole image, at most, float64 [B]; -1 if there is none."""
    assert reports.confidence is not None
    return torch.where(reports.label == reports.whole[:, None], BELOW, reports.confidence[..., 1]).amax(dim=1)


def prove(reports: MaskedOutputs, by: Tensor) -> Proof:
    """Decide the theorem's condition for the sets of masks ``by``, bool [U, M]; one mask in each asks all of them."""
    return weakest_set(reports, by, mask_margins(reports))


def weakest_set(reports: MaskedOutputs, by: Tensor, margins: Tensor) -> Proof:
    """The smallest margin over the sets of masks ``by``, bool [U, M], where the best mask of a set counts: float64 [B, M]."""
    best, mask = torch.where(by, margins[:, None], -torch.inf).max(dim=2)  # [B, U]
    margin, weakest = best.min(dim=1)
    other = torch.where(reports.label == reports.whole[:, None], reports.rival, reports.label)
    return Proof(margin, weakest, other.gather(1, mask.gather(1, weakest[:, None]))[:, 0])
