"""Draw what certificates cost beside what they prove, and write the tables of docs/methods/strips.md.

    python docs/make_trade.py [--check]

Everything comes from docs/trade.json (``benchmarks/trade.py``), from the records of the zoo's models for the same images, and,
where a column is about all test images, from their cards. With ``--check`` nothing is written, and the exit code is 1 if the page
or a plot is out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from patchcert_cli.cards import Card
from patchcert_cli.cards.published import PublishedRecords
from patchcert_cli.catalog import bundled
from patchcert_cli.certificate import clopper_pearson
from patchcert_cli.certifiers.masks.mask_sets import PER_AXIS
from patchcert_cli.reporting import figure_style
from patchcert_cli.reporting.figure_style import GRID, SOFT, Heading, Look
from patchcert_cli.reporting.numbers import interval as ends
from patchcert_cli.reporting.numbers import percent
from patchcert_cli.reporting.site.charts import looks
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, parse_threat

DOCS = Path(__file__).parent
PAGE, DATA = DOCS / "methods" / "strips.md", DOCS / "trade.json"
FIVE, MASKED = "patch:5x5", "cifar-masked-cnn"
OVERLAP = (
    {"shape": "column", "per_axis": 14},
    {"shape": "row", "per_axis": 14},
    {"shape": "square", "per_axis": 4},
)  # masks for the same network


@dataclass(frozen=True)
class Setting:
    """One row: a model with masks, how many images of a sample it certifies, and its cost."""

    name: str
    masks: str
    threat: str
    images: int
    certified: int
    whole: str = ""  # of all test images, in %
    clean: str = ""  # of the sample, in %
    passes: float = 0
    pairs: str = ""
    speed: float = 0

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Setting:
        """A measured row."""
        shape = row["masks"].get("shape", "square") if "masks" in row and not row["own"] else ""
        return cls(
            name=f"{row['model']}, {shape}s" if shape else row["model"],
            masks=row.get("sizes", ""),
            threat=row["threat"],
            images=row["images"],
            certified=row["certified"],
            whole=whole(row["model"], row["threat"]) if row["own"] else "",
            clean=percent(row["clean"] / row["images"]),
            passes=row["passes"],
            pairs=str(row["pairs"] or ""),
            speed=row["images_per_second"],
        )

    @property
    def share(self) -> float:
        return 100 * self.certified / self.images

    @property
    def interval(self) -> tuple[float, float]:
        return clopper_pearson(self.certified, self.images)

    @property
    def text(self) -> str:
        return f"{percent(self.certified / self.images)} ({ends(self.interval)})"


def speed(images_per_second: float) -> str:
    """Two digits, and whole numbers from 10: ``1.5``, ``95``, ``120``."""
    return f"{images_per_second:.{0 if images_per_second >= 9.95 else 2}{'f' if images_per_second >= 9.95 else 'g'}}"


def whole(name: str, threat: str) -> str:
    """What the card says of all test images."""
    found = cards()[name].result(parse_threat(threat))
    return percent(found.certified / found.images) if found else ""


@cache
def cards() -> dict[str, Card]:
    """The zoo's models for CIFAR-10."""
    return bundled.cards(dataset="cifar10")


def measured() -> list[dict[str, Any]]:
    """All rows of docs/trade.json."""
    return list(files.read_json(DATA)["rows"])


def sample(images: int) -> list[int]:
    """Which test images a row of this many is about."""
    return sorted(files.read_json(DATA)["sample"][:images])


@cache
def records(name: str) -> PublishedRecords:
    """Every verdict of a model of the zoo."""
    return PublishedRecords.read(bundled.folder() / name / files.PUBLISHED_RECORDS)


def settings() -> list[Setting]:
    """The rows about 5x5 patches."""
    return [Setting.of(row) for row in measured() if row["threat"] == FIVE]


def by_name(rows: Sequence[Setting]) -> dict[str, list[Setting]]:
    """The rows in groups that one line joins."""
    found: dict[str, list[Setting]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row)
    return found


def trade_table() -> str:
    """Every setting against 5x5 patches."""
    lines = [
        "| model | masks | pairs | images | clean, % | certified, % (95 % interval) | all test images | passes an image"
        " | images/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(settings(), key=lambda row: (row.name, row.passes)):
        cells = (row.name, row.masks or "none", row.pairs, str(row.images), row.clean, row.text, row.whole)
        lines.append(f"| {' | '.join(cells)} | {row.passes:.0f} | {speed(row.speed)} |")
    return "\n".join(lines)


def overlap_table() -> str:
    """Which images are certified with columns, rows and squares."""
    rows = [row for row in measured() if not row["own"] and row["model"] == MASKED and row["threat"] == FIVE]
    found = [
        next(row["verdicts"] for row in rows if ({"shape": "square"} | row["masks"]).items() >= wanted.items())
        for wanted in OVERLAP
    ]
    votes = [tuple(one == "1" for one in image) for image in zip(*found, strict=True)]
    columns, lines_, squares = (sum(vote[at] for vote in votes) for at in range(3))
    counts = {
        "14 columns": columns,
        "14 rows": lines_,
        "16 squares": squares,
        "columns and rows": sum(vote[0] and vote[1] for vote in votes),
        "columns or rows": sum(vote[0] or vote[1] for vote in votes),
        "at least two of the three": sum(sum(vote) >= 2 for vote in votes),
    }
    images, together = len(votes), files.read_json(DATA)["majority"]
    assert together["images"] == images
    counts["a majority of the three, proven location by location"] = together["certified"]
    return "\n".join(
        [
            f"| certified by, of {images} images | images | % |",
            "| --- | --- | --- |",
            *(f"| {name} | {count} | {percent(count / images)} |" for name, count in counts.items()),
        ]
    )


def sizes_table() -> str:
    """Certified accuracy over patch sizes, of the same images."""
    lines = ["| patch | model | images | certified, % (95 % interval) | all test images |", "| --- | --- | --- | --- | --- |"]
    rows = [row for found in size_rows().values() for row in found]
    ordered = sorted(rows, key=lambda one: (_side(one.threat), one.name))
    lines += [f"| `{row.threat}` | {row.name} | {row.images} | {row.text} | {row.whole} |" for row in ordered]
    return "\n".join(lines)


def size_rows() -> dict[str, list[Setting]]:
    """Masks chosen for each size, and models without masks from their records; all about the images that every size has."""
    squares = [row for row in measured() if row.get("masks", {}).get("per_axis") == PER_AXIS and "shape" not in row["masks"]]
    chosen = sample(min(row["images"] for row in squares))
    found = {MASKED: []}
    for row in squares:
        right = {index for index, one in zip(sample(row["images"]), row["verdicts"], strict=True) if one == "1"}
        found[MASKED].append(Setting(MASKED, "", row["threat"], len(chosen), len(right.intersection(chosen))))
    for name, card in cards().items():
        squares = [one.threat for one in card.results if isinstance(one.threat, Patch) and one.threat.height == one.threat.width]
        for threat in dict.fromkeys(squares if name != MASKED else ()):
            at, rows = records(name).position(threat), [records(name).rows[index] for index in chosen]
            count = sum(row.certified[at] and row.prediction == row.label for row in rows)
            found.setdefault(name, []).append(Setting(name, "", str(threat), len(rows), count, whole(name, str(threat))))
    return found


def _side(threat: str) -> int:
    parsed = parse_threat(threat)
    assert isinstance(parsed, Patch)
    return parsed.height


def _draw(
    axes: Axes, rows: Mapping[str, Sequence[Setting]], x: Callable[[Setting], float], of: Mapping[str, Look] | None = None
) -> None:
    for index, (name, points) in enumerate(rows.items()):
        ordered, look = sorted(points, key=x), Look(index) if of is None else of[name]
        at = [x(one) for one in ordered]
        ends = [[100 * one.interval[end] for one in ordered] for end in (0, 1)]
        axes.vlines(at, *ends, colors=look.color, linewidth=1)
        line = axes.plot(at, [one.share for one in ordered], color=look.color, linewidth=1.4, label=name, marker=look.marker)[0]
        line.set(markersize=5, markeredgecolor="white")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(ylim=(0, 100), ylabel="certified, %")


def draw_trade(path: Path) -> None:
    """Certified accuracy over passes, and over images a second."""
    rows, images = by_name(settings()), max(row.images for row in settings())
    note = f"CIFAR-10, one 5x5 patch anywhere; the same {images} test images; one thread; exact 95 % intervals"
    heading = Heading.of("Certified accuracy and its cost", note, 7.6)
    with figure_style.figure(path, 7.6, 6.4 + heading.height, digest=digest()) as figure:
        heading.write(figure)
        for bottom, label, x in ((3.75, "passes of the network an image", _passes), (0.5, "images a second", _speed)):
            axes = figure_style.axes_at(figure, 0.6, bottom, 6.8, 2.55)
            _draw(axes, rows, x)
            axes.set(xscale="log", xlabel=label)
            _plain_ticks(axes)
            if x is _passes:
                figure_style.add_legend(axes)
            else:
                axes.set_position((*axes.get_position().p0, figure.axes[0].get_position().width, axes.get_position().height))


def _plain_ticks(axes: Axes) -> None:
    """Tick labels 1, 2, 5, 10, ... of a logarithmic axis."""
    low, high = axes.get_xlim()
    ticks = [step * 10.0**power for power in range(-3, 5) for step in (1, 2, 5) if low <= step * 10.0**power <= high]
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _passes(row: Setting) -> float:
    return row.passes


def _speed(row: Setting) -> float:
    return row.speed


def draw_sizes(path: Path) -> None:
    """Certified accuracy over patch sides; models without a published counterpart are in the table alone, for legibility."""
    rows = {name: points for name, points in size_rows().items() if cards()[name].published}
    note = f"CIFAR-10, one square patch anywhere; the same {rows[MASKED][0].images} test images; exact 95 % intervals"
    heading = Heading.of("Certified accuracy over patch sizes", note, 7.6)
    with figure_style.figure(path, 7.6, 3.5 + heading.height, digest=digest()) as figure:
        heading.write(figure)
        axes = figure_style.axes_at(figure, 0.6, 0.55, 6.8, 2.8)
        _draw(axes, rows, lambda row: _side(row.threat), of=looks(bundled.cards().values()))
        axes.set_xticks(range(1, 11))
        axes.set_xlabel("patch side, pixels", color=SOFT)
        figure_style.add_legend(axes)


def digest() -> str:
    """What the plots show, as a sha256."""
    return files.sha256_of(f"{trade_table()}{sizes_table()}{looks(bundled.cards().values())}".encode())


def filled(text: str) -> str:
    """The page with its tables."""
    for name, table in (("trade", trade_table), ("overlap", overlap_table), ("sizes", sizes_table)):
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = f"{text.split(start)[0]}{start}\n{table()}\n{end}{text.split(end)[1]}"
    return text


def main() -> int:
    """Write or check all three; returns the exit code."""
    text, pictures = PAGE.read_text(), {DOCS / "trade.svg": draw_trade, DOCS / "sizes.svg": draw_sizes}
    stale = [path for path in pictures if not path.exists() or digest() not in path.read_text()]
    stale += [PAGE] if filled(text) != text else []
    if "--check" in sys.argv:
        for path in stale:
            sys.stderr.write(f"{path.name} is out of date: python docs/make_trade.py\n")
        return 1 if stale else 0
    PAGE.write_text(filled(text))
    for path in stale:
        if path in pictures:
            pictures[path](path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
