"""A few pixels: repeated linearization, then random swaps of the chosen entries.

The random part follows Sparse-RS (Croce et al., Sparse-RS: A Versatile Framework for Query-Efficient Sparse Black-Box Adversarial
Attacks, AAAI 2022): swap a shrinking random subset of the chosen entries, keep what raises the margin. Here it starts from the
best gradient solution, and draws new entries with weights by their linearized gain in every other round.

Shapes: n images in progress, C channels, H x W pixels, T target classes, E entries: the H * W pixels with all their channels, or,
if the threat counts single values, the C * H * W values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchcert_cli.attacks._base import Attack, Effort, require
from patchcert_cli.attacks._target import Target
from patchcert_cli.defenses import Defense
from patchcert_cli.threats import Sparse, Threat


@dataclass(frozen=True, kw_only=True)
class SparseSearch(Attack):
    """Set the k entries of largest linearized effect to 0 or 1, linearize again there, then search at random from the best.

    Attributes:
        seed: source of all randomness, together with each image's number.
        rivals: classes to aim at one by one, highest clean logit first.
        steps: linearizations per target class.
        momentum: share of the earlier slopes that is kept when a new one is added.
        iterations: rounds of random search.
        swap: share of the chosen entries that the first round swaps, falling linearly to a single one.
    """

    rivals: int = 9
    steps: int = 20
    momentum: float = 0.9
    iterations: int = 200
    swap: float = 0.5
    kinds: ClassVar[tuple[str, ...]] = ("sparse",)

    def __post_init__(self) -> None:
        require("rivals", self.rivals, 1)
        require("steps", self.steps, 1)
        require("momentum", self.momentum, 0, 1)
        require("iterations", self.iterations, 0)
        require("swap", self.swap, 0, 1)

    @property
    def candidates(self) -> int:
        return self.rivals

    def most(self, defense: Defense, threat: Threat, *, hinted: bool) -> Effort:
        rivals, looks = min(self.rivals, len(defense.classes) - 1), self.steps + 1
        return Effort(1 + 2 * rivals * looks + self.iterations, 2 + looks + self.iterations)

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Work through the images in groups whose candidates make one chunk."""
        assert isinstance(threat, Sparse)
        for owner in target.groups(self.candidates):
            slope = self._linearize(target, x, owner, threat)
            self._search(target, x, owner, threat, index, slope)
        return target.best

    def _linearize(self, target: Target, x: Tensor, owner: Tensor, threat: Sparse) -> Tensor:
        """Offer, for each target class, the best corners under slopes summed along the way.

        A dense change follows the normalized slopes, each taken at the change's projection on k entries at 0 or 1.

        Returns:
            [n, C, H, W], the slope at the clean image towards the runner-up.
        """
        rival = target.rivals(x[owner], owner, self.rivals)  # [n, T]
        clean = x[owner][:, None].expand(-1, rival.shape[1], -1, -1, -1)  # [n, T, C, H, W]
        first, point, dense = torch.zeros_like(x[owner]), clean, torch.zeros_like(clean)
        live = torch.arange(len(owner), device=x.device)
        for step in range(self.steps + 1):
            rows, owners = point.flatten(0, 1), owner[live].repeat_interleave(rival.shape[1])
            logits, slope = target.gradients(rows, owners, rival[live].flatten())
            target.offer(point, target.gap(logits, owners).reshape(point.shape[:2]), owner[live])
            slope = slope.reshape(point.shape)
            if step == 0:
                first = slope[:, 0]
            going = ~target.done[owner[live]]
            dense = self.momentum * dense + slope / slope.abs().sum(dim=(2, 3, 4), keepdim=True).clamp(min=1e-30)
            live, dense = live[going], dense[going]
            if step == self.steps or not len(live):
                break
            point = _corners(clean[live].flatten(0, 1), dense.flatten(0, 1), threat).reshape(dense.shape)
        return first

    def _search(self, target: Target, x: Tensor, owner: Tensor, threat: Sparse, index: Tensor, slope: Tensor) -> None:
        """Swap chosen entries for others at random, and stay where the margin rises."""
        clean, images = x[owner], index[owner]
        values = clean[0].numel()
        weight = _effect(clean, slope, threat)  # [n, E]
        entries, live = weight.shape[1], torch.arange(len(owner), device=x.device)
        for step in range(self.iterations):
            live = live[~target.done[owner[live]]]
            if not len(live):
                return
            here, now = clean[live], target.best[owner[live]]
            drawn = self.draw(images[live], step, 2 * entries + values)
            leave, enter, bits = torch.split(drawn, [entries, entries, values], dim=1)
            chosen = _entries(now != here, threat)  # [n', E]
            count = max(1, round(threat.k * self.swap * (1 - step / self.iterations)))
            kept = chosen & ~_largest(leave.where(chosen, leave - 1), count)
            guided = step % 2 == 1
            # weights over exponential lots: the largest are a draw by weight without replacement
            lot = weight[live] / -(1 - enter).log().clamp(max=-1e-30) if guided else enter
            added = _largest(lot.where(~kept, -1), threat.k, threat.k - kept.sum(dim=1, keepdim=True))
            fresh = (slope[live] > 0).to(here) if guided else (bits < 0.5).to(here).reshape(here.shape)
            rows = torch.where(_values(added, here, threat), fresh, torch.where(_values(kept, here, threat), now, here))
            margin = target.gap(target.logits(rows, owner[live]), owner[live])
            target.offer(rows[:, None], margin[:, None], owner[live])


def _effect(x: Tensor, slope: Tensor, threat: Sparse) -> Tensor:
    """The most that moving an entry to 0 or 1 adds to a linear function, [n, C, H, W] twice -> [n, E]."""
    gain = torch.maximum(slope * (1 - x), -slope * x)
    return gain.flatten(1) if threat.unit == "value" else gain.sum(dim=1).flatten(1)


def _corners(x: Tensor, slope: Tensor, threat: Sparse) -> Tensor:
    """The allowed change that adds most to a linear function: the k entries of largest effect at their better end."""
    return torch.where(_values(_largest(_effect(x, slope, threat), threat.k), x, threat), (slope > 0).to(x), x)


def _entries(changed: Tensor, threat: Sparse) -> Tensor:
    """Which entries are touched, bool [n, C, H, W] -> bool [n, E]."""
    return changed.flatten(1) if threat.unit == "value" else changed.any(dim=1).flatten(1)


def _values(entries: Tensor, x: Tensor, threat: Sparse) -> Tensor:
    """Which values belong to the entries, bool [n, E] -> bool that fits [n, C, H, W]."""
    return entries.reshape(x.shape if threat.unit == "value" else (len(x), 1, *x.shape[2:]))


def _largest(score: Tensor, most: int, count: Tensor | None = None) -> Tensor:
    """Whether each entry is among its image's ``most`` largest, or ``count`` int64 [n, 1] largest: [n, E] -> bool [n, E]."""
    top = score.topk(min(most, score.shape[1]), dim=1).indices
    among = torch.arange(top.shape[1], device=score.device) < (most if count is None else count)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, top, among.expand_as(top))
