"""How long-running library functions tell what they are doing, without printing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by the engine, shown by whoever called it."""

    def update(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` steps are finished; ``text`` says what stands."""
        ...

    def note(self, text: str) -> None:
        """A line worth keeping: a finished epoch, a smaller batch, a resumed run."""
        ...


class Silent:
    """Shows nothing."""

    def update(self, done: int, total: int, text: str) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""
