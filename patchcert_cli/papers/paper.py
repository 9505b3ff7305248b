"""A paper as data: its tables and figures, row by row, what it publishes and which model or recipe here answers to it.

One YAML file for each paper, in this folder, so that an installed wheel has them. A number that is not in the file is not
known: a field that is left out reads None, and is shown as :data:`NOT_KNOWN`. No torch here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from patchcert_cli import schema
from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.cards.entries import Name, Sha256, Share, Text, ThreatField
from patchcert_cli.errors import IntegrityError, unknown
from patchcert_cli.schema import Count, NonNegative, Positive, Rule
from patchcert_cli.threats import Guarantee

NOT_KNOWN = "not known"
NOT_OF_THE_PAPER = "not of the paper"
EXAMPLES = "Correct the file; those of patchcert_cli/papers/ are examples."
ENDING = ".yaml"


def _ordered(clean: float | None, certified: float | None) -> Iterable[str]:
    if clean is not None and certified is not None and certified > clean:
        yield f"certified {certified} exceeds clean {clean}"


@dataclass(frozen=True)
class PublishedNumbers:
    """What the paper reports for a row; None is not known.

    Attributes:
        where: where the numbers are, as far as we have read them: abstract, slides, public code, a leaderboard.
        clean: accuracy without an attack, a fraction.
        certified: certified accuracy, a fraction.
        images: how many images they are about.
        parameters: of the network.
        seconds: of certifying 10,000 images.
        training: what training took, and on what.
    """

    where: Text
    clean: Share | None = None
    certified: Share | None = None
    images: Positive | None = None
    parameters: Positive | None = None
    seconds: NonNegative | None = None
    training: str = ""
    rules: ClassVar[tuple[Rule, ...]] = (_ordered,)


def _counts_in_order(images: int, clean: int, certified: int) -> Iterable[str]:
    if not certified <= clean <= images:
        yield f"certified {certified}, clean {clean}, images {images}: each must be at most the next"


@dataclass(frozen=True)
class Counted:
    """Counts from a file of benchmark results in the repository, whose weights had this hash; a test compares them with it.

    Attributes:
        certified: in a table without a guarantee: how many right answers no attack changed.
        file: its path in the repository.
    """

    images: Positive
    clean: Count
    certified: Count
    model_sha256: Sha256
    method: Text
    arithmetic: Arithmetic
    file: Text
    rules: ClassVar[tuple[Rule, ...]] = (_counts_in_order,)


def _measured_once(model: str, command: str, sample: bool, counted: Counted | None, masks: int, mask_shape: str) -> Iterable[str]:
    if not model and not command:
        yield "model and command are both empty: one of them says what measures the row"
    if sample and counted is not None:
        yield "sample and counted are two measurements of one row"
    if not model and (sample or counted is not None or masks or mask_shape):
        yield "sample, counted, masks and mask_shape are for a row with a model"


@dataclass(frozen=True)
class Row:
    """One row of a table, or one point of a figure.

    Attributes:
        name: what it is called; different from the other rows of the table.
        threat: under which it is certified.
        published: the paper's numbers; None if none of them is known.
        model: the model of the zoo that answers to it, or the recipe; it need not exist yet.
        method: the proof; empty for the one that certifies most.
        masks: how many masks along each axis, where not the model's own; 0 for its own.
        mask_shape: likewise their shape.
        sample: whether it is measured on images that are not a test split, as the card's ``samples``.
        counted: what a benchmark counted.
        band: width of the band or side of the block of smoothing, for a chart over it.
        differs: what differs from the paper: parameters, epochs, images.
        command: what measures the row, where it does not follow from model and threat. A row without a model whose command
            trains one gets its measurement from :mod:`patchcert_cli.papers.trained`.
    """

    name: Text
    dataset: Text
    threat: ThreatField
    published: PublishedNumbers | None = None
    model: str = ""
    method: str = ""
    masks: Count = 0
    mask_shape: str = ""
    sample: bool = False
    counted: Counted | None = None
    band: Count = 0
    differs: str = ""
    command: str = ""
    rules: ClassVar[tuple[Rule, ...]] = (_measured_once,)


@dataclass(frozen=True)
class Gap:
    """By how much the certified accuracy of one row exceeds that of another, both of the same model.

    Attributes:
        more, less: names of rows of the table.
        published: the published difference, a fraction; None if it is not known.
        where: where it is published.
    """

    more: Text
    less: Text
    published: float | None = None
    where: str = ""


def _rows_differ(rows: tuple[Row, ...]) -> Iterable[str]:
    yield from (f"rows: {name} occurs more than once" for name, number in Counter(row.name for row in rows).items() if number > 1)


def _gaps_exist(rows: tuple[Row, ...], gaps: tuple[Gap, ...]) -> Iterable[str]:
    known = {row.name for row in rows}
    yield from (f"gaps: there is no row {name}" for gap in gaps for name in (gap.more, gap.less) if name not in known)


def _unit_has_seconds(rows: tuple[Row, ...], seconds_of: str) -> Iterable[str]:
    if seconds_of and not any(row.name == seconds_of and row.published and row.published.seconds for row in rows):
        yield f"seconds_of: there is no row {seconds_of} with published seconds"


def _attacks_have_no_certificates(rows: tuple[Row, ...], guarantee: Guarantee) -> Iterable[str]:
    if not guarantee.proves:
        of_models = (row for row in rows if row.model and not row.counted)
        yield from (f"rows: {row.name} has a model, but nothing is certified here" for row in of_models)


@dataclass(frozen=True)
class Table:
    """A table or a figure of the paper.

    Attributes:
        id: its name in addresses and file names.
        kind: what it is.
        where: which table or figure of the paper it is, as far as it is known; or :data:`NOT_OF_THE_PAPER`.
        about: what it shows, a few sentences.
        axis: what its chart is drawn over; empty for no chart.
        guarantee: of all its rows; ``none`` for accuracy under attacks, which shares no table with certificates.
        training: whether it shows what training took.
        seconds_of: the row in whose seconds those of all rows are also shown, since ratios travel between machines.
        gaps: differences between its rows.
    """

    id: Name
    kind: Literal["table", "figure"]
    title: Text
    where: Text
    rows: tuple[Row, ...]
    about: str = ""
    axis: Literal["", "side", "width", "masks", "band"] = ""
    guarantee: Guarantee = Guarantee.RECOVERY
    training: bool = False
    seconds_of: str = ""
    gaps: tuple[Gap, ...] = ()
    rules: ClassVar[tuple[Rule, ...]] = (_rows_differ, _gaps_exist, _unit_has_seconds, _attacks_have_no_certificates)

    @property
    def place(self) -> str:
        """Where it is in the paper, as the beginning of a sentence."""
        return self.where[:1].upper() + self.where[1:] if self.where == NOT_OF_THE_PAPER else f"In the paper: {self.where}"

    def is_of_the_paper(self, row: Row) -> bool:
        """Whether the paper has such a row, so that a number could have been published."""
        return self.where != NOT_OF_THE_PAPER and not row.differs.lower().startswith(NOT_OF_THE_PAPER)


def _tables_differ(tables: tuple[Table, ...]) -> Iterable[str]:
    yield from (f"tables: {id_} occurs more than once" for id_, number in Counter(one.id for one in tables).items() if number > 1)


@dataclass(frozen=True)
class Paper:
    """A paper.

    Attributes:
        name: the name of its file.
        read: what of it the published numbers were taken from, and what was not at hand.
        defenses: which defenses of this package are its own.
    """

    name: Name
    title: Text
    authors: Text
    venue: Text
    read: Text
    defenses: tuple[Text, ...]
    tables: tuple[Table, ...]
    rules: ClassVar[tuple[Rule, ...]] = (_tables_differ,)

    @classmethod
    def from_text(cls, text: str, where: str) -> Paper:
        """The paper of a YAML text; one :class:`IntegrityError` lists everything that is wrong."""
        try:
            values: Any = yaml.safe_load(text)
            if not isinstance(values, dict):
                raise IntegrityError(
                    f"'{where}' is not a paper: it holds no table of names and values.",
                    hint=EXAMPLES,
                )
            return schema.read(cls, values)
        except yaml.YAMLError as problem:
            raise IntegrityError(
                f"'{where}' is not a paper: {' '.join(str(problem).split())}.",
                hint=EXAMPLES,
            ) from problem
        except schema.Invalid as invalid:
            raise IntegrityError(
                f"'{where}' is not a valid paper: {invalid}.",
                hint=EXAMPLES,
            ) from invalid

    def table(self, id_: str) -> Table:
        """One of its tables.

        Raises:
            UnknownName: there is none of this name.
        """
        for one in self.tables:
            if one.id == id_:
                return one
        raise unknown(f"table of {self.name}", id_, [one.id for one in self.tables])


def names() -> list[str]:
    """The names of all papers."""
    return sorted(path.stem for path in Path(__file__).parent.glob(f"*{ENDING}"))


@cache
def load(name: str) -> Paper:
    """The paper of this name.

    Raises:
        UnknownName: there is none.
        IntegrityError: its file is wrong; everything that is wrong is listed.
    """
    if name not in names():
        raise unknown("paper", name, names(), see="patchcert reproduce")
    path = Path(__file__).parent / f"{name}{ENDING}"
    paper = Paper.from_text(path.read_text(encoding="utf-8"), str(path))
    if paper.name != name:
        raise IntegrityError(f"'{path}' is of the paper {paper.name}.", hint="A file of papers has the name of its paper.")
    return paper
