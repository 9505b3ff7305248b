"""From what a command names to what it computes: the model, the images, and what is claimed of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchcert_cli.cli import show
from patchcert_cli.cli.options import typed_command
from patchcert_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from patchcert_cli.data.datasets import Dataset
    from patchcert_cli.data.images import Images
    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation.models import DefenseRequest, ModelSource
    from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask

    Claims = Callable[[str, tuple[int, int, int]], Sequence[Claim]]

SAY_DATA = "Name the images: --data imagefolder:./val, or a data set such as cifar10."
CLASSIFIER = "Plain classifiers, and other masks"
DefenseOption = Annotated[
    str | None,
    typer.Option("--defense", help="Put this defense around the classifier, such as patchcleanser.", rich_help_panel=CLASSIFIER),
]
MasksOption = Annotated[
    int | None,
    typer.Option("--masks", metavar="K", help="Masks along each axis, at most. Default: 6.", rich_help_panel=CLASSIFIER),
]
PassesOption = Annotated[
    int | None,
    typer.Option("--passes", help="As many masks as let all pairs be evaluated in so many passes.", rich_help_panel=CLASSIFIER),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FILE|none",
        help="Safetensors instead of the published weights; none: random ones, to measure the cost with --dry-run.",
        rich_help_panel=CLASSIFIER,
    ),
]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        "--classes",
        metavar="FILE|imagenet",
        help="What the model's outputs are called: a text file, one line per output.",
        rich_help_panel=CLASSIFIER,
    ),
]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        help="Certified detection: a mask that contradicts the whole image raises an alarm from this confidence on. Default: 0.",
        rich_help_panel=CLASSIFIER,
    ),
]
LabelsOption = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="float32|bfloat16",
        help="What labels behind masks are computed in; bfloat16 is faster with few classes; those in doubt are computed again.",
        rich_help_panel=CLASSIFIER,
    ),
]


def wish_of(
    *,
    defense: str | None,
    masks: int | None,
    passes: int | None,
    weights: str | None,
    classes: str | None,
    labels: str | None,
    dry_run: bool,
    download: bool = False,
    threshold: float | None = None,
    compare: bool = False,
) -> DefenseRequest:
    """What the options say is to be made of a model, refused if they contradict each other."""
    if masks is not None and passes is not None:
        raise UsageError("--masks and --passes both say how many masks there are.", hint="Give one of them.")
    for flag, value in (("--masks", masks), ("--passes", passes)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value} must be 1 or more.")
    if threshold is not None and not 0 <= threshold < 1:
        raise UsageError(f"--threshold {threshold:g} is no confidence.", hint="Allowed: from 0 (any contradiction) to below 1.")
    if labels not in (None, "float32", "bfloat16"):
        raise UsageError(f"invalid --labels '{labels}'.", hint="Use float32 or bfloat16.")
    if weights == "none" and not dry_run:
        raise UsageError("--weights none means random weights, whose answers mean nothing.", hint="Add --dry-run.")

    from patchcert_cli.evaluation.models import DefenseRequest

    return DefenseRequest(defense, masks, passes, weights, classes, labels, download, threshold, compare)


def open_task(
    model: str | None,
    claims: Claims,
    request: DefenseRequest | None = None,
    *,
    dataset: str | None,
    data_dir: Path | None,
    download: bool,
    limit: int | None,
    batch_size: int | None,
    device: str,
    seed: int,
) -> EvaluationTask:
    """Load model and test images for an evaluation, and say on stderr where both came from.

    ``claims`` makes what is to be certified from the model's own threat model and the shape of its images.
    """
    from patchcert_cli import data

    opened = _open(model, claims, request, dataset, data_dir, device)
    images = opened.dataset.load("test", download=download, fetch=f"{typed_command()} --download")
    total = data.whole_split(images)
    _tell(opened.dataset, images, total)
    return opened.task(images.limit(limit, seed), total, batch_size, seed)


def open_sample(
    model: str | None,
    claims: Claims,
    request: DefenseRequest | None,
    *,
    dataset: str | None,
    data_dir: Path | None,
    limit: int | None,
    batch_size: int | None,
    device: str,
    seed: int,
) -> tuple[EvaluationTask, int]:
    """As :func:`open_task`, but for a dry run: of images in files only a few are opened. Returns how many the run has."""
    from patchcert_cli import data
    from patchcert_cli.evaluation import estimate

    opened = _open(model, claims, request, dataset, data_dir, device)
    fetch = typed_command().replace(" --dry-run", "") + " --download"
    images = opened.dataset.load("test", fetch=fetch)
    total = data.whole_split(images)
    _tell(opened.dataset, images, total)
    chosen = images.limit(limit, seed)
    sample = chosen if chosen.reader is None else chosen.limit(estimate.MOST, seed)
    return opened.task(sample, total, batch_size, seed), len(chosen)


@dataclass(frozen=True)
class _Opened:
    """A model, what is claimed of it, and a data set whose classes are known to be the model's.

    Attributes:
        outputs: for each class of the data set the model's output of that name; None if the labels count outputs already.
    """

    dataset: Dataset
    model: EvaluatedModel
    claims: tuple[Claim, ...]
    outputs: list[int] | None

    def task(self, images: Images, total: int, batch_size: int | None, seed: int) -> EvaluationTask:
        """The evaluation on these images."""
        from patchcert_cli.evaluation import task as tasks

        named = images if self.outputs is None else images.relabelled(self.outputs)
        with show.progress() as progress:
            named = named.checked(progress)
        show.say("\n".join(named.remarks))
        size = tasks.batch_size(self.model.defense) if batch_size is None else batch_size
        task = tasks.EvaluationTask(self.model, named, self.claims, total, seed, size, typed_command())
        task.check()
        return task


def _open(
    model: str | None, claims: Claims, request: DefenseRequest | None, dataset: str | None, data_dir: Path | None, device: str
) -> _Opened:
    """Find model and data set and hold them against each other before an image is read or packed."""
    from patchcert_cli import data
    from patchcert_cli import device as devices
    from patchcert_cli.data import datasets

    place = devices.resolve(device)
    _foresee(model, claims, dataset, data_dir)
    candidate = found(model, dataset, request, place)
    if dataset is None and datasets.own(candidate.dataset):
        raise UsageError(f"{candidate.name} was trained on {candidate.dataset}.", hint=SAY_DATA)
    chosen = candidate.fitted(dataset or candidate.dataset)
    shape = candidate.shape(chosen)
    meant = tuple(claims(candidate.threat, shape))
    evaluated = candidate.evaluated(shape, [claim.threat for claim in meant], place)
    show.say("\n".join(evaluated.notes))
    opened = data.open_dataset(chosen, data_dir=data_dir)
    if opened.shape != shape:
        if opened.in_folders:  # before an image is opened
            raise DataError(f"{chosen} images are {opened.shape}, but {candidate.name} takes {shape}.")
        return _Opened(opened, evaluated, meant, None)  # the task says so, if there are such images
    names = opened.class_names("test")
    outputs = candidate.matched(names, chosen, evaluated)
    if outputs is not None:
        pairs = [f"{name} is output {at}" for name, at in zip(names, outputs, strict=True)]
        show.say(f"{len(names)} classes matched by name: {', '.join(pairs[:3])}{', ...' if len(pairs) > 3 else ''}")
    return _Opened(opened, evaluated, meant, outputs)


def _foresee(model: str | None, claims: Claims, dataset: str | None, data_dir: Path | None) -> None:
    """Refuse what would make fetching somebody's weights be in vain: no threat, no images."""
    from patchcert_cli import data
    from patchcert_cli.catalog import bundled
    from patchcert_cli.classifiers import addresses

    if model is None:
        return
    card = bundled.card(model) if model in bundled.names() else None
    if addresses.is_address(model):
        if dataset is None:
            raise UsageError(f"{model} comes without images.", hint=SAY_DATA)
        claims("", data.info(dataset).shape)
    elif card is None or not card.classifier:
        return
    chosen = dataset or (card.dataset if card else "")
    known = data.open_dataset(chosen, data_dir=data_dir)
    if known.in_folders:
        known.folder("test")


def found(model: str | None, dataset: str | None, request: DefenseRequest | None, device: str) -> ModelSource:
    """The model that is named, and a line on stderr about where it came from; a wrong data set is told first."""
    from patchcert_cli import data
    from patchcert_cli.evaluation import models

    if dataset is not None:
        data.info(dataset)
    candidate = models.find(model, dataset, request or models.DefenseRequest(), device)
    show.say(candidate.note)
    return candidate


def _tell(dataset: Dataset, images: Images, total: int) -> None:
    """Say where the images come from."""
    where = "bundled with patchcert" if images.source == "bundled" else f"from '{images.source}'"
    if len(images) < total:
        where += f": the first {len(images)} of {total}; --data-dir or --download for all of them"
    what = f"{len(images)} images in {len(images.classes)} class folders" if dataset.custom else f"{images.name} test images"
    show.say(f"{what} {where}")
