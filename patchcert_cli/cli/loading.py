"""From what a command names to what it computes: the model, the images, and the claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patchcert_cli.cli import show
from patchcert_cli.cli.options import DataOptions, RunOptions
from patchcert_cli.errors import UsageError, on_all_ranks
from patchcert_cli.parallel import workers

if TYPE_CHECKING:
    from patchcert_cli.data.datasets import Dataset
    from patchcert_cli.data.images import Images
    from patchcert_cli.data.resize_crop import ResizeCrop
    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation.models import DefenseRequest, ModelSource
    from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask
    from patchcert_cli.threats import Threat

    Claims = Callable[[Threat | None, tuple[int, int, int]], Sequence[Claim]]
    OpenedForImage = tuple[EvaluatedModel, Sequence[Claim], ResizeCrop]

NAME_DATA = "Name the images: --data imagefolder:./val, or a data set such as cifar10."


def open_task(
    model: str | None, claims: Claims, data: DataOptions, run: RunOptions, command: str, request: DefenseRequest | None = None
) -> EvaluationTask:
    """Load model and test images for an evaluation, and report on stderr where both came from.

    ``claims`` makes what is to be certified from the model's own threat model and the shape [C, H, W] of its images.
    """
    from patchcert_cli import data as datasets

    opened = _open(model, claims, request, data, run.device)
    images = opened.dataset.load("test", download=data.download, fetch=f"{command} --download")
    total = datasets.whole_split(images)
    _report(opened.dataset, images, total)
    chosen, ranks = images.limit(data.limit, run.seed), workers.current().size
    if ranks > len(chosen):
        hint = f"Use --processes {len(chosen)} or fewer."
        problem = UsageError(f"{ranks} processes are more than the {len(chosen)} image{'s' * (len(chosen) != 1)}.", hint=hint)
        raise on_all_ranks(problem)
    return opened.task(chosen, total, run, command)


def open_sample(
    model: str | None, claims: Claims, data: DataOptions, run: RunOptions, command: str, request: DefenseRequest | None = None
) -> tuple[EvaluationTask, int]:
    """As :func:`open_task`, for a dry run: of images in files only a few are opened. Returns how many the run has."""
    from patchcert_cli import data as datasets
    from patchcert_cli.evaluation import estimate

    opened = _open(model, claims, request, data, run.device)
    fetch = command.replace(" --dry-run", "") + " --download"
    images = opened.dataset.load("test", fetch=fetch)
    total = datasets.whole_split(images)
    _report(opened.dataset, images, total)
    chosen = images.limit(data.limit, run.seed)
    sample = chosen if chosen.reader is None else chosen.limit(estimate.MOST, run.seed)
    return opened.task(sample, total, run, command), len(chosen)


def open_image(
    model: str | None, claims: Claims, request: DefenseRequest, dataset: str | None, device: str, path: Path
) -> OpenedForImage:
    """Load a model for one image file; also returns the claims, and how the file is resized and cropped."""
    return image_opener(model, claims, request, dataset, device)(path)


def image_opener(
    model: str | None, claims: Claims, request: DefenseRequest, dataset: str | None, device: str
) -> Callable[[Path], OpenedForImage]:
    """As :func:`open_image`, for several files: the model is loaded once, and prepared once for each size of images."""
    from patchcert_cli import device as devices
    from patchcert_cli.data.datasets import open_dataset

    place = devices.resolve(device)
    images = None if dataset is None else open_dataset(dataset)
    candidate = find(model, dataset, request, place)
    prepared: dict[tuple[int, int, int], tuple[EvaluatedModel, Sequence[Claim]]] = {}

    def opened(path: Path) -> OpenedForImage:
        resize_crop = candidate.meant(images, path)
        shape = (candidate.channels, *resize_crop.size)
        if shape not in prepared:
            claimed = claims(candidate.threat, shape)
            evaluated = candidate.evaluated(shape, [claim.threat for claim in claimed], place)
            show.say("\n".join(evaluated.notes))
            prepared[shape] = evaluated, claimed
        return *prepared[shape], resize_crop

    return opened


@dataclass(frozen=True)
class _Opened:
    """A model, the claims, and a data set whose classes are known to be the model's.

    Attributes:
        outputs: for each class of the data set the model's output of that name; None if the labels count outputs already.
    """

    dataset: Dataset
    model: EvaluatedModel
    claims: tuple[Claim, ...]
    outputs: list[int] | None

    def task(self, images: Images, total: int, run: RunOptions, command: str) -> EvaluationTask:
        """The evaluation on these images."""
        from patchcert_cli.evaluation import task as tasks

        named = images if self.outputs is None else images.relabelled(self.outputs)
        with show.progress() as progress:
            named = named.checked(progress)
        show.say("\n".join(named.remarks))
        size = tasks.batch_size(self.model.defense) if run.batch_size is None else run.batch_size
        task = tasks.EvaluationTask(self.model, named, self.claims, total, run.seed, size, command)
        task.check()
        return task


def _open(model: str | None, claims: Claims, request: DefenseRequest | None, given: DataOptions, device: str) -> _Opened:
    """Find model and data set, and check that they fit together before an image is read."""
    from patchcert_cli import data
    from patchcert_cli import device as devices
    from patchcert_cli.data import datasets

    dataset, data_dir = given.dataset, given.data_dir
    place = devices.resolve(device)
    named = None if dataset is None else data.open_dataset(dataset, data_dir=data_dir)
    _check_early(model, claims, named, data_dir)
    candidate = find(model, dataset, request, place)
    if named is None and datasets.is_custom(candidate.dataset):
        raise UsageError(f"{candidate.name} was trained on {candidate.dataset}.", hint=NAME_DATA)
    opened = candidate.fitted(named or data.open_dataset(candidate.dataset, data_dir=data_dir))
    shape = candidate.shape(opened)
    meant = tuple(claims(candidate.threat, shape))
    evaluated = candidate.evaluated(shape, [claim.threat for claim in meant], place)
    show.say("\n".join(evaluated.notes))
    if opened.shape != shape:
        if opened.in_folders:  # before an image is opened
            from patchcert_cli.evaluation.task import other_size

            raise other_size(opened.name, opened.shape, candidate.name, shape)
        return _Opened(opened, evaluated, meant, None)  # the task refuses it, if there are such images
    names = opened.class_names("test")
    outputs = candidate.matched(names, opened, evaluated)
    if outputs is not None:
        pairs = [f"{name} is output {at}" for name, at in zip(names, outputs, strict=True)]
        show.say(f"{len(names)} classes matched by name: {', '.join(pairs[:3])}{', ...' if len(pairs) > 3 else ''}")
    return _Opened(opened, evaluated, meant, outputs)


def _check_early(model: str | None, claims: Claims, dataset: Dataset | None, data_dir: Path | None) -> None:
    """Check threat and images before weights are downloaded."""
    from patchcert_cli import data
    from patchcert_cli.catalog import bundled
    from patchcert_cli.classifiers import addresses

    if model is None:
        return
    card = bundled.card(model) if model in bundled.names() else None
    if addresses.is_address(model):
        if dataset is None:
            raise UsageError(f"{model} comes without images.", hint=NAME_DATA)
        claims(None, dataset.shape)
    elif card is None or not card.classifier:
        return
    known = dataset or data.open_dataset(card.dataset if card else "", data_dir=data_dir)
    if known.in_folders:
        known.folder("test")


def find(model: str | None, dataset: str | None, request: DefenseRequest | None, device: str) -> ModelSource:
    """The model that is named, and a line on stderr about where it came from."""
    from patchcert_cli.evaluation import models

    candidate = models.find(model, dataset, request or models.DefenseRequest(), device)
    show.say(candidate.note)
    return candidate


def _report(dataset: Dataset, images: Images, total: int) -> None:
    """Report where the images come from."""
    where = "bundled with patchcert" if images.source == "bundled" else f"from '{images.source}'"
    if len(images) < total:
        where += f": the first {len(images)} of {total}; --data-dir or --download for all of them"
    what = f"{len(images)} images in {len(images.classes)} class folders" if dataset.custom else f"{images.name} test images"
    show.say(f"{what} {where}")
