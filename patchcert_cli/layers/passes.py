"""Passes of a network, told while they are made to whoever listens: so an image that takes minutes shows that it goes on.

Networks of proofs may not carry hooks, so the loops that ask them tell it. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[int], None]] = []


@contextmanager
def heard(listener: Callable[[int], None]) -> Iterator[None]:
    """Tell ``listener`` how many passes were made, each time some were; it may raise to stop the work."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def made(count: int) -> None:
    """``count`` passes were made; 0 says that work goes on which is not counted in passes."""
    for listener in tuple(_listeners):
        listener(count)
