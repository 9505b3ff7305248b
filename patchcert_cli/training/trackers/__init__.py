"""Trackers by name: each module of this folder is one, and its file name is its name everywhere; ``_`` marks shared code.

They show what ``metrics.jsonl`` has. None is used by default; the first rank of a job tracks for all.
"""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchcert_cli import registry
from patchcert_cli.errors import first_line
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage import files
from patchcert_cli.training.trackers._base import TrackedRun as TrackedRun
from patchcert_cli.training.trackers._base import Tracker as Tracker
from patchcert_cli.training.trackers._base import require

TRACKED = "trackers.json"  # in the run folder: the id of the run, and how many epochs each tracker has


def names() -> list[str]:
    """All tracker names."""
    return registry.names("tracker", __path__)


def by_name(name: str) -> type[Tracker]:
    """The one :class:`Tracker` class that the module ``name`` defines, if its library is installed.

    Raises:
        UnknownName: there is no tracker of this name.
        MachineError: its library is not installed.
    """
    # mypy refuses an abstract class where a type is expected; the result is a concrete subclass of it
    found = registry.only_class(registry.entry("tracker", __name__, name, __path__), Tracker)  # type: ignore[type-abstract]
    require(name, found)
    return found


@dataclass
class _Entry:
    tracker: Tracker
    epochs: int  # that it has


class Tracking:
    """The trackers of one run. One that fails is left out from then on, with one line; training goes on.

    Raises:
        UnknownName: there is no tracker of such a name.
        MachineError: the library of one is not installed.
    """

    def __init__(self, trackers: Sequence[str] = (), progress: Progress | None = None) -> None:
        self._classes = {name: by_name(name) for name in trackers}
        self._progress = progress or Silent()
        self._entries: dict[str, _Entry] = {}
        self._id, self._folder = "", Path()
        self._epochs: dict[str, int] = {}  # that each tracker has, those of earlier calls included

    @contextmanager
    def of(self, recipe: Mapping[str, Any], folder: Path, epochs: int) -> Iterator[None]:
        """Track a run of ``epochs`` epochs in ``folder`` as long as the block lasts."""
        self._begin(recipe, folder, epochs)
        try:
            yield
        finally:
            for name in list(self._entries):
                with self._guarded(name):
                    self._entries[name].tracker.finish()

    def update(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the metrics of the epochs that a tracker does not have yet, among ``rows``, one for each epoch so far."""
        if not any(entry.epochs < len(rows) for entry in self._entries.values()):
            return
        for name, entry in list(self._entries.items()):
            with self._guarded(name):
                for row in rows[entry.epochs :]:
                    entry.tracker.log(row["epoch"], {key: value for key, value in row.items() if key != "epoch"})
                    entry.epochs += 1
        self._keep()

    def _begin(self, recipe: Mapping[str, Any], folder: Path, epochs: int) -> None:
        path = folder / TRACKED
        before = files.read_json(path) if self._classes and path.exists() else {}
        self._id, self._folder = str(before.get("id") or uuid.uuid4().hex[:12]), folder
        self._epochs = dict(before.get("epochs", {}))
        run = TrackedRun(folder.resolve().name, self._id, folder, dict(recipe))
        for name, tracker in self._classes.items():
            has = self._epochs.get(name, 0)
            if has < epochs:
                with self._guarded(name):
                    self._entries[name] = _Entry(tracker(), has)
                    self._entries[name].tracker.start(run)
        self._keep()

    def _keep(self) -> None:
        if self._entries:
            self._epochs |= {name: entry.epochs for name, entry in self._entries.items()}
            files.write_json(self._folder / TRACKED, {"id": self._id, "epochs": self._epochs})

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Calls of a tracker: what it prints goes to stderr, and whatever it raises ends it."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as problem:  # libraries that use a network may raise anything
            self._entries.pop(name, None)
            self._progress.note(f"tracker {name} failed: {first_line(problem)}; training goes on without it")
