"""A paper's tables filled from the zoo: what is measured for each row, how far it is from what is published, and why.

A measurement counts only if its card and the records of the same weights agree; both are read here, image by image. No torch,
except for the intervals of what is not counted in the zoo.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from patchcert_cli.cards import Card, Measured, Sample, weights_sha256
from patchcert_cli.cards.entries import Training
from patchcert_cli.catalog import bundled, claims
from patchcert_cli.papers import times, trained
from patchcert_cli.papers.paper import NOT_OF_THE_PAPER, Counted, Gap, Paper, Row, Table
from patchcert_cli.papers.trained import TrainedRow
from patchcert_cli.schema import plain
from patchcert_cli.threats import Threat, as_options

FOLDERS = "imagenet"  # rows of this data set are measured on images in class folders, which the user names


class Verdict(enum.StrEnum):
    """How a row compares with the paper."""

    REACHED = "reached"
    CLEAN_BELOW = "certified reached, clean below"
    CLOSE = "below, published is inside the interval"
    BELOW = "below"
    NOTHING_PUBLISHED = "published is not known"
    NOT_OF_THE_PAPER = NOT_OF_THE_PAPER
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Measurement:
    """Counts on ``images`` images, and the exact 95 % interval of the certified accuracy.

    Attributes:
        source: where the records are.
        about: what the images are, where they are not the whole test split.
    """

    images: int
    clean: int
    certified: int
    certified_interval: tuple[float, float]
    method: str
    arithmetic: str
    source: str
    about: str = ""


@dataclass(frozen=True)
class FilledRow:
    """A row with its measurement, or the reason why there is none.

    Attributes:
        card: of the row's model; None if it has none or the zoo does not have it.
        missing: why there is no measurement; empty if there is one.
        without_zoo: what was measured of a model that the row's command trained, whose weights were not kept.
        of_the_paper: whether the paper has such a row, so that a number could have been published.
    """

    row: Row
    card: Card | None
    measured: Measurement | None
    missing: str = ""
    without_zoo: TrainedRow | None = None
    of_the_paper: bool = True

    @property
    def network(self) -> str:
        """The network of the row's model as short text; empty if there is none."""
        known = self.card or self.without_zoo
        return known.network if known else ""

    @property
    def trained(self) -> Training | None:
        """What the training took; None if there was none."""
        known = self.card or self.without_zoo
        return known.trained if known else None

    @property
    def began_with(self) -> str:
        """The model whose weights the training began with; empty if it began with fresh ones."""
        return str(self.card.recipe.get("start", "")) if self.card else ""

    @property
    def taught_by(self) -> str:
        """The model whose answers the training also learned from; empty without one."""
        return str(self.card.recipe.get("teacher", "")) if self.card else ""

    @property
    def seconds(self) -> float | None:
        """Of certifying 10,000 images on one core; None if that was not timed, or with other weights."""
        known = weights_sha256(self.card.files) if self.card else self.without_zoo.model_sha256 if self.without_zoo else ""
        key = (self.row.model or self.row.command, self.row.threat, known)
        return next((one.per_split for one in times.read() if (one.of, one.threat, one.model_sha256) == key), None)

    @cached_property
    def difference(self) -> tuple[Fraction | None, Fraction | None]:
        """Measured minus published, clean and certified; None where one of both is not known."""
        if self.measured is None or self.row.published is None:
            return None, None
        given = (self.row.published.clean, self.row.published.certified)
        counts = (self.measured.clean, self.measured.certified)
        clean, certified = (
            None if share is None else Fraction(count, self.measured.images) - Fraction(str(share))
            for count, share in zip(counts, given, strict=True)
        )
        return clean, certified

    @property
    def verdict(self) -> Verdict:
        """How it compares with the paper."""
        clean, certified = self.difference
        if self.measured is None:
            return Verdict.NOT_MEASURED
        if certified is None:
            return Verdict.NOTHING_PUBLISHED if self.row.published or self.of_the_paper else Verdict.NOT_OF_THE_PAPER
        if certified >= 0:
            return Verdict.REACHED if clean is None or clean >= 0 else Verdict.CLEAN_BELOW
        assert self.row.published is not None and self.row.published.certified is not None
        return Verdict.CLOSE if self.row.published.certified <= self.measured.certified_interval[1] else Verdict.BELOW

    @property
    def why(self) -> str:
        """What differs from the paper, after the reason why nothing is measured."""
        return ". ".join(filter(None, (self.missing, self.row.differs)))

    @property
    def can_run(self) -> bool:
        """Whether certify can measure the row: it is not measured, has no command of its own, and its model has weights."""
        return not (self.measured or self.row.command or self.card is None or self.card.status == "recipe only")

    @property
    def command(self) -> str:
        """The command that measures the row."""
        return self.row.command or command_for(self.row, self.card)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        row = plain(self.row)
        clean, certified = (None if one is None else float(one) for one in self.difference)
        return {
            **{name: row[name] for name in ("name", "dataset", "threat", "model", "method", "masks", "mask_shape", "published")},
            "measured": None if self.measured is None else plain(self.measured),
            "difference": {"clean": clean, "certified": certified},
            "verdict": str(self.verdict),
            "why": self.why,
            "seconds": self.seconds,
            "trained": None if self.trained is None else plain(self.trained),
            "command": self.command,
        }


@dataclass(frozen=True)
class FilledTable:
    """A table with its filled rows."""

    table: Table
    rows: tuple[FilledRow, ...]

    def gap(self, gap: Gap) -> Fraction | None:
        """A difference between certified accuracies as measured on equally many images; None if one is not measured."""
        by_name = {one.row.name: one.measured for one in self.rows}
        more, less = by_name[gap.more], by_name[gap.less]
        if more is None or less is None or more.images != less.images:
            return None
        return Fraction(more.certified - less.certified, more.images)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        found = {name: getattr(self.table, name) for name in ("id", "kind", "title", "where", "about")}
        gaps = [{**plain(gap), "measured": None if (share := self.gap(gap)) is None else float(share)} for gap in self.table.gaps]
        rows = [row.to_dict() for row in self.rows]
        if not self.table.guarantee.proves:  # what no attack changed is not certified
            for measured in filter(None, (row["measured"] for row in rows)):
                measured |= {"withstood": measured.pop("certified"), "withstood_interval": measured.pop("certified_interval")}
                measured["arithmetic"] = None
        return {**found, "guarantee": str(self.table.guarantee), "rows": rows, "gaps": gaps}


@dataclass(frozen=True)
class FilledPaper:
    """A paper with its filled tables."""

    paper: Paper
    tables: tuple[FilledTable, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        facts = {name: plain(getattr(self.paper, name)) for name in ("name", "title", "authors", "venue", "read", "defenses")}
        return {**facts, "tables": [one.to_dict() for one in self.tables]}


@dataclass(frozen=True)
class RunRequest:
    """Rows that one run of ``certify`` measures: the same model, images and masks."""

    model: str
    dataset: str
    masks: int
    mask_shape: str
    rows: tuple[Row, ...]

    @property
    def claims(self) -> list[tuple[Threat, str]]:
        """What the run certifies: threats and proofs, each once; no name for the best proof."""
        return list(dict.fromkeys((row.threat, row.method) for row in self.rows))


def fill(paper: Paper, *, table: str | None = None, zoo: Path | None = None) -> FilledPaper:
    """The paper's tables, or one of them, with what the records of the zoo say.

    Raises:
        UnknownName: the paper has no such table.
        ClaimError: a card and its records disagree.
        IntegrityError: a card or a file of records is damaged.
    """
    place = zoo or bundled.folder()
    wanted = paper.tables if table is None else (paper.table(table),)
    tables = tuple(
        FilledTable(one, tuple(replace(_filled(row, one, place), of_the_paper=one.is_of_the_paper(row)) for row in one.rows))
        for one in wanted
    )
    return FilledPaper(paper, tables)


def command_for(row: Row, card: Card | None) -> str:
    """The command that certifies the row's model as the row wants it, or trains it if it is a recipe."""
    if card is not None and card.status == "recipe only":
        return f"patchcert train --recipe {card.name}"
    words = f"patchcert certify {row.model} {as_options(row.threat)}"
    words += f" --masks {row.masks}" if row.masks else ""
    words += f" --mask-shape {row.mask_shape}" if row.mask_shape else ""
    words += method_option(row.method)
    return words + (" --data imagefolder:./val" if row.dataset == FOLDERS else "")


def method_option(method: str) -> str:
    """What makes certify prove with a row's method, `` --bounds interval``; empty where the method has no option."""
    if method in ("3.1", "3.2", "3.3", "exact"):
        return f" --condition {method}"
    return f" --bounds {method}" if method in ("interval", "linear") else ""


def requests(paper: FilledPaper) -> list[RunRequest]:
    """What would have to be run for rows of models with weights that have no measurement.

    Cells vote once for all threats, so rows of one model are one run; masks are made for a threat, so there each threat is one.
    """
    groups: dict[tuple[str, str, int, str, str], list[Row]] = {}
    for one in (row for table in paper.tables for row in table.rows):
        if one.can_run:
            row = one.row
            key = (row.model, row.dataset, row.masks, row.mask_shape, str(row.threat) if row.masks or row.mask_shape else "")
            groups.setdefault(key, []).append(row)
    return [RunRequest(*key[:4], tuple(rows)) for key, rows in groups.items()]


def with_runs(paper: FilledPaper, found: Mapping[Row, Measurement]) -> FilledPaper:
    """The same with further measurements, by row."""

    def measured(one: FilledRow) -> FilledRow:
        new = found.get(one.row) if one.measured is None else None
        return one if new is None else replace(one, measured=new, missing="")

    return replace(paper, tables=tuple(replace(table, rows=tuple(map(measured, table.rows))) for table in paper.tables))


def from_result(result: Mapping[str, Any], request: RunRequest) -> dict[Row, Measurement]:
    """The measurements of the request's rows in the result of certify for its claims."""
    whole = result["full_split"] and result["split"] == "test"
    about = "" if whole else f"not all of {result['dataset']} {result['split']}"
    found = dict(zip(request.claims, result["claims"], strict=True))
    measured = {}
    for row in request.rows:
        claim = found[row.threat, row.method]
        counts = (result["images"], claim["counts"]["clean"], claim["counts"]["certified"])
        low, high = claim["certified_interval"]
        measured[row] = Measurement(*counts, (low, high), claim["method"], str(claim["arithmetic"]), result["records"], about)
    return measured


def _card(name: str, zoo: Path) -> Card | None:
    """The card of a model, checked against its records; None if the zoo does not have it."""
    if name not in bundled.names(zoo):
        return None
    state = tuple((path.name, (facts := path.stat()).st_mtime_ns, facts.st_size) for path in sorted((zoo / name).iterdir()))
    return _checked(name, zoo.resolve(), state)


@lru_cache(maxsize=256)
def _checked(name: str, zoo: Path, state: tuple[tuple[str, int, int], ...]) -> Card:
    """The card, checked once for each state of its files."""
    card = bundled.card(name, zoo)
    if card.results:
        claims.check_results(card, zoo / name)
    claims.check_samples(card, zoo / name)
    return card


def _filled(row: Row, table: Table, zoo: Path) -> FilledRow:
    if not row.model:
        return _without_zoo(row)
    card = _card(row.model, zoo)
    if card is None:
        return FilledRow(row, None, None, f"The zoo has no model {row.model} yet")
    measured, why = _counted(row.counted, card) if row.counted else _from_card(row, table, card)
    if measured is None and card.status == "recipe only":
        why = "A recipe that was not run"
    return FilledRow(row, card, measured, "" if measured else why)


def _without_zoo(row: Row) -> FilledRow:
    """A row without a model, with what was measured of the one that its command trained."""
    one = next((one for one in trained.read() if (one.command, one.threat) == (row.command, row.threat)), None)
    if one is None:
        return FilledRow(row, None, None)
    from patchcert_cli.certificate import clopper_pearson  # imports torch

    interval = clopper_pearson(one.certified, one.images)
    about = f"a fixed sample of the test images (--limit {one.limit})" if one.limit else ""
    counts = (one.images, one.clean, one.certified, interval)
    measured = Measurement(*counts, one.method, str(one.arithmetic), f"papers/{trained.FILE.name}", about)
    return FilledRow(row, None, measured, without_zoo=one)


def _from_card(row: Row, table: Table, card: Card) -> tuple[Measurement | None, str]:
    if row.masks or row.mask_shape:  # results of a card are with the model's own masks; samples name theirs
        masked = [one for one in card.samples if row.sample and one.masks == f"{row.masks} per axis" and not row.mask_shape]
        return _best(row, table, card, masked), ""
    return _best(row, table, card, card.samples if row.sample else card.results), ""


def _best(row: Row, table: Table, card: Card, entries: Iterable[Measured | Sample]) -> Measurement | None:
    fitting = [
        one
        for one in entries
        if one.threat == row.threat
        and row.method in ("", one.method.removeprefix("condition "))
        and one.guarantee is table.guarantee
        if isinstance(one, Sample) or (one.dataset, one.split) == (row.dataset, "test")
    ]
    if not fitting:
        return None
    one = max(fitting, key=lambda entry: (entry.images, entry.certified))
    arithmetic = one.arithmetic if isinstance(one, Sample) else card.arithmetic(one)
    counts = (one.images, one.clean, one.certified, one.certified_interval)
    source = f"zoo/{card.name}/{one.records if isinstance(one, Sample) else 'records.jsonl.gz'}"
    return Measurement(*counts, one.method, str(arithmetic), source, one.pictures if isinstance(one, Sample) else "")


def _counted(counted: Counted, card: Card) -> tuple[Measurement | None, str]:
    if weights_sha256(card.files) != counted.model_sha256:
        return None, f"What {counted.file} counts is about other weights of {card.name}"
    from patchcert_cli.certificate import clopper_pearson  # imports torch

    interval = clopper_pearson(counted.certified, counted.images)
    counts = (counted.images, counted.clean, counted.certified, interval)
    return Measurement(*counts, counted.method, str(counted.arithmetic), counted.file, "a fixed sample of the test images"), ""
