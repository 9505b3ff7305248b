"""A running average of weights along the way, which is often better than the last ones (Polyak & Juditsky, 1992)."""

from __future__ import annotations

import copy

import torch

from patchcert_cli.defenses import Trainable


class Average:
    """A copy of a defense whose weights and statistics follow those of the original.

    Attributes:
        defense: the copy.
        steps: how many steps it has seen.
    """

    def __init__(self, defense: Trainable) -> None:
        self.defense, self.steps = copy.deepcopy(defense).eval(), 0

    @torch.no_grad()
    def follow(self, defense: Trainable, keep: float) -> None:
        """One step: ``keep`` of what was, the rest from ``defense``; fewer at the beginning, when what was is old."""
        self.steps += 1
        share = 1 - min(keep, (self.steps + 1) / (self.steps + 10))
        pairs = [(mine, own) for mine, own in zip(*(d.state_dict().values() for d in (self.defense, defense)), strict=True)]
        for mine, own in pairs:
            if not mine.is_floating_point():
                mine.copy_(own)  # counters
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in moving], [own for _, own in moving], share)
