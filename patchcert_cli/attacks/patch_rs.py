"""One patch by random search on location and content, without gradients (Patch-RS: Croce et al., Sparse-RS, AAAI 2022).

Each round proposes several changes of the best patch so far: a square inside it gets a random corner color, or the patch moves;
and some new patches. The best proposal is kept if it raises the margin. Squares and moves shrink along the run, as in Square
Attack (Andriushchenko et al., ECCV 2020). The margin is the first surrogate's; a candidate that may have changed the deployed
answer is answered by the whole defense, which decides. So it works with any defense, and with networks that have no gradients.

Shapes: n images in progress, C channels, H x W pixels, h x w pixels of the patch, P proposals of an image, A locations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchcert_cli.attacks._random_search import FIRST_STREAM, RandomSearch, share
from patchcert_cli.attacks._target import Target
from patchcert_cli.threats import Threat

LARGEST_SQUARE = 0.8  # side of the first squares, as a share of the patch's
MOVING_SHARE = 0.25  # of the proposals of a round
FRESH_SHARE = 0.125  # of the proposals of a round: new patches at random locations
SIDES = (
    (0.05, 1.0),
    (0.2, 0.7),
    (0.5, 0.4),
    (0.8, 0.2),
    (1.1, 0.1),
)  # until which part of the run, which share of the first side


@dataclass(frozen=True, kw_only=True)
class PatchRS(RandomSearch):
    """Random search that begins at the hint, if there is one, and at random locations with stripes of corner colors."""

    kinds: ClassVar[tuple[str, ...]] = ("patch",)
    revision: ClassVar[int] = 2  # the first one began at one location of the hint

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Work through the images in groups whose proposals make one chunk."""
        locations = threat.locations(int(x.shape[2]), int(x.shape[3])).to(x.device)
        for owner in target.groups(self.candidates):
            owner = owner[~target.done[owner]]
            if len(owner):
                self._search(target, x, owner, index, locations)
        return target.best

    def _search(self, target: Target, x: Tensor, owner: Tensor, index: Tensor, locations: Tensor) -> None:
        corner, content = self._begin(target, x, owner, index, locations)
        best = torch.full((len(owner),), -torch.inf, device=x.device)
        held_corner, held = corner[:, 0], content[:, 0]
        live = torch.arange(len(owner), device=x.device)
        for number in range(1 + self.rounds):
            margin = self._offer(target, x, owner[live], corner, content)
            score, pick = margin.max(dim=1)
            rows = torch.arange(len(live), device=x.device)
            better = score > best[live]
            best[live] = torch.where(better, score, best[live])
            held_corner[live] = torch.where(better[:, None], corner[rows, pick], held_corner[live])
            held[live] = torch.where(better[:, None, None, None], content[rows, pick], held[live])
            live = live[~target.done[owner[live]]]
            if not len(live) or number == self.rounds:
                return
            part = self.part(number)
            corner, content = self._propose(index[owner[live]], number, part, held_corner[live], held[live], locations)

    def _begin(self, target: Target, x: Tensor, owner: Tensor, index: Tensor, locations: Tensor) -> tuple[Tensor, Tensor]:
        """Locations [n, P, 2] and contents [n, P, C, h, w] of the first round, up to half of them as the hint says."""
        corner, content = self._fresh(index[owner], FIRST_STREAM - 1, self.candidates, x, locations)
        if target.start is not None:
            hinted = target.start.places[owner, : (self.candidates + 1) // 2, :2]
            corner[:, : hinted.shape[1]] = hinted
        return corner, content

    def _fresh(self, index: Tensor, stream: int, count: int, x: Tensor, locations: Tensor) -> tuple[Tensor, Tensor]:
        """Random locations [n, count, 2] with contents [n, count, C, h, w]: stripes along either axis, single pixels."""
        channels, (height, width) = x.shape[1], (int(side) for side in locations[0, 2:])
        drawn = self.draw(index, stream, count * (1 + channels * height * width))
        place = (drawn[:, :count] * len(locations)).long().clamp(max=len(locations) - 1)
        bits = (drawn[:, count:] < 0.5).to(x).reshape(len(index), count, channels, height, width)
        kind = (torch.arange(count, device=x.device) % 3)[None, :, None, None, None]
        content = torch.where(kind == 0, bits[..., :1].expand_as(bits), bits)
        content = torch.where(kind == 1, bits[..., :1, :].expand_as(bits), content)
        return locations[place][..., :2], content

    def _propose(
        self, index: Tensor, number: int, part: float, corner: Tensor, content: Tensor, locations: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Changes of the best patches, at ``corner`` [n, 2] with ``content`` [n, C, h, w], after ``part`` of the run."""
        n, channels, height, width = content.shape
        count = self.candidates
        drawn = self.draw(index, FIRST_STREAM + number, count * (4 + channels)).reshape(n, count, 4 + channels)
        side = [max(1, round(LARGEST_SQUARE * length * share(part, SIDES))) for length in (height, width)]
        inside = []
        for axis, length in enumerate((height, width)):
            begin = (drawn[..., axis] * (length - side[axis] + 1)).floor()[..., None]
            at = torch.arange(length, device=content.device)
            inside.append((at >= begin) & (at < begin + side[axis]))
        square = (inside[0][..., :, None] & inside[1][..., None, :])[:, :, None]  # [n, P, 1, h, w]
        color = (drawn[..., 4:] < 0.5).to(content)[..., None, None]
        fresh = torch.where(square, color, content[:, None])
        last = locations[:, :2].amax(dim=0)
        reach = (last * (1 - part) / 2).clamp(min=1)
        step = ((drawn[..., 2:4] * 2 - 1) * reach).round().long()
        moved = (corner[:, None] + step).clamp(min=torch.zeros_like(last), max=last)
        moving = torch.arange(count, device=content.device) < (round(count * MOVING_SHARE) if count > 1 else number % 4 == 3)
        corners = torch.where(moving[None, :, None], moved, corner[:, None])
        contents = torch.where(moving[None, :, None, None, None], content[:, None], fresh)
        again = round(count * FRESH_SHARE)
        if again:
            corners[:, -again:], contents[:, -again:] = self._fresh(index, -FIRST_STREAM - number, again, content, locations)
        return corners, contents

    def _offer(self, target: Target, x: Tensor, owner: Tensor, corner: Tensor, content: Tensor) -> Tensor:
        """Offer patches at ``corner`` [n, P, 2] with ``content`` [n, P, C, h, w]; returns their margins [n, P]."""
        n, count, _, height, width = content.shape
        rows = x[owner][:, None].repeat(1, count, 1, 1, 1).flatten(0, 1)
        down = (corner[..., :1] + torch.arange(height, device=x.device)).flatten(0, 1)[:, :, None]
        right = (corner[..., 1:] + torch.arange(width, device=x.device)).flatten(0, 1)[:, None, :]
        each = torch.arange(len(rows), device=x.device)[:, None, None]
        rows.permute(0, 2, 3, 1)[each, down, right] = content.flatten(0, 1).permute(0, 2, 3, 1)
        sides = torch.tensor([height, width], device=x.device).expand(n, count, 2)
        boxes, owners = torch.cat([corner, sides], dim=2), owner.repeat_interleave(count)
        evaluator = target.local_evaluator(x[owner], owner, boxes)
        margin = target.gap(target.logits(rows, owners, evaluator), owners).reshape(n, count)
        target.offer(rows.reshape(n, count, *x.shape[1:]), margin, owner, boxes)
        return margin
