"""The options of interval training: which locations, how strong an attacker, and when."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from patchcert_cli.defenses._training import Augment, AugmentedOptions
from patchcert_cli.schema import Count, Fraction, Must, NonNegative, Positive, Rule

PICKS = ("auto", "worst", "random", "guided", "mined")


def _enough_locations(pick: str, locations: int, screened: int) -> Iterator[str]:
    if pick == "worst" and locations:
        yield f"locations is {locations}, not 0, which pick=worst needs (it trains on the exact worst of each class)"
    if pick in ("random", "guided") and not locations:
        yield f"locations is 0, but pick={pick} needs 1 or more"
    if pick == "mined" and screened < max(1, locations):
        yield f"screened is {screened}, but pick=mined needs {max(1, locations)} or more"


@dataclass(frozen=True)
class IntervalOptions(AugmentedOptions):
    """The schedule of Chiang et al.: clean loss, growing attacker, full attacker, and at the end a bounded loss.

    Attributes:
        natural_epochs: first epochs, with the clean loss only.
        ramp_epochs: epochs over which the attacker grows from nothing to full strength.
        decay: ``cosine`` (to zero at the end) or ``step`` (lowered every ``decay_every`` epochs), after the ramp.
        decay_every: epochs between two steps for ``decay=step``.
        locations: how many locations ``pick`` chooses; 0 with ``pick=auto`` trains on the exact worst location.
        natural: weight of the clean cross-entropy once the ramp is over.
        bounded_epochs: last epochs, in which an image's loss is bounded; the learning rate restarts at half.
        bounded_natural: weight of the clean cross-entropy in them.
        bounded_shift: pixels by which an image is moved at random in them, at most; against memorizing.
        pick: locations to train on: ``worst`` (the exact worst of each class), ``random`` (``locations`` for each image),
            ``guided`` (``locations`` for each class, by the bounds that a small U-Net predicts),
            ``mined`` (``screened`` random ones are bounded without gradient; of these the worst of each class, or the
            ``locations`` worst); ``auto`` is ``worst`` if ``locations`` is 0, else ``random``.
        screened: random locations of each image that ``pick=mined`` chooses from.
        flip: mirror images at random, in all epochs.
        shift: pixels by which an image is moved at random in all epochs, at most.
        decay_by: what a step of ``decay=step`` multiplies the learning rate by.
        visits: sparse threats: pixels or values that the training bound looks at per neuron, those of the largest weights; 0 is
            all, which is exact.
        init: weights at the start: ``torch`` (PyTorch's) or ``ibp`` (widths of intervals stay the same from layer to layer).
        tightness: weight, while the attacker grows, of a penalty for intervals that widen from layer to layer.
        balance: weight, while the attacker grows, of a penalty for ReLUs that are nearly all on, or nearly all off.
        linear: share of the loss that takes the better of the interval bound and a linear one, at the same locations; for fully
            connected networks.
        average: what a step keeps of the running average of weights that becomes the model; 0 for none.
    """

    natural_epochs: Count = 1
    ramp_epochs: Count = 15
    decay: Annotated[str, Must(("cosine", "step").__contains__, "cosine or step")] = "cosine"
    decay_every: Positive = 10
    locations: Count = 0
    natural: Fraction = 0.0
    bounded_epochs: Count = 20
    bounded_natural: Fraction = 0.1
    bounded_shift: Count = 0
    pick: Annotated[str, Must(PICKS.__contains__, ", ".join(PICKS[:-1]) + f" or {PICKS[-1]}")] = "auto"
    screened: Count = 0
    flip: bool = False
    shift: Count = 0
    decay_by: Fraction = 0.5
    visits: Count = 0
    init: Annotated[str, Must(("torch", "ibp").__contains__, "torch or ibp")] = "torch"
    tightness: NonNegative = 0.0
    balance: NonNegative = 0.0
    linear: Fraction = 0.0
    average: Fraction = 0.0

    rules: ClassVar[tuple[Rule, ...]] = (_enough_locations,)

    def fitted(self, epochs: int) -> IntervalOptions:
        """Phases of a third each if the run is too short for them, as one of 3 epochs would be."""
        if self.natural_epochs + self.ramp_epochs + self.bounded_epochs < epochs:
            return self
        third = epochs // 3
        return replace(self, natural_epochs=0, ramp_epochs=third, bounded_epochs=min(self.bounded_epochs, third))

    @property
    def ema_decay(self) -> float:
        return self.average

    @property
    def picked(self) -> str:
        """``pick``, with ``auto`` resolved."""
        return ("random" if self.locations else "worst") if self.pick == "auto" else self.pick

    def epsilon(self, progress: float) -> float:
        """Strength of the attacker at ``progress`` epochs: 0 to 1."""
        if progress < self.natural_epochs:
            return 0.0
        if self.ramp_epochs == 0:
            return 1.0
        return min(1.0, (progress - self.natural_epochs) / self.ramp_epochs)

    def bounded(self, progress: float, epochs: int) -> bool:
        """Whether ``progress`` epochs lie in the phase of the bounded loss."""
        return progress >= epochs - self.bounded_epochs

    def augment(self, progress: float, epochs: int) -> Augment:
        shift = max(self.shift, self.bounded_shift) if self.bounded(progress, epochs) else self.shift
        return replace(super().augment(progress, epochs), shift=shift)

    def lr_multiplier(self, progress: float, epochs: int) -> float:
        """Constant until the ramp is over, then falling; again, from half, in the bounded phase."""
        turn = epochs - self.bounded_epochs
        if progress < turn or not self.bounded_epochs:
            peak, start, end = 1.0, self.natural_epochs + self.ramp_epochs, turn
        else:
            peak, start, end = 0.5, turn, epochs
        after = max(0.0, progress - start)
        if self.decay == "step":
            return float(peak * self.decay_by ** int(after // self.decay_every))
        return peak * (1 + math.cos(math.pi * after / max(end - start, 1))) / 2
