"""One patch: projected gradient ascent inside one location, which a hint or a search gives, then inside others.

Projected gradient: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018; momentum: Dong et al.,
Boosting Adversarial Attacks with Momentum, CVPR 2018. Inside a patch, every content in [0, 1] is allowed, so the projection is a
clamp and what lies outside stays the clean image.

Where cells of small receptive fields vote, what a patch writes persuades the cells that see nothing else, wherever it lies. So a
content that was found at one location is carried to others, and climbs on where it does most.

Shapes: n images in progress, C channels, H x W pixels, A locations, S kept locations, T target classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchcert_cli.attacks._base import Attack, Effort, require
from patchcert_cli.attacks._target import Target
from patchcert_cli.defenses import Defense, activations, surrogates
from patchcert_cli.layers.boxes import box_mask, box_sums
from patchcert_cli.threats import Threat

BLOCK = 16  # locations of an image that are tried together; an image whose answer flips is done after its block
CONTENTS = 3  # black, white, and the corner that the gradient at the clean image points to
BEGIN = 1 << 20  # the first random stream of the first location
CHEAP = 1 << 26  # activations that looking at every location may cost
MOMENTUM = 0.75
JUDGED = 8  # steps between two looks of the first surrogate while another is climbed


@dataclass(frozen=True, kw_only=True)
class PatchPGD(Attack):
    """Climb the margin where the hint says, or else where the clean gradient promises most; then elsewhere.

    Where the network is small, every location is looked at with three contents, and the worst of them are climbed in. The third
    content is the corner of [0, 1] that maximizes the linearized ``f_j - f_y`` inside the location, for the class j that gains
    most there; for a linear model this is the strongest patch there is.

    Where it is not, one location is climbed in. If that went far, the best content is carried to further locations of the hint,
    where it climbs on each surrogate; then to ``carried`` locations on a grid and next to the best one, and it climbs on in the
    worst of these with half the step, ``rounds`` times.

    Attributes:
        seed: source of all randomness, together with each image's number.
        locations: locations per image to climb in, the most damaging ones; half as many where a content is carried.
        restarts: random contents to climb from at each location; after screening, beside the three screened ones.
        steps: gradient steps per climb; 0 only looks.
        step_size: first step of a climb in pixel values, falling linearly to 0.
        rivals: classes whose gradient at the clean image is used, highest logit first.
        screen: whether every location is looked at with three contents; by default where that is cheap.
        hope: share of the way from the clean margin to zero that the first location must have brought, or no other is tried.
        starts: locations of the hint to climb in, the first one included.
        carried: locations of the grid that the best content is carried to.
        rounds: how often.
    """

    locations: int = 10
    restarts: int = 2
    steps: int = 40
    step_size: float = 0.2
    rivals: int = 9
    screen: bool | None = None
    hope: float = 0.7
    starts: int = 12
    carried: int = 100
    rounds: int = 3
    kinds: ClassVar[tuple[str, ...]] = ("patch",)
    revision: ClassVar[int] = 2  # the first one climbed at one location of the hint alone

    def __post_init__(self) -> None:
        require("locations", self.locations, 1)
        require("restarts", self.restarts, 0)
        require("steps", self.steps, 0)
        require("step_size", self.step_size, 0, 1)
        require("rivals", self.rivals, 1)
        require("hope", self.hope, 0, 1)
        require("starts", self.starts, 1)
        require("carried", self.carried, 1)
        require("rounds", self.rounds, 0)

    @property
    def candidates(self) -> int:
        return max(BLOCK * CONTENTS, self.locations)

    def most(self, defense: Defense, threat: Threat, *, hinted: bool) -> Effort:
        locations, count = threat.locations(*defense.input_shape[1:]), len(surrogates(defense))
        screen = self._screens(len(locations), activations(defense))
        parts = [Effort(0, 2)]  # the clean answer and the last one
        if hinted or not screen:
            sizes = [2 + self.restarts] + [2] * (2 * count - 1)
            parts += [self._climbing(size, which=number // 2) for number, size in enumerate(sizes)]
        if screen or not hinted:
            parts.append(Effort(1 + 2 * min(self.rivals, len(defense.classes) - 1), 0))
        if screen:
            blocks = -(-len(locations) // BLOCK)
            parts.append(Effort(len(locations) * CONTENTS + blocks, blocks))
            climbs = CONTENTS + self.restarts if self.steps else 0
            parts += [self._climbing(min(self.locations, len(locations)), 0)] * climbs
        else:
            parts.append(Effort(1, 0))
            parts += [self._climbing(self.starts - 1, which) for which in range(count if hinted and self.starts > 1 else 0)]
            for number in range(self.rounds):
                parts.append(Effort(1 + len(_grid(locations, self.carried, number)) + 8, 1))
                parts += [self._climbing((self.locations + 1) // 2, 0)] if self.steps else []
        return Effort(sum(part.queries for part in parts), sum(part.answers for part in parts))

    def _climbing(self, starts: int, which: int) -> Effort:
        """The most that :meth:`_climb` takes from ``starts`` points of an image, on one of the surrogates."""
        looks = 1 + self.steps // JUDGED if which else 1  # with the first surrogate, besides those that come with a slope
        return Effort(1 + (which > 0) + starts * (2 * self.steps + looks), looks if which else self.steps + 1)

    def _screens(self, locations: int, activations: int) -> bool:
        """Whether every location is looked at."""
        return locations * CONTENTS * activations <= CHEAP if self.screen is None else self.screen

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Work through the images in groups whose candidates make one chunk."""
        locations = threat.locations(int(x.shape[2]), int(x.shape[3])).to(x.device)
        screen = self._screens(len(locations), target.activations)
        for owner in target.groups(self.candidates):
            if target.start is not None:
                self._begin(target, x, owner, index, target.start.location[owner], target.start.rival[owner])
            elif not screen:
                self._begin(target, x, owner, index, *self._promising(target, x, owner, locations))
            if screen:
                self._search(target, x, owner, index, locations)
            else:
                owner = self._hopeful(target, x, owner)
                if target.start is not None:
                    self._climb_further(target, x, owner, target.start.places[:, 1 : self.starts])
                for number in range(self.rounds):
                    self._carry(target, x, owner, locations, number)
        return target.best

    def _begin(self, target: Target, x: Tensor, owner: Tensor, index: Tensor, location: Tensor, rival: Tensor) -> None:
        """Climb at one location of each image, int64 [n, 4], on every surrogate, towards class ``rival``, int64 [n], and any.

        The first climb starts from the image, its negative and random contents, the others from the image and its negative.
        """
        clean = x[owner]
        noise = [self._noise(index[owner], BEGIN + restart, clean) for restart in range(self.restarts)]
        content = torch.stack([clean, 1 - clean, *noise], dim=1)
        for which in range(len(target.surrogates)):
            for aimed in (True, False):
                live = ~target.done[owner]
                if bool(live.any()):
                    rows = content[live]
                    boxes = location[live, None].expand(-1, rows.shape[1], -1)
                    aim = rival[live, None].expand(-1, rows.shape[1]) if aimed else None
                    self._climb(target, x, owner[live], boxes, rows, aim, which=which)
                    content = content[:, :2]

    def _climb_further(self, target: Target, x: Tensor, owner: Tensor, places: Tensor) -> None:
        """Carry each image's best content to the further locations int64 [B, S, 4] of the hint, and climb there."""
        for which in range(len(target.surrogates)):
            owner = owner[~target.done[owner]]
            if not len(owner) or not places.shape[1]:
                return
            content = _moved(target.best[owner], target.box[owner], places[owner])
            self._climb(target, x, owner, places[owner], content, which=which)

    def _hopeful(self, target: Target, x: Tensor, owner: Tensor) -> Tensor:
        """Those images, int64 [n] -> int64 [n'], that withstood so far, but not by much."""
        owner = owner[~target.done[owner]]
        before = target.gap(target.logits(x[owner], owner), owner) if len(owner) else target.margin[owner]
        return owner[target.margin[owner] >= (1 - self.hope) * before]

    def _promising(self, target: Target, x: Tensor, owner: Tensor, locations: Tensor) -> tuple[Tensor, Tensor]:
        """The location and the class of highest first-order margin, int64 [n, 4] and [n]."""
        rival, estimate, _ = self._linearize(target, x[owner], owner, locations)
        value, best = estimate.max(dim=1)  # [n, A]
        at = value.argmax(dim=1, keepdim=True)  # [n, 1]
        return locations[at[:, 0]], rival.gather(1, best.gather(1, at))[:, 0]

    def _search(self, target: Target, x: Tensor, owner: Tensor, index: Tensor, locations: Tensor) -> None:
        """Screen all locations, and climb in the worst."""
        owner = owner[~target.done[owner]]
        if not len(owner):
            return
        boxes, corners = self._screen(target, x, owner, locations)
        noise = [self._noise(index[owner], restart, corners) for restart in range(self.restarts)]
        for content in (torch.zeros_like(corners), torch.ones_like(corners), corners, *noise) if self.steps else ():
            live = ~target.done[owner]
            if bool(live.any()):
                self._climb(target, x, owner[live], boxes[live], content[live])

    def _screen(self, target: Target, x: Tensor, owner: Tensor, locations: Tensor) -> tuple[Tensor, Tensor]:
        """Offer every location's contents, most promising location first; int64 [n] -> the worst locations and their corners.

        Returns:
            int64 [n, S, 4] and float32 [n, S, C, H, W], of which the part inside the location is meant.
        """
        clean = x[owner]
        _, estimate, corner = self._linearize(target, clean, owner, locations)  # [n, T, A], [n, T, C, H, W]
        value, rival = estimate.max(dim=1)  # [n, A]
        order = value.sort(dim=1, descending=True, stable=True).indices
        score = torch.full_like(value, -torch.inf)
        live = torch.arange(len(owner), device=x.device)
        for block in torch.split(order, BLOCK, dim=1):
            place = block[live]  # [n', L]
            best = corner[live[:, None], rival[live[:, None], place]]  # [n', L, C, H, W]
            content = torch.stack([torch.zeros_like(best), torch.ones_like(best), best], dim=2).flatten(1, 2)
            boxes = locations[place].repeat_interleave(CONTENTS, dim=1)  # [n', L * CONTENTS, 4]
            margin = self._look(target, clean[live], owner[live], boxes, content)
            score[live[:, None], place] = margin.reshape(*place.shape, CONTENTS).amax(dim=2).to(score)
            live = live[~target.done[owner[live]]]
            if not len(live):
                break
        kept = score.sort(dim=1, descending=True, stable=True).indices[:, : self.locations]  # [n, S]
        images = torch.arange(len(owner), device=x.device)[:, None]
        return locations[kept], corner[images, rival[images, kept]]

    def _linearize(self, target: Target, clean: Tensor, owner: Tensor, locations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Target classes [n, T], first-order margin at each location [n, T, A], and the corner that attains it [n, T, C, H, W].

        An entry that may move to 0 or 1 adds at most ``max(g (1 - x), -g x)``; a location adds the sum over its entries.
        """
        rival = target.rivals(clean, owner, self.rivals)  # [n, T]
        rows = clean[:, None].expand(-1, rival.shape[1], -1, -1, -1)
        owners = owner.repeat_interleave(rival.shape[1])
        logits, slope = target.gradients(rows.flatten(0, 1), owners, rival.flatten())
        now, slope = target.gap(logits, owners, rival.flatten()).reshape(rival.shape), slope.reshape(rows.shape)
        gain = torch.maximum(slope * (1 - rows), -slope * rows).sum(dim=2)  # [n, T, H, W]
        return rival, now[:, :, None] + box_sums(gain.double(), locations), (slope > 0).to(clean)

    def _noise(self, index: Tensor, restart: int, like: Tensor) -> Tensor:
        """Random contents of the shape [n, ...]."""
        return self.draw(index, restart, like[0].numel()).reshape(like.shape)

    def _carry(self, target: Target, x: Tensor, owner: Tensor, locations: Tensor, number: int) -> None:
        """Try each image's best content elsewhere, and climb on where it does most."""
        owner = owner[~target.done[owner]]
        if not len(owner):
            return
        clean, box = x[owner], target.box[owner]
        boxes = torch.cat([_grid(locations, self.carried, number).expand(len(owner), -1, -1), _around(locations, box)], dim=1)
        content = _moved(target.best[owner], box, boxes)
        margin = self._look(target, clean, owner, boxes, content)
        live = ~target.done[owner]
        if not self.steps or not bool(live.any()):
            return
        kept = margin.sort(dim=1, descending=True, stable=True).indices[live, : (self.locations + 1) // 2]
        images = live.nonzero()
        self._climb(target, x, owner[live], boxes[images, kept], content[images, kept], first=self.step_size / 2)

    def _look(self, target: Target, clean: Tensor, owner: Tensor, boxes: Tensor, content: Tensor) -> Tensor:
        """Offer contents [n, S, C, H, W] inside boxes [n, S, 4] as they are, and return their margins [n, S]."""
        rows = torch.where(box_mask(boxes, *clean.shape[2:])[:, :, None], content, clean[:, None])
        owners = owner.repeat_interleave(rows.shape[1])
        evaluator = target.local_evaluator(clean, owner, boxes)
        margin = target.gap(target.logits(rows.flatten(0, 1), owners, evaluator), owners).reshape(rows.shape[:2])
        target.offer(rows, margin, owner, boxes)
        return margin

    def _climb(
        self,
        target: Target,
        x: Tensor,
        owner: Tensor,
        boxes: Tensor,
        content: Tensor,
        rival: Tensor | None = None,
        which: int = 0,
        first: float | None = None,
    ) -> None:
        """Sign-gradient ascent with momentum, of the margin or towards ``rival`` [n, S], on one of the surrogates.

        It starts from ``content`` [n, S, C, H, W] inside ``boxes`` [n, S, 4], with a ``first`` step, by default the attack's.
        """
        inside = box_mask(boxes, *x.shape[2:])[:, :, None]  # [n, S, 1, H, W]
        point, pull = torch.where(inside, content, x[owner][:, None]), torch.zeros_like(content)
        evaluator = target.local_evaluator(x[owner], owner, boxes, which)
        judge = evaluator if which == 0 else target.local_evaluator(x[owner], owner, boxes)
        for step in range(self.steps + 1):
            rows, owners = point.flatten(0, 1), owner.repeat_interleave(point.shape[1])
            last, aim = step == self.steps, None if rival is None else rival.flatten()
            logits, slope = (None, rows) if last else target.gradients(rows, owners, aim, evaluator)
            if last or (which > 0 and step % JUDGED == JUDGED - 1):
                logits = target.logits(rows, owners, judge)
            elif which > 0:
                logits = None
            if logits is not None:
                target.offer(point, target.gap(logits, owners).reshape(point.shape[:2]), owner, boxes)
            going = ~target.done[owner]
            if last or not bool(going.any()):
                return
            slope = slope.reshape(point.shape) * inside
            pull = MOMENTUM * pull + slope / slope.abs().sum(dim=(2, 3, 4), keepdim=True).clamp(min=1e-30)
            rate = (self.step_size if first is None else first) * (1 - step / self.steps)
            point = torch.where(inside, (point + rate * pull.sign()).clamp(0, 1), point)
            if not bool(going.all()):
                point, pull, inside, owner, boxes = point[going], pull[going], inside[going], owner[going], boxes[going]
                rival, evaluator, judge = None if rival is None else rival[going], evaluator.take(going), judge.take(going)


def _grid(locations: Tensor, count: int, phase: int) -> Tensor:
    """About ``count`` locations, evenly spread, or all; each phase gives others."""
    apart = max(1, round((len(locations) / count) ** 0.5))
    return locations[((locations[:, :2] - phase) % apart == 0).all(dim=1)]


def _around(locations: Tensor, box: Tensor) -> Tensor:
    """The locations one pixel from a box on both axes or one, int64 [n, 4] -> [n, 8, 4], at the border some of them twice."""
    steps = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).to(box)
    moved = box[:, None, :2] + steps[steps.abs().sum(dim=1) > 0]
    most = locations[:, :2].amax(dim=0)
    return torch.cat([moved.clamp(min=torch.zeros_like(most), max=most), box[:, None, 2:].expand(-1, moved.shape[1], -1)], dim=2)


def _moved(x: Tensor, box: Tensor, boxes: Tensor) -> Tensor:
    """Images [n, C, H, W] rolled so that the content of ``box`` [n, 4] is in each of ``boxes`` [n, S, 4]: [n, S, C, H, W]."""
    height, width = x.shape[2:]
    shift = boxes[:, :, :2] - box[:, None, :2]  # [n, S, 2]
    row = (torch.arange(height, device=x.device) - shift[..., :1]) % height  # [n, S, H]
    column = (torch.arange(width, device=x.device) - shift[..., 1:]) % width  # [n, S, W]
    image = torch.arange(len(x), device=x.device)[:, None, None, None]
    return x.permute(0, 2, 3, 1)[image, row[..., :, None], column[..., None, :]].permute(0, 1, 4, 2, 3)
