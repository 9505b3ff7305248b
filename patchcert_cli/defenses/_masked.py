"""Defenses that evaluate any classifier under masks; :mod:`patchcert_cli.defenses.patchcleanser` and
:mod:`patchcert_cli.defenses.minority` differ in how many masks they apply to an image, and in what they prove.

Training under two random masks, or under the two worst of some (greedy cutout: Saha et al., Revisiting Image Classifier
Training for Improved Certified Robust Defense against Adversarial Patches, TMLR 2023).

Shapes: B images, C channels, H x W pixels, K classes, M masks, A locations.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.masks import fingerprint, masked_predictions
from patchcert_cli.certifiers.masks.exact_predictions import ExactMaskedPredictor, Predictor
from patchcert_cli.certifiers.masks.logit_scale import CalibrationCache
from patchcert_cli.certifiers.masks.mask_sets import MaskCoverage, MaskSpec, Shape
from patchcert_cli.certifiers.masks.masked_predictions import PRECISIONS, MaskedPredictor
from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._base import MarginMaps, WrapsClassifier, build_network, own_entries, size_and_classes
from patchcert_cli.defenses._training import Options, TaughtOptions, Trainable, TrainingStep, cross_entropy
from patchcert_cli.errors import UsageError
from patchcert_cli.layers import fixed_point, precision
from patchcert_cli.layers.boxes import box_mask
from patchcert_cli.layers.levels import Levels
from patchcert_cli.schema import Count, Fraction, Must, Positive
from patchcert_cli.threats import Patch, PatchPercent, Threat

MASKS_ATTACKED = 12  # masks that an attack looks through

Share = Annotated[float, Must(lambda p: 0 <= p <= 1, "in [0, 1]")]
Labels = Annotated[str, Must(PRECISIONS.__contains__, " or ".join(PRECISIONS))]


@dataclass(frozen=True)
class MaskedOptions(TaughtOptions):
    """Training under masks.

    Attributes:
        per_axis: masks of the deployed model along each axis, at most.
        mask_shape: ``square``, ``column`` or ``row``, the shape of the deployed masks.
        sides: random masks are squares of one of these sides, or strips of one of these widths, at any offset; empty for the
            sides of the deployed masks.
        masks: random masks an image.
        greedy_from: part of the run after which masks are chosen by greedy cutout.
        greedy_share: part of the images of which they are chosen so; the others have random ones.
        greedy_per_axis: masks along each axis, at most, of the set that greedy cutout takes them from; 0 for the deployed set.
            Fewer masks are larger ones, and harder.
        candidates: masks of that set, drawn at random, of which the one with the highest loss is taken, twice; 0 for all.
        smoothing: label smoothing.
        labels: what labels are computed in where it is beyond doubt, ``float32``, or ``bfloat16`` where that is faster.
        average: what a step keeps of the running average of weights that becomes the model; 0 for none.
        flip: mirror images at random.
        shift: move images by up to this many pixels.
    """

    per_axis: Positive = 6
    mask_shape: Shape = "square"
    sides: tuple[Positive, ...] = ()
    masks: Count = 2
    greedy_from: Fraction = 0.0
    greedy_share: Share = 0.0
    greedy_per_axis: Count = 0
    candidates: Count = 0
    smoothing: Fraction = 0.1
    labels: Labels = "float32"
    average: Fraction = 0.998
    flip: bool = False
    shift: Count = 0

    @property
    def ema_decay(self) -> float:
        return self.average


@dataclass(frozen=True)
class Masking:
    """What is deployed besides the network.

    Attributes:
        masks: which masks.
        fill: their colour, per channel in [0, 1]; empty for the mean that the network normalizes by.
        prediction_dtype: what labels are computed in where they are beyond doubt.
    """

    masks: MaskSpec
    fill: tuple[float, ...] = ()
    prediction_dtype: Labels = "float32"


class MaskedSurrogate(Surrogate):
    """The mean class probabilities under some single masks; the deployed answer may change well before they do."""

    tolerance = 0.5

    def __init__(self, defense: MaskedClassifier, which: Tensor) -> None:
        self._defense, self._hidden = defense, defense.masks[which]

    def whole(self, x: Tensor) -> Tensor:
        count = len(self._hidden)
        images, occluded = x.repeat_interleave(count, dim=0), self._hidden.repeat(len(x), 1, 1)
        return self._defense.behind(images, occluded).softmax(dim=1).reshape(len(x), count, -1).mean(dim=1)


class MaskedClassifier(Trainable, MarginMaps, WrapsClassifier):
    """Any classifier, images [B, C, H, W] in [0, 1] -> logits [B, K], evaluated under masks.

    A network whose attribute ``takes_mask`` is true is also given which pixels are hidden, bool [B, 1, H, W].

    Attributes:
        deployed_entries: what :meth:`from_config` reads besides the network.
        plan: which masks it has.
        set: these masks.
        masks: bool [M, H, W], what each of them hides.
        fill: [C, 1, 1] in [0, 1], the colour of hidden pixels.
        prediction_dtype: what labels are computed in where they are beyond doubt.
    """

    options = MaskedOptions
    deployed_entries: ClassVar[type[Masking]] = Masking
    precision: Mapping[str, str] = {"labels in doubt": "float64, one image at a time"}
    default_network = "masked"
    validation_size = 50
    unit = "of the logit scale"

    masks: Tensor
    fill: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        input_shape: tuple[int, int, int],
        classes: tuple[str, ...],
        masks: MaskSpec,
        fill: Sequence[float],
        prediction_dtype: str = "float32",
    ) -> None:
        """Put the defense around ``network``.

        Args:
            network: [B, C, H, W] in [0, 1] -> logits [B, K].
            input_shape: C, H and W of the images; masks are laid over them as they are, whatever the network does to them.
            classes: K names.
            masks: which masks.
            fill: the colour of hidden pixels, per channel in [0, 1].
            prediction_dtype: what labels are computed in where they are beyond doubt, ``float32`` or ``bfloat16``.

        Raises:
            UsageError: there are no such masks for images of this size.
        """
        super().__init__(input_shape=input_shape, classes=classes)
        self.network, self.prediction_dtype = network, prediction_dtype
        self.plan, self._why = masks.chosen(*input_shape[1:])
        self.set, self._memory = self.plan.masks(*input_shape[1:]), CalibrationCache()
        self.deployed = fixed_point.FrozenNetworkCache(network) if getattr(network, "freezable", False) else None
        self._exact: ExactMaskedPredictor | None = None
        if self.deployed is not None:
            self.precision = {"labels": "exact"}
        self.register_buffer("masks", self.set.occluded, persistent=False)
        self.register_buffer("fill", torch.tensor(list(fill), dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        if len(self.fill) != input_shape[0]:
            raise UsageError(
                f"a colour of {len(self.fill)} channels does not fit images of {input_shape[0]}.",
                hint=f"Give {input_shape[0]} numbers.",
            )

    @classmethod
    def wrap(cls, network: nn.Module, **given: Any) -> MaskedClassifier:
        return cls(network, **given)

    @classmethod
    def default_recipe(cls, threat: Threat, dataset: str) -> dict[str, Any]:
        digits = dataset == "mnist"  # a mirrored digit is not a digit, and digits need a smaller network
        small = {"stem": 16, "widths": [32, 64, 128], "takes_mask": True} if digits else {}
        return {
            "dataset": "cifar10",
            "network_options": {"bits": 8, **small},
            "epochs": 20,
            "learning_rate": 0.25,
            "optimizer": "sgd",
            "weight_decay": 5e-4,
            "precision": "bfloat16",
            "stored": "float16",
            "validation": 500,  # certifying them costs the most here
            "options": {"flip": not digits, "shift": 1 if digits else 2},
        }

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        assert isinstance(options, MaskedOptions)
        masks = MaskSpec((threat,), per_axis=options.per_axis, shape=options.mask_shape).to_dict()
        return {"masks": masks, "prediction_dtype": options.labels}

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> MaskedClassifier:
        own = own_entries(cls.deployed_entries, deployed)
        entries = {item.name: getattr(own, item.name) for item in fields(own)}
        entries["fill"] = own.fill or deployed["network"]["options"]["mean"]
        return cls(build_network(deployed), **size_and_classes(deployed), **entries)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the whole image."""
        return self.behind(x, torch.zeros(len(x), *x.shape[2:], dtype=torch.bool, device=x.device))

    def class_probabilities(self, x: Tensor) -> Tensor:
        return self.forward(x).float().softmax(dim=1)

    def behind(self, x: Tensor, occluded: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in which hidden pixels, bool [B, H, W], have the colour of the masks."""
        return masked_predictions.logits_under_mask(self.network, x, occluded, self.fill)

    def surrogates(self) -> tuple[Surrogate, ...]:
        """Class probabilities under a few of the masks, and the logits of the whole image."""
        count = min(MASKS_ATTACKED, len(self.set))
        which = torch.linspace(0, len(self.set) - 1, count).round().long().to(self.masks.device)
        return MaskedSurrogate(self, which), Surrogate(self)

    @property
    def activations(self) -> int:
        return min(MASKS_ATTACKED, len(self.set)) * int(getattr(self.network, "most", 16 * math.prod(self.input_shape)))

    def _behind(self, masks: Tensor) -> Predictor:
        """The same under other masks, bool [M, H, W]."""
        if self.deployed is None:
            shape, count = self.input_shape, len(self.classes)
            return MaskedPredictor(self.network, masks, self.fill, shape, count, self.prediction_dtype, self._memory)
        frozen = cast(Levels, self.deployed())
        if self._exact is None or self._exact.network is not frozen or not torch.equal(self._exact.masks, masks):
            self._exact = ExactMaskedPredictor(frozen, masks, self.fill)
        return self._exact

    def sets(self, cover: MaskCoverage, *, whole: bool) -> tuple[Tensor, Tensor]:
        """The sets of masks that a proof asks for, bool [U, M], and a location for each, int64 [U].

        With ``whole`` each mask is a set of its own.
        """
        if not whole:
            return cover.by, cover.location
        return torch.eye(len(self.set), dtype=torch.bool), cover.location[cover.by.int().argmax(dim=0)]

    @abstractmethod
    def views(self) -> Predictor:
        """The network as it is now, under the masks."""

    @abstractmethod
    def mask_margins(self, x: Tensor) -> Tensor:
        """The margin of each mask, float64 [B, M]."""

    @abstractmethod
    def passes_per_image(self) -> tuple[int, int]:
        """The fewest and the most passes of the network that a certificate takes."""

    def note(self, threat: Threat) -> str:
        """What it costs."""
        least, most = self.passes_per_image()
        passes = f"{least}" if least == most else f"{least} to {most}"
        why = f" ({self._why})" if self._why else ""
        return f"masks: {self.set.sizes} pixels{why}; {passes} passes of the network an image, with the proof"

    def settings(self) -> dict[str, Any]:
        """Masks, what labels are computed in, and the colour of masks."""
        fill = [round(value, 6) for value in self.fill.flatten().tolist()]
        return {"masks": self.plan.to_dict(), "labels": self.prediction_dtype, **self.alarm_settings(), "fill": fill}

    def alarm_settings(self) -> dict[str, Any]:
        """When it raises alarms, if it does."""
        return {}

    @torch.no_grad()
    def margin_map(self, x: Tensor, patch: Threat) -> Tensor:
        """At each location the margin of the best mask that hides it."""
        self.check_input(x)
        height, width = self.input_shape[1:]
        if not isinstance(patch, Patch | PatchPercent):
            raise UsageError(f"a map needs one patch, not {patch}.", hint="Use --patch, for example --patch 5.")
        self.set.cover(patch)
        hides, sides = self.set.hides(patch), patch.resolve(height, width)
        best = torch.stack([torch.where(hides, one, -torch.inf).amax(dim=1) for one in self.mask_margins(x)])  # [B, A]
        return best.reshape(-1, height - sides.height + 1, width - sides.width + 1).to(x.device)

    def self_test(self) -> None:
        self.views().test()

    @torch.no_grad()
    def plain(self, x: Tensor) -> Tensor:
        """What the network alone says of images [B, C, H, W], without masks and without a defense: int64 [B]."""
        self.check_input(x)
        with precision.exact_arithmetic():
            together = min(masked_predictions.PASSES, masked_predictions.PIXELS // math.prod(self.input_shape))
            parts = torch.split(x, max(1, together))
            return (
                torch.cat([self.forward(part).argmax(dim=1) for part in parts]) if len(x) else x.new_zeros(0, dtype=torch.int64)
            )

    def fingerprint(self) -> dict[str, Any] | None:
        """Answers that show whether the network is the same (:mod:`patchcert_cli.certifiers.masks.fingerprint`); None where its
        weights do."""
        seen = self.views()
        return fingerprint.answers(seen) if isinstance(seen, MaskedPredictor) else None

    def fit_before(self, x: Tensor) -> None:
        """Let a network that can begin with the whitening of the training images do so."""
        whiten = getattr(self.network, "whiten", None)
        if whiten is not None:
            whiten(x)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Choose the steps of a network that is to be frozen, from training images under two random masks and without masks."""
        if self.deployed is None:
            return
        self.eval()
        generator = torch.Generator().manual_seed(0)
        with fixed_point.observing(self.network):
            for part in torch.split(x, 250):
                occluded = self.masks[torch.randint(len(self.masks), (2, len(part)), generator=generator).to(self.masks.device)]
                self.behind(part, occluded[0] | occluded[1])
                self.forward(part)

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """Cross-entropy under random masks, or under masks chosen by greedy cutout."""
        options = step.options
        assert isinstance(options, MaskedOptions)
        occluded = self._random(x, options, step.generator)
        if step.progress >= options.greedy_from * step.epochs and options.greedy_share > 0:
            chosen = (torch.rand(len(x), generator=step.generator) < options.greedy_share).nonzero()[:, 0].to(x.device)
            occluded[chosen] = self._greedy(x[chosen], label[chosen], options, step.generator)
        return cross_entropy(self.behind(x, occluded).float(), label, step, options.smoothing)

    def _random(self, x: Tensor, options: MaskedOptions, generator: torch.Generator) -> Tensor:
        """Random masks wholly inside the images, bool [B, H, W]."""
        image = torch.tensor(x.shape[2:])
        whole = torch.tensor([self.plan.shape == "column", self.plan.shape == "row"])  # axes that strips fill
        shapes = [(side, side) for side in options.sides] or sorted({box[2:] for union in self.set.boxes for box in union})
        occluded = torch.zeros(len(x), *x.shape[2:], dtype=torch.bool, device=x.device)
        for _ in range(options.masks):
            drawn = torch.tensor(shapes)[torch.randint(len(shapes), (len(x),), generator=generator)]  # [B, 2]
            sides = torch.where(whole, image, torch.minimum(drawn, image))
            room = image - sides + 1
            starts = torch.stack([torch.rand(len(x), generator=generator) for _ in range(2)], dim=1) * room
            occluded |= box_mask(torch.cat([starts.long(), sides], dim=1), *x.shape[2:]).to(x.device)
        return occluded

    @torch.no_grad()
    def _greedy(self, x: Tensor, label: Tensor, options: MaskedOptions, generator: torch.Generator) -> Tensor:
        """The mask of the highest loss among some, then a second one with the first in place: bool [B, H, W]."""
        masks = self._harder(options.greedy_per_axis)
        count = min(options.candidates or len(masks), len(masks))
        occluded = torch.zeros(len(x), *x.shape[2:], dtype=torch.bool, device=x.device)
        training = self.training
        self.eval()  # a sweep leaves no trace in the statistics
        for _ in range(2):
            drawn = torch.rand(len(x), len(masks), generator=generator).argsort(dim=1)[:, :count].to(x.device)  # [B, c]
            losses = [
                F.cross_entropy(self.behind(x, occluded | masks[drawn[:, at]]).float(), label, reduction="none")
                for at in range(count)
            ]
            worst = torch.stack(losses, dim=1).argmax(dim=1, keepdim=True)
            occluded = occluded | masks[drawn.gather(1, worst)[:, 0]]
        self.train(training)
        return occluded

    def _harder(self, per_axis: int) -> Tensor:
        """Masks for the same threats with ``per_axis`` along each axis, bool [m, H, W]; for 0 the deployed ones."""
        if not per_axis:
            return self.masks
        plan = replace(self.plan, per_axis=per_axis, stride=0, passes=0)
        return plan.masks(*self.input_shape[1:]).occluded.to(self.masks.device)
