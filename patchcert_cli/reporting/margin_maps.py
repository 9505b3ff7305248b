"""A map of one image: the margins of its certificate over all patch locations, beside the image at the same scale.

It needs matplotlib, the extra ``patchcert[plots]``.

Shapes: C channels, H x W pixels, P x Q locations of the patch's top-left corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchcert_cli.reporting import figure_style
from patchcert_cli.reporting.figure_style import DPI, EMPTY, INK, MARK, Heading, axes_at
from patchcert_cli.threats import Patch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


def single_map(values: dict[str, Any], pixels: Tensor, margins: Tensor, path: Path, *, unit: str) -> None:
    """Draw the result for one image: its values as JSON shows them, its pixels uint8 [C, H, W], and its margins [P, Q]."""
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
        title: all its lines but the first are set smaller.
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
        draw_image(panels[0], image, box)
        _draw_margins(panels[1], margins, (height, width), (top, left), 72 * dots / DPI)
        _draw_scale(panels[1], axes_at(figure, lefts[1] + wide + 0.16, bottom, 0.14, high), margins, f"margin, {unit}")


def draw_image(axes: Axes, image: Tensor, box: Sequence[int] | None) -> None:
    """The image uint8 [C, H, W] with a frame around the pixels of ``box``, if there is one."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    pixels = image.detach().cpu().permute(1, 2, 0).squeeze(2).numpy()  # [H, W] or [H, W, 3]
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xlabel="column, pixels", ylabel="row, pixels")
    if box is None:
        return
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
