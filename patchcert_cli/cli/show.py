"""Progress and results on the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from patchcert_cli.evaluation.pace import Clock, Left, spoken
from patchcert_cli.storage.files import json_bytes, write_named

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

PATIENCE = 1.0  # seconds before any progress is shown
PLAIN_EVERY = 10.0  # seconds between plain progress lines


class TerminalProgress:
    """A bar on stderr, or plain lines where it is no terminal, with the time to the end; nothing for work under a second."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.bars: Bars | None = None
        self.task: TaskID | None = None
        self.clock, self.left, self.total = clock, Left(clock), -1
        self.began = self.spoke = clock()

    def update(self, done: int, total: int, text: str) -> None:
        """Show how far the work is, and how long the rest takes."""
        now = self.clock()
        if total != self.total:  # another piece of work
            self.total, self.left = total, Left(self.clock)
        left = self.left.seconds(done, total)
        if now - self.began < PATIENCE:
            return
        if left is not None and done < total:
            text += f", {spoken(left)} left"
        if self.console.is_terminal:
            if self.bars is None:
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
                from rich.progress import Progress as Bars

                columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
                self.bars = Bars(*columns, console=self.console, transient=True)
                self.bars.start()
                self.task = self.bars.add_task(text, total=total)
            assert self.task is not None
            self.bars.update(self.task, completed=done, total=total, description=text)
        elif now - self.spoke >= PLAIN_EVERY:
            self.spoke = now
            typer.echo(f"{done}/{total} {text}", err=True)

    def note(self, text: str) -> None:
        """Show a line that stays."""
        if self.bars is not None:
            self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(text, err=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.bars is not None:
            self.bars.stop()


@contextmanager
def progress() -> Iterator[TerminalProgress]:
    """A :class:`TerminalProgress` that is removed at the end, whatever happens."""
    shown = TerminalProgress()
    try:
        yield shown
    finally:
        shown.close()


def say(text: str) -> None:
    """A remark on stderr; nothing if it is empty."""
    if text:
        typer.echo(text, err=True)


def result(rows: Sequence[tuple[str, str]], value: dict[str, Any], json_to: str | None) -> None:
    """Print a result as a table on stdout, or as JSON there, and write JSON to a file if asked."""
    if json_to == "-":
        typer.echo(json.dumps(value, indent=2))
        return
    try:  # a table that cannot be printed must not cost the file
        _print_rows(rows)
    finally:
        if json_to is not None:
            write_named(Path(json_to), json_bytes(value))


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            typer.echo(f"{name:<{width}}  {text}")
