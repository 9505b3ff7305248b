"""From what a command names to what it computes: the model, the images, and the claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patchcert_cli.cli import show
from patchcert_cli.cli.options import DataOptions, RunOptions
from patchcert_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from patchcert_cli.data.images import Images
    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation.estimate import FullRun
    from patchcert_cli.evaluation.models import DefenseRequest, ModelSource
    from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask

    Claims = Callable[[str, tuple[int, int, int]], Sequence[Claim]]

NAME_DATA = "Name the images: --data imagefolder:./val, or a data set such as cifar10."


def open_task(
    model: str | None, claims: Claims, data: DataOptions, run: RunOptions, command: str, request: DefenseRequest | None = None
) -> EvaluationTask:
    """Load model and test images for an evaluation, and report on stderr where both came from.

    ``claims`` makes what is to be certified from the model's own threat model and the shape [C, H, W] of its images.
    """
    from patchcert_cli import data as datasets

    opened = _open(model, claims, request, data, run.device)
    with show.progress() as progress:
        whole = datasets.load(
            opened.dataset,
            "test",
            data_dir=data.data_dir,
            download=data.download,
            fetch=f"{command} --download",
            progress=progress,
        )
    total = datasets.whole_split(whole)
    _report(whole, len(whole), total)
    return opened.task(whole.limit(data.limit, run.seed), total, run, command)


def open_sample(
    model: str | None, claims: Claims, data: DataOptions, run: RunOptions, command: str, request: DefenseRequest | None = None
) -> tuple[EvaluationTask, FullRun]:
    """As :func:`open_task`, but for a dry run: images that are not packed yet are not packed, and a few stand for all."""
    from patchcert_cli import data as datasets
    from patchcert_cli.evaluation import estimate

    opened = _open(model, claims, request, data, run.device)
    fetch = command.replace(" --dry-run", "") + " --download"
    some = datasets.glance(opened.dataset, "test", estimate.MOST, run.seed, data_dir=data.data_dir, fetch=fetch)
    _report(some.images, some.there, some.total)
    full = estimate.FullRun(min(data.limit or some.there, some.there), some.disk)
    return opened.task(some.images.limit(data.limit, run.seed), some.total, run, command), full


@dataclass(frozen=True)
class _Opened:
    """A model, the claims, and a data set whose classes are known to be the model's.

    Attributes:
        outputs: for each class of the data set the model's output of that name; None if the labels count outputs already.
    """

    dataset: str
    model: EvaluatedModel
    claims: tuple[Claim, ...]
    outputs: list[int] | None

    def task(self, images: Images, total: int, run: RunOptions, command: str) -> EvaluationTask:
        """The evaluation on these images."""
        from patchcert_cli.evaluation import task as tasks

        named = images if self.outputs is None else images.relabelled(self.outputs)
        size = tasks.batch_size(self.model.defense) if run.batch_size is None else run.batch_size
        task = tasks.EvaluationTask(self.model, named, self.claims, total, run.seed, size, command)
        task.check()
        return task


def _open(model: str | None, claims: Claims, request: DefenseRequest | None, given: DataOptions, device: str) -> _Opened:
    """Find model and data set, and check that they fit together before an image is read or packed."""
    from patchcert_cli import data
    from patchcert_cli import device as devices
    from patchcert_cli.data import datasets

    dataset, data_dir = given.dataset, given.data_dir
    place = devices.resolve(device)
    _check_early(model, claims, dataset, data_dir)
    candidate = find(model, dataset, request, place)
    if dataset is None and datasets.own(candidate.dataset):
        raise UsageError(f"{candidate.name} was trained on {candidate.dataset}.", hint=NAME_DATA)
    chosen = candidate.fitted(dataset or candidate.dataset)
    shape = candidate.shape(chosen)
    meant = tuple(claims(candidate.threat, shape))
    evaluated = candidate.evaluated(shape, [claim.threat for claim in meant], place)
    show.say("\n".join(evaluated.notes))
    facts = data.info(chosen)
    if facts.shape != shape:
        if facts.resize_crop is not None:  # before anything is packed
            raise DataError(f"{chosen} images are {facts.shape}, but {candidate.name} takes {shape}.")
        return _Opened(chosen, evaluated, meant, None)  # the task refuses it, if there are such images
    names = data.classes_of(chosen, "test", data_dir=data_dir)
    outputs = candidate.matched(names, chosen, evaluated)
    if outputs is not None:
        pairs = [f"{name} is output {at}" for name, at in zip(names, outputs, strict=True)]
        show.say(f"{len(names)} classes matched by name: {', '.join(pairs[:3])}{', ...' if len(pairs) > 3 else ''}")
    return _Opened(chosen, evaluated, meant, outputs)


def _check_early(model: str | None, claims: Claims, dataset: str | None, data_dir: Path | None) -> None:
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
        claims("", data.info(dataset).shape)
    elif card is None or not card.classifier:
        return
    chosen = dataset or (card.dataset if card else "")
    if data.info(chosen).resize_crop is not None:
        data.classes_of(chosen, "test", data_dir=data_dir)


def find(model: str | None, dataset: str | None, request: DefenseRequest | None, device: str) -> ModelSource:
    """The model that is named, and a line on stderr about where it came from; an unknown data set fails first."""
    from patchcert_cli import data
    from patchcert_cli.evaluation import models

    if dataset is not None:
        data.info(dataset)
    candidate = models.find(model, dataset, request or models.DefenseRequest(), device)
    show.say(candidate.note)
    return candidate


def _report(images: Images, there: int, total: int) -> None:
    """Report where the images come from."""
    from patchcert_cli import data

    where = "bundled with patchcert" if images.source == "bundled" else f"from '{images.source}'"
    if there < total:
        where += f": the first {there} of {total}; --data-dir or --download for all of them"
    facts = data.info(images.name)
    what = f"{there} pictures in {len(images.classes)} class folders" if facts.path else f"{images.name} test images"
    show.say(f"{what} {where}")
    some = f"of {len(images)} of them that were looked at: " if images.mapped is None and facts.resize_crop else ""
    for remark in images.remarks:
        show.say(some + remark)
