"""Plots of results: accuracy over patch sizes, shapes or thresholds, and over the attacker's strength for several models.

They need matplotlib, the extra ``patchcert[plots]``. Equal input gives equal bytes.

Rows are dictionaries as a sweep stores them, one for each threat and method: ``threat`` (``patch:5x5``), ``method``, the counts
``images``, ``clean`` and ``certified``, and ``certified_interval``, the two ends of the exact 95 % interval as fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchcert_cli.errors import UsageError
from patchcert_cli.reporting import figure_style
from patchcert_cli.reporting.figure_style import DASHES, GRID, INK, SOFT, Heading, Look, axes_at, check_path, require
from patchcert_cli.threats import Patch, PatchPercent, Sparse, parse_threat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Point", "Series", "check_path", "curve", "model_curves", "plot", "require", "shapes", "thresholds"]

Rows = Sequence[Mapping[str, Any]]

WIDTH, HEIGHT = 6.8, 3.7  # of a plot in inches, without its heading
MAX_TICKS = 12  # with more positions the axis has round numbers instead of each position
MAX_CLEAN_LINES = 5  # with more models, the lines of their clean accuracies would hide each other


@dataclass(frozen=True)
class Point:
    """A position on the x axis, and accuracies in percent: clean, certified, and the ends of the certified one's interval."""

    x: float
    clean: float
    certified: float
    low: float
    high: float

    @classmethod
    def of(cls, row: Mapping[str, Any], x: float) -> Point:
        """The point of a row."""
        images = max(row["images"], 1)
        low, high = (100 * end for end in row["certified_interval"])
        return cls(x, 100 * row["clean"] / images, 100 * row["certified"] / images, low, high)


@dataclass(frozen=True)
class Series:
    """Points that one line joins, from left to right; hollow marks set published numbers apart from measured ones."""

    name: str
    look: Look
    points: tuple[Point, ...]
    hollow: bool = False


def plot(rows: Rows, path: Path, *, title: str, area: int | None = None) -> None:
    """Draw :func:`shapes` if a row's patch is not square, else :func:`curve`; ``area`` is the largest area that was asked for."""
    threats = [parse_threat(row["threat"]) for row in rows]
    oblong = any(isinstance(threat, Patch) and threat.height != threat.width for threat in threats)
    if oblong:
        shapes(rows, path, title=title, area=area)
    else:
        curve(rows, path, title=title)


def curve(rows: Rows, path: Path, *, title: str) -> None:
    """Draw clean and certified accuracy in % over the side of a square patch in pixels, with a certified line for each method.

    A sweep over ``patch:P%`` or over the budgets of sparse attacks is drawn over that figure instead. All lines of ``title``
    but the first are set smaller.
    """
    axis_names, points = set(), []
    for row in _checked(rows):
        unit, threat, position = _size(row["threat"])
        axis_names.add((unit, threat))
        points.append((str(row["method"]), Point.of(row, position)))
    if len(axis_names) > 1:
        raise UsageError("one curve cannot show different kinds of threats.", hint="Give one kind, such as square patches.")
    ((unit, threat),) = axis_names
    series = _by_method(points)
    heading = Heading.of(title, f"{threat}, anywhere in the image · {_images(rows)} · with exact 95 % intervals", WIDTH)
    with figure_style.figure(path, WIDTH, HEIGHT + heading.height) as figure:
        axes = accuracy_axes(figure, heading, below=0.55)
        axes.set_xlabel(unit)
        positions = _set_positions(axes, series)
        _draw_methods(axes, series, bars=len(positions) == 1)


def shapes(rows: Rows, path: Path, *, title: str, area: int | None = None) -> None:
    """Draw certified accuracy in % over patch shapes, from wide to tall, with exact 95 % intervals and the clean accuracy.

    The patches should have nearly one area, at most ``area``. All lines of ``title`` but the first are set smaller.
    """
    patches = [parse_threat(row["threat"]) for row in _checked(rows)]
    sides = [(patch.height, patch.width) for patch in patches if isinstance(patch, Patch)]
    if len(sides) < len(patches):
        raise UsageError("only patches of HxW pixels have an aspect ratio.", hint="Give threats such as patch:2x12.")
    order = sorted(set(sides), key=lambda side: (side[0] / side[1], side))
    points = [(str(row["method"]), Point.of(row, order.index(side))) for row, side in zip(rows, sides, strict=True)]
    width = min(WIDTH + 0.4 * max(0, len(order) - 11), 14)
    areas = _span([height * width for height, width in sides])
    areas = areas if area is None else f"at most {area:,}" + (f" ({areas})" if areas != f"{area:,}" else "")
    note = f"one patch of {areas} pixels, anywhere in the image · {_images(rows)} · with exact 95 % intervals"
    heading = Heading.of(title, note, width)
    upright = len(order) > 24  # tick labels
    below = 0.9 + 0.3 * upright
    with figure_style.figure(path, width, below + HEIGHT - 0.55 + heading.height) as figure:
        axes = accuracy_axes(figure, heading, below=below)
        axes.set_xlabel("patch, height x width in pixels, from wide to tall")
        axes.set_xticks(range(len(order)), [f"{height}x{width}" for height, width in order])
        axes.tick_params(axis="x", pad=28, labelrotation=90 * upright)
        axes.set_xlim(-0.6, len(order) - 0.4)
        _draw_methods(axes, _side_by_side(_by_method(points)), bars=True)
        _draw_icons(axes, order, room=72 * axes.get_position().width * width / len(order))


def thresholds(rows: Rows, path: Path, *, title: str) -> None:
    """Draw how the threshold of certified detection decides, in % of all images: alarms on unattacked ones, right answers
    without an alarm, certified ones with exact 95 % intervals, and the published metric, which counts clean alarms as success.

    Rows are those of other plots with ``threshold`` and ``alarms``, and without ``method`` and ``certified_interval``; those of
    older results have no ``or_alarm``.
    """
    from patchcert_cli.certificate import clopper_pearson  # imports torch, which other plots do not need

    order = sorted(_checked(rows), key=lambda row: float(row["threshold"]))
    threats, x = {str(row["threat"]) for row in order}, [float(row["threshold"]) for row in order]
    if len(threats) > 1:
        raise UsageError("one plot of thresholds cannot show different threats.", hint="Give one.")
    heading = Heading.of(title, f"{threats.pop()}, anywhere in the image · {_images(order)} · with exact 95 % intervals", WIDTH)
    lines = {"alarms, unattacked": ("alarms", Look(1)), "right, no alarm": ("clean", None), "certified": ("certified", Look(0))}
    if all("or_alarm" in row for row in order):
        lines["published metric\n(incl. clean alerts)"] = ("or_alarm", Look(3))
    with figure_style.figure(path, WIDTH, HEIGHT + heading.height) as figure:
        axes = accuracy_axes(figure, heading, below=0.55)
        axes.set(xlabel="confidence threshold of alarms", ylabel="of all images, %")
        axes.set_xlim(-0.03, 1.03)
        for i, (name, (key, look)) in enumerate(lines.items()):
            shares = [100 * row[key] / max(row["images"], 1) for row in order]
            (line,) = axes.plot(x, shares, color=look.color if look else INK, linewidth=1.6, linestyle=DASHES[i], label=name)
            line.set(marker=(look or Look(2)).marker, markersize=4.5, markeredgecolor="white", clip_on=False)
        spans = [clopper_pearson(row["certified"], max(row["images"], 1)) for row in order]
        low, high = ([100 * span[end] for span in spans] for end in (0, 1))
        axes.fill_between(x, low, high, color=Look(0).color, alpha=0.2, linewidth=0)
        figure_style.add_legend(axes)


def model_curves(
    series: Sequence[Series], *, xlabel: str, about: str, titles: Mapping[str, Sequence[str]], salt: str = ""
) -> str:
    """Certified accuracy in % over the attacker's strength, a line for each model, as an SVG element for the web page.

    The clean accuracies are dashed, if there are at most :data:`MAX_CLEAN_LINES` models.

    Args:
        series: the models, with different names.
        xlabel: what the x axis shows.
        about: the drawing in one sentence, for screen readers.
        titles: for each model, a tooltip for each of its points.
        salt: different for each drawing on one page, so that no two elements have the same id.
    """
    with figure_style.blank_figure(7.6, 4.2, **{"svg.fonttype": "none", "svg.hashsalt": f"patchcert {salt}"}) as figure:
        figure.patch.set_visible(False)
        axes = _style_axes(axes_at(figure, 0.62, 0.88, 6.84, 2.85))
        axes.patch.set_visible(False)
        axes.tick_params(pad=8)
        axes.set_xlabel(xlabel, labelpad=15)
        axes.set_title("certified accuracy, %", loc="left", fontsize=9.5, color=INK, pad=10, x=-0.07)
        positions = _set_positions(axes, series)
        for one in series:
            x = [point.x for point in one.points]
            if len(series) <= MAX_CLEAN_LINES:
                half = 0.02 * (positions[-1] - positions[0]) if len(x) == 1 else 0
                clean = [(point.x + shift, point.clean) for point in one.points for shift in ((-half, half) if half else (0,))]
                axes.plot(*zip(*clean, strict=True), color=one.look.color, linewidth=1.3, linestyle=(0, (4, 3)), clip_on=False)
            axes.vlines(x, *_ends(one), colors=one.look.color, linewidth=1.3, clip_on=False)
            (line,) = axes.plot(x, [point.certified for point in one.points], color=one.look.color, linewidth=1.8, zorder=3)
            line.set(marker=one.look.marker, markersize=8, markeredgecolor="white", clip_on=False, gid=one.name)
            if one.hollow:
                line.set(markerfacecolor="white", markeredgecolor=one.look.color, markeredgewidth=1.6)
        return figure_style.inline_svg(figure, about, titles)


def _checked(rows: Rows) -> Rows:
    if not rows:
        raise UsageError("there is no result to draw.", hint="Give runs of patchcert certify with an image or more.")
    return rows


def _size(text: str) -> tuple[str, str, float]:
    """The name of the x axis, the threat as text, and the position of this threat."""
    threat = parse_threat(text)
    if isinstance(threat, PatchPercent):
        return "patch area, % of the image", "one square patch", float(threat.percent)
    if isinstance(threat, Sparse):
        return f"changed {threat.unit}s, at most", f"any {threat.unit}s", threat.k
    if not isinstance(threat, Patch) or threat.height != threat.width:
        raise UsageError(f"{threat} has no side to draw a curve over.", hint="Draw a chart over shapes.")
    return "patch side, pixels", "one square patch", threat.height


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _images(rows: Rows) -> str:
    return f"n = {_span([row['images'] for row in rows])} images"


def _by_method(points: Sequence[tuple[str, Point]]) -> list[Series]:
    """A series for each method, in the order in which the methods occur."""
    methods = list(dict.fromkeys(method for method, _ in points))
    return [
        Series(name, Look(i), tuple(sorted((point for method, point in points if method == name), key=lambda point: point.x)))
        for i, name in enumerate(methods)
    ]


def _side_by_side(series: Sequence[Series]) -> list[Series]:
    """The series moved apart, so that none covers another."""
    step = min(0.16, 0.6 / len(series))
    shifts = [step * (i - (len(series) - 1) / 2) for i in range(len(series))]
    return [
        replace(one, points=tuple(replace(point, x=point.x + shift) for point in one.points))
        for one, shift in zip(series, shifts, strict=True)
    ]


def accuracy_axes(figure: Figure, heading: Heading, *, below: float) -> Axes:
    """Axes from 0 to 100 % with the heading above; ``below`` inches for the x axis."""
    heading.write(figure)
    across, up = (float(size) for size in figure.get_size_inches())
    axes = _style_axes(axes_at(figure, 0.62, below, across - 0.8, up - below - heading.height))
    axes.set_ylabel("accuracy, %")
    return axes


def _style_axes(axes: Axes) -> Axes:
    """Horizontal lines from 0 to 100 %, and nothing else around the axes."""
    axes.set_ylim(-2, 104)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="y", color=GRID, linewidth=0.8, clip_on=False)
    axes.axhline(0, color=SOFT, linewidth=0.8, zorder=1.5, clip_on=False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes


def _set_positions(axes: Axes, series: Sequence[Series]) -> list[float]:
    """Limits and ticks of the x axis for all points; returns their positions in rising order."""
    positions = sorted({point.x for one in series for point in one.points})
    pad = 0.05 * (positions[-1] - positions[0]) or 0.5
    axes.set_xlim(positions[0] - pad, positions[-1] + pad)
    if len(positions) <= MAX_TICKS:
        axes.set_xticks(positions, [f"{position:g}" for position in positions])
    return positions


def _ends(series: Series) -> tuple[list[float], list[float]]:
    return [point.low for point in series.points], [point.high for point in series.points]


def _draw_methods(axes: Axes, series: Sequence[Series], *, bars: bool) -> None:
    """The clean accuracy of one model, and a certified line for each method, with intervals as bars or bands."""
    clean = sorted({(round(point.x), point.clean) for one in series for point in one.points})
    if len({value for _, value in clean}) == 1:
        axes.axhline(clean[0][1], color=INK, linewidth=1.4, label=f"clean, {clean[0][1]:.1f} %")
    else:
        axes.plot(*zip(*clean, strict=True), color=INK, linewidth=1.4, marker=".", label="clean")
    for i, one in enumerate(series):
        _draw_method(axes, one, i, bars=bars or len(one.points) == 1)
    if len(series) == 1 and len(series[0].points) <= MAX_TICKS:
        for point in series[0].points:
            axes.annotate(
                f"{point.certified:.1f}",
                (point.x, point.high),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=series[0].look.color,
            )
    figure_style.add_legend(axes)


def _draw_method(axes: Axes, series: Series, i: int, *, bars: bool) -> None:
    """The certified line of method number ``i``, with its intervals."""
    color, x, y = series.look.color, [point.x for point in series.points], [point.certified for point in series.points]
    low, high = _ends(series)
    if bars:
        reach = [[max(a - b, 0) for a, b in zip(y, low, strict=True)], [max(b - a, 0) for a, b in zip(y, high, strict=True)]]
        axes.errorbar(x, y, yerr=reach, fmt="none", ecolor=color, elinewidth=1.2, capsize=2.5, capthick=1.2, zorder=2.5)
    else:
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    (line,) = axes.plot(x, y, color=color, linewidth=1.1 if bars else 1.8, linestyle=DASHES[i % len(DASHES)], zorder=3)
    line.set(marker=series.look.marker, markersize=max(7.5 - i, 5.5), markeredgecolor="white")  # all are visible if they coincide
    line.set(label=f"certified, {series.name}", clip_on=False)


def _draw_icons(axes: Axes, sides: Sequence[tuple[int, int]], *, room: float) -> None:
    """The shapes themselves, to one scale, between the axes and the tick labels; ``room`` points for each."""
    from matplotlib.offsetbox import AnnotationBbox, DrawingArea
    from matplotlib.patches import Rectangle

    scale = min(22, 0.8 * room) / max(max(side) for side in sides)
    where: Any = ("data", "axes fraction")
    for i, (height, width) in enumerate(sides):
        size = max(width * scale, 1), max(height * scale, 1)
        area = DrawingArea(*size)
        area.add_artist(Rectangle((0, 0), *size, facecolor=SOFT, linewidth=0))
        icon = AnnotationBbox(area, (i, 0), (0, -15), xycoords=where, boxcoords="offset points", frameon=False, pad=0)
        icon.set_annotation_clip(False)
        axes.add_artist(icon)
