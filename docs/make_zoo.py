"""Write the zoo's table into README.md and its picture to docs/zoo.svg, both from the cards alone.

    python docs/make_zoo.py [--check]

With ``--check`` nothing is written, and the exit code is 1 if either is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

from patchcert_cli.cards import Card
from patchcert_cli.catalog import bundled
from patchcert_cli.threats import Guarantee

ROOT = Path(__file__).parents[1]
START, END = "<!-- zoo -->", "<!-- /zoo -->"
INK, GRID, MEASURED, CLEAN, PUBLISHED = "#1f2933", "#d9dee3", "#2f6f8f", "#a9c7d6", "#c65d2e"


def rows(guarantee: str = "recovery") -> list[tuple[Card, str]]:
    """Every measured card with the threat it was trained against, and those with published numbers, in the order of names."""
    found = []
    for card in (card for card in bundled.cards().values() if card.guarantee == guarantee):
        threats = dict.fromkeys(result.threat for result in card.results if result.guarantee == guarantee)
        found += [(card, threat) for threat in threats if threat == card.threat or card.report(threat)]
    return found


def percent(count: float, total: float = 1) -> str:
    """A share in percent, with two digits."""
    return f"{100 * count / total:.2f}"


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
        low, high = (percent(end) for end in found.certified_interval)
        reported = f"{percent(paper.clean)} / {percent(paper.certified)}" if paper else "none"
        certified = f"**{percent(found.certified, found.images)}** ({low} to {high})"
        cells = (
            f"[`{card.name}`](zoo/{card.name})",
            card.network,
            f"`{threat}`",
            str(card.arithmetic(found)),
            f"{found.images} {found.split}",
        )
        lines.append(f"| {' | '.join(cells)} | {percent(found.clean, found.images)} | {certified} | {reported} |")
    return "\n".join(lines)


def picture() -> str:
    """A bar for each model: clean and certified accuracy measured here, with a mark at the published certified accuracy."""
    entries = rows()
    left, width, step, top = 190, 520, 44, 62
    height = top + step * len(entries) + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="100%" height="100%" fill="white"/><g fill="{INK}">',
        f'<rect x="{left}" y="18" width="14" height="12" fill="{CLEAN}"/><text x="{left + 20}" y="29">clean</text>',
        f'<rect x="{left + 80}" y="18" width="14" height="12" fill="{MEASURED}"/><text x="{left + 100}" y="29">certified</text>',
        f'<rect x="{left + 180}" y="16" width="3" height="16" fill="{PUBLISHED}"/>',
        f'<text x="{left + 190}" y="29">published certified</text>',
    ]
    for tick in range(0, 101, 20):
        x = left + width * tick / 100
        parts.append(f'<line x1="{x}" x2="{x}" y1="{top - 12}" y2="{height - 40}" stroke="{GRID}"/>')
        parts.append(f'<text x="{x}" y="{height - 20}" text-anchor="middle">{tick} %</text>')
    for i, (card, threat) in enumerate(entries):
        found, paper, y = card.result(threat), card.report(threat), top + step * i
        assert found is not None
        doubt = ", arithmetic measured" if card.arithmetic(found) == "measured" else ""
        clean, certified = found.clean / found.images, found.certified / found.images
        parts.append(f'<text x="{left - 10}" y="{y + 14}" text-anchor="end" font-weight="bold">{card.name}</text>')
        parts.append(f'<text x="{left - 10}" y="{y + 29}" text-anchor="end" fill="#5b6770" font-size="11">{threat}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width * clean:.1f}" height="26" fill="{CLEAN}"/>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width * certified:.1f}" height="26" fill="{MEASURED}"/>')
        parts.append(f'<text x="{left + 10}" y="{y + 18}" fill="white">{percent(certified)} %{doubt}</text>')
        if paper:
            parts.append(
                f'<rect x="{left + width * paper.certified - 1.5:.1f}" y="{y - 4}" width="3" height="34" fill="{PUBLISHED}"/>'
            )
    return "\n".join([*parts, "</g></svg>"]) + "\n"


def main() -> int:
    """Write or check both; returns the exit code."""
    readme, chart = ROOT / "README.md", ROOT / "docs" / "zoo.svg"
    before, after = readme.read_text().split(START)[0], readme.read_text().split(END)[1]
    wanted = {readme: f"{before}{START}\n{tables()}\n{END}{after}", chart: picture()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if "--check" not in sys.argv:
        for path in stale:
            path.write_text(wanted[path])
        return 0
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)} is out of date: python docs/make_zoo.py\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
