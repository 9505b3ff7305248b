"""Which cells see which pixels: outputs of a sliding layer, and bands that wrap around the image.

A layer with kernel k, stride s and padding q has output i look at pixels ``i*s - q`` to ``i*s - q + k - 1``. Both axes are alike
and independent: the cells that a rectangle touches are those of its rows and of its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def touched_range(start: int, side: int, *, kernel: int, stride: int, padding: int, size: int) -> tuple[int, int]:
    """The half-open range of outputs that see any pixel of ``[start, start + side)``, within ``[0, size)``; empty if none.

    Output i is touched iff ``i*s - q <= start + side - 1`` and ``i*s - q + k - 1 >= start``.
    """
    first = max(0, -((kernel - 1 - padding - start) // stride))  # ceil((start - k + 1 + q) / s)
    last = min(size - 1, (start + side - 1 + padding) // stride)
    return first, max(first, last + 1)


@dataclass(frozen=True)
class Axis:
    """Which cells along one axis each start of a patch touches.

    Attributes:
        cells: how many cells there are.
        touched: for each start of the patch, the sorted numbers of the cells it touches.
    """

    cells: int
    touched: tuple[tuple[int, ...], ...]

    @classmethod
    def sliding(cls, length: int, side: int, *, kernel: int, stride: int = 1, padding: int = 0) -> Axis:
        """Outputs of a sliding layer over ``length`` pixels, under a patch of ``side`` pixels anywhere inside."""
        cells = (length + 2 * padding - kernel) // stride + 1
        ranges = (
            touched_range(start, side, kernel=kernel, stride=stride, padding=padding, size=cells)
            for start in range(length - side + 1)
        )
        return cls(cells, tuple(tuple(range(first, last)) for first, last in ranges))

    @classmethod
    def bands(cls, length: int, side: int, *, band: int, stride: int = 1) -> Axis:
        """Bands that wrap around: cell i shows pixels ``i*stride`` to ``i*stride + band - 1``, modulo ``length``.

        The set is exact also where the stride does not divide the length; counting ``ceil((side + band - 1) / stride)`` is not.
        """
        shown = [{(first + offset) % length for offset in range(band)} for first in range(0, length, stride)]
        patches = (set(range(start, start + side)) for start in range(length - side + 1))
        return cls(len(shown), tuple(tuple(i for i, pixels in enumerate(shown) if pixels & patch) for patch in patches))

    @classmethod
    def whole(cls, length: int, side: int) -> Axis:
        """One cell that sees all ``length`` pixels."""
        return cls(1, ((0,),) * (length - side + 1))

    @cached_property
    def sweep(self) -> tuple[int, int] | None:
        """``(first, width)`` if start i touches exactly cells first + i to first + i + width - 1, for every i; else None."""
        if not self.touched or not self.touched[0]:
            return None
        first, width = self.touched[0][0], len(self.touched[0])
        even = all(cells == tuple(range(first + i, first + i + width)) for i, cells in enumerate(self.touched))
        return (first, width) if even else None

    @cache  # noqa: B019  # axes are few and small
    def matrix(self) -> Tensor:
        """float32 [starts, cells], 1 where a start touches a cell; shared, not to be written to."""
        import torch

        mask = torch.zeros(len(self.touched), self.cells)
        for start, cells in enumerate(self.touched):
            mask[start, list(cells)] = 1
        return mask

    @cache  # noqa: B019
    def distinct(self) -> tuple[int, ...]:
        """Starts whose cells are not all in another's, the first of equals: the others cannot be worse."""
        sets = [frozenset(cells) for cells in self.touched]
        return tuple(
            at
            for at, mine in enumerate(sets)
            if not any(mine < other or (mine == other and before < at) for before, other in enumerate(sets))
        )

    def select(self, starts: Sequence[int]) -> Axis:
        """Only these starts."""
        return Axis(self.cells, tuple(self.touched[start] for start in starts))


@dataclass(frozen=True)
class CellCoverage:
    """The cells that each location touches: those in a touched row and a touched column.

    Locations are numbered row by row, as :meth:`patchcert_cli.threats.Threat.locations` lists them; the attacker has
    ``budget`` of them.
    """

    rows: Axis
    columns: Axis
    budget: int = 1
