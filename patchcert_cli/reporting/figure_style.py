"""What every picture is drawn on: figures measured in inches, headings, colours, and labels that cover nothing.

matplotlib is imported only where it is used. No window is opened, and the user's own matplotlib settings play no part, so that
equal input gives equal bytes. Positions "in data units" are those of the axes; a point is 1/72 inch.
"""

from __future__ import annotations

import io
import itertools
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchcert_cli.errors import UsageError
from patchcert_cli.storage import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf", ".svg")
UNDATED: dict[str, dict[str, Any]] = {  # what the writers would add of the clock and the machine
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}
DPI = 200
MARGIN = 0.15  # inches
INK, SOFT, GRID, EMPTY, MARK = "#1f2933", "#5b6770", "#dfe3e7", "#eceff1", "#ffb000"
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "patchcert",
    "pdf.fonttype": 42,
}


def require() -> None:
    """Raise :class:`UsageError` if matplotlib is missing; meant to be called before a long computation starts."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401  # looked for, not used
    except ImportError as problem:
        raise UsageError(
            "pictures need matplotlib, which is not installed.", hint="Get it with: pip install 'patchcert[plots]'"
        ) from problem


def check_path(path: Path) -> None:
    """Refuse a path that no picture can be written to: an unknown ending, or what :func:`files.check_file` refuses.

    Raises:
        UsageError: it is no path of a picture.
        MachineError: nothing can be written there.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"a picture cannot be written to '{path}'.", hint=f"The name must end in {', '.join(ENDINGS)}.")
    files.check_file(path, "the picture")


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A white figure of ``width`` x ``height`` inches; when the block ends it is written to ``path``, atomically."""
    require()
    check_path(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():  # put the process's settings back
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # its box says so
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(round(width * DPI) / DPI, round(height * DPI) / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        content, ending = io.BytesIO(), path.suffix.lower()
        figure.savefig(content, format=ending[1:], dpi=DPI, metadata=UNDATED[ending])
    files.write_named(path, content.getvalue())


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place in inches from the lower left corner, begun on a whole device pixel."""
    across, up = (float(size) for size in figure.get_size_inches())
    left, bottom = round(left * DPI) / DPI, round(bottom * DPI) / DPI
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


@dataclass(frozen=True)
class Heading:
    """Lines of text with their size in points, colour and weight, the first at the top."""

    lines: tuple[tuple[str, float, str, str], ...]

    @classmethod
    def of(cls, title: str, note: str, width: float) -> Heading:
        """The title's first line in bold, then its other lines and the note; all wrapped to ``width`` inches."""
        first, *rest = title.strip().splitlines() or [""]
        lines: list[tuple[str, float, str, str]] = []
        for i, text in enumerate((first, *rest, note)):
            size, color, weight, advance = (8.5, SOFT, "normal", 0.54) if i else (11.5, INK, "bold", 0.66)
            letters = int((width - 2 * MARGIN) * 72 / (size * advance))
            lines.extend((part, size, color, weight) for part in textwrap.wrap(text, letters))
        return cls(tuple(lines))

    @property
    def height(self) -> float:
        """Inches, with the margins above and below."""
        return 0.16 + sum(size for _, size, _, _ in self.lines) * 1.5 / 72

    def write(self, figure: Figure) -> None:
        """Write it from the upper left corner down."""
        across, up = (float(size) for size in figure.get_size_inches())
        y = up - 0.12
        for text, size, color, weight in self.lines:
            figure.text(MARGIN / across, y / up, text, fontsize=size, color=color, fontweight=weight, va="top")
            y -= size * 1.5 / 72


@dataclass(frozen=True)
class EndLabel:
    """The label of a line, and the line's last point in data units."""

    text: str
    color: str
    x: float
    y: float


def label_ends(axes: Axes, ends: Sequence[EndLabel]) -> None:
    """Write labels right of the axes, which make room for them: as high as the lines end, but apart from each other."""
    order = sorted(ends, key=lambda end: end.y)
    boxes = []
    for end in order:
        trial = axes.text(0, 0, end.text, fontsize=8.5, linespacing=1.1)
        boxes.append(trial.get_window_extent())
        trial.remove()
    make_room(axes, max(box.width for box in boxes))
    frame, (bottom, top), (start, stop) = axes.get_window_extent(), axes.get_ylim(), axes.get_xlim()
    halves = [box.height / frame.height / 2 + 0.008 for box in boxes]
    wanted = [(end.y - bottom) / (top - bottom) for end in order]  # as fractions of the height of the axes
    levels = wanted.copy()
    for i in range(1, len(levels)):
        levels[i] = max(levels[i], levels[i - 1] + halves[i - 1] + halves[i])
    levels[-1] = min(levels[-1], max(1.0, wanted[-1]))
    for i in reversed(range(len(levels) - 1)):
        levels[i] = min(levels[i], levels[i + 1] - halves[i + 1] - halves[i])
    for end, want, level in zip(order, wanted, levels, strict=True):
        beside = end.x == stop and abs(level - want) < 0.01
        far = stop - end.x > 0.2 * (stop - start)
        leader = {"arrowstyle": "-", "color": end.color, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4}
        axes.annotate(
            end.text,
            (end.x, end.y),
            (1 + 0.1 * DPI / frame.width, level),
            textcoords="axes fraction",
            color=end.color,
            fontsize=8.5,
            linespacing=1.1,
            va="center",
            annotation_clip=False,
            arrowprops=None if beside or far else leader,
        )


def add_legend(axes: Axes) -> None:
    """A legend right of the axes, which make room for it."""
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8, handlelength=3, labelspacing=0.7)
    make_room(axes, legend.get_window_extent().width)


def make_room(axes: Axes, width: float) -> None:
    """Narrow the axes so that ``width`` device pixels and a margin fit to their right."""
    place = axes.get_position()
    right = 1 - (width + 0.28 * DPI) / axes.figure.bbox.width
    axes.set_position((place.x0, place.y0, max(right - place.x0, 0.2), place.height))


@dataclass(frozen=True)
class Value:
    """A point (x, y) and what is marked above and below it, from ``low`` to ``high``, in data units."""

    x: float
    y: float
    low: float
    high: float
    color: str


def label_values(axes: Axes, values: Sequence[Value]) -> None:
    """Write each ``y`` beside its point, or not at all where it would cover a line, a point or another label."""
    import numpy
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    drawn = [line for line in axes.lines if line.get_linestyle() != "None"]  # not the caps of error bars
    lines = [line.get_transform().transform(line.get_xydata()) for line in drawn]  # [n, 2] each, in device pixels
    lines += [axes.transData.transform([(value.x, value.low), (value.x, value.high)]) for value in values]
    steps = numpy.linspace(0, 1, 150)[:, None]
    dense = numpy.concatenate([a + (b - a) * steps for line in lines for a, b in itertools.pairwise(line)])
    frame, reach = axes.get_window_extent(), 4.5 * DPI / 72
    points = axes.transData.transform([(value.x, value.y) for value in values])
    boxes = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in points]
    halo = [withStroke(linewidth=2, foreground="white")]
    for value in values:
        gap = 3 if value.high > value.low else 6
        places = ((value.high, 0, gap, "bottom"), (value.low, 0, -gap, "top"), (value.y, 6, 3, "bottom"), (value.y, 6, -3, "top"))
        for y, right, up, va in places:
            text = axes.annotate(
                f"{value.y:.1f}", (value.x, y), (right, up), textcoords="offset points", fontsize=8, color=value.color
            )
            text.set(va=va, ha="left" if right else "center", path_effects=halo)
            box = text.get_window_extent().padded(2)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 + 20
            if inside and not box.count_contains(dense) and not box.count_overlaps(boxes):
                boxes.append(box)
                break
            text.remove()
