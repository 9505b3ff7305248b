"""Plots of attacks: accuracy over the queries that they spend, and one attacked image.

They need matplotlib, the extra ``patchcert[plots]``. Equal input gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patchcert_cli.errors import UsageError
from patchcert_cli.reporting import figure_style, plots
from patchcert_cli.reporting.figure_style import DASHES, DPI, INK, SOFT, Heading, Look, axes_at
from patchcert_cli.reporting.margin_maps import draw_image
from patchcert_cli.reporting.text import named

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 2.6  # of a drawn image in inches, at most


def queries(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the share of images that are right and not flipped within a number of queries, a line for each attack run.

    Args:
        results: of attacks under one threat on the same images, as ``result.json`` holds them.
        path: the file to write; its ending says the format.

    Raises:
        UsageError: the runs are of different threats or images, or of a version that did not count queries.
    """
    about = {(one["threat"], one["dataset"], one["split"], one["images"]) for one in results}
    if len(about) != 1:
        hint = "Give runs with the same threat, data and number of images."
        raise UsageError("one plot cannot show attacks on different images or under different threats.", hint=hint)
    if not all(one.get("curve") for one in results):
        old = next(str(one["records"]) for one in results if not one.get("curve"))
        hint = "Attack again with --fresh."
        raise UsageError(f"the records in '{Path(old).parent}' do not say at which query an image was flipped.", hint=hint)
    ((threat, dataset, split, images),) = about
    models = list(dict.fromkeys(named(one["model"]) for one in results))
    note = f"{threat}, anywhere in the image · n = {images:,} images · measured: a stronger attack may flip more"
    heading = Heading.of(f"{', '.join(models)}\n{named(dataset)} {split}", note, plots.WIDTH)
    with figure_style.figure(path, plots.WIDTH, plots.HEIGHT + heading.height) as figure:
        axes = plots.accuracy_axes(figure, heading, below=0.55)
        axes.set(xlabel="queries spent on an image", ylabel="right under attack, %", xscale="log")
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for i, one in enumerate(results):
            x, y = _steps(one)
            name = _attack_name(one) + (f", {named(one['model'])}" if len(models) > 1 else "")
            axes.plot(x, y, drawstyle="steps-post", color=Look(i).color, linestyle=DASHES[i % 4], linewidth=1.8, label=name)
        for model in models:
            _floor(axes, [one for one in results if named(one["model"]) == model], f" {model}" if len(models) > 1 else "")
        figure_style.add_legend(axes)


def _steps(result: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Queries, and the accuracy in % from there on; before the first query it is the clean one."""
    images, clean = max(result["images"], 1), result["counts"]["clean"]
    rows = [(1, 0), *((max(queries, 1), flipped) for queries, flipped in result["curve"])]
    return [float(queries) for queries, _ in rows], [100 * (clean - flipped) / images for _, flipped in rows]


def _floor(axes: Any, results: Sequence[Mapping[str, Any]], model: str) -> None:
    """The certified accuracy, which no attack goes below."""
    shares = {claim["certified_accuracy"] for one in results for claim in one["claims"]}
    for share in sorted(shares):
        axes.axhline(
            100 * share, color=SOFT, linewidth=1.2, linestyle=(0, (2, 2)), label=f"certified{model}, {100 * share:.1f} %"
        )


def _attack_name(result: Mapping[str, Any]) -> str:
    return str(result["attack"].get("name", "attack")).replace(",", " + ")


def attacked_image(values: Mapping[str, Any], clean: Tensor, adversarial: Tensor, path: Path) -> None:
    """Draw an image, its adversarial one and their difference side by side, float32 [C, H, W] in [0, 1], with the answers.

    ``values`` are those of an attacked image (:func:`patchcert_cli.evaluation.single_image.attack`). In the difference, grey is
    no change, white is +1 and black -1, in each channel by itself.
    """
    channels, height, width = clean.shape
    if channels not in (1, 3):
        raise UsageError(f"images of {channels} channels cannot be drawn.", hint="Leave --map out; --save keeps them.")
    flipped, answer = values["flipped"], values["attacked_class"]
    words = (
        f"flipped to {answer} after {values['flipped_at']:,} queries"
        if flipped
        else f"not flipped in {values['queries']:,} queries"
    )
    certified = [claim["certified"] for claim in values["claims"]]
    note = f"{values['threat']} · {values['model']} · {_attack_name(values)}"
    note += (" · certified" if certified[0] else " · not certified") if certified else ""
    dots = max(1, int(SIDE * DPI) // max(height, width))  # device pixels per image pixel, whole so that pixels stay crisp
    high, wide = dots * height / DPI, dots * width / DPI
    slot = max(wide, 2.0)
    total = 0.3 + 3 * slot + 2 * 0.25
    heading = Heading.of(f"{Path(values['image']).name}: {values['class']}, {words}", note, total)
    size = (adversarial - clean).abs().amax()
    captions = (
        f"clean: {values['class']}",
        f"adversarial: {answer}" if flipped else "no flip found",
        f"difference, at most {size:.2g}",
    )
    drawn = (clean, adversarial, 0.5 + (adversarial - clean) / 2)
    with figure_style.figure(path, total, high + 0.45 + heading.height) as figure:
        heading.write(figure)
        for i, (image, caption) in enumerate(zip(drawn, captions, strict=True)):
            axes = axes_at(figure, 0.15 + i * (slot + 0.25) + (slot - wide) / 2, 0.12, wide, high)
            box = values["changed"] if i == 1 and flipped and values["threat"].startswith("patch:") else None
            draw_image(axes, (image * 255).round().to(torch.uint8), box)
            axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
            axes.set_title(caption, fontsize=9.5, pad=6, color=INK)
