"""Which outputs of a sliding layer see which pixels.

A layer with kernel k, stride s and padding q has output i look at pixels ``i*s - q`` to ``i*s - q + k - 1``.
"""

from __future__ import annotations


def touched_range(start: int, side: int, *, kernel: int, stride: int, padding: int, size: int) -> tuple[int, int]:
    """The half-open range of outputs that see any pixel of ``[start, start + side)``, within ``[0, size)``; empty if none.

    Output i is touched iff ``i*s - q <= start + side - 1`` and ``i*s - q + k - 1 >= start``.
    """
    first = max(0, -((kernel - 1 - padding - start) // stride))  # ceil((start - k + 1 + q) / s)
    last = min(size - 1, (start + side - 1 + padding) // stride)
    return first, max(first, last + 1)
