"""Filled tables of papers as text: cells for the terminal and for Markdown.

Published and measured numbers are in columns of their own, and a number that is not known is shown as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from patchcert_cli.papers import NOT_KNOWN
from patchcert_cli.papers.fill import FilledPaper, FilledRow, FilledTable, Measurement
from patchcert_cli.papers.paper import Gap, PublishedNumbers
from patchcert_cli.reporting.numbers import interval, percent

NONE = "-"
MEASURED, UNDER_ATTACKS = "measured", "clean / under attacks"  # columns; no certificate is in the second
FIRST = ("row", "published", MEASURED, UNDER_ATTACKS, "verdict", "difference", "images")  # on a terminal with little room
ABOUT = "Accuracies are clean / certified, in percent; published numbers belong to the paper's own weights."


def cells(one: FilledRow, table: FilledTable) -> dict[str, str]:
    """The texts of a row by the names of their columns, the same for all rows of the table."""
    row, measured = one.row, one.measured
    published = row.published or PublishedNumbers(NOT_KNOWN)
    found = {
        "row": row.name,
        "threat": str(row.threat),
        "model": row.model or NONE,
        "published": pair(published.clean, published.certified) if row.published or one.of_the_paper else NONE,
    }
    numbers = measured_column(table)
    if measured is None:
        found |= {numbers: NONE, "95 % interval": NONE, "images": NONE, "arithmetic": NONE}
    else:
        found[numbers] = pair(measured.clean / measured.images, measured.certified / measured.images)
        found |= {"95 % interval": interval(measured.certified_interval), "images": images(measured)}
        found["arithmetic"] = measured.arithmetic if table.table.guarantee.proves else "no certificate"
    found |= {"difference": difference(one), "verdict": str(one.verdict)}
    if any(other.row.published and other.row.published.images for other in table.rows):
        found["published images"] = number(published.images)
    if any(other.row.published and other.row.published.parameters for other in table.rows):
        found |= {
            "published network": size(published.parameters),
            "network": one.network or NONE,
        }
    if any(other.row.published and other.row.published.seconds for other in table.rows):
        found["published seconds"] = number(published.seconds)
        timed = any(other.seconds is not None for other in table.rows)
        if timed:
            found["seconds of one core"] = NONE if one.seconds is None else f"{one.seconds:.0f}"
        for unit in (other for other in table.rows if other.row.name == table.table.seconds_of):
            assert unit.row.published is not None
            name = f"seconds / {table.table.seconds_of}"
            found[f"published {name}"] = ratio(published.seconds, unit.row.published.seconds, NOT_KNOWN)
            if timed:
                found[name] = ratio(one.seconds, unit.seconds, NONE)
    if table.table.training:
        found |= {"published training": published.training or NOT_KNOWN, "training": training(one)}
    return found


def measured_column(table: FilledTable) -> str:
    """The name of the column of measured numbers."""
    return MEASURED if table.table.guarantee.proves else UNDER_ATTACKS


def pair(clean: float | None, certified: float | None) -> str:
    """Two accuracies: ``93.81 / 61.85``."""
    if clean is None and certified is None:
        return NOT_KNOWN
    return " / ".join(NOT_KNOWN if share is None else percent(share) for share in (clean, certified))


def number(value: float | None) -> str:
    """A number, or that it is not known."""
    return NOT_KNOWN if value is None else f"{value:g}"


def ratio(seconds: float | None, unit: float | None, otherwise: str) -> str:
    """One time in units of another: ``0.96``."""
    return f"{seconds / unit:.2f}" if seconds is not None and unit else otherwise


def images(measured: Measurement) -> str:
    """How many images, and which, where they are not a whole test split: ``150, one of each of 150 classes``."""
    about = measured.about.removeprefix(f"{measured.images} images ")
    return f"{measured.images}, {about}" if about else str(measured.images)


def size(parameters: int | None) -> str:
    """How many parameters: ``38M parameters``."""
    return NOT_KNOWN if parameters is None else f"{parameters / 1e6:g}M parameters"


def training(one: FilledRow) -> str:
    """What the training took, that of weights it began with apart: ``14 min, cpu, 1 thread, after mnist-ibp-p5``."""
    if one.trained is None:
        return NONE
    done = one.trained
    threads = f", {done.threads} thread{'s' * (done.threads != 1)}" if done.device == "cpu" else ""
    others = "".join(f", {how} {name}" for how, name in (("after", one.began_with), ("taught by", one.taught_by)) if name)
    return f"{done.seconds / 60:.0f} min, {done.device}{threads}{others}"


def points(share: Fraction | None) -> str:
    """A difference of accuracies in percentage points, with its sign; ``-`` if it is not known."""
    return NONE if share is None else f"{100 * float(share):+.2f}"


def difference(one: FilledRow) -> str:
    """Measured minus published, clean / certified, in percentage points."""
    found = one.difference
    return NONE if found == (None, None) else " / ".join(map(points, found))


def gap(one: Gap, table: FilledTable) -> str:
    """A difference between two rows as a sentence."""
    measured = table.gap(one)
    published = NOT_KNOWN if one.published is None else f"{100 * one.published:g} points ({one.where})"
    found = "not measured" if measured is None else f"measured {points(measured)} points"
    return f"{one.more} over {one.less}: published {published}, {found}."


def notes(paper: FilledPaper, table: FilledTable) -> list[tuple[str, str]]:
    """What differs from the paper, by the names of the rows, and how rows without a measurement get one."""
    found: dict[str, list[str]] = {}
    for one in table.rows:
        if one.row.published is not None:
            found.setdefault(f"Published: {one.row.published.where}", []).append(one.row.name)
    waiting = [one.row.name for one in table.rows if one.can_run]
    for one in table.rows:
        if one.why:
            found.setdefault(one.why, []).append(one.row.name)
    if waiting:
        found[f"Not measured yet: `patchcert reproduce {paper.paper.name} --table {table.table.id} --run`"] = waiting
    for one in table.rows:
        if one.measured is None and not one.can_run:
            found.setdefault(f"Not measured yet: `{one.command}`", []).append(one.row.name)
    return [("All rows" if len(names) == len(table.rows) > 1 else "; ".join(names), text) for text, names in found.items()]


def heading(table: FilledTable) -> str:
    """The title of a table, and where it is in the paper."""
    place = table.table.place
    return f"{table.table.title} ({place[:1].lower()}{place[1:]})"


def markdown(paper: FilledPaper, charts: Mapping[str, str]) -> str:
    """The paper as Markdown; ``charts`` names the file of each table's chart, by the id of the table."""
    lines = [f"# {paper.paper.title}", "", f"{paper.paper.authors}, {paper.paper.venue}.", ""]
    lines += [f"Read for the published numbers: {paper.paper.read}", "", ABOUT, ""]
    for table in paper.tables:
        lines += [f"## {table.table.title}", "", f"{table.table.place}. {table.table.about}".strip(), ""]
        if table.table.id in charts:
            lines += [f"![{table.table.title}]({charts[table.table.id]})", ""]
        lines += grid([cells(row, table) for row in table.rows])
        lines += ["", *(gap(one, table) for one in table.table.gaps)]
        lines += ["", *(f"- {escaped(names)}: {escaped(text)}" for names, text in notes(paper, table)), ""]
    return "\n".join(lines).rstrip() + "\n"


def grid(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"| {' | '.join('---' for _ in names)} |"]
    return lines + [f"| {' | '.join(escaped(row[name]) for name in names)} |" for row in rows]


def escaped(text: str) -> str:
    """A text that Markdown does not read as a column, a tag or emphasis."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
