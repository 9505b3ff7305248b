"""The weakest images of a run: those that are right with the smallest margin, drawn beside their margins at every location.

An image and a model are used only if certifying it again gives the run's own record: the same answer and verdict, and the same
margin and location. Where margins are rounded, their last digits and which of two equal locations is worst may differ, since
rounding depends on how many images are computed at a time.
"""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from patchcert_cli import device as devices
from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certificate import Certificate
from patchcert_cli.classifiers import addresses
from patchcert_cli.data import datasets
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.defenses import Claim, Defense, MarginMaps
from patchcert_cli.errors import DataError, IntegrityError, PatchcertError
from patchcert_cli.evaluation import models, results
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.reporting import figure_style, margin_maps
from patchcert_cli.reporting.figure_style import DPI, Heading, axes_at
from patchcert_cli.reporting.site.claimed import Claimed
from patchcert_cli.reporting.site.runs import Record, RunOnPage
from patchcert_cli.threats import Patch, PatchPercent, Threat


@dataclass(frozen=True)
class WeakImage:
    """One of the weakest images.

    Attributes:
        name: its number in the split, or its file.
        label: what it shows; the class's number if its name is not known.
        margin: the smallest margin over all locations.
        worst: where: top, left, height and width.
        png: the drawing as the address of an embedded image; empty if there is none.
    """

    name: str
    label: str
    runner_up: str
    margin: float
    certified: bool
    worst: tuple[int, int, int, int]
    png: str = ""


@dataclass(frozen=True)
class Weakest:
    """The weakest images of a run under one claim; ``why`` says why some have no drawing, if so."""

    claim: Claimed
    images: tuple[WeakImage, ...]
    why: str


def weakest(
    run: RunOnPage, count: int, *, data_dir: Path | None = None, device: str = "auto", progress: Progress | None = None
) -> Weakest:
    """The ``count`` images that are right with the smallest margins under the run's main claim, the smallest first.

    Args:
        run: a run of certify.
        count: at most how many.
        data_dir: where the data set is looked for.
        device: where the margins are computed.
        progress: receives the images that are drawn.
    """
    claim, shown = run.main, progress or Silent()
    verdicts = [(one, one["claims"][claim.at]) for one in run.records]
    right = [(one, verdict) for one, verdict in verdicts if results.counted(one, verdict)[0]]
    chosen = sorted(right, key=lambda pair: (_margin(pair[1]), pair[0]["index"]))[:count]
    source, why = _source(run, claim, data_dir, device) if chosen else (None, "")
    found, failed = [], list[str]()
    for at, (record, verdict) in enumerate(chosen):
        png = ""
        if source is not None:
            shown.update(at, len(chosen), "weakest images drawn")
            try:
                png = source.draw(record, verdict)
            except PatchcertError as problem:
                failed.append(problem.message.rstrip("."))
        found.append(_weak(record, verdict, source, png))
    if failed:
        why = failed[0] + (f"; {len(failed) - 1} more likewise" if len(failed) > 1 else "")
    return Weakest(claim, tuple(found), why)


def _margin(verdict: Record) -> float:
    margin = float(verdict["margin"])
    return -math.inf if math.isnan(margin) else margin


def _weak(record: Record, verdict: Record, source: _Source | None, png: str) -> WeakImage:
    def called(number: int) -> str:
        return f"class {number}" if source is None else source.defense.class_name(number)

    return WeakImage(
        str(record.get("picture", f"image {record['index']}")),
        called(record["label"]),
        called(verdict["runner_up"]),
        float(verdict["margin"]),
        bool(verdict["certified"]),
        tuple(verdict["worst"]),
        png,
    )


@dataclass(frozen=True)
class _Source:
    """The model of a run, its images, and what was certified."""

    defense: Defense
    images: Images
    claim: Claim

    def draw(self, record: Record, verdict: Record) -> str:
        """The drawing of an image, as the address of an embedded PNG; raises a PatchcertError if it is not that of the run."""
        places = (self.images.index == record["index"]).nonzero().flatten()
        if not len(places):
            raise DataError(
                f"image {record['index']} is not among the {len(self.images)} images here.",
                hint="Use --data-dir with the images that were certified.",
            )
        pixels = self.images.read(places[:1])  # uint8 [1, C, H, W]
        x = to_float(pixels).to(self.defense.device)
        (found,) = self.defense.certify_claims(x, [self.claim])
        if not _same(found, record, verdict):
            raise IntegrityError(
                f"image {record['index']} certified again differs from its record: other images or weights.",
                hint="Use --data-dir with the images that were certified, and the model that was.",
            )
        if pixels.shape[1] not in (1, 3):
            raise DataError(
                f"images of {pixels.shape[1]} channels cannot be drawn.", hint="Images of 1 or 3 channels can be drawn."
            )
        title = f"{self.defense.class_name(record['label'])}, {'certified' if verdict['certified'] else 'not certified'}"
        threat, box = self.claim.threat, verdict["worst"]
        defense = self.defense
        if isinstance(defense, MarginMaps) and isinstance(threat, Patch | PatchPercent):
            patch, unit = threat.resolve(*pixels.shape[2:]), defense.unit
            margins = defense.margin_map(x, patch)[0].cpu()
            drawn = partial(margin_maps.margin_map, title=title, box=tuple(box), patch=patch, unit=unit)
            return _embedded(lambda path: drawn(pixels[0], margins, path))
        return _embedded(lambda path: _alone(pixels[0], title, box, threat, path))


def _same(found: Certificate, record: Record, verdict: Record) -> bool:
    """Whether the certificate of one image is that of its record."""
    answers = int(found.prediction[0]), bool(found.certified[0])
    if answers != (record["prediction"], verdict["certified"]):
        return False
    margin = float(found.margin[0])
    if found.arithmetic is Arithmetic.EXACT:
        return (margin, found.worst[0].tolist()) == (verdict["margin"], verdict["worst"])
    rounded = 4 * float(found.tolerance[0])  # each of the two is within about its tolerance of what it bounds
    return math.isclose(margin, verdict["margin"], rel_tol=0.0, abs_tol=rounded)


def _source(run: RunOnPage, claim: Claimed, data_dir: Path | None, device: str) -> tuple[_Source | None, str]:
    """The model and the images of a run; or None, and why not."""
    name, dataset = str(run.manifest["model"]), str(run.manifest["dataset"])
    if addresses.is_address(name):
        return None, f"the plain classifier {name} is not loaded for a page; patchcert certify --image FILE --map draws one image"
    try:
        found = models.find(name, None, models.DefenseRequest(), devices.resolve(device))
        opened = datasets.open_dataset(dataset, data_dir=data_dir)
        model = found.evaluated(found.shape(opened), [claim.threat], devices.resolve(device))
        images = opened.load("test")
    except PatchcertError as problem:
        return None, problem.message.rstrip(".")
    if model.sha256 != run.manifest["model_sha256"]:
        return None, f"{name} has other weights now than in the run"
    if tuple(images.pixels.shape[1:]) != model.defense.input_shape:
        return None, f"the images here do not have the shape {model.defense.input_shape} that {name} takes"
    return _Source(model.defense, images, Claim(claim.threat, claim.asked, top=claim.top)), ""


def _embedded(draw: Callable[[Path], None]) -> str:
    """What is drawn into a PNG file, as the address of an embedded image."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "drawing.png"
        draw(path)
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _alone(pixels: Tensor, title: str, worst: Sequence[int], threat: Threat, path: Path) -> None:
    """An image with its worst location, for a defense whose margins at other locations are not known."""
    high, wide = (int(size) for size in pixels.shape[1:])
    dots = max(1, int(2.6 * DPI) // max(high, wide))
    tall, broad = dots * high / DPI, dots * wide / DPI
    heading = Heading.of(title, f"worst location under {threat}", max(broad, 3.0) + 1)
    with figure_style.figure(path, max(broad, 3.0) + 1, tall + 0.6 + heading.height) as figure:
        heading.write(figure)
        axes = axes_at(figure, 0.7, 0.5, broad, tall)
        axes.tick_params(length=3, labelsize=8.5)
        margin_maps.draw_image(axes, pixels, worst)
