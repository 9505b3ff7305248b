"""Linear bounds, backwards through a network: from forms of a layer's output to forms of its input, one rule per layer type.

Shapes: G boxes, R forms, ``...`` the layer's own axes. Each form belongs to one box, named by ``owner``, int64 [R].

**Theorem.** Let v_0 be the pixels, v_1, ..., v_n what the layers make of them, and let the box of each ReLU and of each
max-pooling enclose its input. If ``<w_j, v_j> + c_j`` bounds a quantity from below, so does ``<w_{j-1}, v_{j-1}> + c_{j-1}`` as
given here. Proof: an affine layer ``v_j = W v_{j-1} + b`` gives ``w_{j-1} = W^T w_j`` and ``c_{j-1} = c_j + <w_j, b>``, exactly.
For z in [l, u] and any a in [0, 1], ``a z <= relu(z)`` if l < 0 < u; by convexity ``relu(z) <= s z + t`` for any s in [0, 1] with
``t = max(-s l, (1 - s) u)``; the line below serves positive entries of w_j, the line above negative ones. The largest entry of a
window is at least any one of them and at most the largest upper end.
Source: Zhang et al., Efficient Neural Network Robustness Certification with General Activation Functions, NeurIPS 2018.

**Claim (slope 0).** With a = 0 and interval bounds for boxes, no form's smallest value over the first box is below the interval
bound. Proof: on [l, u] both lines stay within [relu(l), relu(u)], and so do both bounds of a window; so, layer by layer, the
form's range over the box of v_{j-1} lies within its range over the box of v_j.

**Theorem (rounding).** Let size_0 = 1 and ``size_j >= |W| size_{j-1} + |b|`` bound all |v_j| and box ends. An affine rule in
floating point returns W^T w_j up to ``gamma |W|^T |w_j|``, where gamma is that of sums with as many terms as the layer has inputs
and outputs. Going on with what was computed costs at most ``gamma <|W|^T |w_j|, size_{j-1}> <= gamma <|w_j|, size_j>``, and so do
<w_j, b> and the sum of intercepts, as |t| <= size_j; and ``<|w_{j-1}|, size_{j-1}> <= (1 + gamma) <|w_j|, size_j>``, as slopes
are at most 1. So a whole pass from w_n loses at most ``sum_j 8 gamma_j <|w_n|, size_n>``, one more term for the evaluation at the
pixels included, if boxes are widened by their own rounding error first: s and a may be any numbers, and t is rounded up.
Convolutions are products and sums of shifted products (:func:`torch.nn.functional.fold`), so this holds for them entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.rules import Box, channel_affine, gamma, noise, per_channel
from patchcert_cli.layers.supported_layers import IDENTITY

UNIT = 2.0**-53  # unit roundoff of float64, in which all of this is computed
BOX_MARGIN = 4  # boxes come from up to three sums where the rounding rule of :mod:`rules` counts one
HUGE = 1e100  # larger values are refused, so that nothing overflows and what underflows does not count
BENT = (nn.ReLU, nn.MaxPool2d)  # layers that need a box

Slope = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """``<weight, v> + offset``: weight [R, ...], offset [R]."""

    weight: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Magnitudes:
    """What any image in [0, 1] can give, and what rounding can do to it.

    Attributes:
        shapes: the input shape of each layer, without the batch.
        inflation: how far the ends of each layer's input box may be off, [1, ...], or [1, C, 1, 1] of maps.
        loss: bound of what a backward pass loses to rounding for a difference of two outputs.
    """

    shapes: list[torch.Size]
    inflation: list[Tensor]
    loss: float

    @classmethod
    def of(cls, layers: list[nn.Module], like: Tensor) -> Magnitudes:
        """Magnitudes for images of the shape of ``like``."""
        size = torch.ones_like(like[:1], dtype=torch.float64)
        error, rate = torch.zeros_like(size), gamma(size.numel(), UNIT)
        shapes, inflation, sizes = [], [], []
        for layer in layers:
            before = size
            shapes.append(before.shape[1:])
            # one width for a whole map: entries of a max pooling that are alike stay alike, and the first of them is taken
            inflation.append(BOX_MARGIN * (error.amax(dim=(2, 3), keepdim=True) if error.ndim == 4 else error))
            size, error = noise(layer, size, error, UNIT)
            rate += gamma(before.numel() + size.numel(), UNIT)
            sizes.append(size.max())
        largest: list[float] = torch.stack(sizes).tolist()  # one look at the device; not a number is not below HUGE
        sane = bool(torch.isfinite(error).all()) and all(one < HUGE for one in largest)
        return cls(shapes, inflation, 8 * rate * 2 * largest[-1] * (1 + 1e-6) if sane else float("inf"))


def zero(lower: Tensor, upper: Tensor) -> Tensor:
    """The line below an undecided ReLU is 0: never worse than interval bounds at a single location."""
    return torch.zeros_like(lower)


def adaptive(lower: Tensor, upper: Tensor) -> Tensor:
    """The line below an undecided ReLU is z where most of [l, u] is positive, else 0: the smaller area."""
    return (upper > -lower).to(lower.dtype)


def backward(
    layers: list[nn.Module], shapes: list[torch.Size], boxes: dict[int, Box], owner: Tensor, form: Form, slope: Slope
) -> Form:
    """Pull forms of the last layer's output back to the first layer's input (theorem above).

    Args:
        layers: in order.
        shapes: the input shape of each layer, without the batch.
        boxes: for the position of each ReLU and max-pooling, an enclosure of its input, [G, ...] each.
        owner: int64 [R], which of the G boxes each form is about.
        form: forms of the output.
        slope: which line to take below an undecided ReLU: lower and upper ends -> a in [0, 1].
    """
    for index in reversed(range(len(layers))):
        layer, weight = layers[index], form.weight
        if isinstance(layer, nn.ReLU):
            form = _relu(boxes[index], owner, form, slope)
        elif isinstance(layer, nn.MaxPool2d):
            form = _largest(layer, boxes[index], owner, form)
        elif isinstance(layer, nn.Flatten):
            form = Form(weight.reshape(-1, *shapes[index]), form.offset)
        elif not isinstance(layer, IDENTITY):
            form = _affine(layer, shapes[index], form)
    return form


def _affine(layer: nn.Module, shape: torch.Size, form: Form) -> Form:
    weight = form.weight
    scaling = channel_affine(layer)
    if scaling is not None:
        scale, shift = (per_channel(part, weight) for part in scaling[:2])
        return Form(weight * scale, form.offset + (weight * shift).flatten(1).sum(dim=1))
    if isinstance(layer, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        return Form(_averaged(layer, shape, weight), form.offset)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    offset = form.offset
    if layer.bias is not None:
        spread = layer.bias if isinstance(layer, nn.Linear) else per_channel(layer.bias, weight)
        offset = offset + (weight * spread).flatten(1).sum(dim=1)
    return Form(weight @ layer.weight if isinstance(layer, nn.Linear) else _convolution(layer, shape, weight), offset)


def _convolution(layer: nn.Conv2d, shape: torch.Size, weight: Tensor) -> Tensor:
    """The transposed convolution, [R, O, h, w] -> [R, C, H, W], as one product and a sum of shifted images."""
    groups = layer.groups
    kernel = layer.weight.reshape(groups, layer.out_channels // groups, -1)
    parts = kernel.transpose(1, 2) @ weight.reshape(len(weight), groups, layer.out_channels // groups, -1)
    padding = cast(tuple[int, int], layer.padding)
    size = (int(shape[1]), int(shape[2]))
    return F.fold(parts.flatten(1, 2), size, layer.kernel_size, layer.dilation, padding, layer.stride)


def _averaged(layer: nn.Module, shape: torch.Size, weight: Tensor) -> Tensor:
    """The adjoint of an average pooling, by differentiating it: it is linear."""
    with torch.enable_grad():
        like = weight.new_zeros(len(weight), *shape, requires_grad=True)
        back: Tensor = torch.autograd.grad(layer(like), like, weight)[0]
    return back


def _relu(bounds: Box, owner: Tensor, form: Form, slope: Slope) -> Form:
    lower, upper = bounds
    undecided = (lower < 0) & (upper > 0)
    positive = (lower >= 0).to(lower.dtype)
    above = torch.where(undecided, (upper / (upper - lower)).clamp(0, 1), positive)
    rise = torch.maximum(-above * lower, (1 - above) * upper) * (1 + 8 * UNIT)
    rise = torch.where(undecided, rise, torch.zeros_like(rise)).masked_fill(~(lower <= upper), float("nan"))  # NaN proves nothing
    below = torch.where(undecided, slope(lower, upper), positive)
    up, down = form.weight.clamp(min=0), form.weight.clamp(max=0)
    offset = form.offset + (down * rise[owner]).flatten(1).sum(dim=1)
    return Form(up.mul_(below[owner]).add_(down.mul_(above[owner])), offset)


def _largest(layer: nn.MaxPool2d, bounds: Box, owner: Tensor, form: Form) -> Form:
    """Below: the entry whose lower end is the largest. Above: the largest upper end."""
    options: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "ceil_mode")}
    lower, upper = bounds
    _, index = F.max_pool2d(lower, layer.kernel_size, return_indices=True, **options)
    highest = F.max_pool2d(upper, layer.kernel_size, **options)
    up, down = form.weight.clamp(min=0), form.weight.clamp(max=0)
    offset = form.offset + (down * highest[owner]).flatten(1).sum(dim=1)
    back = up.new_zeros(len(up), *lower.shape[1:]).flatten(2)
    back.scatter_add_(2, index.flatten(2)[owner], up.flatten(2))
    return Form(back.reshape(-1, *lower.shape[1:]), offset)
