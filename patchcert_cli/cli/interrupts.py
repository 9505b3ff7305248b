"""Ctrl-C that is never lost: during an import it waits until the module is there.

Modules of C code import others while they begin, and some swallow what that raises, KeyboardInterrupt included.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 0.1  # seconds until a signal that came during an import is raised again


@contextmanager
def interrupts() -> Iterator[None]:
    """As long as the block lasts, Ctrl-C raises KeyboardInterrupt at the next moment in which nothing is imported.

    A second Ctrl-C does not wait: the module may be of a user, and never come to an end.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    handler = _Handler()
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        handler.end()
        signal.signal(signal.SIGINT, signal.default_int_handler)


class _Handler:
    def __init__(self) -> None:
        self._typed, self._own, self._over = 0, False, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._typed, self._own = self._typed + (not self._own), False
        if self._typed > 1 or not _importing(frame):
            self.end()
            raise KeyboardInterrupt
        later = threading.Timer(AGAIN, self._again, [number])
        later.daemon = True
        later.start()

    def end(self) -> None:
        """What was put off is not raised any more."""
        self._over = True

    def _again(self, number: int) -> None:
        if not self._over:
            self._own = True
            signal.raise_signal(number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False
