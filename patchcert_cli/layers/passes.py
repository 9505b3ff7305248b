"""Forward passes are reported to listeners while they are made, so that an image that takes minutes shows progress.

Networks of proofs may not carry hooks, so the loops that call them report it. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[int], None]] = []


@contextmanager
def heard(listener: Callable[[int], None]) -> Iterator[None]:
    """Report to ``listener`` how many passes were made, each time; it may raise to stop the work."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def made(count: int) -> None:
    """``count`` passes were made; 0 reports work that is not counted in passes."""
    for listener in tuple(_listeners):
        listener(count)
