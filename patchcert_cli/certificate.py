"""What a proof returns, and the counts made of it.

Shapes: B images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from patchcert_cli.arithmetic import Arithmetic as Arithmetic  # also a word of this module
from patchcert_cli.arithmetic import weakest
from patchcert_cli.notebook import Tabular
from patchcert_cli.threats import ALERT as ALERT  # also words of this module
from patchcert_cli.threats import Guarantee as Guarantee
from patchcert_cli.threats import Threat


@dataclass(frozen=True)
class Claim:
    """What is to be certified: a threat model, and the name of a proof, by default the defense's best.

    Attributes:
        threat: the threat model.
        method: the name of a proof; None for the defense's best.
        forced: whether the certificate is to say what the attacker can force at each location.
        top: the answer is to stay among this many first classes.
    """

    threat: Threat
    method: str | None = None
    forced: bool = False
    top: int = 1


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What a defense proved about one claim; :meth:`patchcert_cli.defenses.Defense.certify_claims` makes a certificate of it.

    An image is certified where ``margin`` exceeds ``tolerance``.

    Attributes:
        answer: int64 [B], what the deployed defense answers.
        margin: float64 [B], lower bound of how far the nearest allowed change stays from altering it, in the proof's own unit.
        location: int64 [B], which of the threat's locations comes nearest, by its position in ``threat.locations(H, W)``.
        runner_up: int64 [B], the class that comes nearest.
        tolerance: float64 [B] or one number, see :class:`Certificate`.
        method: the name of the proof in records; empty for the claim's.
        arithmetic: what is known of its rounding; the author states it, since nothing follows from silence.
        passes, or_alarm, thresholds, silent, or_alarm_thresholds, plain, forced, ranking, stays: see :class:`Certificate`.
    """

    answer: Tensor
    margin: Tensor
    location: Tensor
    runner_up: Tensor
    tolerance: Tensor | float = 0.0
    method: str = ""
    arithmetic: Arithmetic = field(kw_only=True)
    passes: Tensor | None = None
    or_alarm: Tensor | None = None
    thresholds: Tensor | None = None
    silent: Tensor | None = None
    or_alarm_thresholds: Tensor | None = None
    plain: Tensor | None = None
    forced: Tensor | None = None
    ranking: Tensor | None = None
    stays: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[Proof]) -> Proof:
        """Join proofs of one claim about consecutive images."""
        return _joined(parts)


@dataclass(frozen=True)
class Certificate(Tabular):
    """One claim, image by image. It knows no labels: "certified correct" is computed by :class:`Tally`.

    Attributes:
        prediction: int64 [B], what the deployed defense answers; :data:`ALERT` for an alarm, which is never certified.
        certified: bool [B], no allowed change can alter that answer, or with ``detection`` not without an alarm.
        margin: float64 [B], lower bound of how far the nearest allowed change stays from altering the answer, in the proof's
            own unit; an image is certified only if it exceeds ``tolerance``.
        tolerance: float64 [B], bound of the rounding error of ``margin`` and of the deployed prediction; where ``arithmetic`` is
            measured, what is allowed for it.
        worst: int64 [B, 4], the location (top, left, height, width) that comes nearest to altering the answer.
        runner_up: int64 [B], the class that comes nearest.
        threat: the threat model of the claim.
        method: the name of the proof.
        guarantee: recovery or detection.
        arithmetic: what is known of its rounding; the least unless the proof says more.
        passes: int64 [B], how often the network was asked for the answer and for all claims of the call, where that differs from
            image to image; else None.
        or_alarm: bool [B, K] of certified detection, else None: whether every allowed change is answered with that class or with
            an alarm, even if the image itself raises one. It is what published metrics count, and never decides ``certified``.
        thresholds: float64 [B, 2] of a defense that raises alarms by a threshold, if other thresholds are compared, else None.
            With any threshold between the two numbers the image raises no alarm and is certified; rounding is allowed for.
            -1 is below all thresholds, 2 above all.
        silent: float64 [B, 2], of the same, between which the image raises no alarm.
        or_alarm_thresholds: float64 [B, K, 2], of the same, between which ``or_alarm`` holds.
        plain: int64 [B], of the same, the label of the whole image, whether or not an alarm is raised.
        forced: bool [B, A, K] where the claim asks for it, else None: the answers that an attacker who changes only location
            a of ``threat.locations(H, W)`` may be able to cause. The answer itself is always among them. An answer
            that is missing is proven to be impossible.
        top: how many first classes the claim is about; with more than 1, ``certified``, ``margin``, ``worst`` and ``runner_up``
            are about whether the answer stays among them.
        ranking: int64 [B, top], the first classes of the unchanged image, the answer first; None where ``top`` is 1.
        stays: bool [B, top], which of them stay among the first ``top`` under every allowed change; None where ``top`` is 1.
    """

    prediction: Tensor
    certified: Tensor
    margin: Tensor
    tolerance: Tensor
    worst: Tensor
    runner_up: Tensor
    threat: Threat
    method: str
    guarantee: Guarantee = Guarantee.RECOVERY
    arithmetic: Arithmetic = Arithmetic.MEASURED
    passes: Tensor | None = None
    or_alarm: Tensor | None = None
    thresholds: Tensor | None = None
    silent: Tensor | None = None
    or_alarm_thresholds: Tensor | None = None
    plain: Tensor | None = None
    forced: Tensor | None = None
    top: int = 1
    ranking: Tensor | None = None
    stays: Tensor | None = None

    @classmethod
    def of(cls, proof: Proof, claim: Claim, guarantee: Guarantee, *, size: tuple[int, int], device: torch.device) -> Certificate:
        """The certificate of a proof about images of ``size`` H x W: certified where the margin exceeds the tolerance."""
        tolerance = torch.as_tensor(proof.tolerance, dtype=torch.float64, device=proof.margin.device).expand_as(proof.margin)
        locations = claim.threat.locations(*size).to(proof.location.device)

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        return cls(
            prediction=proof.answer.to(device),
            certified=(proof.margin > tolerance).to(device),
            margin=proof.margin.to(device),
            tolerance=tolerance.to(device),
            worst=locations[proof.location].to(device),
            runner_up=proof.runner_up.to(device),
            threat=claim.threat,
            method=proof.method or str(claim.method),
            guarantee=guarantee,
            arithmetic=proof.arithmetic,
            passes=moved(proof.passes),
            or_alarm=moved(proof.or_alarm),
            thresholds=moved(proof.thresholds),
            silent=moved(proof.silent),
            or_alarm_thresholds=moved(proof.or_alarm_thresholds),
            plain=moved(proof.plain),
            forced=moved(proof.forced),
            top=claim.top,
            ranking=moved(proof.ranking),
            stays=moved(proof.stays),
        )

    @classmethod
    def cat(cls, parts: Sequence[Certificate]) -> Certificate:
        """Join certificates of consecutive batches of one threat and method."""
        return _joined(parts)

    def columns(self) -> dict[str, list[Any]]:
        """A row for each image, with the location that comes nearest as its top, left, height and width."""
        sides = zip(("top", "left", "height", "width"), self.worst.T.tolist(), strict=True)
        rows = {name: getattr(self, name).tolist() for name in ("prediction", "certified", "margin", "tolerance", "runner_up")}
        rows |= dict(sides) | ({} if self.passes is None else {"passes": self.passes.tolist()})
        claim = {"threat": self.threat, "method": self.method, "guarantee": self.guarantee, "arithmetic": self.arithmetic}
        return rows | {name: [str(value)] * len(self.prediction) for name, value in claim.items()}

    def caption(self) -> str:
        """How many images are certified, whatever their labels are."""
        about = f"{self.threat}, {self.method}, {self.guarantee}, arithmetic {self.arithmetic}"
        top = f" to stay among the first {self.top}" if self.top > 1 else ""
        return f"{about}: {int(self.certified.sum())} of {len(self.prediction)} answers certified{top}"


Joined = TypeVar("Joined", Proof, Certificate)


def _joined(parts: Sequence[Joined]) -> Joined:
    """Tensors one after the other, the weakest arithmetic, and all else as in the first part."""
    joined: dict[str, Any] = {"arithmetic": weakest(part.arithmetic for part in parts)}
    for item in fields(parts[0]):
        tensors = [value for part in parts if isinstance(value := getattr(part, item.name), Tensor)]
        if tensors:
            joined[item.name] = torch.cat(tensors)
    return replace(parts[0], **joined)


@dataclass(frozen=True)
class Tally(Tabular):
    """Counts over a data set; accuracies are fractions of ``images``."""

    images: int
    clean: int
    certified: int

    @classmethod
    def of(cls, label: Tensor, prediction: Tensor, certified: Tensor) -> Tally:
        """Count from int64 [B], int64 [B] and bool [B]: "certified correct" is certified and answered right."""
        right = prediction == label
        return cls(int(label.numel()), int(right.sum()), int((right & certified).sum()))

    @property
    def clean_accuracy(self) -> float:
        return self.clean / max(self.images, 1)

    @property
    def certified_accuracy(self) -> float:
        return self.certified / max(self.images, 1)

    @property
    def certified_interval(self) -> tuple[float, float]:
        """Exact 95 % confidence interval of the certified accuracy on the distribution the images were drawn from."""
        return clopper_pearson(self.certified, self.images)

    def columns(self) -> dict[str, list[Any]]:
        """One row: counts and accuracies, with the confidence interval if there is an image."""
        low, high = self.certified_interval if self.images else (None, None)
        accuracies = {"clean_accuracy": [self.clean_accuracy], "certified_accuracy": [self.certified_accuracy]}
        counts = {"images": [self.images], "clean": [self.clean], "certified": [self.certified]}
        return {**counts, **accuracies, "certified_low": [low], "certified_high": [high]}

    def caption(self) -> str:
        """Counts among all images."""
        return f"{self.clean} of {self.images} images right, {self.certified} right and certified"


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Exact two-sided confidence interval of a binomial proportion (Clopper & Pearson, 1934).

    Each end is found by bisection on the binomial tail, so that no statistics package is needed.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials")
    tail = (1 - level) / 2

    head = math.lgamma(trials + 1)
    choose = [head - math.lgamma(i + 1) - math.lgamma(trials - i + 1) for i in range(trials + 1)]

    def at_least(count: int, p: float) -> float:
        """P(X >= count) for X ~ Binomial(trials, p), 0 < p < 1."""
        yes, no = math.log(p), math.log1p(-p)
        return math.fsum(math.exp(choose[i] + i * yes + (trials - i) * no) for i in range(count, trials + 1))

    def solve(count: int, target: float) -> float:
        low, high = 0.0, 1.0
        while high - low > 1e-12:
            middle = (low + high) / 2
            low, high = (middle, high) if at_least(count, middle) < target else (low, middle)
        return (low + high) / 2

    lower = 0.0 if successes == 0 else solve(successes, tail)
    upper = 1.0 if successes == trials else solve(successes + 1, 1 - tail)
    return lower, upper
