"""What gradient attacks need of a defense: stand-ins for its answer that have gradients.

Shapes: B images, C channels, H x W pixels, K classes, S boxes per image.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from patchcert_cli.defenses._base import Defense
from patchcert_cli.errors import UsageError


class Surrogate:
    """A stand-in for the deployed answer that has gradients, for attacks: class scores on any scale, the highest answers.

    Changes inside a box often reach a small part of the network. A defense that can compute this part alone overrides
    :meth:`near` and :meth:`rest`, such that ``whole(x') == rest(x, boxes) + near(x', boxes)`` wherever x' differs from x inside
    the box alone.

    Attributes:
        tolerance: how far the deployed answer may be from this one: where a margin exceeds ``-tolerance``, it is evaluated.
    """

    tolerance: float = 0.0

    def __init__(self, scores: Callable[[Tensor], Tensor]) -> None:
        self._scores = scores

    def whole(self, x: Tensor) -> Tensor:
        """[B, C, H, W] in [0, 1] -> [B, K]."""
        return self._scores(x)

    def near(self, x: Tensor, boxes: Tensor) -> Tensor:
        """The part that boxes can alter, [B, C, H, W] and int64 [B, 4], all of one size -> [B, K]."""
        return self.whole(x)

    def share(self, boxes: Tensor) -> float:
        """How much of the network :meth:`near` computes for such boxes, int64 [..., 4], at most 1: more of them go at once."""
        return 1.0

    def rest(self, x: Tensor, boxes: Tensor) -> Tensor:
        """The other part, [B, C, H, W] and int64 [B, S, 4] -> [B, S, K], or 1 for K where it is zero."""
        return x.new_zeros(*boxes.shape[:2], 1)


@runtime_checkable
class Attackable(Protocol):
    """A defense that names its surrogates; of any other one attacks climb ``forward``."""

    @abstractmethod
    def surrogates(self) -> tuple[Surrogate, ...]:
        """What attacks climb, the most faithful one first; candidates are compared by it."""

    @property
    @abstractmethod
    def activations(self) -> int:
        """How many numbers the largest layer holds for one image, about; passes of attacks are cut accordingly."""


def surrogates(defense: Defense) -> tuple[Surrogate, ...]:
    """What attacks climb of a defense, the most faithful one first.

    Raises:
        UsageError: it has neither surrogates nor ``forward``.
    """
    if isinstance(defense, Attackable):
        return defense.surrogates()
    if type(defense).forward is nn.Module.forward:
        raise UsageError(
            f"{type(defense).__name__} cannot be attacked by gradients.", hint="Give it a forward(), or surrogates()."
        )
    return (Surrogate(defense),)


def activations(defense: Defense) -> int:
    """How many numbers the largest layer of a defense holds for one image, about; of an unknown one those of the image.

    A defense may state this without naming surrogates.
    """
    return int(getattr(defense, "activations", math.prod(defense.input_shape)))
