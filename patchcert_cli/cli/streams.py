"""stdout that says in one line when it cannot be written to, and stderr that never stops a command.

A reader that has enough, such as ``| head``, ends the command without a word, with the exit code that a shell shows for SIGPIPE.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from patchcert_cli.errors import MachineError

READER_LEFT = 141  # 128 + SIGPIPE


class _Stream:
    """A text stream with all its attributes; what happens when it cannot be written to is for subclasses to say."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write some text."""
        try:
            return self._stream.write(text)
        except OSError as problem:
            self._lost(problem)
            return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        try:
            self._stream.flush()
        except OSError as problem:
            self._lost(problem)

    def _lost(self, problem: OSError) -> None:
        """Send what is left nowhere, so that the interpreter does not fail on it when it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


class _Output(_Stream):
    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._problem: OSError | None = None

    def write(self, text: str) -> int:
        self._tell()
        return super().write(text)

    def _lost(self, problem: OSError) -> None:
        super()._lost(problem)
        self._problem = problem
        self._tell()

    def _tell(self) -> None:
        """Raise what happened, again and again: libraries try streams out and swallow what that raises."""
        if isinstance(self._problem, BrokenPipeError):
            raise SystemExit(READER_LEFT)
        if self._problem is not None:
            raise MachineError(
                f"stdout cannot be written to: {self._problem.strerror or self._problem}.",
                hint="What was computed is in the run folder, if there is one.",
            ) from self._problem


@contextmanager
def guarded() -> Iterator[None]:
    """Make sure that files 0, 1 and 2 are open, and watch stdout and stderr: :class:`MachineError` if stdout fails."""
    before = sys.stdout, sys.stderr
    for number in range(3):  # else the next file that is opened gets the number, and what is printed goes into it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        if sys.stderr is not None:
            sys.stderr = cast(TextIO, _Stream(sys.stderr))
        if sys.stdout is not None:
            sys.stdout = cast(TextIO, _Output(sys.stdout))
        yield
    finally:
        sys.stdout, sys.stderr = before


def require_stdout() -> None:
    """Refuse to begin without a place to tell the result.

    Raises:
        MachineError: stdout is closed.
    """
    if sys.stdout is None:
        raise MachineError("stdout is closed, and results go there.", hint="Add >/dev/null if you do not need them.")
