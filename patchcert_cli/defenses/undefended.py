"""No defense: the classifier answers by itself. It is what the others are compared with, and what blind attacks are made for.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from torch import Tensor

from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._empirical import EmpiricalDefense


class Undefended(EmpiricalDefense):
    """A plain classifier."""

    def filtered(self, x: Tensor) -> Tensor:
        return x

    def surrogates(self) -> tuple[Surrogate, ...]:
        return (Surrogate(self.forward),)
