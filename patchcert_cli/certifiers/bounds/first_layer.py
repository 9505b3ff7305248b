"""The first affine layer of a network under an attacked input, for every location, without copies of the image.

Shapes: B images, C channels, H x W pixels, A locations, N first-layer neurons, P pixels or values, h x w a patch.

**Claim (patch).** Let z(x) = W x + b with W already multiplied by the normalization's scale, and let x' differ from x only inside
a window L, with entries in [x - e x, x + e (1 - x)] for 0 <= e <= 1 (e = 1 is all of [0, 1]). Then z(x') lies in
``z(x) + e * sum_{i in L} w_i (1/2 - x_i)  -/+  e/2 * sum_{i in L} |w_i|``, and both ends are attained, neuron by neuron.
Proof: each entry is x_i + e (1/2 - x_i) + e s_i / 2 with s_i free in [-1, 1]. The radius does not depend on the image.

**Claim (sparse).** If at most k pixels change, z_n(x') - z_n(x) is at most the sum of the k largest per-pixel gains
``sum_c max(w_c (1 - x_c), -w_c x_c)`` and at least minus the sum of the k largest losses ``sum_c max(w_c x_c, -w_c (1 - x_c))``;
both are attained, neuron by neuron (each neuron picks its own k). Source: Chiang et al., ICLR 2020, section 4, there with the
input-independent gain |w|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from patchcert_cli.certifiers.bounds.rules import channel_affine
from patchcert_cli.certifiers.bounds.topk_gains import largest_gains
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.layers.boxes import box_mask
from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.layers.supported_layers import CHANNEL_AFFINE, IDENTITY, layers_of
from patchcert_cli.threats import Patch, Sparse

NORM_ROUNDINGS = 6  # of a batch norm's scale: the variance plus eps, its root, one over it, times the weight; two to spare


@dataclass(frozen=True)
class Split:
    """A network cut after its first linear or convolutional layer.

    Attributes:
        before: per-channel affine layers and flattening before it.
        first: the first affine layer; None if something else comes first.
        tail: all layers after ``first`` (or after ``before`` if there is none).
        scale: float64 [C], the product of the scales in ``before``: weights times this are rounded once, whatever is in it.
    """

    before: list[nn.Module]
    first: nn.Linear | nn.Conv2d | None
    tail: list[nn.Module]
    scale: Tensor

    @classmethod
    def of(cls, network: nn.Module, channels: int) -> Split:
        """Cut ``network`` for images with ``channels`` channels."""
        layers = layers_of(network)
        reference = next(iter([*network.parameters(), *network.buffers()]), torch.zeros(()))
        scale = torch.ones(channels, dtype=torch.float64, device=reference.device)
        flat = False
        for position, layer in enumerate(layers):
            if isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.Linear) and flat):
                return cls(layers[:position], layer, layers[position + 1 :], scale)
            affine = None if flat else channel_affine(layer, torch.float64)
            if affine is not None:
                scale = scale * affine[0]
            elif isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
                flat = True
            elif not isinstance(layer, IDENTITY):
                return cls([], None, layers, scale)
        return cls([], None, layers, scale)

    @property
    def layers(self) -> list[nn.Module]:
        """The whole network."""
        return [*self.before, *([self.first] if self.first else []), *self.tail]

    @property
    def is_dense(self) -> bool:
        """Fully connected: two or more linear layers with nothing but ReLU between them."""
        inner = bool(self.tail) and isinstance(self.tail[-1], nn.Linear)
        return inner and isinstance(self.first, nn.Linear) and all(isinstance(a, nn.Linear | nn.ReLU) for a in self.tail)

    def clean(self, x: Tensor) -> Tensor:
        """Pre-activation of the first affine layer, [B, N] or [B, N, H', W'].

        For a linear layer the normalization is folded into weight and bias, so that black pixels cost no rounding.
        """
        assert self.first is not None
        if isinstance(self.first, nn.Linear):
            weight = self.dense_weight((x.shape[1], x.shape[2], x.shape[3])).flatten(1)
            return F.linear(x.flatten(1), weight, self.dense_bias(x))
        for layer in (*self.before, self.first):
            x = layer(x)
        return x

    def dense_bias(self, x: Tensor) -> Tensor:
        """Pre-activation of a linear first layer at the all-black image, [N], summed in float64."""
        assert isinstance(self.first, nn.Linear)
        black = torch.zeros_like(x[:1])
        for layer in self.before:
            black = layer(black)
        bias = black.flatten(1).double() @ self.first.weight.double().t()
        if self.first.bias is not None:
            bias = bias + self.first.bias.double()
        return bias[0].to(x.dtype)

    def dense_weight(self, shape: tuple[int, int, int]) -> Tensor:
        """Weight of a linear first layer with respect to pixels in [0, 1]: [N, C, H, W]."""
        assert isinstance(self.first, nn.Linear)
        return self._scaled(self.first.weight.reshape(-1, *shape))

    @property
    def folded(self) -> int:
        """The most roundings of float64 that are in ``scale``: those of each batch norm's own scale, and of products of two."""
        scales = [layer for layer in self.before if isinstance(layer, CHANNEL_AFFINE)]
        return max(0, len(scales) - 1) + NORM_ROUNDINGS * sum(not isinstance(layer, Normalize) for layer in scales)

    def _scaled(self, weight: Tensor) -> Tensor:
        """A weight [N, C, ...] with respect to pixels in [0, 1], rounded once to its own type."""
        return (weight.double() * self.scale.reshape(1, -1, 1, 1)).to(weight.dtype)

    def kernel(self) -> Tensor:
        """Weight of a convolutional first layer with respect to pixels in [0, 1]: [N, C/groups, kh, kw]."""
        assert isinstance(self.first, nn.Conv2d)
        if self.first.groups != 1:
            raise UnsupportedThreat("a grouped convolution as first layer has no all-location bound.", hint="Use groups=1.")
        return self._scaled(self.first.weight)


def under_patch(values: Tensor, patch: Patch) -> Tensor:
    """The entries under the patch at every location: [C, H, W, M] -> [A, C*h*w, M], contiguous along M."""
    view = values.unfold(1, patch.height, 1).unfold(2, patch.width, 1)  # [C, Ah, Aw, M, h, w]
    return view.permute(1, 2, 0, 4, 5, 3).reshape(-1, values.shape[0] * patch.height * patch.width, values.shape[3])


def window_sums(values: Tensor, patch: Patch) -> Tensor:
    """Sums over channels and the patch window at every location: [N, C, H, W] -> [N, A]."""
    total = values.sum(dim=1, keepdim=True)
    return F.avg_pool2d(total, (patch.height, patch.width), stride=1, divisor_override=1).flatten(1)


def location_masks(patch: Patch, x: Tensor) -> Tensor:
    """1 under the patch, 0 elsewhere, for every location: [A, H, W] in the type of ``x``."""
    height, width = x.shape[2:]
    return box_mask(patch.locations(height, width).to(x.device), height, width).to(x.dtype)


def dense_box(split: Split, x: Tensor, patch: Patch, owner: Tensor, location: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Lower and upper pre-activation [U, N] of a linear first layer for pairs (image ``owner``, ``location``), int64 [U] each."""
    moved = location_masks(patch, x)[location, None] * epsilon  # [U, 1, H, W]
    weight = split.dense_weight((x.shape[1], x.shape[2], x.shape[3]))  # [N, C, H, W]
    content = (0.5 - x)[owner] * moved
    middle = split.clean(x)[owner] + content.flatten(1) @ weight.flatten(1).t()
    radius = (epsilon / 2) * window_sums(weight.abs(), patch)[:, location].t()
    return middle - radius, middle + radius


def sparse_box(split: Split, x: Tensor, threat: Sparse, *, epsilon: float = 1.0, topk_limit: int = 0) -> tuple[Tensor, Tensor]:
    """Lower and upper pre-activation of the first layer when ``threat.k`` pixels or values change (claim above).

    With ``epsilon`` < 1 each changed entry moves at most that fraction of its way to 0 or 1. ``topk_limit`` is for training: see
    :func:`topk_gains.largest_gains`. Shapes [B, N] or [B, N, H', W'].
    """
    if split.first is None:
        raise UnsupportedThreat(
            f"no certificate against {threat}: the network must begin with a linear or convolutional layer.",
            hint="Put pooling after it.",
        )
    clean = split.clean(x)
    if isinstance(split.first, nn.Linear):
        channels, height, width = x.shape[1:]
        weight = split.dense_weight((channels, height, width)).flatten(2)  # [N, C, P]
        pixels = x.flatten(2)
        if threat.unit == "value":
            weight, pixels = weight.flatten(1)[:, None], pixels.flatten(1)[:, None]
        up, down = largest_gains(weight, pixels, threat.k, topk_limit=topk_limit)
    else:
        up, down = _convolution_gains(split, x, threat, clean)
    return clean - epsilon * down, clean + epsilon * up


def _convolution_gains(split: Split, x: Tensor, threat: Sparse, clean: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`topk_gains.largest_gains` for a convolution: each output sees the pixels of its own receptive field."""
    layer, kernel = cast(nn.Conv2d, split.first), split.kernel()
    channels, taps = kernel.shape[1], kernel.shape[2] * kernel.shape[3]

    def columns(image: Tensor) -> Tensor:
        unfolded = F.unfold(image, layer.kernel_size, layer.dilation, cast(tuple[int, int], layer.padding), layer.stride)
        return unfolded.reshape(image.shape[0], channels, taps, -1)  # [B, C, T, L]

    content, present = columns(x), columns(torch.ones_like(x[:1]))  # padding is not a pixel: it cannot change
    up: list[Tensor] = []
    down: list[Tensor] = []
    for weight in kernel.reshape(-1, 1, channels, taps, 1):
        gain = (weight.clamp(min=0) - weight * content) * present
        loss = (weight.abs() * present) - gain
        for sums, values in ((up, gain), (down, loss)):
            rows = values.flatten(1, 2) if threat.unit == "value" else values.sum(dim=1)  # [B, T, L]
            sums.append(rows.topk(min(threat.k, rows.shape[1]), dim=1).values.sum(dim=1))
    shape = (x.shape[0], -1, *clean.shape[2:])
    return torch.stack(up, dim=1).reshape(shape), torch.stack(down, dim=1).reshape(shape)


def patch_max_change(split: Split, shape: tuple[int, int, int], patch: Patch) -> Tensor:
    """Largest possible |change| of each output of a linear first layer under a patch at any location: [N]."""
    return window_sums(split.dense_weight(shape).abs(), patch).amax(dim=1)


def sparse_max_change(split: Split, shape: tuple[int, int, int], threat: Sparse) -> Tensor:
    """Largest possible |change| of each first-layer output when ``threat.k`` entries change: [N] or [N, 1, 1]."""
    if isinstance(split.first, nn.Linear):
        reach = split.dense_weight(shape).abs()
        reach = (reach if threat.unit == "value" else reach.sum(dim=1)).reshape(reach.shape[0], -1)
        return reach.topk(min(threat.k, reach.shape[1]), dim=1).values.sum(dim=1)
    return split.kernel().abs().sum(dim=(1, 2, 3))[:, None, None]


def first_layer_influence(split: Split, x: Tensor, falls: Tensor, rises: Tensor) -> Tensor:
    """How much each pixel's change weighs, [B, H, W].

    ``falls`` and ``rises`` (shape of the layer's output) say what lowering or raising each output counts.
    """

    def back(weights: Tensor, outputs: Tensor) -> Tensor:
        if isinstance(split.first, nn.Linear):
            return (outputs @ weights.flatten(1)).reshape(x.shape)
        layer = cast(nn.Conv2d, split.first)
        padding = cast(tuple[int, int], layer.padding)
        outputs = outputs.contiguous()
        back_through: Tensor = conv2d_input(x.shape, weights, outputs, layer.stride, padding, layer.dilation)  # type: ignore[no-untyped-call]
        return back_through

    linear = isinstance(split.first, nn.Linear)
    weight = split.dense_weight((x.shape[1], x.shape[2], x.shape[3])) if linear else split.kernel()
    moved = back(weight.clamp(min=0), rises) + back(-weight.clamp(max=0), falls) + x * back(weight, falls - rises)
    return moved.sum(dim=1)
