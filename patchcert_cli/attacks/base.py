"""What every attack is: a search for an allowed change of an image that changes the deployed answer.

An attack meets the defense only as a :class:`Target`: logits, gradients and answers, each counted as a query. It sees no labels
and no certificates, but it may be told where to begin. The base class, not the attack's author, checks what came back and judges:
the answer must be another one, and where the defense promises detection it must not be an alarm.

Shapes: B images, C channels, H x W pixels, K classes, R rows (candidates, each owned by one of the B),
S candidates per image.
The margin of a row is ``max_{j != y} f_j - f_y`` with the logits f of the defense's first surrogate and the deployed clean answer
y; further surrogates only lend their gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, final

import torch
from torch import Tensor

from patchcert_cli import passes
from patchcert_cli.certificate import ALERT
from patchcert_cli.defenses.base import Defense, Surrogate
from patchcert_cli.errors import PatchcertError, UsageError
from patchcert_cli.threats import Threat

CHUNK_VALUES = {"cpu": 1 << 20, "cuda": 1 << 23}  # pixel values that go through the network in one pass


def rows_at_once(device: torch.device, values: int, activations: int) -> int:
    """Candidates of so many pixel values each that go through a network of so many activations in one pass."""
    return max(1, CHUNK_VALUES.get(device.type, CHUNK_VALUES["cpu"]) // max(1, values, activations))


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
class AttackResult:
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
    """

    adversarial: Tensor
    success: Tensor
    prediction: Tensor
    queries: Tensor
    clean_prediction: Tensor
    judged: Tensor
    plain: Tensor

    @classmethod
    def cat(cls, parts: list[AttackResult]) -> AttackResult:
        """Join the results of consecutive batches."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class Start:
    """Where an attack may begin, for example where a certificate found the least room.

    Attributes:
        location: int64 [B, 4], one of the threat's atoms for each image: top, left, height, width.
        rival: int64 [B], the class to aim at.
    """

    location: Tensor
    rival: Tensor

    def checked(self, x: Tensor, threat: Threat, classes: int) -> Start:
        """The same on the images' device, [B, C, H, W]; raises :class:`UsageError` unless it fits them."""
        shapes = tuple(self.location.shape), tuple(self.rival.shape)
        if shapes != ((len(x), 4), (len(x),)):
            raise UsageError(f"a start of shapes {shapes[0]} and {shapes[1]} does not fit {len(x)} images.")
        location, rival = self.location.to(x.device, torch.int64), self.rival.to(x.device, torch.int64)
        atoms = threat.atoms(int(x.shape[2]), int(x.shape[3])).to(x.device)
        if not bool((location[:, None] == atoms).all(dim=2).any(dim=1).all()):
            raise UsageError(f"a start at a location that {threat} does not have.")
        if not bool(((rival >= 0) & (rival < classes)).all()):
            raise UsageError("a start with a rival that is no class;", hint=f"allowed: 0 to {classes - 1}.")
        return Start(location, rival)


class Lens:
    """A surrogate's view of candidates that differ from their image inside one box alone; see :class:`Surrogate`.

    Attributes:
        boxes: int64 [n, S, 4].
    """

    def __init__(self, surrogate: Surrogate, clean: Tensor, boxes: Tensor) -> None:
        """For n distinct images [n, C, H, W]."""
        self.surrogate, self.boxes = surrogate, boxes
        with torch.no_grad():
            self._rest = surrogate.rest(clean, boxes)

    def take(self, images: Tensor) -> Lens:
        """The same for some of the images, bool [n]."""
        taken = object.__new__(Lens)
        taken.surrogate, taken.boxes, taken._rest = self.surrogate, self.boxes[images], self._rest[images]
        return taken

    def __call__(self, rows: Tensor, part: Tensor) -> Tensor:
        """Logits [r, K] of rows [r, C, H, W], which are number ``part`` int64 [r] of all n * S."""
        near = self.surrogate.near(rows, self.boxes.flatten(0, 1)[part])
        return near + self._rest.flatten(0, 1)[part]


class Target:
    """The defended model as an attack meets it, and the best candidate of each image so far.

    Attributes:
        answer: int64 [B], the deployed answer on the clean images, which is to be changed.
        best: float32 [B, C, H, W], the offered candidate of highest margin, at first the clean image.
        margin: float32 [B], its margin, at first -inf.
        box: int64 [B, 4], where ``best`` differs from the image, if that was said.
        done: bool [B], whether the attack has succeeded with ``best``, or the clean image raises an alarm anyhow; such an image
            needs no more work.
        queries: int64 [B], passes spent so far.
        judged: int64 [B, 3], see :class:`AttackResult`.
        start: where to begin, a hint that an attack may ignore.
        surrogates: what to climb, the most faithful one first.
    """

    def __init__(self, defense: Defense, x: Tensor, start: Start | None = None) -> None:
        self._defense, self.start = defense, start
        self.surrogates = defense.surrogates()
        self.activations = defense.activations
        self.queries = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.rows = rows_at_once(x.device, x[:1].numel(), self.activations)
        everyone = torch.arange(len(x), device=x.device)
        self.answer = self.answers(x, everyone)
        self.best = x.clone()
        self.margin = torch.full((len(x),), -torch.inf, device=x.device)
        self.box = torch.zeros(len(x), 4, dtype=torch.int64, device=x.device)
        self.done = self.answer == ALERT
        self.judged = torch.zeros(len(x), 3, dtype=torch.int64, device=x.device)
        self._x = x
        self._plain: Tensor | None = None
        self._class = self.answer.clamp(min=0)  # an alarm is no class, and such an image is done

    def groups(self, rows_per_image: int) -> Iterator[Tensor]:
        """Consecutive image numbers, int64 [n], so few that ``rows_per_image`` candidates of each make about one chunk."""
        everyone = torch.arange(len(self.answer), device=self.answer.device)
        yield from torch.split(everyone, max(1, self.rows // rows_per_image))

    @torch.no_grad()
    def answers(self, rows: Tensor, owner: Tensor) -> Tensor:
        """The deployed answers, [R, C, H, W] and int64 [R] -> int64 [R]."""
        self._count(owner, 1)
        return torch.cat([self._defense.predict(part) for part in torch.split(rows, self.rows)])

    @property
    def plain(self) -> Tensor:
        """int64 [B], what the plain classifier says of the clean images; without one the deployed answer."""
        if self._plain is None:
            self._plain = self._plainly(self._x, torch.arange(len(self._x), device=self._x.device))
        return self.answer if self._plain is None else self._plain

    @torch.no_grad()
    def _plainly(self, rows: Tensor, owner: Tensor) -> Tensor | None:
        """The labels of a plain classifier, int64 [R]; None if there is none inside the defense."""
        parts = [self._defense.plain(part) for part in torch.split(rows, self.rows)]
        found = [part for part in parts if part is not None]
        if not found:
            return None
        self._count(owner, 1)
        return torch.cat(found)

    def judge(self, rows: Tensor, owner: Tensor) -> None:
        """Count what candidates [R, C, H, W] of distinct images int64 [R] do, and keep the first that changes an answer."""
        flipped = self.flipped(self.answers(rows, owner), owner)
        plain = self._plainly(rows, owner)
        altered = flipped if plain is None else plain != self.plain[owner]
        self.judged[owner] += torch.stack([torch.ones_like(owner), flipped.long(), altered.long()], dim=1)
        fresh = flipped & ~self.done[owner]
        self.best[owner[fresh]], self.done[owner] = rows[fresh], self.done[owner] | flipped

    def flipped(self, answers: Tensor, owner: Tensor) -> Tensor:
        """Whether such answers, int64 [R] for images int64 [R], are a success: bool [R]."""
        return ~self._defense.guarantee.kept(self.answer[owner], answers)

    def lens(self, clean: Tensor, owner: Tensor, boxes: Tensor, which: int = 0) -> Lens:
        """A surrogate for S boxes int64 [n, S, 4] on each of the distinct images [n, C, H, W], numbers ``owner`` [n]."""
        self._count(owner, 1)
        return Lens(self.surrogates[which], clean, boxes)

    def _logits(self, rows: Tensor, part: Tensor, lens: Lens | None) -> Tensor:
        return self.surrogates[0].whole(rows) if lens is None else lens(rows, part)

    @torch.no_grad()
    def logits(self, rows: Tensor, owner: Tensor, lens: Lens | None = None) -> Tensor:
        """The logits of the first surrogate or of a lens, [R, C, H, W] and int64 [R] -> [R, K]."""
        self._count(owner, 1)
        found = []
        for part in torch.split(torch.arange(len(rows), device=rows.device), self.rows):
            found.append(self._logits(rows[part], part, lens))
            passes.made(len(part))
        return torch.cat(found)

    def gap(self, logits: Tensor, owner: Tensor, rival: Tensor | None = None) -> Tensor:
        """The margin, or ``f_rival - f_y`` for a class int64 [R], of logits [R, K] -> [R]."""
        own = self._class[owner][:, None]
        if rival is not None:
            return (logits.gather(1, rival[:, None]) - logits.gather(1, own))[:, 0]
        return logits.scatter(1, own, -torch.inf).amax(dim=1) - logits.gather(1, own)[:, 0]

    def slopes(self, rows: Tensor, owner: Tensor, rival: Tensor | None = None, lens: Lens | None = None) -> tuple[Tensor, Tensor]:
        """The logits of candidates, and the gradient of their :meth:`gap`.

        Args:
            rows: [R, C, H, W].
            owner: int64 [R], the image each belongs to.
            rival: int64 [R], the class to aim at instead of the highest one.
            lens: what sees the rows, by default the first surrogate.

        Returns:
            [R, K] and [R, C, H, W].
        """
        self._count(owner, 2)
        values, slopes = [], []
        for part in torch.split(torch.arange(len(rows), device=rows.device), self.rows):
            with torch.enable_grad():
                point = rows[part].detach().requires_grad_()
                logits = self._logits(point, part, lens)
                aim = self.gap(logits, owner[part], None if rival is None else rival[part])
                slopes.append(torch.autograd.grad(aim.sum(), point)[0])
            values.append(logits.detach())
            passes.made(2 * len(part))
        return torch.cat(values), torch.cat(slopes)

    def rivals(self, x: Tensor, owner: Tensor, most: int) -> Tensor:
        """The classes but the answer, highest logit on [n, C, H, W] first, at most ``most`` of them: int64 [n, T]."""
        logits = self.logits(x, owner)
        ranked = logits.scatter(1, self._class[owner][:, None], -torch.inf).sort(dim=1, descending=True, stable=True).indices
        return ranked[:, : min(most, logits.shape[1] - 1)]

    def offer(self, candidates: Tensor, margins: Tensor, owner: Tensor, boxes: Tensor | None = None) -> None:
        """Keep the best of each image's candidates, [n, S, C, H, W] with margins [n, S] of the distinct images ``owner`` [n].

        Where the surrogate says that the answer changed or nearly so, the deployed answer is asked, and decides. ``boxes``
        int64 [n, S, 4] say where the candidates differ from their images.
        """
        score, pick = margins.max(dim=1)
        better = ((score > self.margin[owner]) & ~self.done[owner]).nonzero()[:, 0]
        image, score = owner[better], score[better]
        self.margin[image] = score
        self.best[image] = candidates[better, pick[better]]
        if boxes is not None:
            self.box[image] = boxes[better, pick[better]]
        ask = image[score >= -self.surrogates[0].slack]  # in a tie the lowest class wins, which may be the rival
        if len(ask):
            self.done[ask] = self.flipped(self.answers(self.best[ask], ask), ask)

    def _count(self, owner: Tensor, passes: int) -> None:
        self.queries += passes * torch.bincount(owner, minlength=len(self.queries))


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A search with keyword-only hyper-parameters; authors write :meth:`run`, users call the object.

    Attributes:
        seed: source of all randomness, together with each image's number.
    """

    seed: int = 0
    kinds: ClassVar[tuple[str, ...]] = ()  # the kinds of threat it knows
    judges_each: ClassVar[bool] = False  # whether it counts what each of its tries does

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
        rows = rows_at_once(defense.device, math.prod(defense.input_shape), defense.activations)
        return max(1, rows // self.candidates)

    def most(self, defense: Defense, threat: Threat, *, hinted: bool) -> Effort | None:
        """The most that an image takes, where it begins at a hint or not; None if nobody can tell."""
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
            raise UsageError(f"{type(self).__name__} cannot attack under {threat};", hint=f"allowed: {', '.join(self.kinds)}.")
        x = x.detach().to(defense.device, torch.float32)
        defense.check_input(x)
        threat.check(int(x.shape[2]), int(x.shape[3]), int(x.shape[1]))
        index = torch.arange(len(x)) if index is None else index
        if tuple(index.shape) != (len(x),):
            raise UsageError(f"{tuple(index.shape)} image numbers do not fit {len(x)} images.")
        target = Target(defense, x, None if start is None else start.checked(x, threat, len(defense.classes)))
        found = self.run(target, x, threat, index.to(x.device, torch.int64)) if len(x) else x
        candidate = self._checked(found, x, threat)
        everyone = torch.arange(len(x), device=x.device)
        prediction = target.answers(candidate, everyone)
        success = target.flipped(prediction, everyone)
        adversarial = torch.where(success[:, None, None, None], candidate, x)
        plain = target.plain if self.judges_each and len(x) else target.answer
        return AttackResult(adversarial, success, prediction, target.queries, target.answer, target.judged, plain)

    def _checked(self, found: Tensor, x: Tensor, threat: Threat) -> Tensor:
        """Project to [0, 1] and refuse what the threat forbids."""
        name = type(self).__name__
        if found.shape != x.shape or bool(found.isnan().any()):
            raise PatchcertError(f"attack {name} did not return images: shape {tuple(found.shape)}, or not a number.")
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
        raise UsageError(f"{name} {value} is out of range;", hint=f"allowed: {allowed}.")
