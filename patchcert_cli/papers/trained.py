"""Rows of papers that were trained with the command of the row and certified, without a model in the zoo.

Tables that compare settings (band widths, margins, ways to pick locations) need many short trainings. Their weights are not kept:
the command trains them again. What is kept is the verdict on every image, in ``trained.json`` beside the papers, so every number
is counted from records here too. ``benchmarks/rows.py`` makes the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from patchcert_cli import schema
from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.cards.entries import Sha256, Text, ThreatField, Training
from patchcert_cli.papers import kept
from patchcert_cli.schema import Count, Rule
from patchcert_cli.storage import files

FILE = Path(__file__).parent / "trained.json"
WRONG, RIGHT, CERTIFIED = "012"  # verdicts: a wrong answer, a right one, a right one that is certified


def _verdicts_are_known(verdicts: str) -> Iterable[str]:
    if not verdicts or set(verdicts) - {WRONG, RIGHT, CERTIFIED}:
        yield f"verdicts has other characters than {WRONG}, {RIGHT} and {CERTIFIED}, or none"


@dataclass(frozen=True)
class TrainedRow:
    """What certify measured of a model that ``command`` trained.

    Attributes:
        command: the row's.
        threat: under which it was certified.
        network: short text, as on cards.
        trained: time, device and versions of the training.
        limit: how many images; 0 for the whole split. They are those of ``certify --limit``.
        seed: of the choice of the images.
        verdicts: one character for each image, in the order of their index in the split.
    """

    command: Text
    threat: ThreatField
    dataset: Text
    method: Text
    arithmetic: Arithmetic
    model_sha256: Sha256
    network: Text
    trained: Training
    limit: Count
    seed: Count
    verdicts: Text
    rules: ClassVar[tuple[Rule, ...]] = (_verdicts_are_known,)

    @property
    def images(self) -> int:
        """How many images were certified."""
        return len(self.verdicts)

    @cached_property
    def certified(self) -> int:
        """How many right answers are certified."""
        return self.verdicts.count(CERTIFIED)

    @cached_property
    def clean(self) -> int:
        """How many answers are right."""
        return self.certified + self.verdicts.count(RIGHT)


def folder_name(command: str) -> str:
    """The run folder of a row's training, inside that of all such runs."""
    return hashlib.sha256(command.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _File:
    rows: tuple[TrainedRow, ...]


def read(path: Path | None = None) -> tuple[TrainedRow, ...]:
    """All such rows, by default those of :data:`FILE`; none if there is no file.

    Raises:
        IntegrityError: the file is damaged.
    """
    found = kept.read(_File, path or FILE, "python benchmarks/rows.py")
    return found.rows if found else ()


def write(rows: Iterable[TrainedRow], path: Path) -> None:
    """Write the file: a row a line, in the order of commands, so that versions can be compared."""
    ordered = sorted(rows, key=lambda row: (row.command, str(row.threat)))
    lines = ",\n".join(json.dumps(schema.plain(row)) for row in ordered)
    files.write_atomically(path, f'{{"rows": [\n{lines}\n]}}\n'.encode())
