"""Progress, results and errors on the terminal: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from patchcert_cli.errors import PatchcertError
from patchcert_cli.evaluation.pace import Clock, Left, spoken
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage.files import json_bytes, write_named

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    Rows = Sequence[tuple[str, str]]

PATIENCE = 1.0  # seconds before any progress is shown
PLAIN_EVERY = 10.0  # seconds between plain progress lines
_quiet = False
_silent = False  # of all ranks of a job but the first


def set_quiet(value: bool) -> bool:
    """Callback of ``--quiet``: from now on :func:`progress` and :func:`say` print nothing, or again what there is."""
    global _quiet
    _quiet = value
    return value


def set_silent(value: bool) -> None:
    """From now on nothing is printed but errors, and no file of a result is written; or again all of it."""
    global _silent
    _silent = value


class TerminalProgress:
    """A bar on stderr, or plain lines where it is not a terminal, with the time left; nothing for work under a second."""

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
def progress() -> Iterator[Progress]:
    """Progress on the terminal, removed at the end, whatever happens; none with ``--quiet``."""
    if _quiet or _silent:
        yield Silent()
        return
    shown = TerminalProgress()
    try:
        yield shown
    finally:
        shown.close()


def say(text: str) -> None:
    """A remark on stderr; nothing if it is empty, and nothing with ``--quiet``."""
    if text and not _quiet and not _silent:
        typer.echo(text, err=True)


def error(problem: PatchcertError, about: str = "") -> None:
    """An error on stderr, on one line, and its hint on another; ``about`` names what it concerns."""
    prefix = f"{about}: " if about and about not in problem.message else ""
    typer.echo(f"error[{problem.code}]: {prefix}{problem.message}", err=True)
    if problem.hint:
        typer.echo(f"hint: {problem.hint}", err=True)


def result(rows: Rows, value: Any, json_to: str | None) -> None:
    """Print a result as two columns on stdout, or as JSON there, and write JSON to a file if asked."""
    printed(lambda: pairs(rows), value, json_to)


def printed(table: Callable[[], None], value: Any, json_to: str | None) -> None:
    """Print something on stdout, or ``value`` as JSON in its place (``-``), and write that to a file if asked."""
    if _silent:
        return
    if json_to == "-":
        typer.echo(json.dumps(value, indent=2))
        return
    try:  # a table that cannot be printed must not cost the file
        table()
    finally:
        if json_to is not None:
            write_named(Path(json_to), json_bytes(value))


def table(rows: Sequence[Mapping[str, str]], first: Sequence[str] = ()) -> None:
    """Print rows under their column names: all columns, or on a terminal as many of ``first`` as there is room for.

    No cell is ever shortened.
    """
    columns = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    if not sys.stdout.isatty():
        for cells in (columns, *([row[name] for name in columns] for row in rows)):
            typer.echo("  ".join(cell.ljust(widths[name]) for cell, name in zip(cells, columns, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    order = [*first, *(name for name in columns if name not in first)]
    room = accumulate(widths[name] + 2 for name in order)
    fitting = {name for name, end in zip(order, room, strict=True) if end <= console.width} or set(order[:1])
    shown = [name for name in columns if name in fitting]
    drawn = Table(*(Column(name, no_wrap=True, overflow="ignore") for name in shown), box=None)
    for row in rows:
        drawn.add_row(*(row[name] for name in shown))
    console.width = max(console.width, widths[order[0]] + 2)  # the terminal may break a line, but nothing is cut off
    console.print(drawn, crop=False)
    if len(shown) < len(columns):
        say(f"not shown: {', '.join(name for name in columns if name not in shown)}; widen the terminal, or see --json")


def pairs(rows: Rows) -> None:
    """Print names and texts in two columns."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(show_header=False, box=None, padding=(0, 2))
        drawn.add_column(style="bold", no_wrap=True)
        drawn.add_column(overflow="fold")
        for row in rows:
            drawn.add_row(*row)
        Console().print(drawn)
    else:
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            typer.echo(f"{name:<{width}}  {text}")
