"""Write the zoo's table into README.md and two plots: docs/zoo.svg by threat, docs/zoo-models.svg by model.

    python docs/make_zoo.py [--check]

What was measured comes from the cards alone, what was published from the cards and from docs/field.yaml. With ``--check``
nothing is written, and the exit code is 1 if one of them is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.cards import Card, Measured
from patchcert_cli.cards.entries import Sample
from patchcert_cli.catalog import bundled
from patchcert_cli.reporting import figure_style
from patchcert_cli.reporting.figure_style import GRID, INK, SOFT, Look
from patchcert_cli.reporting.numbers import interval, percent
from patchcert_cli.reporting.site.charts import looks
from patchcert_cli.reporting.site.leaderboards import covers, title
from patchcert_cli.storage.files import sha256_of
from patchcert_cli.threats import Guarantee, Sparse, Threat, parse_threat
from patchcert_cli.threats import Patch as PatchThreat

ROOT = Path(__file__).parents[1]
START, END = "<!-- zoo -->", "<!-- /zoo -->"


def rows(guarantee: str = "recovery") -> list[tuple[Card, Threat]]:
    """Every measured card with the threat it was trained against, and those with published numbers, in the order of names."""
    found = []
    for card in (card for card in bundled.cards().values() if card.guarantee == guarantee):
        threats = dict.fromkeys(result.threat for result in card.results if result.guarantee == guarantee)
        found += [(card, threat) for threat in threats if threat == card.threat or card.report(threat)]
    return found


def tables() -> str:
    """The table of recovery, and below it that of detection if there is a model for it: two promises, never in one table."""
    detection = f"\n\nCertified detection ({Guarantee.DETECTION.phrase}):\n\n{table('detection')}"
    return table() + (detection if rows("detection") else "")


def table(guarantee: str = "recovery") -> str:
    """Markdown: measured beside published, with counts and the 95 % interval."""
    lines = [
        "| model | network | threat | arithmetic | images | clean, % | certified, % (95 % interval)"
        " | published clean / certified, % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for card, threat in rows(guarantee):
        found = card.result(threat)
        paper = card.report(threat)
        assert found is not None
        reported = f"{percent(paper.clean)} / {percent(paper.certified)}" if paper else "none"
        certified = f"**{percent(found.certified / found.images)}** ({interval(found.certified_interval)})"
        cells = (
            f"[`{card.name}`](zoo/{card.name})",
            card.network,
            f"`{threat}`",
            str(card.arithmetic(found)),
            f"{found.images} {found.split}",
        )
        lines.append(f"| {' | '.join(cells)} | {percent(found.clean / found.images)} | {certified} | {reported} |")
    return "\n".join(lines)


class Row(NamedTuple):
    """A threat: the best published numbers, and the card that certifies most under it here, if any was measured.

    Attributes:
        published: an entry of docs/field.yaml.
        card: the model; None if there is none.
        found: its counts on the test split.
        sample: of a data set without a measurement on the test split, its counts on other images.
    """

    dataset: str
    threat: Threat
    published: dict[str, Any]
    card: Card | None = None
    found: Measured | None = None
    sample: Sample | None = None

    @property
    def remark(self) -> str:
        """What the number here is about, besides the row's own threat."""
        if self.found is None or self.card is None:
            return ""
        remarks = [f"proven for {self.found.threat}"] if self.found.threat != self.threat else []
        measured = self.card.arithmetic(self.found) is Arithmetic.MEASURED
        return ", ".join(remarks + (["rounding measured"] if measured else []))

    @property
    def missing(self) -> str:
        """The text where there is no number."""
        if self.sample is None or self.card is None:
            return "not measured here"
        counts = f"{percent(self.sample.certified / self.sample.images)} % of a sample (n = {self.sample.images})"
        return f"not measured on the test split; {counts}"


def field() -> list[Row]:
    """The rows of the plot by threat."""
    return [_best(one) for one in yaml.safe_load((ROOT / "docs" / "field.yaml").read_text())]


def _best(published: dict[str, Any]) -> Row:
    dataset, threat = published["dataset"], parse_threat(published["threat"])
    cards = [card for card in bundled.cards(dataset=dataset).values() if card.status != "unreliable"]
    pairs = [(card, one) for card in cards for one in card.results if (one.dataset, one.split) == (dataset, "test")]
    pairs = [(card, one) for card, one in pairs if one.guarantee is Guarantee.RECOVERY and covers(one.threat, threat)]
    if pairs:
        card, best = max(pairs, key=lambda pair: (pair[1].certified / pair[1].images, pair[1].threat == threat))
        return Row(dataset, threat, published, card, best)
    samples = [(one.images, card, one) for card in cards for one in card.samples if one.guarantee is Guarantee.RECOVERY]
    samples = [(images, card, one) for images, card, one in samples if one.threat == threat]
    if samples:
        _, card, sample = max(samples, key=lambda three: three[0])
        return Row(dataset, threat, published, card, sample=sample)
    return Row(dataset, threat, published)


def percent_axes(figure: Figure, left: float, width: float, height: float, rows: int) -> Axes:
    """Axes from 0 to 100 % with a horizontal bar for each row, the first at the top; sizes in inches."""
    axes = figure_style.axes_at(figure, left, 0.4, width, height)
    axes.set(xlim=(0, 100), ylim=(rows - 0.4, -0.6))
    axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return axes


BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}  # under text that is on no filled bar
HERE, PUBLISHED = Look(0).color, Look(1).color
THREATS = {PatchThreat: "{0.height}x{0.width} patch", Sparse: "{0.k} pixels"}


def plot_field(path: Path) -> None:
    """Two bars for each threat: the best certified accuracy here and the best published one, over clean accuracy in a lighter
    shade. A number that was not checked is hatched.
    """
    entries = field()
    with figure_style.figure(path, 8.6, 0.62 * len(entries) + 1.0, digest=digest(field_text())) as figure:
        axes = percent_axes(figure, 1.55, 4.15, float(figure.get_size_inches()[1]) - 0.85, len(entries))
        for i, row in enumerate(entries):
            name = THREATS.get(type(row.threat), "{0.percent} % patch").format(row.threat)
            axes.text(-2, i - 0.17, title(row.dataset) if row.dataset != "imagenet" else "ImageNet", **_left(9, "bold"))
            axes.text(-2, i + 0.2, name, **_left(8.5, "normal"))
            one = row.published
            _bar(axes, i + 0.2, one["clean"], one["certified"], PUBLISHED, doubtful=not one.get("checked", True))
            _beside(axes, i + 0.2, f"{one['method']}", one.get("remark", ""))
            if row.found is None or row.card is None:
                axes.text(1, i - 0.2, row.missing, fontsize=8, va="center", color=HERE, bbox=BLANK)
                continue
            images = row.found.images
            _bar(axes, i - 0.2, row.found.clean / images, row.found.certified / images, HERE)
            _beside(axes, i - 0.2, row.card.name, row.remark)
        handles = [
            Patch(color=HERE, label="certified here"),
            Patch(color=PUBLISHED, label="best published"),
            Patch(color=SOFT, alpha=0.25, label="clean"),
            Patch(facecolor="white", edgecolor=SOFT, hatch="////", label="not checked"),
        ]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=4, frameon=False, fontsize=8.5)


def _left(size: float, weight: str) -> dict[str, Any]:
    return {"ha": "right", "va": "center", "fontsize": size, "fontweight": weight}


def _bar(axes: Axes, y: float, clean: float, certified: float, color: str, *, doubtful: bool = False) -> None:
    axes.barh(y, 100 * clean, 0.36, color=color, alpha=0.25)
    filled = {"facecolor": "white", "edgecolor": color, "hatch": "////"} if doubtful else {"color": color}
    axes.barh(y, 100 * certified, 0.36, linewidth=0.8, **filled)
    number = f"about {100 * certified:.0f} %" if doubtful else f"{percent(certified)} %"
    ink, blank = (color, BLANK) if doubtful else ("white", None)
    axes.text(1, y, number, color=ink, fontsize=8.5, va="center", bbox=blank)


def _beside(axes: Axes, y: float, name: str, remark: str) -> None:
    axes.text(102, y, name + (f" ({remark})" if remark else ""), fontsize=7.5, va="center", color=INK)


def field_text() -> str:
    """What the plot by threat shows, as text."""
    lines = []
    for row in field():
        here = (row.card.name if row.card else "", row.missing if row.found is None else row.remark, row.found)
        lines.append(f"{row.dataset} {row.threat}: {here}; {row.published}")
    return "\n".join(lines)


def plot_models(path: Path) -> None:
    """A bar for each model, in its colour of the web page: certified accuracy, over clean accuracy in a lighter shade, and a
    mark at the published certified accuracy.
    """
    entries = rows()
    look = looks(bundled.cards().values())
    with figure_style.figure(path, 7.6, 0.42 * len(entries) + 1.1, digest=digest(tables())) as figure:
        up = float(figure.get_size_inches()[1])
        axes = percent_axes(figure, 2.35, 5.0, up - 0.95, len(entries))
        for i, (card, threat) in enumerate(entries):
            found, paper, color = card.result(threat), card.report(threat), look[card.name].color
            assert found is not None
            clean, certified = 100 * found.clean / found.images, 100 * found.certified / found.images
            axes.barh(i, clean, 0.62, color=color, alpha=0.25)
            axes.barh(i, certified, 0.62, color=color)
            doubt = ", rounding measured" if card.arithmetic(found) is Arithmetic.MEASURED else ""
            axes.text(1, i, f"{certified:.2f} %{doubt}", color="white", fontsize=8.5, va="center")
            axes.text(-1.5, i - 0.17, card.name, ha="right", va="center", fontsize=9, fontweight="bold")
            axes.text(-1.5, i + 0.21, str(threat), ha="right", va="center", fontsize=7.5, color=SOFT)
            if paper:
                axes.vlines(100 * paper.certified, i - 0.4, i + 0.4, color=INK, linewidth=2)
        handles = [
            Patch(color=SOFT, label="certified"),
            Patch(color=SOFT, alpha=0.25, label="clean"),
            Line2D([], [], color=INK, linewidth=2, label="published certified"),
        ]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=8.5)


def digest(text: str) -> str:
    """What a plot shows, as a sha256: another release of matplotlib may draw the same in other bytes."""
    return sha256_of(text.encode())


def main() -> int:
    """Write or check all; returns the exit code."""
    readme, docs = ROOT / "README.md", ROOT / "docs"
    text = readme.read_text()
    wanted = f"{text.split(START)[0]}{START}\n{tables()}\n{END}{text.split(END)[1]}"
    stale = [readme] if text != wanted else []
    plots = {docs / "zoo.svg": (plot_field, field_text()), docs / "zoo-models.svg": (plot_models, tables())}
    stale += [path for path, (_, shown) in plots.items() if not path.exists() or digest(shown) not in path.read_text()]
    if "--check" in sys.argv:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} is out of date: python docs/make_zoo.py\n")
        return 1 if stale else 0
    for path in stale:
        if path == readme:
            readme.write_text(wanted)
        else:
            plots[path][0](path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
