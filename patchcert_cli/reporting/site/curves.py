"""Certified accuracy over the attacker's strength, as SVG: square patches by their side, sparse attacks by their budget.

Positions are in units of the drawing: ``WIDTH`` x ``HEIGHT`` with the labels of the lines' ends in the gutter on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from patchcert_cli.reporting.site.leaderboards import Entry, Leaderboard
from patchcert_cli.reporting.site.markup import Html, fragment, tag
from patchcert_cli.reporting.site.tables import title, words
from patchcert_cli.threats import Guarantee, Patch, Sparse, Threat

WIDTH, HEIGHT = 760, 350
LEFT, RIGHT, TOP, BOTTOM = 66, 556, 14, 292  # of the axes
HUES = 6
MARKS = (
    "M-4.4,0a4.4,4.4 0 1,0 8.8,0a4.4,4.4 0 1,0 -8.8,0z",
    "M-4,-4h8v8h-8z",
    "M0,-5.6L5.6,0L0,5.6L-5.6,0z",
    "M0,-5.4L5.2,4H-5.2z",
    "M0,5.4L5.2,-4H-5.2z",
    "M-1.7,-5h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
)
LETTER, LINE = 8.2, 16  # a letter's width and a line's height, rather too large than too small
LONGEST = int((WIDTH - RIGHT - 22) / LETTER)
MOST_CLEAN = 5  # with more lines, those of the clean accuracies would hide each other
AXES = {
    "side": ("side of a square patch, pixels", "the side of a square patch"),
    "pixel": ("pixels that may change", "the number of pixels that may change"),
    "value": ("channel values that may change", "the number of channel values that may change"),
}

Place = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Line:
    """A model's measurements on one chart, by strength; ``look`` chooses its colour and mark."""

    name: str
    look: int
    points: tuple[tuple[int, Entry], ...]


@dataclass(frozen=True)
class Chart:
    """Lines that may be compared: one data set, split, guarantee and axis; ``doubtful`` names the models left out."""

    dataset: str
    split: str
    guarantee: str
    axis: str
    lines: tuple[Line, ...]
    doubtful: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The kind of threat."""
        return "patch" if self.axis == "side" else "sparse"

    @property
    def strengths(self) -> list[int]:
        """All positions on the axis."""
        return sorted({x for line in self.lines for x, _ in line.points})


def strength(threat: Threat) -> tuple[str, int] | None:
    """The axis a threat stands on, and where; None if it stands on none."""
    if isinstance(threat, Patch):
        return ("side", threat.height) if threat.height == threat.width else None
    return (threat.unit, threat.k) if isinstance(threat, Sparse) else None


def charts(boards: Iterable[Leaderboard]) -> list[Chart]:
    """Every chart with two points or more. A model keeps its look within a data set."""
    found: dict[tuple[str, str, str, str], dict[str, list[tuple[int, Entry]]]] = {}
    for board in boards:
        place = strength(board.threat)
        if place is not None:
            key = (board.dataset, board.split, board.guarantee, place[0])
            for entry in board.entries:
                found.setdefault(key, {}).setdefault(entry.card.name, []).append((place[1], entry))
    drawn = []
    for key, models in found.items():
        sure = {name: points for name, points in models.items() if points[0][1].rank is not None}
        if sum(map(len, sure.values())) >= 2:
            known = sorted({name for other, names in found.items() if other[0] == key[0] for name in names})
            lines = (Line(name, known.index(name), tuple(sorted(sure[name], key=lambda p: p[0]))) for name in sorted(sure))
            drawn.append(Chart(*key, lines=tuple(lines), doubtful=tuple(sorted(set(models) - set(sure)))))
    return sorted(
        drawn,
        key=lambda chart: (
            chart.dataset,
            list(AXES).index(chart.axis),
            chart.split,
            list(Guarantee).index(Guarantee(chart.guarantee)),
        ),
    )


def figure(chart: Chart) -> Html:
    """A chart with its legend and a caption that says what is drawn."""
    axis, over = AXES[chart.axis]
    about = f"Certified accuracy over {over}: {title(chart.dataset)}, {chart.split} split, guarantee {chart.guarantee}."
    how = " Marks are measured, with exact 95 % intervals; lines only join them."
    if len(chart.lines) <= MOST_CLEAN:
        how += " Dashed: clean accuracy."
    if chart.doubtful:
        how += f" Left out as unreliable: {', '.join(chart.doubtful)}."
    scale = Scale.of(chart)
    drawing = tag(
        "svg",
        _frame(chart, scale, axis),
        *(_line(line, scale, chart) for line in chart.lines),
        *_labels(chart, scale),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=about,
    )
    legend = tag("ul", *map(_legend, chart.lines), class_="legend")
    return tag(
        "figure",
        tag("div", drawing, class_="plot"),
        legend,
        tag("figcaption", tag("b", about), how),
        class_="curve",
        data_dataset=fragment(chart.dataset),
        data_kind=chart.kind,
    )


@dataclass(frozen=True)
class Scale:
    """From strengths and fractions to the drawing."""

    first: float
    last: float

    @classmethod
    def of(cls, chart: Chart) -> Scale:
        """Room for all strengths, and a margin."""
        first, last = chart.strengths[0], chart.strengths[-1]
        margin = 0.05 * (last - first) or 0.5
        return cls(first - margin, last + margin)

    def x(self, strength: float) -> float:
        return LEFT + (RIGHT - LEFT) * (strength - self.first) / (self.last - self.first)

    def y(self, share: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * share


def _n(value: float) -> str:
    """A coordinate, short and always the same."""
    return f"{value:.1f}".removesuffix(".0")


def _path(places: Sequence[Place]) -> str:
    return "M" + "L".join(f"{_n(x)},{_n(y)}" for x, y in places)


def ticks(strengths: Sequence[int]) -> list[int]:
    """Round numbers on the axis, a dozen at most."""
    first, last = strengths[0], strengths[-1]
    step = next(n * 10**e for e in range(10) for n in (1, 2, 5) if (last - first) / (n * 10**e) <= 12)
    return list(range(-(-first // step) * step, last + 1, step))


def _frame(chart: Chart, scale: Scale, axis: str) -> Html:
    """Grid, ticks and the names of both axes."""
    parts = []
    for share in range(0, 101, 20):
        y = scale.y(share / 100)
        parts.append(tag("path", d=_path([(LEFT, y), (RIGHT, y)]), class_="base" if share == 0 else "grid"))
        parts.append(tag("text", str(share), x=LEFT - 9, y=_n(y + 4.5), text_anchor="end"))
    for tick in ticks(chart.strengths):
        x = scale.x(tick)
        parts.append(tag("path", d=_path([(x, BOTTOM), (x, BOTTOM + 5)]), class_="base"))
        parts.append(tag("text", str(tick), x=_n(x), y=BOTTOM + 22, text_anchor="middle"))
    middle = (TOP + BOTTOM) / 2
    parts.append(tag("text", axis, x=(LEFT + RIGHT) / 2, y=HEIGHT - 10, text_anchor="middle"))
    turned = f"translate(18 {_n(middle)}) rotate(-90)"
    parts.append(tag("text", "certified accuracy, %", transform=turned, text_anchor="middle"))
    return tag("g", *parts, class_="frame")


def _places(line: Line, scale: Scale) -> tuple[list[Place], list[Place]]:
    """Where the line's certified and clean accuracies are drawn."""
    certified = [(scale.x(x), scale.y(float(entry.certified))) for x, entry in line.points]
    clean = [(scale.x(x), scale.y(entry.result.clean / entry.result.images)) for x, entry in line.points]
    if len(clean) == 1:
        ((x, y),) = clean
        clean = [(x - 13, y), (x + 13, y)]
    return certified, clean


def look(line: Line) -> str:
    """The class that colours a line."""
    return f"hue{line.look % HUES}"


def _mark(line: Line, place: str) -> Html:
    return tag("path", d=MARKS[(line.look + line.look // HUES) % len(MARKS)], transform=f"translate({place})", class_="mark")


def _line(line: Line, scale: Scale, chart: Chart) -> Html:
    certified, clean = _places(line, scale)
    parts = [tag("path", d=_path(clean), class_="clean")] if len(chart.lines) <= MOST_CLEAN else []
    if len(certified) > 1:
        parts.append(tag("path", d=_path(certified), class_="line"))
    for (x, y), (size, entry) in zip(certified, line.points, strict=True):
        one = entry.result
        low, high = one.certified_interval
        told = f"{line.name}, {entry.result.threat}: certified {100 * one.certified / one.images:.2f} %"
        told += f" ({one.certified}/{one.images}), 95 % interval {100 * low:.2f} to {100 * high:.2f} %;"
        told += f" clean {100 * one.clean / one.images:.2f} % ({one.clean}/{one.images}); proof {one.method}"
        bar = tag("path", d=_path([(x, scale.y(low)), (x, scale.y(high))]), class_="bar")
        reach = tag("path", d=f"M{_n(x - 11)},{_n(y - 11)}h22v22h-22z", class_="reach")  # so that a mark is easy to hit
        parts.append(tag("g", tag("title", told), reach, bar, _mark(line, f"{_n(x)} {_n(y)}"), data_strength=size))
    return tag("g", *parts, class_=f"model {look(line)}", data_name=line.name)


def _legend(line: Line) -> Html:
    swatch = tag(
        "svg",
        tag("path", d="M1,7H27", class_="line"),
        _mark(line, "14 7"),
        viewBox="0 0 28 14",
        class_=f"swatch {look(line)}",
        aria_hidden="true",
    )
    return tag(
        "li", swatch, tag("a", line.name, href=f"#{fragment('model', line.name)}"), data_words=words(line.points[0][1].card)
    )


def _labels(chart: Chart, scale: Scale) -> list[Html]:
    """Names beside the lines: in the gutter for those that reach the right edge, else near the last mark if there is room."""
    places = {line.name: _places(line, scale) for line in chart.lines}
    ends = {name: certified[-1] for name, (certified, _) in places.items()}
    edge = scale.x(chart.strengths[-1])
    outer = sorted((line for line in chart.lines if ends[line.name][0] == edge), key=lambda line: ends[line.name][1])
    fitting = outer[: 1 + int((BOTTOM - TOP) / LINE)]  # the legend names them all
    drawn = [
        _label(line, (RIGHT + 20, y), leader=(ends[line.name], (RIGHT + 16, y)))
        for line, y in zip(fitting, spread([ends[line.name][1] for line in fitting]), strict=True)
    ]
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for certified, _ in places.values() for x, y in certified]
    inked = [place for pair in places.values() for one in pair for place in _dense(one)]
    for line in chart.lines:
        found = None if line in outer else _free(shorten(line.name), ends[line.name], taken, inked)
        if found is not None:
            place, box = found
            taken.append(box)
            drawn.append(_label(line, place))
    return drawn


def _label(line: Line, place: Place, leader: tuple[Place, Place] | None = None) -> Html:
    text = tag("text", shorten(line.name), x=_n(place[0]), y=_n(place[1] + 4))
    parts = [text] if leader is None else [tag("path", d=_path(leader), class_="leader"), text]
    return tag("g", *parts, class_=f"label {look(line)}")


def shorten(name: str) -> str:
    """A name that fits into the gutter."""
    half = (LONGEST - 1) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


def spread(wanted: Sequence[float]) -> list[float]:
    """Heights in rising order, moved apart so that labels do not cover each other, and inside the axes if they fit."""
    heights = list(wanted)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LINE)
    if heights:
        heights[-1] = min(heights[-1], max(BOTTOM, wanted[-1]))
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - LINE)
    return heights


def _dense(places: Sequence[Place]) -> list[Place]:
    """Places along a line, close to each other."""
    steps = [step / 40 for step in range(41)]
    return [(a + (c - a) * t, b + (d - b) * t) for (a, b), (c, d) in pairwise(places) for t in steps]


def _free(text: str, end: Place, taken: Sequence[Box], inked: Sequence[Place]) -> tuple[Place, Box] | None:
    """Where a name can stand near its mark without covering anything: its left end at mid-height, and its box."""
    width, half = LETTER * len(text), LINE / 2
    left, middle = -width - 8, -width / 2
    for across, down in ((11, 0), (8, -15), (8, 15), (left - 3, 0), (middle, -18), (middle, 18), (left, -15), (left, 15)):
        x, y = end[0] + across, end[1] + down
        box = (x - 2, y - half, x + width, y + half)
        inside = box[0] >= LEFT and box[2] <= RIGHT and box[1] >= TOP - 6 and box[3] <= BOTTOM
        crossed = any(box[0] < a < box[2] and box[1] < b < box[3] for a, b in inked)
        covered = any(box[0] < one[2] and one[0] < box[2] and box[1] < one[3] and one[1] < box[3] for one in taken)
        if inside and not crossed and not covered:
            return (x, y), box
    return None


def section(dataset: str, drawn: Sequence[Chart]) -> Html:
    """All charts of a data set; nothing if there are none."""
    figures = [figure(chart) for chart in drawn if chart.dataset == dataset]
    return tag("div", *figures, class_="curves") if figures else Html()
