"""Digital Watermarking (Hayes, On Visible Adversarial Perturbations & Digital Watermarking, CVPR Workshops 2018): where the
classifier looks most is taken for the patch, hidden, and filled in from around it.

The saliency of a pixel is the sum over channels of the absolute gradient of the predicted class, by guided backpropagation: at
each activation layer (``nn.ReLU``, ``nn.GELU`` and the like) only positive gradients go on. The ``share`` of the pixels with the
largest saliency is hot. Islands of hot pixels in which no square of side ``island`` fits are removed (erosion, then dilation).
What remains grows by ``grow`` pixels and is filled in.

The paper leaves open, or leaves to a library, what is chosen here: the share; the sizes, which are scaled with the image; and the
filling: from the border inwards, ring by ring, each pixel is the mean of its known neighbours among eight.

The saliency of the deployed answer is computed in float64, each image alone and on one thread, so that what is hidden does not
depend on the batch. An attack computes it in float32, many images at a time. It takes what is hidden for constant, so that the
filling is linear and has a gradient, or takes the identity for the gradient of the whole filter.

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.masks.masked_predictions import logits_under_mask, one_way
from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._empirical import EmpiricalDefense, scaled, straight_through
from patchcert_cli.errors import UsageError
from patchcert_cli.layers import fixed_point, passes, precision
from patchcert_cli.models.masked import Gelu
from patchcert_cli.schema import Count, Must

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, Gelu)
GREY = 0.5  # an image that is hidden as a whole

Share = Annotated[float, Must(lambda p: 0 < p < 1, "between 0 and 1")]


@dataclass(frozen=True)
class Watermark:
    """What is hidden.

    Attributes:
        share: of the pixels that are hot.
        island: side in pixels of the square that must fit into hot pixels; 0 for 7 on an image of 224x224, at least 2.
        grow: pixels by which they grow on every side; -1 for 7 on an image of 224x224.
    """

    share: Share = 0.1
    island: Count = 0
    grow: Annotated[int, Must(lambda n: n >= -1, "-1 or more")] = -1


class DigitalWatermarking(EmpiricalDefense):
    """Any classifier of images whose most salient parts were filled in."""

    source = "Hayes, On Visible Adversarial Perturbations & Digital Watermarking, CVPR Workshops 2018"
    settings_type = Watermark
    chosen: Watermark

    def __init__(
        self, network: nn.Module, chosen: Watermark | None = None, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]
    ) -> None:
        super().__init__(network, chosen, input_shape=input_shape, classes=classes)
        self.island = self.chosen.island or max(2, round(scaled(7, input_shape)))
        self.grow = round(scaled(7, input_shape)) if self.chosen.grow < 0 else self.chosen.grow
        if max(self.island, 2 * self.grow + 1) > min(input_shape[1:]):
            largest = min(input_shape[1:])
            raise UsageError(
                f"island {self.island} and grow {self.grow} do not fit {input_shape[1]}x{input_shape[2]} images.",
                hint=f"Allowed: island up to {largest}, grow up to {(largest - 1) // 2}.",
            )
        self._copies: list[tuple[object, nn.Module]] = []  # in float64; no part of the model

    def filtered(self, x: Tensor) -> Tensor:
        """Filled in where it is hidden; what is hidden is found in float64, one image at a time."""
        if not len(x):
            return x
        network, found = self._in_double(), []
        with one_way(x.device):
            for at in range(len(x)):
                found.append(self.hidden(network, x[at : at + 1].detach().double()))
                passes.made(2)
        return filled(x, torch.cat(found))

    def _in_double(self) -> nn.Module:
        """A copy in float64, made again when the weights have changed."""
        state = fixed_point.state_of(self.network)
        if not self._copies or self._copies[0][0] != state:
            self._copies = [(state, precision.double(precision.frozen(self.network)))]
        return self._copies[0][1]

    def hidden(self, network: nn.Module, x: Tensor) -> Tensor:
        """What is hidden of images [B, C, H, W], found with this network of their precision: bool [B, H, W]."""
        return cleaned(hottest(self.saliency(network, x), self.chosen.share), self.island, self.grow)

    def saliency(self, network: nn.Module, x: Tensor) -> Tensor:
        """The absolute gradient of the predicted class by guided backpropagation, summed over channels: [B, H, W].

        Raises:
            UsageError: the network has no gradients.
        """
        with torch.enable_grad(), precision.exact_arithmetic(), guided(network):
            point = x.detach().requires_grad_()
            logits = logits_under_mask(network, point, self.nothing.expand(len(x), -1, -1), self.black.to(x))
            if not logits.requires_grad:
                raise UsageError(
                    "this classifier has no gradients, from which the watermark defense finds a patch.",
                    hint="Use a classifier of PyTorch.",
                )
            (slope,) = torch.autograd.grad(logits.amax(dim=1).sum(), point)
        return slope.abs().sum(dim=1)

    def surrogates(self) -> tuple[Surrogate, ...]:
        """Scores of the image filled in, with what is hidden as a constant; and with the identity for the filter."""

        def through(x: Tensor) -> Tensor:
            return self.scores(filled(x, self.hidden(self.network, x)))

        def past(x: Tensor) -> Tensor:
            return self.scores(straight_through(filled(x.detach(), self.hidden(self.network, x)), x))

        return Surrogate(past), Surrogate(through)


@contextlib.contextmanager
def guided(network: nn.Module) -> Iterator[None]:
    """Let only positive gradients into the activation layers of a network (Springenberg et al., ICLR Workshop 2015)."""

    def positive(layer: nn.Module, given: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda slope: slope.clamp(min=0))  # type: ignore[no-untyped-call]

    hooks = [layer.register_forward_hook(positive) for layer in network.modules() if isinstance(layer, ACTIVATIONS)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hottest(saliency: Tensor, share: float) -> Tensor:
    """The ``share`` of the pixels, at least one, with the largest positive values and all their equals: [B, H, W] -> bool."""
    values = saliency.flatten(1)
    least = values.topk(max(1, round(share * values.shape[1])), dim=1).values[:, -1:]
    return ((values >= least) & (values > 0)).reshape(saliency.shape)


def cleaned(hot: Tensor, island: int, grow: int) -> Tensor:
    """The squares of side ``island`` that fit into hot pixels, grown by ``grow`` pixels on every side: bool [B, H, W]."""
    cold = (~hot).float()[:, None]
    fits = 1 - F.max_pool2d(cold, island, stride=1)
    squares = F.max_pool2d(F.pad(fits, [island - 1] * 4), island, stride=1)
    return F.max_pool2d(squares, 2 * grow + 1, stride=1, padding=grow)[:, 0] > 0


def filled(x: Tensor, hidden: Tensor) -> Tensor:
    """Images [B, C, H, W] with hidden pixels, bool [B, H, W], filled in ring by ring from the border of what is hidden."""
    known, v = ~hidden[:, None], x.where(~hidden[:, None], GREY)
    while bool((~known).any()):
        total, count = _around(v * known), _around(known.to(x))
        ring = ~known & (count > 0)
        if not bool(ring.any()):
            break
        v, known = torch.where(ring, total / count.clamp(min=1), v), known | ring
    return v


def _around(v: Tensor) -> Tensor:
    """The sum of the eight neighbours, always in the same order: [B, C, H, W] -> [B, C, H, W]."""
    height, width = v.shape[2:]
    padded, total = F.pad(v, (1, 1, 1, 1)), torch.zeros_like(v)
    for down in range(3):
        for right in range(3):
            if (down, right) != (1, 1):
                total = total + padded[:, :, down : down + height, right : right + width]
    return total
