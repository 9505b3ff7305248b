"""Defenses without a certificate: an image is filtered, then any classifier answers. All that is known of them is their accuracy
under attacks that were run.

The answer is one function of the image: the filter gives the same bits in any batch, and a label that rounding might decide is
computed again, as in masked predictions without a mask (:mod:`patchcert_cli.certifiers.masks.masked_predictions`).

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from patchcert_cli import schema
from patchcert_cli.certificate import Claim, Proof
from patchcert_cli.certifiers.masks import fingerprint
from patchcert_cli.certifiers.masks.exact_predictions import ExactMaskedPredictor, Predictor
from patchcert_cli.certifiers.masks.logit_scale import CalibrationCache
from patchcert_cli.certifiers.masks.masked_predictions import PRECISIONS, MaskedPredictor, logits_under_mask
from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._base import (
    Defense,
    NoEntries,
    WrapsClassifier,
    build_network,
    own_entries,
    size_and_classes,
)
from patchcert_cli.errors import UsageError
from patchcert_cli.layers import fixed_point
from patchcert_cli.layers.levels import Levels
from patchcert_cli.threats import Guarantee

VALUES = 1 << 24  # pixel values that are filtered together, at most


class EmpiricalDefense(Defense, WrapsClassifier):
    """Any classifier, images [B, C, H, W] in [0, 1] -> logits [B, K], of images that were filtered.

    Attributes:
        settings_type: the dataclass of its settings.
        chosen: its settings.
    """

    guarantee = Guarantee.NONE
    methods = ()
    masked = False
    precision: Mapping[str, str] = {"labels in doubt": "float64, one image at a time"}
    settings_type: ClassVar[type] = NoEntries

    nothing: Tensor
    black: Tensor

    def __init__(
        self, network: nn.Module, chosen: Any = None, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]
    ) -> None:
        """Put the defense around ``network``, with settings of ``settings_type``, by default the published ones.

        Raises:
            UsageError: the settings do not fit images of this size.
        """
        super().__init__(input_shape=input_shape, classes=classes)
        self.network, self.chosen, self._memory = network, chosen or self.settings_type(), CalibrationCache()
        self.deployed = fixed_point.FrozenNetworkCache(network) if getattr(network, "freezable", False) else None
        self.register_buffer("nothing", torch.zeros(1, *input_shape[1:], dtype=torch.bool), persistent=False)
        self.register_buffer("black", torch.zeros(input_shape[0], 1, 1), persistent=False)

    @classmethod
    def wrap(cls, network: nn.Module, **given: Any) -> EmpiricalDefense:
        """The defense around ``network``; what is not ``input_shape`` and ``classes`` are settings.

        Raises:
            UsageError: lists every setting that is wrong, and those there are.
        """
        shape, classes = given.pop("input_shape"), given.pop("classes")
        try:
            chosen: Any = schema.read(cls.settings_type, given)
        except schema.Invalid as problem:
            known = "; ".join(f"{one.name} ({one.allowed})" for one in schema.entries(cls.settings_type))
            raise UsageError(f"{problem}.", hint=f"Settings: {known}." if known else "It has no settings.") from problem
        return cls(network, chosen, input_shape=shape, classes=classes)

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> EmpiricalDefense:
        chosen: Any = own_entries(cls.settings_type, deployed)
        return cls(build_network(deployed), chosen, **size_and_classes(deployed))

    @abstractmethod
    def filtered(self, x: Tensor) -> Tensor:
        """The images as the classifier is given them, [B, C, H, W] in [0, 1]; each depends on its own image alone, to the bit."""

    def scores(self, x: Tensor) -> Tensor:
        """Logits of the classifier without the defense, with gradients: [B, C, H, W] -> [B, K]."""
        return logits_under_mask(self.network, x, self.nothing.expand(len(x), -1, -1), self.black.to(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of the filtered images."""
        return self.scores(self.filtered(x))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        self.check_input(x)
        self.test_once()
        return self._labels(x, self.filtered)

    @torch.no_grad()
    def plain(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self._labels(x, lambda part: part)

    def undefended(self) -> Defense:
        """The same classifier without the filter; what was found out about it is shared."""
        from patchcert_cli.defenses.undefended import Undefended

        made = Undefended(self.network, input_shape=self.input_shape, classes=self.classes).to(self.device).eval()
        made.deployed, made._memory, made._tested = self.deployed, self._memory, self._tested
        return made

    def _labels(self, x: Tensor, filtered: Callable[[Tensor], Tensor]) -> Tensor:
        """The labels of images after a filter, int64 [B]."""
        predictor, found = self._predictor(), [torch.zeros(0, dtype=torch.int64)]
        for part in torch.split(x, max(1, VALUES // math.prod(self.input_shape))) if len(x) else ():
            no_mask = torch.zeros(len(part), dtype=torch.int64)
            found.append(predictor.ask(filtered(part), torch.arange(len(part)), no_mask, no_mask).label)
        return torch.cat(found).to(x.device)

    def _predictor(self) -> Predictor:
        """The classifier as it is now, with a single mask that hides nothing."""
        if self.deployed is not None:
            return ExactMaskedPredictor(cast(Levels, self.deployed()), self.nothing, self.black)
        shape, count = self.input_shape, len(self.classes)
        return MaskedPredictor(self.network, self.nothing, self.black, shape, count, PRECISIONS[0], self._memory)

    def self_test(self) -> None:
        """Measure whether the classifier's labels are a function of the image."""
        self._predictor().test()

    def fingerprint(self) -> dict[str, Any] | None:
        predictor = self._predictor()
        return fingerprint.answers(predictor) if isinstance(predictor, MaskedPredictor) else None

    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> Sequence[Proof]:
        self.check_proves()
        return []

    def settings(self) -> dict[str, Any]:
        return cast(dict[str, Any], schema.plain(self.chosen))

    def surrogates(self) -> tuple[Surrogate, ...]:
        """The defended scores with gradients through the filter, and as if the filter's gradient were the identity."""
        return Surrogate(self.forward), Surrogate(lambda x: self.scores(straight_through(self.filtered(x), x)))

    @property
    def activations(self) -> int:
        """Of the largest layer, for one image."""
        return int(getattr(self.network, "most", 16 * math.prod(self.input_shape)))


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """``value``, with the gradient of ``x``: backward pass differentiable approximation by the identity (Athalye, Carlini &
    Wagner, Obfuscated Gradients Give a False Sense of Security, ICML 2018).
    """
    return _StraightThrough.apply(value, x)  # type: ignore[no-any-return]


class _StraightThrough(torch.autograd.Function):
    """Exactly ``value``, which ``x + (value - x)`` would round."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def scaled(length: int, shape: Sequence[int]) -> float:
    """A length in pixels of a 224x224 image, on an image [C, H, W]."""
    return length * min(shape[1:]) / 224
