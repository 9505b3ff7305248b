"""The look of every plot: one palette, figures measured in inches, headings, and equal bytes for equal input.

matplotlib is imported only where it is used. No window is opened, and the user's matplotlib settings have no effect. A point is
1/72 inch.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from patchcert_cli.errors import MachineError, UsageError
from patchcert_cli.storage import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf", ".svg")
METADATA: dict[str, dict[str, Any]] = {  # what the writers must leave out, as it depends on the clock or the machine
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    ".svg": {"Date": None, "Creator": None},
}
DPI = 200
MARGIN = 0.15  # inches
INK, SOFT, GRID, EMPTY, MARK = "#1f2933", "#5b6770", "#dfe3e7", "#eceff1", "#ffb000"
PALETTE = (  # on a light page and on a dark one; the first six after Okabe and Ito
    ("#0072b2", "#56b4e9"),
    ("#b95600", "#f2994a"),
    ("#007f5f", "#3cc49a"),
    ("#a8477f", "#e28bbd"),
    ("#8a6d00", "#d9c045"),
    ("#6a40a8", "#b79cf0"),
    ("#b8322a", "#ff8a80"),
    ("#007a87", "#4dd0e1"),
    ("#7a4a2b", "#c8a387"),
    ("#4f7a00", "#a5d64c"),
)
MARKERS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚"}  # matplotlib's names, and the same as text
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.6, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
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
WEB_COLORS = {  # the custom properties of the web page's style sheet
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--line)",
    "#ffffff": "var(--page)",
    **{light: f"var(--hue{i})" for i, (light, _) in enumerate(PALETTE)},
}
FONT_PROPERTIES = ("font", "font-family", "font-size", "font-weight", "font-stretch", "font-style")


@dataclass(frozen=True)
class Look:
    """The colour and the marker of number ``index`` among the lines or models that one reader compares; 60 differ."""

    index: int

    @property
    def hue(self) -> int:
        """The number of the colour in :data:`PALETTE`."""
        return self.index % len(PALETTE)

    @property
    def color(self) -> str:
        """The colour on a light page."""
        return PALETTE[self.hue][0]

    @property
    def marker(self) -> str:
        """matplotlib's name of the marker."""
        return list(MARKERS)[(self.index + self.index // len(PALETTE)) % len(MARKERS)]

    @property
    def glyph(self) -> str:
        """The marker as text."""
        return MARKERS[self.marker]


def require() -> None:
    """Check that matplotlib is installed; meant to be called before a long computation starts.

    Raises:
        MachineError: it is not.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401  # imported to see whether that works
    except ImportError as problem:
        raise MachineError(
            "plots need matplotlib, which is not installed.", hint="Type: pip install 'patchcert[plots]'"
        ) from problem


def check_path(path: Path) -> None:
    """Refuse a path that no plot can be written to: an unknown ending, or what :func:`files.check_file` refuses.

    Raises:
        UsageError: the name has another ending, or is the name of a folder.
        MachineError: nothing can be written there.
    """
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"a plot cannot be written to '{path}'.", hint=f"The name must end in {', '.join(ENDINGS)}.")
    files.check_file(path, "the plot")


@contextmanager
def blank_figure(width: float, height: float, **settings: Any) -> Iterator[Figure]:
    """A white figure of ``width`` x ``height`` inches, under this module's settings and ``settings`` until the block ends."""
    require()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():  # restores the process's settings
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # an empty box is drawn
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | settings)
        blank = Figure(figsize=(round(width * DPI) / DPI, round(height * DPI) / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(blank)
        yield blank


@contextmanager
def figure(path: Path, width: float, height: float, *, digest: str = "") -> Iterator[Figure]:
    """A :func:`blank_figure`, written to ``path`` when the block ends, atomically; ``digest`` goes into the metadata of SVG."""
    require()
    check_path(path)
    with blank_figure(width, height) as drawing:
        yield drawing
        content, ending = io.BytesIO(), path.suffix.lower()
        metadata = METADATA[ending] | ({"Description": digest} if digest else {})
        drawing.savefig(content, format=ending[1:], dpi=DPI, metadata=metadata)
    files.write_named(path, content.getvalue())


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a position in inches from the lower left corner, moved to a whole device pixel."""
    across, up = (float(size) for size in figure.get_size_inches())
    left, bottom = round(left * DPI) / DPI, round(bottom * DPI) / DPI
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def add_legend(axes: Axes) -> None:
    """A legend right of the axes, which are narrowed so that it fits."""
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8.5, handlelength=3)
    box = axes.get_position()
    right = 1 - (legend.get_window_extent().width + 0.28 * DPI) / axes.figure.bbox.width
    axes.set_position((box.x0, box.y0, max(right - box.x0, 0.2), box.height))


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


def inline_svg(figure: Figure, label: str, titles: Mapping[str, Sequence[str]]) -> str:
    """A figure as an SVG element that stands inside an HTML page: without style attributes, and in the page's fonts and colours.

    Args:
        figure: its texts and lines have colours of :data:`WEB_COLORS` alone; nothing in it is clipped.
        label: what a screen reader says instead of the drawing.
        titles: for the ``gid`` of a line with markers, the tooltip of each marker; such a line becomes a group of class
            ``model`` with its ``gid`` as ``data-name``.
    """
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata=METADATA[".svg"])
    root = ElementTree.fromstring(content.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata") or child.tag.endswith("}style"):
                parent.remove(child)
    links = {value.removeprefix("#") for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")}
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        name = node.get("id", "")
        attributes = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
        attributes |= _presentation(attributes.pop("style", ""))
        if name not in links:
            attributes.pop("id", None)
        node.attrib.clear()
        node.attrib.update(attributes)
        if name in titles:
            node.attrib.update({"class": "model", "data-name": name})
            for mark, text in zip(list(node.iter("{http://www.w3.org/2000/svg}use")), titles[name], strict=True):
                ElementTree.SubElement(mark, "title").text = text
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _presentation(style: str) -> dict[str, str]:
    """The declarations of a style attribute as attributes, in the page's colours and without fonts."""
    pairs = (declaration.partition(":")[::2] for declaration in style.split(";") if ":" in declaration)
    found = {key.strip(): value.strip() for key, value in pairs}
    return {key: WEB_COLORS.get(value, value) for key, value in found.items() if key not in FONT_PROPERTIES}
