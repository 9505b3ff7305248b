"""How long certifying took for rows of papers, all of them in one run of one core: ``times.json``, from ``benchmarks/times.py``.

Seconds travel badly between machines, so tables show them as ratios to a row (``seconds_of``) beside those of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from patchcert_cli import schema
from patchcert_cli.cards.entries import Sha256, Text, ThreatField
from patchcert_cli.papers import kept
from patchcert_cli.schema import NonNegative, Positive
from patchcert_cli.storage import files

FILE = Path(__file__).parent / "times.json"
IMAGES = 10_000  # that published seconds are of


@dataclass(frozen=True)
class TimedRow:
    """What certifying took.

    Attributes:
        of: the model, or the command that trains it.
        threat: under which it was certified.
        images: how many images were certified.
        seconds: of one core, for these images.
        model_sha256: of the weights.
    """

    of: Text
    threat: ThreatField
    images: Positive
    seconds: NonNegative
    model_sha256: Sha256

    @property
    def per_split(self) -> float:
        """Seconds for :data:`IMAGES` images."""
        return self.seconds / self.images * IMAGES


@dataclass(frozen=True)
class _File:
    machine: Text
    rows: tuple[TimedRow, ...]


def read(path: Path | None = None) -> tuple[TimedRow, ...]:
    """All such rows, by default those of :data:`FILE`; none if there is no file.

    Raises:
        IntegrityError: the file is damaged.
    """
    found = kept.read(_File, path or FILE, "python benchmarks/times.py")
    return found.rows if found else ()


def write(machine: str, rows: list[TimedRow], path: Path) -> None:
    """Write such a file; all rows are of one run."""
    files.write_json(path, schema.plain(_File(machine, tuple(rows))))
