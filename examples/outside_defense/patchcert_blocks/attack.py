"""Black and white noise at random places: the simplest attack there is.

Shapes: n images, C channels, h x w pixels of the patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchcert_cli.attacks import Attack, Target
from patchcert_cli.threats import Threat


@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """Random patches, each a candidate; the base class checks and judges the best one.

    Attributes:
        seed: source of all randomness, together with each image's number.
        tries: patches of an image.
    """

    tries: int = 50
    kinds: ClassVar[tuple[str, ...]] = ("patch",)

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        locations = threat.locations(int(x.shape[2]), int(x.shape[3])).to(x.device)
        tall, wide = (int(side) for side in locations[0, 2:])
        for number in range(self.tries):
            owner = (~target.done).nonzero()[:, 0]  # the images that are not flipped yet
            if not len(owner):
                break
            drawn = self.draw(index[owner], number, 1 + x.shape[1] * tall * wide)
            content = (drawn[:, 1:] < 0.5).to(x).reshape(len(owner), -1, tall, wide)
            place = locations[(drawn[:, 0] * len(locations)).long()]
            rows = x[owner].clone()
            for row, patch, (top, left, _, _) in zip(rows, content, place.tolist(), strict=True):
                row[:, top : top + tall, left : left + wide] = patch
            margin = target.gap(target.logits(rows, owner), owner)
            target.offer(rows[:, None], margin[:, None], owner)
        return target.best
