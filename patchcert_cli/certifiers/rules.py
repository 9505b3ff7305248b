"""Interval arithmetic and rounding error, one rule per layer type.

Shapes: N boxes, ``...`` the layer's own axes. A box is a pair ``lower <= upper`` of tensors [N, ...].

Each rule states two things about a layer f:

* ``box``: if ``lower <= v <= upper`` then ``box(lower, upper)`` encloses f(v), in exact arithmetic.
* ``noise``: if every value that enters the computation is at most ``size`` in magnitude and off by at most ``error``, then every
  value that leaves it is at most the returned size, and off by at most the returned error, when computed in floating point with
  unit roundoff ``unit`` in any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1:
  a dot product of n terms errs by at most gamma_n * sum |w||v| with gamma_n = n u / (1 - n u)). This covers both a box and a
  plain forward pass: a bound of |W| |v| + |b| also bounds each half of midpoint-radius arithmetic. Where a value may overflow,
  the error is infinite.

Only layers of exactly these types have rules: a subclass with a forward of its own, or with hooks, computes something else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.layers import Normalize

Box = tuple[Tensor, Tensor]

ROUNDINGS = 8  # roundings besides the dot product itself: midpoint, radius, their sum, bias, normalization
CONVOLUTION_FACTOR = 16  # fast convolution algorithms (Winograd) err more than a dot product; they stay within this factor
SINGLE = 2.0**-24  # unit roundoff of float32
UNIT = {torch.float32: SINGLE, torch.float64: 2.0**-53}

IDENTITY = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in eval mode
MONOTONE = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten)
CHANNEL_AFFINE = (Normalize, nn.BatchNorm1d, nn.BatchNorm2d)
KNOWN: tuple[type[nn.Module], ...] = (*IDENTITY, *MONOTONE, *CHANNEL_AFFINE, nn.Linear, nn.Conv2d)

ALLOWED = "Sequential, Linear, Conv2d, ReLU, Flatten, pooling, frozen batch norm, Normalize"
INSTEAD = {
    **dict.fromkeys(("ELU", "GELU", "Hardswish", "LeakyReLU", "Mish", "ReLU6", "SELU", "SiLU", "Sigmoid", "Tanh"), "ReLU"),
    **dict.fromkeys(("GroupNorm", "InstanceNorm2d", "LayerNorm", "LocalResponseNorm", "RMSNorm"), "batch norm"),
    "AdaptiveMaxPool2d": "MaxPool2d",
}


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers of a (possibly nested) ``Sequential`` in order.

    Raises:
        UnsupportedThreat: a layer has no rule, a forward of its own, or hooks.
    """
    if isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward and not _hooked(network):
        return [layer for child in network for layer in layers_of(child)]
    if not any(isinstance(network, kind) and type(network).forward is kind.forward for kind in KNOWN) or _hooked(network):
        raise _no_rule(network)
    if isinstance(network, nn.Conv2d):
        _check_padding(network)
    return [network]


def _no_rule(layer: nn.Module) -> UnsupportedThreat:
    name = type(layer).__name__
    instead = f"use {INSTEAD[name]}; " if name in INSTEAD else ""
    return UnsupportedThreat(
        f"no interval rule for layer {name};",
        hint=f"{instead}allowed, without hooks: {ALLOWED}.",
    )


def _check_padding(layer: nn.Conv2d) -> None:
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnsupportedThreat("interval bounds need convolutions with numeric zero padding.")


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def gamma(terms: int, unit: float) -> float:
    """Relative error of a sum of products of ``terms`` terms, with the extra roundings of interval arithmetic."""
    n = terms + ROUNDINGS
    if n * unit >= 0.5:
        raise UnsupportedThreat(f"a sum of {terms} terms has no useful rounding bound in this precision;", hint="use float32.")
    return n * unit / (1 - n * unit)


def channel_affine(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(scale, shift, terms)``, each [C], of a layer that maps channel c to ``scale * v + shift``, else None.

    ``terms`` bounds the magnitudes that ``shift`` is a sum of: they can cancel, their rounding errors do not.
    """
    if isinstance(layer, Normalize):
        return layer.scale, layer.shift, layer.shift.abs()
    if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return None
    if layer.running_mean is None or layer.running_var is None:
        raise UnsupportedThreat("batch norm without running statistics mixes images;", hint="freeze it first.")
    scale = torch.rsqrt(layer.running_var + layer.eps)
    if layer.affine:
        scale = scale * layer.weight
    moved = layer.running_mean * scale
    if layer.affine:
        return scale, layer.bias - moved, layer.bias.abs() + moved.abs()
    return scale, -moved, moved.abs()


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Shape [C] so that it multiplies ``like`` [N, C, ...] channel by channel."""
    return values.reshape(1, -1, *([1] * (like.ndim - 2)))


def convolve(layer: nn.Conv2d, v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's convolution with another weight and bias."""
    _check_padding(layer)
    return F.conv2d(v, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def box(layer: nn.Module, bounds: Box) -> Box:
    """Enclose the image of a box under one layer (exact arithmetic; rounding is accounted for by :func:`noise`)."""
    lower, upper = bounds
    if isinstance(layer, IDENTITY):
        return bounds
    if isinstance(layer, MONOTONE):
        return layer(lower), layer(upper)  # entry by entry
    middle, radius = (lower + upper) / 2, (upper - lower) / 2
    affine = channel_affine(layer)
    if affine is not None:
        scale, shift = (per_channel(part, lower) for part in affine[:2])
        middle, radius = middle * scale + shift, radius * scale.abs()
    elif isinstance(layer, nn.Linear):
        middle, radius = layer(middle), F.linear(radius, layer.weight.abs())
    elif isinstance(layer, nn.Conv2d):
        middle = convolve(layer, middle, layer.weight, layer.bias)
        radius = convolve(layer, radius, layer.weight.abs(), None)
    else:
        raise _no_rule(layer)
    return middle - radius, middle + radius


def propagate(layers: list[nn.Module], bounds: Box) -> Box:
    """Enclose the image of a box under a sequence of layers."""
    for layer in layers:
        bounds = box(layer, bounds)
    return bounds


def relative_error(layer: nn.Linear | nn.Conv2d, unit: float) -> float:
    """Error of one output of an affine layer, relative to the sum of the magnitudes of its terms."""
    if isinstance(layer, nn.Linear):
        return gamma(layer.in_features, unit)
    return CONVOLUTION_FACTOR * gamma(layer.weight[0].numel(), unit)


def is_exact(layer: nn.Module) -> bool:
    """Whether a layer rounds nothing."""
    return isinstance(layer, (*IDENTITY, nn.ReLU, nn.MaxPool2d, nn.Flatten))


def carry(layer: nn.Module, error: Tensor) -> Tensor:
    """Largest errors behind a layer that rounds nothing, float64 [N, ...], from those in front of it."""
    affine = channel_affine(layer)
    if affine is not None:
        return error * per_channel(affine[0].double().abs(), error)
    if isinstance(layer, nn.Linear):
        return F.linear(error, layer.weight.double().abs())
    if isinstance(layer, nn.Conv2d):
        return convolve(layer, error, layer.weight.double().abs(), None)
    if not isinstance(layer, (*IDENTITY, *MONOTONE)):
        raise _no_rule(layer)
    behind: Tensor = layer(error)
    return behind


def terms_of(layer: nn.Module, size: Tensor) -> int:
    """How many terms an output of the layer is the sum of, on inputs like ``size``."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d):
        return layer.weight[0].numel()
    return size[0, 0].numel() if isinstance(layer, nn.AvgPool2d | nn.AdaptiveAvgPool2d) else 1


def magnitude(layer: nn.Module, size: Tensor) -> Tensor:
    """Sums of the magnitudes of the terms of each output, float64 [N, ...], from the largest magnitudes of the inputs."""
    behind, affine = carry(layer, size), channel_affine(layer)
    if affine is not None:
        return behind + per_channel(affine[2].double(), size)
    bias = layer.bias if isinstance(layer, nn.Linear | nn.Conv2d) else None
    if bias is None:
        return behind
    return behind + (per_channel(bias.double().abs(), behind) if isinstance(layer, nn.Conv2d) else bias.double().abs())


def mixed(layer: nn.Conv2d, size: Tensor) -> Tensor:
    """As :func:`magnitude` for tiled algorithms, which mix neighbouring outputs, so that each may err as the largest does."""
    weight = layer.weight.double().abs()
    rounded = F.conv2d(size.amax(dim=(2, 3), keepdim=True).expand(-1, -1, *weight.shape[2:]), weight, groups=layer.groups)
    return rounded if layer.bias is None else rounded + per_channel(layer.bias.double().abs(), rounded)


def noise(layer: nn.Module, size: Tensor, error: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Carry (largest magnitude, largest error), float64 [N, ...] each, through one layer computed with roundoff ``unit``."""
    carried = carry(layer, error)
    if is_exact(layer):
        return carry(layer, size), carried
    out, terms = magnitude(layer, size), terms_of(layer, size)
    rounded = mixed(layer, size) if isinstance(layer, nn.Conv2d) else out
    rate = relative_error(layer, unit) if isinstance(layer, nn.Linear | nn.Conv2d) else gamma(terms, unit)
    # the factor 2 covers midpoint and radius, each of which may reach the full magnitude; (1 + rate) the second order
    error = (carried + 2 * rate * (rounded + carried)) * (1 + rate) + terms * torch.finfo(torch.float32).tiny
    return out + carried, overflow(out + carried, error, unit)


def overflow(size: Tensor, error: Tensor, unit: float) -> Tensor:
    """``error``, but infinite where a value of magnitude ``size``, or a partial sum of it, might overflow."""
    largest = torch.finfo(torch.float32 if unit == SINGLE else torch.float64).max
    return error.masked_fill(~(size < largest / 16), float("inf"))
