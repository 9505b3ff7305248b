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

**Rounding.** ``f_i = y`` and ``p_i >= threshold`` count only if both hold by more than ``tolerance``: a certificate holds as far
as rounding moves neither by more than that, which :mod:`patchcert_cli.certifiers.masks.masked_predictions` measures and does not
prove.

Shapes: B images, M masks, U sets of masks of which an attack leaves one whole (:class:`mask_sets.MaskCoverage`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchcert_cli.certificate import ALERT

METHODS = ("agreement", "all")  # the theorem, and the published condition


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
        confidence: float64 [B, M, 2], its confidence at least and at most, as far as float64 rounds; for :func:`thresholds`.
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


def answer(reports: MaskedOutputs) -> Tensor:
    """The deployed answer, int64 [B], :data:`patchcert_cli.certificate.ALERT` for an alarm."""
    alarm = ((reports.label != reports.whole[:, None]) & (reports.confidence_margin >= 0)).any(dim=1)
    return torch.where(alarm, ALERT, reports.whole)


def mask_margins(reports: MaskedOutputs) -> Tensor:
    """By how much each mask agrees with the answer, float64 [B, M]; not positive where it does not, or after an alarm."""
    right = reports.label == reports.whole[:, None]
    found = torch.where(right, torch.minimum(reports.logit_margin, reports.confidence_margin), -reports.logit_margin)
    return torch.where((answer(reports) == ALERT)[:, None], found.clamp(max=0), found)


def thresholds(reports: MaskedOutputs, by: Tensor, tolerance: float) -> Tensor:
    """Between which two thresholds the theorem's condition holds for the sets of masks ``by``, bool [U, M]: float64 [B, 2].

    Above the first no mask that contradicts the whole image is confident enough for an alarm; below the second each set has a
    mask that agrees with it, by a logit margin above ``tolerance``, and is confident enough. -1 where nothing contradicts, or
    nothing agrees.
    """
    assert reports.confidence is not None
    low, high = reports.confidence.unbind(dim=2)
    right = reports.label == reports.whole[:, None]
    silent = torch.where(right, -1.0, high).amax(dim=1)
    agreeing = torch.where(right & (reports.logit_margin > tolerance), low, -1.0)
    held = torch.where(by, agreeing[:, None], -1.0).amax(dim=2).amin(dim=1)
    return torch.stack([silent, held], dim=1)


def prove(reports: MaskedOutputs, by: Tensor) -> Proof:
    """Decide the theorem's condition for the sets of masks ``by``, bool [U, M]; one mask in each asks all of them."""
    best, mask = torch.where(by, mask_margins(reports)[:, None], -torch.inf).max(dim=2)  # [B, U]
    margin, weakest = best.min(dim=1)
    other = torch.where(reports.label == reports.whole[:, None], reports.rival, reports.label)
    return Proof(margin, weakest, other.gather(1, mask.gather(1, weakest[:, None]))[:, 0])
