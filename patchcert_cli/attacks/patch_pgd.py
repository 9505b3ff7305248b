"""One patch: look at every location with a few contents, then projected gradient ascent inside the most damaging ones.

Projected gradient: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018. Inside a patch, every
content in [0, 1] is allowed, so the projection is a clamp and what lies outside stays the clean image.

Shapes: n images at work, C channels, H x W pixels, A atoms (locations), S kept locations, T rival classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.attacks.base import Attack, Target, require
from patchcert_cli.threats import Threat

BLOCK = 16  # locations of an image that are tried together; an image whose answer flips is done after its block
CONTENTS = 3  # black, white, and the corner that the gradient at the clean image points to


@dataclass(frozen=True, kw_only=True)
class PatchPGD(Attack):
    """Screen every location, then climb the margin inside the worst of them.

    The third screened content is the corner of [0, 1] that maximizes the linearized ``f_j - f_y`` inside the location, for the
    rival j that gains most there; for a linear model this is the strongest patch there is.

    Attributes:
        seed: source of all randomness, together with each image's number.
        locations: locations per image to climb in, the most damaging screened ones.
        restarts: random contents to climb from at each location, after the three screened ones.
        steps: gradient steps per climb; 0 only screens.
        step_size: first step of a climb in pixel values, falling linearly to 0.
        rivals: classes whose gradient at the clean image is used, highest logit first.
    """

    locations: int = 10
    restarts: int = 2
    steps: int = 40
    step_size: float = 0.1
    rivals: int = 9
    kinds: ClassVar[tuple[str, ...]] = ("patch",)

    def __post_init__(self) -> None:
        require("locations", self.locations, 1)
        require("restarts", self.restarts, 0)
        require("steps", self.steps, 0)
        require("step_size", self.step_size, 0, 1)
        require("rivals", self.rivals, 1)

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Work through the images in groups whose candidates make one chunk."""
        atoms = threat.atoms(int(x.shape[2]), int(x.shape[3])).to(x.device)
        for owner in target.groups(max(BLOCK * CONTENTS, self.locations)):
            boxes, corners = self._screen(target, x, owner, atoms)
            noise = [self._noise(index[owner], restart, corners) for restart in range(self.restarts)]
            for content in (torch.zeros_like(corners), torch.ones_like(corners), corners, *noise) if self.steps else ():
                live = (~target.done[owner]).nonzero()[:, 0]
                if len(live):
                    self._climb(target, x[owner[live]], owner[live], boxes[live], content[live])
        return target.best

    def _screen(self, target: Target, x: Tensor, owner: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """Offer every location's contents, most promising location first; int64 [n] -> the worst locations and their corners.

        Returns:
            int64 [n, S, 4] and float32 [n, S, C, H, W], of which the part inside the location is meant.
        """
        clean = x[owner]
        estimate, corner = self._linearize(target, clean, owner, atoms)  # [n, T, A], [n, T, C, H, W]
        value, rival = estimate.max(dim=1)  # [n, A]
        order = value.sort(dim=1, descending=True, stable=True).indices
        score = torch.full_like(value, -torch.inf)
        live = torch.arange(len(owner), device=x.device)
        for block in torch.split(order, BLOCK, dim=1):
            place = block[live]  # [n', L]
            best = corner[live[:, None], rival[live[:, None], place]]  # [n', L, C, H, W]
            content = torch.stack([torch.zeros_like(best), torch.ones_like(best), best], dim=2)
            inside = _inside(atoms[place], clean)[:, :, None]  # [n', L, 1, 1, H, W]
            rows = torch.where(inside, content, clean[live][:, None, None]).flatten(1, 2)  # [n', L * CONTENTS, C, H, W]
            owners = owner[live].repeat_interleave(rows.shape[1])
            margin = target.gap(target.logits(rows.flatten(0, 1), owners), owners).reshape(rows.shape[:2])
            target.offer(rows, margin, owner[live])
            score[live[:, None], place] = margin.reshape(*place.shape, CONTENTS).amax(dim=2).to(score)
            live = live[~target.done[owner[live]]]
            if not len(live):
                break
        kept = score.sort(dim=1, descending=True, stable=True).indices[:, : self.locations]  # [n, S]
        images = torch.arange(len(owner), device=x.device)[:, None]
        return atoms[kept], corner[images, rival[images, kept]]

    def _linearize(self, target: Target, clean: Tensor, owner: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """First-order margin of each rival at each location [n, T, A], and the corner that attains it [n, T, C, H, W].

        An entry that may move to 0 or 1 adds at most ``max(g (1 - x), -g x)``; a location adds the sum over its entries.
        """
        rival = target.rivals(clean, owner, self.rivals)  # [n, T]
        rows = clean[:, None].expand(-1, rival.shape[1], -1, -1, -1)
        owners = owner.repeat_interleave(rival.shape[1])
        logits, slope = target.slopes(rows.flatten(0, 1), owners, rival.flatten())
        now, slope = target.gap(logits, owners, rival.flatten()).reshape(rival.shape), slope.reshape(rows.shape)
        gain = torch.maximum(slope * (1 - rows), -slope * rows).sum(dim=2)  # [n, T, H, W]
        return now[:, :, None] + _box_sums(gain, atoms), (slope > 0).to(clean)

    def _noise(self, index: Tensor, restart: int, like: Tensor) -> Tensor:
        """Random contents of the shape [n, S, C, H, W]."""
        return self.draw(index, restart, like[0].numel()).reshape(like.shape)

    def _climb(self, target: Target, clean: Tensor, owner: Tensor, boxes: Tensor, content: Tensor) -> None:
        """Sign-gradient ascent of the margin from ``content`` [n, S, C, H, W] inside ``boxes`` [n, S, 4]."""
        inside = _inside(boxes, clean)  # [n, S, 1, H, W]
        point = torch.where(inside, content, clean[:, None])
        for step in range(self.steps + 1):
            rows, owners = point.flatten(0, 1), owner.repeat_interleave(point.shape[1])
            last = step == self.steps
            logits, slope = (target.logits(rows, owners), rows) if last else target.slopes(rows, owners)
            target.offer(point, target.gap(logits, owners).reshape(point.shape[:2]), owner)
            going = ~target.done[owner]
            if last or not bool(going.any()):
                return
            rate = self.step_size * (1 - step / self.steps)
            point = torch.where(inside, (point + rate * slope.reshape(point.shape).sign()).clamp(0, 1), point)
            if not bool(going.all()):
                point, inside, owner = point[going], inside[going], owner[going]


def _inside(boxes: Tensor, x: Tensor) -> Tensor:
    """Which pixels lie in each box, int64 [n, S, 4] on images [n, C, H, W] -> bool [n, S, 1, H, W]."""
    top, left, height, width = (side[..., None] for side in boxes.unbind(-1))  # [n, S, 1] each
    row, column = torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[3], device=x.device)
    rows, columns = (row >= top) & (row < top + height), (column >= left) & (column < left + width)
    return (rows[..., :, None] & columns[..., None, :])[:, :, None]


def _box_sums(values: Tensor, atoms: Tensor) -> Tensor:
    """Sum over each box, [n, T, H, W] and int64 [A, 4] -> float64 [n, T, A]."""
    total = F.pad(values.double(), (1, 0, 1, 0)).cumsum(dim=2).cumsum(dim=3)  # [n, T, H + 1, W + 1]
    top, left, height, width = atoms.unbind(dim=1)
    bottom, right = top + height, left + width
    return total[..., bottom, right] - total[..., top, right] - total[..., bottom, left] + total[..., top, left]
