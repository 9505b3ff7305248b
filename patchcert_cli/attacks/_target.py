"""What an attack meets of a defense: its answers and the logits of its surrogates, each counted as a query.

Shapes: B images, C channels, H x W pixels, K classes, R rows (candidates, each owned by one of the B),
S candidates per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patchcert_cli.certificate import ALERT
from patchcert_cli.defenses import Defense, Surrogate, activations, surrogates
from patchcert_cli.errors import UsageError
from patchcert_cli.layers import passes
from patchcert_cli.threats import Threat

CHUNK_VALUES = {"cpu": 1 << 20, "cuda": 1 << 23}  # pixel values that go through the network in one pass


def rows_at_once(device: torch.device, values: int, activations: int) -> int:
    """How many candidates of ``values`` pixel values go through a network of ``activations`` activations in one pass."""
    return max(1, CHUNK_VALUES.get(device.type, CHUNK_VALUES["cpu"]) // max(1, values, activations))


@dataclass(frozen=True)
class Start:
    """Where an attack may begin, for example where a certificate found the least room.

    Attributes:
        location: int64 [B, 4], one of the threat's locations for each image: top, left, height, width.
        rival: int64 [B], the class to aim at.
        further: int64 [B, S, 4], more of its locations, the most promising first; None for none.
    """

    location: Tensor
    rival: Tensor
    further: Tensor | None = None

    @property
    def places(self) -> Tensor:
        """All locations, the most promising first: int64 [B, 1 + S, 4]."""
        first = self.location[:, None]
        return first if self.further is None else torch.cat([first, self.further], dim=1)

    def take(self, images: Tensor) -> Start:
        """The start of some of the images, int64 [n] or bool [B]."""
        return Start(self.location[images], self.rival[images], None if self.further is None else self.further[images])

    def checked(self, x: Tensor, threat: Threat, classes: int) -> Start:
        """The same on the images' device, [B, C, H, W]; raises :class:`UsageError` unless it fits them."""
        shapes = tuple(self.location.shape), tuple(self.rival.shape)
        if shapes != ((len(x), 4), (len(x),)):
            raise UsageError(
                f"a start of shapes {shapes[0]} and {shapes[1]} does not fit {len(x)} images.",
                hint="Give locations [B, 4] and classes [B].",
            )
        further = self.further
        if further is not None and (further.ndim != 3 or (len(further), further.shape[2]) != (len(x), 4)):
            raise UsageError(
                f"further locations of shape {tuple(further.shape)} do not fit {len(x)} images.", hint="Give int64 [B, N, 4]."
            )
        location, rival = self.location.to(x.device, torch.int64), self.rival.to(x.device, torch.int64)
        start = Start(location, rival, None if further is None else further.to(x.device, torch.int64))
        locations = threat.locations(int(x.shape[2]), int(x.shape[3])).to(x.device)
        if not bool((start.places[:, :, None] == locations).all(dim=3).any(dim=2).all()):
            raise UsageError(
                f"a start at a location that {threat} does not have.", hint="Take one of threat.locations(height, width)."
            )
        if not bool(((rival >= 0) & (rival < classes)).all()):
            raise UsageError("a start with a target class that does not exist.", hint=f"Allowed: 0 to {classes - 1}.")
        return start


class LocalEvaluator:
    """A surrogate's view of candidates that differ from their image inside one box alone; see :class:`Surrogate`.

    Attributes:
        boxes: int64 [n, S, 4].
        share: how much of the network each candidate takes.
    """

    def __init__(self, surrogate: Surrogate, clean: Tensor, boxes: Tensor) -> None:
        """For n distinct images [n, C, H, W]."""
        self.surrogate, self.boxes, self.share = surrogate, boxes, surrogate.share(boxes)
        with torch.no_grad():
            self._rest = surrogate.rest(clean, boxes)

    def take(self, images: Tensor) -> LocalEvaluator:
        """The same for some of the images, bool [n]."""
        taken = object.__new__(LocalEvaluator)
        taken.surrogate, taken.boxes, taken.share = self.surrogate, self.boxes[images], self.share
        taken._rest = self._rest[images]
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
        box: int64 [B, 4], where ``best`` differs from the image, if known.
        done: bool [B], whether the attack has succeeded with ``best``, or the clean image raises an alarm anyhow; such an image
            needs no more work.
        queries: int64 [B], passes spent so far.
        flipped_at: int64 [B], how many had been spent when a candidate changed the answer; 0 before.
        judged: int64 [B, 3], see :class:`AttackResult`.
        start: where to begin, a hint that an attack may ignore.
        surrogates: what to climb, the most faithful one first.
    """

    def __init__(self, defense: Defense, x: Tensor, start: Start | None = None) -> None:
        self._defense, self.start = defense, start
        self.surrogates = surrogates(defense)
        self.activations = activations(defense)
        self.queries = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        self.rows = rows_at_once(x.device, x[:1].numel(), self.activations)
        everyone = torch.arange(len(x), device=x.device)
        self.flipped_at = torch.zeros_like(self.queries)
        self.answer = self.answers(x, everyone)
        self.best = x.clone()
        self.margin = torch.full((len(x),), -torch.inf, device=x.device)
        self.box = torch.zeros(len(x), 4, dtype=torch.int64, device=x.device)
        self.done = self.answer == ALERT
        self.judged = torch.zeros(len(x), 3, dtype=torch.int64, device=x.device)
        self._x = x
        self._plain: Tensor | None = None
        self._class = self.answer.clamp(min=0)  # an alarm is not a class, and such an image is done

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

    @property
    def undefended(self) -> Defense | None:
        """The classifier inside the defense, as it answers without it; None if there is none."""
        return self._defense.undefended()

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
        self.best[owner[fresh]] = rows[fresh]
        self._finish(owner[fresh])

    def flipped(self, answers: Tensor, owner: Tensor) -> Tensor:
        """Whether such answers, int64 [R] for images int64 [R], are a success: bool [R]."""
        return ~self._defense.guarantee.kept(self.answer[owner], answers)

    def local_evaluator(self, clean: Tensor, owner: Tensor, boxes: Tensor, which: int = 0) -> LocalEvaluator:
        """A surrogate for S boxes int64 [n, S, 4] on each of the distinct images [n, C, H, W], numbers ``owner`` [n]."""
        self._count(owner, 1)
        return LocalEvaluator(self.surrogates[which], clean, boxes)

    def _parts(self, rows: Tensor, evaluator: LocalEvaluator | None) -> Iterator[Tensor]:
        """The numbers of the rows [R, C, H, W], int64, in parts that go through the network at once."""
        most = self.rows if evaluator is None else int(self.rows / evaluator.share)
        yield from torch.split(torch.arange(len(rows), device=rows.device), max(1, most))

    def _logits(self, rows: Tensor, part: Tensor, evaluator: LocalEvaluator | None) -> Tensor:
        return self.surrogates[0].whole(rows) if evaluator is None else evaluator(rows, part)

    @torch.no_grad()
    def logits(self, rows: Tensor, owner: Tensor, evaluator: LocalEvaluator | None = None) -> Tensor:
        """The logits of the first surrogate or of a evaluator, [R, C, H, W] and int64 [R] -> [R, K]."""
        self._count(owner, 1)
        found = []
        for part in self._parts(rows, evaluator):
            found.append(self._logits(rows[part], part, evaluator))
            passes.made(len(part))
        return torch.cat(found)

    def gap(self, logits: Tensor, owner: Tensor, rival: Tensor | None = None) -> Tensor:
        """The margin, or ``f_rival - f_y`` for a class int64 [R], of logits [R, K] -> [R]."""
        own = self._class[owner][:, None]
        if rival is not None:
            return (logits.gather(1, rival[:, None]) - logits.gather(1, own))[:, 0]
        return logits.scatter(1, own, -torch.inf).amax(dim=1) - logits.gather(1, own)[:, 0]

    def gradients(
        self, rows: Tensor, owner: Tensor, rival: Tensor | None = None, evaluator: LocalEvaluator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The logits of candidates, and the gradient of their :meth:`gap`.

        Args:
            rows: [R, C, H, W].
            owner: int64 [R], the image each belongs to.
            rival: int64 [R], the class to aim at instead of the highest one.
            evaluator: what sees the rows, by default the first surrogate.

        Returns:
            [R, K] and [R, C, H, W].
        """
        self._count(owner, 2)
        values, gradients = [], []
        for part in self._parts(rows, evaluator):
            with torch.enable_grad():
                point = rows[part].detach().requires_grad_()
                logits = self._logits(point, part, evaluator)
                aim = self.gap(logits, owner[part], None if rival is None else rival[part])
                gradients.append(torch.autograd.grad(aim.sum(), point)[0])
            values.append(logits.detach())
            passes.made(2 * len(part))
        return torch.cat(values), torch.cat(gradients)

    def rivals(self, x: Tensor, owner: Tensor, most: int) -> Tensor:
        """The classes but the answer, highest logit on [n, C, H, W] first, at most ``most`` of them: int64 [n, T].

        The class of the hint is among them.
        """
        logits = self.logits(x, owner)
        ranked = logits.scatter(1, self._class[owner][:, None], -torch.inf).sort(dim=1, descending=True, stable=True).indices
        ranked = ranked[:, : min(most, logits.shape[1] - 1)].clone()
        if self.start is not None:
            aim = self.start.rival[owner]
            missing = (ranked != aim[:, None]).all(dim=1) & (aim != self._class[owner])
            ranked[missing, -1] = aim[missing]
        return ranked

    def offer(self, candidates: Tensor, margins: Tensor, owner: Tensor, boxes: Tensor | None = None) -> None:
        """Keep the best of each image's candidates, [n, S, C, H, W] with margins [n, S] of the distinct images ``owner`` [n].

        Where the answer of the surrogate changed or nearly so, the deployed answer is evaluated and decides. ``boxes``
        int64 [n, S, 4] are where the candidates differ from their images.
        """
        score, pick = margins.max(dim=1)
        better = ((score > self.margin[owner]) & ~self.done[owner]).nonzero()[:, 0]
        image, score = owner[better], score[better]
        self.margin[image] = score
        self.best[image] = candidates[better, pick[better]]
        if boxes is not None:
            self.box[image] = boxes[better, pick[better]]
        ask = image[score >= -self.surrogates[0].tolerance]  # in a tie the lowest class wins, which may be the target class
        if len(ask):
            self._finish(ask[self.flipped(self.answers(self.best[ask], ask), ask)])

    def _finish(self, images: Tensor) -> None:
        """Images int64 [n] whose answer the best candidate changes."""
        self.done[images], self.flipped_at[images] = True, self.queries[images]

    def _count(self, owner: Tensor, passes: int) -> None:
        self.queries += passes * torch.bincount(owner, minlength=len(self.queries))
