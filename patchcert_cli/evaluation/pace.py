"""How many images to take next, and how long the rest takes: from measured times alone. No torch here.

What an image takes is not known before some were computed, and differs between images. So a run begins with one image, grows
at most eightfold from batch to batch, and stays at what takes about :data:`GOAL` seconds. Where the most passes of the network
that an image can take are known, a batch of such images fits into :data:`LONGEST` seconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

GOAL, LONGEST = 10.0, 25.0  # seconds of a batch: as it is expected, and if every image takes the most passes
GROWTH = 8
RECENT = 60.0  # seconds that an estimate looks back at least

Clock = Callable[[], float]


class Pace:
    """Sizes of batches: units times powers of two, so that kernels which are kept for a size serve again, or the most allowed.

    Attributes:
        size: images of the next batch.
    """

    def __init__(self, most: int, passes: tuple[int, int] | None = None, *, unit: int = 1) -> None:
        """Begin with one unit.

        Args:
            most: images at a time; a multiple of the unit is taken.
            passes: the fewest and the most that an image takes, if that is known.
            unit: images that are computed together.
        """
        self._unit, self._passes = max(1, min(unit, most)), passes
        self._most, self.size = most // self._unit, self._unit

    def took(self, images: int, seconds: float, passes: int = 0) -> None:
        """Record a batch of ``images`` that took ``seconds``, with ``passes`` if they were counted."""
        each = max(seconds, 1e-9)
        room = min(GOAL * images / each, GROWTH * max(images, self._unit))
        if self._passes is not None and passes > 0:
            room = min(room, LONGEST * passes / each / self._passes[1])
        units = int(room) // self._unit
        self.size = self._unit * (self._most if units >= self._most else 1 << max(units.bit_length() - 1, 0))

    def share(self, left: int, ranks: int) -> int:
        """How many of ``left`` images one of ``ranks`` processes takes: the next batch, or fewer, so that all end together."""
        units = max(left // (3 * ranks * self._unit), 1)
        return min(self.size, self._unit << (units.bit_length() - 1))

    def halve(self, images: int) -> None:
        """A batch of ``images`` was too large for the memory: never more than half as many from now on."""
        self._unit, self._most = min(self._unit, images // 2), max(images // 2 // min(self._unit, images // 2), 1)
        self.size = min(self.size, self._unit * self._most)


class Left:
    """The time to the end, from what was done lately: in the last minute, or in the last half of the time so far."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock, self._seen = clock, deque[tuple[float, int]]()
        self._first: float | None = None

    def seconds(self, done: int, total: int) -> float | None:
        """Seconds until ``total``, now that ``done`` are done; None before anything was done since the first call."""
        now = self._clock()
        if self._seen and done < self._seen[-1][1]:  # started over
            self._seen.clear()
            self._first = None
        if not self._seen or done > self._seen[-1][1]:
            self._seen.append((now, done))
        self._first = now if self._first is None else self._first
        since = now - max(RECENT, (now - self._first) / 2)
        while len(self._seen) > 2 and self._seen[1][0] <= since:
            self._seen.popleft()
        began, before = self._seen[0]
        if done == before:
            return None
        return (now - began) / (done - before) * (total - done)


def spoken(seconds: float) -> str:
    """A duration as text, rounded to what matters: ``8 s``, ``12 min``, ``3 h 20 min``, ``2 days 4 h``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} days {hours % 24} h"
