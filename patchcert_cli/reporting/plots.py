"""Pictures of results: accuracy over patch sizes, accuracy over aspect ratios, and one image's margins over patch locations.

They need matplotlib, the extra ``patchcert[plots]``. Equal input gives equal bytes.

Rows are dictionaries as a sweep stores them, one for each threat and method: ``threat`` (``patch:5x5``), ``method``, the counts
``images``, ``clean`` and ``certified``, and ``certified_interval``, the two ends of the exact 95 % interval as fractions.

Shapes: C channels, H x W pixels, P x Q locations of the patch's top-left corner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchcert_cli.errors import UsageError
from patchcert_cli.reporting import figure_style
from patchcert_cli.reporting.figure_style import DPI, EMPTY, GRID, INK, MARK, SOFT, Heading, axes_at, check_path, require
from patchcert_cli.threats import Patch, PatchPercent, Sparse, parse_threat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

__all__ = ["check_path", "curve", "margin_map", "plot", "require", "shapes", "thresholds"]

Rows = Sequence[Mapping[str, Any]]

HUES = ("#0072b2", "#c65d00", "#007f5f", "#a8477f", "#8a6d00", "#3c4a9c")  # after Okabe and Ito, dark enough for text
MARKS, DASHES = "osD^vp", ("-", (0, (5, 1.6)), (0, (1.6, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MOST_LABELLED = 5  # with more methods a legend takes the place of labels at the ends of the lines


def plot(rows: Rows, path: Path, *, title: str, area: int | None = None) -> None:
    """Draw :func:`shapes` if a row's patch is not square, else :func:`curve`; ``area`` is what was asked of shapes."""
    threats = [parse_threat(row["threat"]) for row in rows]
    oblong = any(isinstance(threat, Patch) and threat.height != threat.width for threat in threats)
    if oblong:
        shapes(rows, path, title=title, area=area)
    else:
        curve(rows, path, title=title)


def curve(rows: Rows, path: Path, *, title: str) -> None:
    """Draw clean and certified accuracy in % over the side of a square patch in pixels, with a certified line for each method.

    A sweep over ``patch:P%`` or over the budgets of sparse attacks is drawn over that figure instead. What follows the first
    line of ``title`` is set smaller.
    """
    names, points = set(), []
    for row in _checked(rows):
        unit, threat, position = _size(row["threat"])
        names.add((unit, threat))
        points.append(_Point.of(row, position))
    if len(names) > 1:
        raise UsageError("one curve cannot show different kinds of threats.", hint="Give one kind, such as square patches.")
    ((unit, threat),) = names
    positions = sorted({point.x for point in points})
    heading = Heading.of(title, f"{threat}, anywhere in the image · {_images(rows)} · with exact 95 % intervals", 6.8)
    with figure_style.figure(path, 6.8, 3.7 + heading.height) as figure:
        axes = _accuracy_axes(figure, heading, below=0.55)
        axes.set_xlabel(unit)
        pad = 0.05 * (positions[-1] - positions[0]) or 0.5
        axes.set_xlim(positions[0] - pad, positions[-1] + pad)
        if len(positions) <= 12:
            axes.set_xticks(positions, [f"{position:g}" for position in positions])
        _draw_accuracies(axes, points, bars=len(positions) == 1, dodge=0)


def shapes(rows: Rows, path: Path, *, title: str, area: int | None = None) -> None:
    """Draw certified accuracy in % over patch shapes, from wide to tall, with exact 95 % intervals and the clean accuracy.

    The patches should have nearly one area, at most ``area``. What follows the first line of ``title`` is set smaller.
    """
    patches = [parse_threat(row["threat"]) for row in _checked(rows)]
    sides = [(patch.height, patch.width) for patch in patches if isinstance(patch, Patch)]
    if len(sides) < len(patches):
        raise UsageError("only patches of HxW pixels have an aspect ratio.", hint="Give threats such as patch:2x12.")
    order = sorted(set(sides), key=lambda side: (side[0] / side[1], side))
    points = [_Point.of(row, order.index(side)) for row, side in zip(rows, sides, strict=True)]
    wide = min(6.8 + 0.4 * max(0, len(order) - 11), 14)
    areas = _span([height * width for height, width in sides])
    areas = areas if area is None else f"at most {area:,}" + (f" ({areas})" if areas != f"{area:,}" else "")
    note = f"one patch of {areas} pixels, anywhere in the image · {_images(rows)} · with exact 95 % intervals"
    heading = Heading.of(title, note, wide)
    upright = len(order) > 24  # tick labels
    below = 0.9 + 0.3 * upright
    with figure_style.figure(path, wide, below + 3.15 + heading.height) as figure:
        axes = _accuracy_axes(figure, heading, below=below)
        axes.set_xlabel("patch, height x width in pixels, from wide to tall")
        axes.set_xticks(range(len(order)), [f"{height}x{width}" for height, width in order])
        axes.tick_params(axis="x", pad=28, labelrotation=90 * upright)
        axes.set_xlim(-0.6, len(order) - 0.4)
        _draw_accuracies(axes, points, bars=True, dodge=0.16)
        _draw_icons(axes, order, room=72 * axes.get_position().width * wide / len(order))


def thresholds(rows: Rows, path: Path, *, title: str) -> None:
    """Draw what the threshold of certified detection decides, in % of all images: alarms on unattacked ones, right answers
    without an alarm, and certified ones with exact 95 % intervals.

    Rows are those of other pictures with ``threshold`` and ``alarms``, and without ``method`` and ``certified_interval``.
    """
    from patchcert_cli.certificate import clopper_pearson  # with torch, which other pictures do not need

    order = sorted(_checked(rows), key=lambda row: float(row["threshold"]))
    threats, x = {str(row["threat"]) for row in order}, [float(row["threshold"]) for row in order]
    if len(threats) > 1:
        raise UsageError("one picture of thresholds cannot show different threats.", hint="Give one.")
    heading = Heading.of(title, f"{threats.pop()}, anywhere in the image · {_images(order)} · with exact 95 % intervals", 6.8)
    lines = {"alarms, unattacked": ("alarms", HUES[1]), "right, no alarm": ("clean", INK), "certified": ("certified", HUES[0])}
    with figure_style.figure(path, 6.8, 3.7 + heading.height) as figure:
        axes = _accuracy_axes(figure, heading, below=0.55)
        axes.set(xlabel="confidence from which a contradicting mask raises an alarm", ylabel="of all images, %")
        axes.set_xlim(-0.03, 1.03)
        ends = []
        for i, (name, (key, hue)) in enumerate(lines.items()):
            shares = [100 * row[key] / max(row["images"], 1) for row in order]
            (line,) = axes.plot(x, shares, color=hue, linewidth=1.6, linestyle=DASHES[i], marker=MARKS[i], markersize=4.5)
            line.set(markeredgecolor="white", label=name, clip_on=False)
            ends.append(figure_style.EndLabel(name, hue, x[-1], shares[-1]))
        spans = [clopper_pearson(row["certified"], max(row["images"], 1)) for row in order]
        low, high = ([100 * span[end] for span in spans] for end in (0, 1))
        axes.fill_between(x, low, high, color=HUES[0], alpha=0.2, linewidth=0)
        figure_style.label_ends(axes, ends)


def single_map(values: dict[str, Any], pixels: Tensor, margins: Tensor, path: Path, *, unit: str) -> None:
    """Draw what is known of one picture: its values as JSON shows them, its pixels uint8 [C, H, W], and its margins [P, Q]."""
    claim = values["claims"][0]
    top, left, height, width = claim["worst"]
    words = "certified" if claim["certified"] else "not certified"
    margin_map(
        pixels,
        margins,
        path,
        title=f"{Path(values['image']).name}: {values['class']}, {words} against {claim['threat']}",
        box=(top, left, height, width),
        patch=Patch(height, width),
        unit=unit,
    )


def margin_map(
    image: Tensor,
    margins: Tensor,
    path: Path,
    *,
    title: str,
    box: tuple[int, int, int, int],
    patch: Patch,
    unit: str = "votes",
) -> None:
    """Draw an image with its worst patch location beside a map of the margins over all locations, at one scale.

    Args:
        image: uint8 [C, H, W], C is 1 (grey) or 3 (RGB).
        margins: float [P, Q] with P = H - patch.height + 1 and Q = W - patch.width + 1: the margin with the patch's top-left
            corner at each pixel, in ``unit``. Above 0 the patch can do no harm there.
        path: the file to write; its ending says the format.
        title: what follows its first line is set smaller.
        box: the worst location in pixels: top, left, height, width.
        patch: the patch in pixels.
        unit: what the margins count.
    """
    channels, height, width = image.shape
    if channels not in (1, 3) or tuple(margins.shape) != (height - patch.height + 1, width - patch.width + 1):
        raise ValueError(f"{patch} with margins {tuple(margins.shape)} does not fit an image {tuple(image.shape)}")
    top, left = box[:2]
    harmless, smallest = int((margins > 0).sum()), f"{float(margins[top, left]):.4g}".replace("-", "\N{MINUS SIGN}")
    note = (
        f"{patch.height}x{patch.width} patch · proven harmless at {harmless:,} of {margins.numel():,} locations (margin above 0)"
        f" · smallest margin {smallest} {unit}, at row {top}, column {left}"
    )
    dots = max(1, int(3.6 * DPI) // max(height, width))  # device pixels per image pixel, whole so that pixels stay crisp
    high, wide = dots * height / DPI, dots * width / DPI  # of the drawings, in inches
    tall, slot = max(high, 1.2), max(wide, 2.4)  # of the room for each
    lefts = [0.7 + i * (slot + 0.75) + (slot - wide) / 2 for i in range(2)]
    bottom, total = 0.6 + (tall - high) / 2, 0.7 + 2 * slot + 0.75 + 1
    heading = Heading.of(title, note, total)
    with figure_style.figure(path, total, 0.6 + tall + 0.3 + heading.height) as figure:
        heading.write(figure)
        panels = [axes_at(figure, start, bottom, wide, high) for start in lefts]
        for axes, name in zip(panels, ("worst location of the patch", "margin for each top-left corner"), strict=True):
            axes.set_title(name, fontsize=9.5, pad=6, loc="left" if slot == wide else "center")
            axes.tick_params(length=3, labelsize=8.5)
        _draw_image(panels[0], image, box)
        _draw_margins(panels[1], margins, (height, width), (top, left), 72 * dots / DPI)
        _draw_scale(panels[1], axes_at(figure, lefts[1] + wide + 0.16, bottom, 0.14, high), margins, f"margin, {unit}")


@dataclass(frozen=True)
class _Point:
    """One row, ready to draw: a position on the x axis and percentages."""

    x: float
    method: str
    clean: float
    certified: float
    low: float
    high: float

    @classmethod
    def of(cls, row: Mapping[str, Any], x: float) -> _Point:
        images = max(row["images"], 1)
        low, high = (100 * end for end in row["certified_interval"])
        return cls(x, str(row["method"]), 100 * row["clean"] / images, 100 * row["certified"] / images, low, high)


def _checked(rows: Rows) -> Rows:
    if not rows:
        raise UsageError("there is no result to draw.")
    return rows


def _size(text: str) -> tuple[str, str, float]:
    """The name of the x axis, the threat in words, and the position of this threat."""
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


def _accuracy_axes(figure: Figure, heading: Heading, *, below: float) -> Axes:
    """Axes from 0 to 100 % with the heading above; ``below`` inches for the x axis."""
    heading.write(figure)
    across, up = (float(size) for size in figure.get_size_inches())
    axes = axes_at(figure, 0.62, below, across - 0.8, up - below - heading.height)
    axes.set_ylim(-2, 104)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.axhline(0, color=SOFT, linewidth=0.8, zorder=1.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return axes


def _draw_accuracies(axes: Axes, points: Sequence[_Point], *, bars: bool, dodge: float) -> None:
    """The clean accuracy, and a certified line for each method, ``dodge`` beside each other, with intervals as bars or bands."""
    clean = sorted({(point.x, point.clean) for point in points})
    if len({value for _, value in clean}) == 1:
        ends = [figure_style.EndLabel(f"clean\n{clean[0][1]:.1f} %", INK, axes.get_xlim()[1], clean[0][1])]
        axes.axhline(clean[0][1], color=INK, linewidth=1.4, label="clean")
    else:
        ends = [figure_style.EndLabel("clean", INK, *clean[-1])]
        axes.plot(*zip(*clean, strict=True), color=INK, linewidth=1.4, marker=".", label="clean")
    methods = list(dict.fromkeys(point.method for point in points))
    values = []
    for i, method in enumerate(methods):
        shift, hue = min(dodge, 0.6 / len(methods)) * (i - (len(methods) - 1) / 2), HUES[i % len(HUES)]
        mine = sorted((replace(p, x=p.x + shift) for p in points if p.method == method), key=lambda point: point.x)
        _draw_method(axes, mine, i, bars=bars or len(mine) == 1)
        ends.append(figure_style.EndLabel(f"certified,\n{method}", hue, mine[-1].x, mine[-1].certified))
        values += [figure_style.Value(p.x, p.certified, *((p.low, p.high) if bars else (p.certified,) * 2), hue) for p in mine]
    if len(methods) <= MOST_LABELLED:
        figure_style.label_ends(axes, ends)
    else:
        figure_style.add_legend(axes)
    figure_style.label_values(axes, values)


def _draw_method(axes: Axes, points: Sequence[_Point], i: int, *, bars: bool) -> None:
    """The certified line of method number ``i``, with its intervals."""
    hue, x, y = HUES[i % len(HUES)], [point.x for point in points], [point.certified for point in points]
    if bars:
        reach = [[max(p.certified - p.low, 0) for p in points], [max(p.high - p.certified, 0) for p in points]]
        axes.errorbar(x, y, yerr=reach, fmt="none", ecolor=hue, elinewidth=1.2, capsize=2.5, capthick=1.2, zorder=2.5)
    else:
        axes.fill_between(x, [p.low for p in points], [p.high for p in points], color=hue, alpha=0.2, linewidth=0)
    (line,) = axes.plot(x, y, color=hue, linewidth=1.1 if bars else 1.8, linestyle=DASHES[i % len(DASHES)], zorder=3)
    line.set(marker=MARKS[i % len(MARKS)], markersize=max(7.5 - i, 5.5), markeredgecolor="white")  # coinciding, all are seen
    line.set(label=f"certified, {points[0].method}", clip_on=False)


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


def _draw_image(axes: Axes, image: Tensor, box: tuple[int, int, int, int]) -> None:
    """The image uint8 [C, H, W] with a frame around the pixels of ``box``."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    pixels = image.detach().cpu().permute(1, 2, 0).squeeze(2).numpy()  # [H, W] or [H, W, 3]
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xlabel="column, pixels", ylabel="row, pixels")
    top, left, height, width = box
    frame = Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=MARK, linewidth=1.8, clip_on=False)
    frame.set_path_effects([withStroke(linewidth=3.4, foreground="black")])
    axes.add_patch(frame)


def _draw_margins(axes: Axes, margins: Tensor, size: tuple[int, int], worst: tuple[int, int], pixel: float) -> None:
    """The margins float [P, Q] on a frame of ``size`` H, W, with a line where their sign changes; a pixel is ``pixel`` points."""
    from matplotlib.collections import LineCollection

    values = margins.detach().double().cpu()  # [P, Q]
    limit = max((abs(value) for value in _finite(margins)), default=0) or 1
    axes.patch.set(facecolor=EMPTY, hatch="////", edgecolor="#c3cad0", linewidth=0)  # where the patch would stick out
    axes.imshow(values.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5))
    axes.set(xlabel="left column of the patch, pixels", ylabel="top row, pixels")
    safe = values > 0
    beside, beneath = (safe[:, 1:] != safe[:, :-1]).nonzero().tolist(), (safe[1:] != safe[:-1]).nonzero().tolist()
    edges = [[(j + 0.5, i - 0.5), (j + 0.5, i + 0.5)] for i, j in beside]
    edges += [[(j - 0.5, i + 0.5), (j + 0.5, i + 0.5)] for i, j in beneath]
    axes.add_collection(LineCollection(edges, colors=INK, linewidths=min(1.3, max(0.6, pixel / 3)), capstyle="projecting"))
    for color, thick in (("black", 3.4), (MARK, 1.8)):
        (ring,) = axes.plot(worst[1], worst[0], "o", markersize=min(9, max(5.5, pixel)), markerfacecolor="none", clip_on=False)
        ring.set(markeredgecolor=color, markeredgewidth=thick)


def _draw_scale(axes: Axes, scale: Axes, margins: Tensor, name: str) -> None:
    """The colours of the map on ``axes``, from its smallest to its largest margin and at least to 0."""
    from matplotlib.ticker import MaxNLocator

    finite = _finite(margins)
    low, high = min(0, *finite, 0), max(0, *finite, 0)
    bar = scale.figure.colorbar(axes.images[0], cax=scale)
    bar.outline.set_visible(False)
    scale.set_ylim((low, high) if low < high else (-1, 1))
    scale.yaxis.set_major_locator(MaxNLocator(6, integer=all(value.is_integer() for value in finite)))
    scale.axhline(0, color=INK, linewidth=1.3)
    scale.tick_params(length=3, labelsize=8.5)
    scale.set_ylabel(name)


def _finite(margins: Tensor) -> list[float]:
    values: list[float] = margins[margins.isfinite()].tolist()
    return values
