"""What every tracker is: a library that shows the metrics of training runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, final

from patchcert_cli.errors import MachineError, first_line

PROJECT = "patchcert"


@dataclass(frozen=True)
class TrackedRun:
    """A training run as trackers know it.

    Attributes:
        name: that of its folder.
        id: random and kept in the folder: a resumed run has the same one, and one that is started over another one.
        folder: the run folder.
        recipe: plain values.
    """

    name: str
    id: str
    folder: Path
    recipe: dict[str, Any]


class Tracker(ABC):
    """A tracker of one run; authors write the three methods. Whatever they raise, training goes on without the tracker."""

    module: ClassVar[str]  # of its library, which is imported by this name
    library: Any

    @final
    def __init__(self) -> None:
        self.library = import_module(self.module)

    @abstractmethod
    def start(self, run: TrackedRun) -> None:
        """Begin, or go on with a run of this id."""

    @abstractmethod
    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show the metrics of an epoch; each epoch comes once, in order, resumed runs included."""

    @abstractmethod
    def finish(self) -> None:
        """The run has ended, or this process has."""


def require(name: str, tracker: type[Tracker]) -> None:
    """Raise :class:`MachineError` unless the library of a tracker can be imported."""
    try:
        import_module(tracker.module)
    except Exception as problem:  # a broken library may raise anything
        said = f"--track {name} cannot import '{tracker.module}': {first_line(problem)}."
        raise MachineError(said, hint=f"Type: pip install 'patchcert[{name}]'") from problem
