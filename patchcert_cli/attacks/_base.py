"""What every attack is: a search for an allowed change of an image that changes the deployed answer.

An attack meets the defense only as a :class:`Target`: logits, gradients and answers, each counted as a query. It sees no labels
and no certificates, but it may be given a start. The base class, not the attack's author, checks what came back and judges:
the answer must be another one, and where the defense promises detection it must not be an alarm.

Shapes: B images, C channels, H x W pixels, K classes, R rows (candidates, each owned by one of the B),
S candidates per image.
The margin of a row is ``max_{j != y} f_j - f_y`` with the logits f of the defense's first surrogate and the deployed clean answer
y; further surrogates only lend their gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from patchcert_cli.attacks._target import Start, Target, rows_at_once
from patchcert_cli.defenses import Defense, activations
from patchcert_cli.errors import PatchcertError, UsageError
from patchcert_cli.notebook import Tabular
from patchcert_cli.threats import Threat


@dataclass(frozen=True)
class Effort:
    """The most that an attack spends on one image.

    Attributes:
        queries: passes besides the deployed answers.
        answers: deployed answers, each counted as one query too.
    """

    queries: int
    answers: int


@dataclass(frozen=True)
class AttackResult(Tabular):
    """What an attack found, one entry for each image of a batch.

    Attributes:
        adversarial: float32 [B, C, H, W] in [0, 1], an allowed change of the image that flips its answer; where none was found,
            the clean image.
        success: bool [B], whether the deployed answer changed; where the defense promises detection, and no alarm was raised.
        prediction: int64 [B], the deployed answer on ``adversarial``.
        queries: int64 [B], forward and backward passes spent on the image, the base class's own included.
        clean_prediction: int64 [B], the deployed answer on the clean image.
        judged: int64 [B, 3], of an attack that judges each of its tries: how many there were, how many of them changed the
            deployed answer, and how many the plain one; zeros of all others.
        plain: int64 [B], the plain answer on the clean image; where there is no plain classifier, the deployed one.
        flipped_at: int64 [B], how many queries had been spent when the answer was found changed; 0 where it was not.
        by: int64 [B], of several attacks the number of the one that changed the answer, from 0; -1 where none did.
    """

    adversarial: Tensor
    success: Tensor
    prediction: Tensor
    queries: Tensor
    clean_prediction: Tensor
    judged: Tensor
    plain: Tensor
    flipped_at: Tensor
    by: Tensor

    @classmethod
    def cat(cls, parts: list[AttackResult]) -> AttackResult:
        """Join the results of consecutive batches."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def columns(self) -> dict[str, list[Any]]:
        """A row for each image."""
        names = ("clean_prediction", "prediction", "success", "queries", "flipped_at", "by")
        return {name: getattr(self, name).tolist() for name in names}

    def caption(self) -> str:
        """How many answers were changed, and by how many queries."""
        return f"{int(self.success.sum())} of {len(self.success)} answers changed, {int(self.queries.sum())} queries"


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A search with keyword-only hyper-parameters; authors write :meth:`run`, users call the object.

    Attributes:
        seed: source of all randomness, together with each image's number.
    """

    seed: int = 0
    kinds: ClassVar[tuple[str, ...]] = ()  # the kinds of threat it knows
    judges_each: ClassVar[bool] = False  # whether it counts what each of its tries does
    revision: ClassVar[int] = 1  # raised where an attack of the same options searches otherwise than before

    @abstractmethod
    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Search for changes that ``threat`` allows and that change ``target.answer``.

        Args:
            target: the model, and a place to offer candidates to.
            x: float32 [B, C, H, W] in [0, 1], the clean images.
            threat: what may be changed; its kind is one of ``kinds`` and it fits the images.
            index: int64 [B], the number of each image; its randomness is to depend on nothing but this and the seed.

        Returns:
            float32 [B, C, H, W], the best candidate of each image, or the image itself.
        """

    @property
    def candidates(self) -> int:
        """Candidates of an image that go through the network together, at least about."""
        return 1

    def together(self, defense: Defense) -> int:
        """Images that it works on together: in batches of multiples of it, every image meets the same numbers to the bit."""
        rows = rows_at_once(defense.device, math.prod(defense.input_shape), activations(defense))
        return max(1, rows // self.candidates)

    @classmethod
    def suits(cls, defense: Defense) -> bool:
        """Whether it can attack this defense; ``--attack all`` leaves it out where not."""
        return True

    def most(self, defense: Defense, threat: Threat, *, hinted: bool) -> Effort | None:
        """The most that an image takes, where it begins at a hint or not; None if unknown."""
        return None

    @final
    def __call__(
        self, defense: Defense, x: Tensor, threat: Threat, *, index: Tensor | None = None, start: Start | None = None
    ) -> AttackResult:
        """Try to change ``defense.predict(x)`` within ``threat``.

        Args:
            defense: the model, in eval mode.
            x: [B, C, H, W] in [0, 1].
            threat: what may be changed.
            index: int64 [B], the number of each image in its data set, by default its position in the batch. Neither the size
                nor the order of batches changes what is drawn for an image.
            start: where to begin, by default wherever the attack finds best.

        Raises:
            UsageError: the attack does not know this kind of threat, or the threat or the start does not fit the images.
            DataError: the images do not fit the model.
            PatchcertError: the attack returned a change that the threat forbids, which is a bug of the attack.
        """
        if threat.kind not in self.kinds:
            raise UsageError(f"{type(self).__name__} cannot attack under {threat}.", hint=f"Allowed: {', '.join(self.kinds)}.")
        x = x.detach().to(defense.device, torch.float32)
        defense.check_input(x)
        threat.check(int(x.shape[2]), int(x.shape[3]), int(x.shape[1]))
        index = torch.arange(len(x)) if index is None else index
        if tuple(index.shape) != (len(x),):
            raise UsageError(f"{tuple(index.shape)} image numbers do not fit {len(x)} images.", hint="Give one number per image.")
        target = Target(defense, x, None if start is None else start.checked(x, threat, len(defense.classes)))
        found = self.run(target, x, threat, index.to(x.device, torch.int64)) if len(x) else x
        candidate = self._checked(found, x, threat)
        everyone = torch.arange(len(x), device=x.device)
        prediction = target.answers(candidate, everyone)
        success = target.flipped(prediction, everyone)
        adversarial = torch.where(success[:, None, None, None], candidate, x)
        plain = target.plain if self.judges_each and len(x) else target.answer
        return AttackResult(
            adversarial=adversarial,
            success=success,
            prediction=prediction,
            queries=target.queries,
            clean_prediction=target.answer,
            judged=target.judged,
            plain=plain,
            flipped_at=torch.where(success, torch.where(target.done, target.flipped_at, target.queries), 0),
            by=success.long() - 1,
        )

    def _checked(self, found: Tensor, x: Tensor, threat: Threat) -> Tensor:
        """Project to [0, 1] and refuse what the threat forbids."""
        name = type(self).__name__
        if found.shape != x.shape or bool(found.isnan().any()):
            said = f"attack {name} did not return images: shape {tuple(found.shape)}, or not a number."
            raise PatchcertError(said, hint="This is a bug of the attack.")
        candidate = found.detach().to(x).clamp(0, 1)
        broken = (~threat.contains(candidate != x)).nonzero()[:, 0]
        if len(broken):
            raise PatchcertError(
                f"attack {name} broke the rules: its change of {len(broken)} of {len(x)} images is not within {threat}.",
                hint="This is a bug of the attack, not of the defense.",
            )
        return candidate

    def draw(self, index: Tensor, stream: int, count: int) -> Tensor:
        """Uniform numbers in [0, 1), float32 [n, count], that depend only on seed, image number [n], ``stream`` and position.

        A counter through the finalizer of SplitMix64 (Steele, Lea & Flood, 2014), the same on every device.
        """
        key = _mix(_mix(_mix(torch.full_like(index, _signed(self.seed))) + index) + stream)  # [n]
        step = _signed(0x9E3779B97F4A7C15)
        counter = torch.arange(1, count + 1, device=index.device) * step
        return _shift(_mix(key[:, None] + counter), 40).float() / (1 << 24)


def _signed(value: int) -> int:
    """The value modulo 2^64, as an int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """A bijection of int64 in which every input bit moves every output bit."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def require(name: str, value: float, least: float, most: float = float("inf")) -> None:
    """Raise :class:`UsageError` unless a hyper-parameter lies in [least, most]."""
    if not least <= value <= most:
        allowed = f"{least} or more" if most == float("inf") else f"{least} to {most}"
        raise UsageError(f"{name} {value} is out of range.", hint=f"Allowed: {allowed}.")
