"""Write the zoo's table into README.md and its plot to docs/zoo.svg, both from the cards alone.

    python docs/make_zoo.py [--check]

With ``--check`` nothing is written, and the exit code is 1 if either is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.cards import Card
from patchcert_cli.catalog import bundled
from patchcert_cli.reporting import figure_style
from patchcert_cli.reporting.figure_style import GRID, INK, SOFT
from patchcert_cli.reporting.numbers import interval, percent
from patchcert_cli.reporting.site.charts import looks
from patchcert_cli.storage.files import sha256_of
from patchcert_cli.threats import Guarantee, Threat

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


def plot(path: Path) -> None:
    """A bar for each model, in its colour of the web page: certified accuracy, over clean accuracy in a lighter shade, and a
    mark at the published certified accuracy.
    """
    entries = rows()
    look = looks(bundled.cards().values())
    with figure_style.figure(path, 7.6, 0.42 * len(entries) + 1.1, digest=digest()) as figure:
        up = float(figure.get_size_inches()[1])
        axes = figure_style.axes_at(figure, 2.35, 0.4, 5.0, up - 0.95)
        axes.set(xlim=(0, 100), ylim=(len(entries) - 0.4, -0.6))
        axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
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


def digest() -> str:
    """What the plot shows, as a sha256: another release of matplotlib may draw the same in other bytes."""
    return sha256_of(tables().encode())


def main() -> int:
    """Write or check both; returns the exit code."""
    readme, picture = ROOT / "README.md", ROOT / "docs" / "zoo.svg"
    text = readme.read_text()
    wanted = f"{text.split(START)[0]}{START}\n{tables()}\n{END}{text.split(END)[1]}"
    stale = [readme] if text != wanted else []
    stale += [picture] if not picture.exists() or digest() not in picture.read_text() else []
    if "--check" in sys.argv:
        for path in stale:
            sys.stderr.write(f"{path.relative_to(ROOT)} is out of date: python docs/make_zoo.py\n")
        return 1 if stale else 0
    if readme in stale:
        readme.write_text(wanted)
    if picture in stale:
        plot(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
