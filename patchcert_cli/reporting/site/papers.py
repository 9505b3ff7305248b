"""Papers as web pages: each table with published beside measured numbers, and both in one chart.

A folder gets for each paper an HTML page that loads nothing, the same as Markdown, and an SVG file for each chart. The style, the
policy and the charts are those of the zoo's page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from patchcert_cli.catalog import bundled
from patchcert_cli.papers.fill import FilledPaper, FilledRow, FilledTable
from patchcert_cli.papers.paper import Row
from patchcert_cli.reporting import figure_style, plots
from patchcert_cli.reporting import papers as texts
from patchcert_cli.reporting.figure_style import DASHES, Heading, Look
from patchcert_cli.reporting.plots import HEIGHT, WIDTH, Point, Series
from patchcert_cli.reporting.site import charts, page
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch

GENERATOR = "patchcert reproduce"
PUBLISHED = "published"
AXES = {
    "side": "side of a square patch, pixels",
    "width": "width of the patch, pixels",
    "masks": "masks along each axis",
    "band": "width of the band or side of the block, pixels",
}
HOLLOW = {"●": "○", "■": "□", "◆": "◇", "▲": "△", "▼": "▽", "✚": "✛"}  # marks of published numbers


@dataclass(frozen=True)
class Line:
    """Points of one model, or what is published about it; ``tips`` has a tooltip for each point."""

    series: Series
    tips: tuple[str, ...]

    @property
    def glyph(self) -> str:
        """The mark as text."""
        return HOLLOW[self.series.look.glyph] if self.series.hollow else self.series.look.glyph


def write(papers: Sequence[FilledPaper], folder: Path, *, force: bool = False) -> list[Path]:
    """Write the pages of these papers; returns the paths of all files.

    Raises:
        UsageError: the folder is a file or below one, or has a file of the same name that this command did not write, without
            ``force``.
        MachineError: it cannot be written, or matplotlib is not installed.
    """
    figure_style.require()
    files.check_folder(folder, "--out")
    drawn = {paper.paper.name: {table.table.id: lines(table) for table in paper.tables if table.table.axis} for paper in papers}
    names = [f"{name}{end}" for name, found in drawn.items() for end in (".html", ".md", *(f"-{id_}.svg" for id_ in found))]
    for name in names:
        page.keep_others(folder / name, GENERATOR, force=force)
    written = []
    for paper in papers:
        name = paper.paper.name
        svgs = {id_: f"{name}-{id_}.svg" for id_, found in drawn[name].items() if found}
        for id_, svg in svgs.items():
            (table,) = [one for one in paper.tables if one.table.id == id_]
            draw_file(table, drawn[name][id_], folder / svg)
        files.write_named(folder / f"{name}.html", render(paper, drawn[name]).encode())
        files.write_named(folder / f"{name}.md", f"<!-- {GENERATOR} -->\n{texts.markdown(paper, svgs)}".encode())
        written += [folder / one for one in (f"{name}.html", f"{name}.md", *svgs.values())]
    return written


def render(paper: FilledPaper, drawn: dict[str, list[Line]]) -> str:
    """The page about a paper."""
    return page.filled(
        "paper.html",
        GENERATOR,
        paper=paper,
        charts={id_: Markup(draw_inline(paper, id_, found)) for id_, found in drawn.items() if found},
        lines=drawn,
        texts=texts,
        newest=max((one.date for row in _rows(paper) if row.card for one in row.card.results), default=""),
    )


def lines(table: FilledTable) -> list[Line]:
    """What the chart of a table shows: a line for each model, and published points beside it.

    A row is on it where both accuracies are known and its threat is on the axis.
    """
    looks = charts.looks(bundled.cards().values())
    measured: dict[str, list[tuple[Point, str]]] = {}
    published: dict[str, list[tuple[Point, str]]] = {}
    for one in table.rows:
        x = place(one.row, table.table.axis)
        if x is None:
            continue
        if one.measured is not None:
            counts = one.measured
            low, high = (100 * end for end in counts.certified_interval)
            point = Point(x, 100 * counts.clean / counts.images, 100 * counts.certified / counts.images, low, high)
            measured.setdefault(_line_of(one.row), []).append((point, _tip(one)))
        if one.row.published and one.row.published.clean is not None and one.row.published.certified is not None:
            clean, certified = 100 * one.row.published.clean, 100 * one.row.published.certified
            tip = f"published, {one.row.name}: clean {clean:.2f} %, certified {certified:.2f} %; {one.row.published.where}"
            published.setdefault(_line_of(one.row), []).append((Point(x, clean, certified, certified, certified), tip))
    models = list(dict.fromkeys((*measured, *published)))
    start = max((look.index for look in looks.values()), default=-1) + 1
    looks |= {name: Look(start + i) for i, name in enumerate(name for name in models if name not in looks)}
    both = (*((name, False) for name in measured), *((name, True) for name in published))
    return [_line(name, looks[name], (published if hollow else measured)[name], hollow) for name, hollow in both]


def _line(name: str, look: Look, found: list[tuple[Point, str]], hollow: bool) -> Line:
    ordered = sorted(found, key=lambda pair: pair[0].x)
    label = f"{PUBLISHED}, beside {name}" if hollow else name  # not the model's own number
    return Line(Series(label, look, tuple(point for point, _ in ordered), hollow), tuple(tip for _, tip in ordered))


def _line_of(row: Row) -> str:
    """The line that a row is a point of: its model, or without one what the name begins with (``Column, band 4``)."""
    return row.model or row.name.partition(",")[0]


def place(row: Row, axis: str) -> int | None:
    """Where a row is on an axis; None if it is not on it."""
    if axis == "side":
        found = charts.strength(row.threat)
        return found[1] if found and found[0] == "side" else None
    if axis == "width":
        return row.threat.width if isinstance(row.threat, Patch) else None
    return {"masks": row.masks, "band": row.band}.get(axis) or None


def draw_inline(paper: FilledPaper, id_: str, found: Sequence[Line]) -> str:
    """The chart as an SVG element for the page."""
    (table,) = [one for one in paper.tables if one.table.id == id_]
    return plots.model_curves(
        [line.series for line in found],
        xlabel=AXES[table.table.axis],
        about=f"{table.table.title}: published and measured certified accuracy",
        titles={line.series.name: line.tips for line in found},
        salt=f"{paper.paper.name} {id_}",
    )


def draw_file(table: FilledTable, found: Sequence[Line], path: Path) -> None:
    """The chart as a file of its own, with a heading and a legend."""
    note = "certified accuracy with exact 95 % intervals; hollow: published; dashed: clean"
    heading = Heading.of(table.table.title, note, WIDTH)
    width = WIDTH + 1.2
    with figure_style.figure(path, width, HEIGHT + heading.height, digest=GENERATOR) as figure:
        axes = plots.accuracy_axes(figure, heading, below=0.55)
        axes.set_xlabel(AXES[table.table.axis])
        axes.set_xticks(sorted({point.x for line in found for point in line.series.points}))
        for line in found:
            series, color = line.series, line.series.look.color
            x, y = [point.x for point in series.points], [point.certified for point in series.points]
            if not series.hollow:
                axes.vlines(x, [p.low for p in series.points], [p.high for p in series.points], colors=color, linewidth=1.2)
                axes.plot(x, [point.clean for point in series.points], color=color, linewidth=1.2, linestyle=DASHES[1])
            (drawn,) = axes.plot(
                x, y, color=color, linewidth=0 if series.hollow else 1.8, zorder=4 if series.hollow else 3, label=series.name
            )
            drawn.set(
                marker=series.look.marker,
                markersize=8,
                markeredgecolor=color if series.hollow else "white",
            )
            drawn.set(markerfacecolor="white" if series.hollow else color, clip_on=False)
        figure_style.add_legend(axes)


def _tip(one: FilledRow) -> str:
    assert one.measured is not None
    cell = texts.pair(one.measured.clean / one.measured.images, one.measured.certified / one.measured.images)
    name = ", ".join(filter(None, (one.row.model, one.row.name)))
    return f"{name}: {cell} %, n = {one.measured.images}, {one.measured.arithmetic}"


def _rows(paper: FilledPaper) -> list[FilledRow]:
    return [row for table in paper.tables for row in table.rows]
