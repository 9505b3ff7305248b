"""How long-running library functions report progress, without printing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called by the library, implemented by the caller, such as the command line."""

    def update(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` steps are finished; ``text`` is the status line."""
        ...

    def note(self, text: str) -> None:
        """A line to keep on the screen: a finished epoch, a smaller batch, a resumed run."""
        ...


class Silent:
    """Shows nothing."""

    def update(self, done: int, total: int, text: str) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
