"""The model under evaluation, from whatever names it: a certified model of the zoo or of a folder, or a plain classifier around
which a defense is put.

Opening goes in two steps. A :class:`ModelSource` knows what it is and what it wants to be evaluated on. With images and threats
chosen it becomes a :class:`patchcert_cli.evaluation.task.EvaluatedModel`: the masks of a defense depend on both.

Shapes: C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchcert_cli import cards, checkpoint, defenses
from patchcert_cli.catalog import bundled
from patchcert_cli.catalog.resolve import ResolvedModel, resolve
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.certifiers.masks.masked_predictions import MANY
from patchcert_cli.classifiers import addresses, loaders
from patchcert_cli.classifiers.addresses import Classifier
from patchcert_cli.data import class_names, datasets, image_files
from patchcert_cli.data.class_names import Names
from patchcert_cli.data.datasets import Dataset
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.defenses import Defense, EmpiricalDefense, MaskedClassifier
from patchcert_cli.defenses._detection import DetectingClassifier
from patchcert_cli.errors import IntegrityError, UsageError
from patchcert_cli.evaluation.task import EvaluatedModel
from patchcert_cli.threats import Patch, PatchPercent, Threat, parse_threat

GREY = 0.5  # the colour of masks, where no better one is known


@dataclass(frozen=True)
class DefenseRequest:
    """What is to be made of a model, as far as the user says.

    Attributes:
        defense: the defense to put around it; None for its own.
        masks: how many masks along each axis.
        passes: as many masks as can be evaluated in pairs with this many passes of the network.
        weights: safetensors file for a plain classifier, or ``none`` for random ones.
        classes: text file with the names of the model's outputs, or ``imagenet``.
        download: whether weights of torchvision may be fetched.
        labels: the precision of masked predictions, ``float32`` or ``bfloat16``; None for the model's own.
        threshold: confidence by which certified detection raises an alarm; None for the model's own.
        compare: whether other thresholds are to be compared with it.
        mask_shape: ``square``, ``column`` or ``row``.
        settings: of a defense without masks, by name.
    """

    defense: str | None = None
    masks: int | None = None
    passes: int | None = None
    weights: str | None = None
    classes: str | None = None
    labels: str | None = None
    download: bool = False
    threshold: float | None = None
    compare: bool = False
    mask_shape: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def masked(self) -> bool:
        """Whether it says which masks to use."""
        return self.masks is not None or self.passes is not None or self.mask_shape is not None

    def plan(self, threats: Sequence[Threat], shape: Sequence[int]) -> MaskSpec:
        """The masks that cover all of these threats on images [C, H, W]."""
        return MaskSpec(
            tuple(largest(threats, shape)), per_axis=self.masks or 0, passes=self.passes or 0, shape=self.mask_shape or "square"
        )


class ModelSource(ABC):
    """A model that was found, before images and threats are known.

    Attributes:
        name: what the user calls it.
        note: one line about where it came from.
        threat: the threat that it is made for; empty if none.
        dataset: the data set that it is evaluated on by default; empty if none.
        names: what its outputs are called; empty if unknown.
    """

    name: str
    note: str
    threat: Threat | None
    dataset: str
    names: Names

    @property
    @abstractmethod
    def channels(self) -> int:
        """C of the images that it takes."""

    @abstractmethod
    def resize_crop(self) -> ResizeCrop | None:
        """How image files are resized and cropped to the images that the model was made for; None if unknown."""

    def fitted(self, dataset: Dataset) -> Dataset:
        """A data set resized and cropped as the model was made for, unless its name states how.

        Raises:
            DataError: neither does, and the images have different sizes.
        """
        if (own := self.resize_crop()) is not None:
            return dataset.resized(own)
        return dataset.resized(dataset.common_size()) if dataset.custom and not dataset.stated else dataset

    def meant(self, dataset: Dataset | None, path: Path) -> ResizeCrop:
        """How a single image is resized and cropped: as images of the data set, else as the model was made for, else not."""
        stated = None if dataset is None else self.fitted(dataset).resize_crop
        return stated or self.resize_crop() or ResizeCrop(image_files.size_of(path))

    @abstractmethod
    def shape(self, dataset: Dataset) -> tuple[int, int, int]:
        """C, H and W of the images that it is to be given, if they are of this data set."""

    @abstractmethod
    def evaluated(self, shape: tuple[int, int, int], threats: Sequence[Threat], device: str) -> EvaluatedModel:
        """The model with its defense, for images of this shape."""

    def matched(self, classes: Sequence[str], dataset: Dataset, evaluated: EvaluatedModel) -> list[int] | None:
        """For each class of a data set the model's output of that name; None if the labels already count its outputs.

        Raises:
            DataError: the names do not fit; says what to type.
        """
        count = len(evaluated.defense.classes)
        return class_names.match(classes, self.names, data=dataset.name, model=self.name, count=count)


class ZooModel(ModelSource):
    """A model with a defense of its own, from the zoo, a folder or the Hub."""

    def __init__(self, found: ResolvedModel, name: str, request: DefenseRequest, device: str) -> None:
        if request.weights is not None:
            raise UsageError(f"'{name}' has its own weights.", hint="Leave --weights out; it is for plain classifiers.")
        self.defense, self.config = checkpoint.load_defense(
            found.folder, device=device, expected_sha256=found.sha256, expected_config=found.config_sha256
        )
        self.found, self.request, self.name, self.note = found, request, name, found.note
        self.threat, self.dataset = parse_threat(self.config["threat"]), str(self.config["dataset"])
        own = tuple(tuple(map(str, one)) for one in self.config.get("names", ())) or tuple((one,) for one in self.defense.classes)
        self.names = own if request.classes is None else class_names.read(Path(request.classes))

    @property
    def channels(self) -> int:
        return self.defense.input_shape[0]

    def resize_crop(self) -> ResizeCrop:
        """That of its training images; if they were not image files in folders, the whole middle square of an image."""
        size = self.defense.input_shape[1:]
        return datasets.stated_resize_crop(self.dataset) or ResizeCrop(size, size)

    def shape(self, dataset: Dataset) -> tuple[int, int, int]:
        return self.defense.input_shape

    def evaluated(self, shape: tuple[int, int, int], threats: Sequence[Threat], device: str) -> EvaluatedModel:
        kind = str(self.config["deployed"]["defense"])
        defense: Any = self.defense
        asked, request = self.request.defense or kind, self.request
        if asked != kind or request.masked or request.labels or request.settings:
            if self.request.defense is None and kind not in defenses.around():
                hint = f"Choose a defense that has them: --defense {' or '.join(defenses.around(masked=not request.settings))}."
                what = "settings" if request.settings else "masks"
                raise UsageError(f"{self.name} is a model of {kind}, which has no {what} to choose.", hint=hint)
            inner: nn.Module = defense
            mean: Sequence[float] | None = self.config["deployed"]["network"]["options"].get("mean")
            if isinstance(defense, MaskedClassifier):
                inner, mean = defense.network, defense.fill.flatten().tolist()
            elif isinstance(defense, EmpiricalDefense):
                inner = defense.network
            if takes_masks(asked, request):
                plan = defense.plan if asked == kind and not request.masked else request.plan(threats, shape)
                numbers = request.labels or str(getattr(defense, "prediction_dtype", ""))
                defense = put_around(inner, asked, shape, defense.classes, plan, mean, numbers)
            else:
                settings = {**(defense.settings() if asked == kind else {}), **request.settings}
                defense = defenses.wrapping(asked).wrap(inner, input_shape=shape, classes=defense.classes, **settings).eval()
            defense = defense.to(torch.device(device))
        alarming(defense, asked, request, getattr(self.defense, "threshold", None) if asked == kind else None)
        setting = defense.settings()
        if asked != kind:
            setting["classifier"] = f"the class scores of {kind}"
        return EvaluatedModel(defense, self.name, asked, self.found.sha256, self.found.source, setting)

    def matched(self, classes: Sequence[str], dataset: Dataset, evaluated: EvaluatedModel) -> list[int] | None:
        """No names are compared if it is the data set that the model was trained on, whose labels it knows."""
        if self.request.classes is None and not dataset.custom and datasets.base_name(self.dataset) == dataset.base:
            return None
        return super().matched(classes, dataset, evaluated)


class WrappedClassifier(ModelSource):
    """A plain classifier, around which the user wants a defense."""

    def __init__(self, classifier: Classifier, request: DefenseRequest, card: cards.Card | None = None) -> None:
        assert request.defense is not None
        self.classifier, self.request, self.kind = classifier, request, request.defense
        self.note, self.names = classifier.note, classifier.names
        self.name = card.name if card else classifier.name
        self.threat, self.dataset = (card.threat, card.dataset) if card else (None, "")

    @property
    def channels(self) -> int:
        return 3 if self.classifier.mean is None else len(self.classifier.mean)

    def resize_crop(self) -> ResizeCrop | None:
        return self.classifier.resize_crop

    def shape(self, dataset: Dataset) -> tuple[int, int, int]:
        return dataset.shape

    def evaluated(self, shape: tuple[int, int, int], threats: Sequence[Threat], device: str) -> EvaluatedModel:
        plan = self.request.plan(threats, shape) if takes_masks(self.kind, self.request) else None
        if plan is not None:
            plan.masks(*shape[1:])  # raises what cannot be masked before the network is evaluated
        about, notes = loaders.settled(self.classifier, shape, device)
        count, numbers = addresses.outputs(about, shape, device), self.request.labels or ""
        classes = class_names.words(self.names) if len(self.names) == count else tuple(map(str, range(count)))
        if plan is None:
            wrap = defenses.wrapping(self.kind).wrap
            defense = wrap(about.network, input_shape=shape, classes=classes, **self.request.settings).eval()
        else:
            defense = put_around(about.network, self.kind, shape, classes, plan, about.mean, numbers)
        defense = defense.to(torch.device(device))
        alarming(defense, self.kind, self.request)
        try:
            defense.test_once()
        except IntegrityError as problem:
            if not about.random:
                raise
            notes.append(f"random weights fail the self-test, which is of no consequence for what they cost: {problem}")
            defense.trust()
        setting = {"classifier": about.name, "input_shape": list(shape), **about.setting, **defense.settings()}
        in_front = about.in_front
        said = (f"preprocessing of {about.name}: {in_front}", *notes)
        return EvaluatedModel(defense, self.name, self.kind, about.sha256, about.source, setting, in_front, said)

    def matched(self, classes: Sequence[str], dataset: Dataset, evaluated: EvaluatedModel) -> list[int] | None:
        """Outputs with random weights have no meaning that a name could fit."""
        return None if self.classifier.random else super().matched(classes, dataset, evaluated)


def find(model: str | None, dataset: str | None, request: DefenseRequest, device: str) -> ModelSource:
    """The model of this name, folder or address; without any, the documented default for a data set.

    Raises:
        UnknownName, UsageError, HubError, IntegrityError, DataError, MachineError: as :func:`patchcert_cli.hub.resolve`,
            :func:`patchcert_cli.checkpoint.load_defense` and :func:`patchcert_cli.classifiers.open_`.
    """
    name = model or bundled.default_model(dataset or bundled.DEFAULT_DATASET)
    from patchcert_cli.evaluation import combined

    if combined.is_combined(name):
        return combined.find(name, request, device)
    if addresses.is_address(name):
        if request.defense is None:
            raise UsageError(
                f"{name} is a plain classifier.", hint=f"Choose a defense: --defense {' or '.join(defenses.around(proves=True))}."
            )
        defenses.wrapping(request.defense)
        opened = addresses.open_(name, weights=request.weights, classes=request.classes, typed=True, download=request.download)
        return WrappedClassifier(opened, request)
    card = bundled.card(name) if name in bundled.names() else None
    if card is not None and card.classifier:
        masks = request.masks if request.masked else card.recipe.get("masks", {}).get("per_axis")
        request = replace(request, defense=request.defense or card.defense, masks=masks)
        classifier = addresses.open_(card.classifier, weights=request.weights, classes=request.classes)
        return WrappedClassifier(classifier, request, card)
    made = ZooModel(resolve(name), name, request, device)
    if model is None:
        made.note = f"no model given: {name}, the default for {dataset or bundled.DEFAULT_DATASET}. {made.note}"
    return made


def takes_masks(kind: str, request: DefenseRequest) -> bool:
    """Whether defense ``kind``, to be put around a classifier, has masks, or settings of its own.

    Raises:
        UsageError: it is to have what it has not.
    """
    masked = defenses.wrapping(kind).masked
    others = ", ".join(defenses.around(masked=not masked))
    if masked and request.settings:
        raise UsageError(f"{kind} has masks and no settings, so --option means nothing.", hint=f"It is for {others}.")
    if not masked and (request.masked or request.labels):
        flag = "--precision" if request.labels and not request.masked else "--masks, --passes or --mask-shape"
        raise UsageError(f"{kind} has no masks, so {flag} means nothing.", hint=f"It is for {others}; {kind} has --option.")
    return masked


def put_around(
    network: nn.Module,
    kind: str,
    shape: tuple[int, int, int],
    classes: tuple[str, ...],
    plan: MaskSpec,
    mean: Sequence[float] | None,
    numbers: str = "",
) -> Defense:
    """Defense ``kind`` around a classifier of images [C, H, W] in [0, 1]; its masks have the mean colour, or grey.

    ``numbers`` is what labels are computed in, if not the defense's default.
    """
    if numbers == "bfloat16" and len(classes) >= MANY:
        raise UsageError(
            f"with {len(classes)} classes --precision bfloat16 gains nothing: most labels are in doubt and computed again.",
            hint="Leave it out.",
        )
    fill = tuple(mean or ())
    if len(fill) != shape[0]:
        fill = (sum(fill) / len(fill) if fill and shape[0] == 1 else GREY,) * shape[0]
    more = {"prediction_dtype": numbers} if numbers else {}
    return defenses.wrapping(kind).wrap(network, input_shape=shape, classes=classes, masks=plan, fill=fill, **more).eval()


def alarming(defense: Defense, kind: str, request: DefenseRequest, own: float | None = None) -> None:
    """Set the threshold of a defense that raises alarms: what is requested, else ``own``, which it had with other masks.

    Raises:
        UsageError: it raises none, or none with this threshold.
    """
    if isinstance(defense, DetectingClassifier):
        chosen = own if request.threshold is None else request.threshold
        if chosen is not None and not defense.takes_threshold(chosen):
            raise UsageError(f"with --threshold {chosen:g} {kind} never raises an alarm.", hint="Allowed: from 0 to below 1.")
        defense.threshold = defense.threshold if chosen is None else chosen
        defense.grid = tuple(sorted({*defense.compared, defense.threshold})) if request.compare else ()
    elif request.threshold is not None or request.compare:
        flag = "--plot-thresholds" if request.threshold is None else "--threshold"
        raise UsageError(f"{kind} raises no alarms, so {flag} means nothing.", hint="Use --defense minority or hicert.")


def largest(threats: Sequence[Threat], shape: Sequence[int]) -> list[Threat]:
    """Threats without the patches that fit inside another one of them: what hides the others hides these too."""
    sides = [one.resolve(*shape[1:]) if isinstance(one, Patch | PatchPercent) else None for one in threats]

    def beneath(at: int, other: int) -> bool:
        one, two = sides[at], sides[other]
        if one is None or two is None or at == other:
            return False
        inside = one.height <= two.height and one.width <= two.width
        return inside and (one != two or other < at)

    return [one for at, one in enumerate(threats) if not any(beneath(at, other) for other in range(len(threats)))]
