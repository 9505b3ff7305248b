"""Interval arithmetic and rounding error, one rule per layer type.

Shapes: N boxes, ``...`` the layer's own axes. A box is a pair ``lower <= upper`` of tensors [N, ...].

Each rule states two things about a layer f:

* ``box``: if ``lower <= v <= upper`` then ``box(lower, upper)`` encloses f(v), in exact arithmetic.
* ``noise``: if every value that enters the computation is at most ``size`` in magnitude and off by at most ``error``, then every
  value that leaves it is at most the returned size, and off by at most the returned error, when computed in floating point with
  unit roundoff ``unit`` in any order of summation (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1:
  a dot product of n terms errs by at most gamma_n * sum |w||v| with gamma_n = n u / (1 - n u)). This covers both a box and a
  plain forward pass: a bound of |W| |v| + |b| also bounds each half of midpoint-radius arithmetic.
"""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import UnsupportedThreat

Box = tuple[Tensor, Tensor]

ROUNDINGS = 8  # roundings besides the dot product itself: midpoint, radius, their sum, bias, normalization
CONVOLUTION_FACTOR = 16  # fast convolution algorithms (Winograd) err more than a dot product; they stay within this factor


@runtime_checkable
class ChannelAffine(Protocol):
    """A layer that maps channel c of its input to ``scale[c] * v + shift[c]``; both are [C]."""

    @property
    def scale(self) -> Tensor: ...

    @property
    def shift(self) -> Tensor: ...


def gamma(terms: int, unit: float) -> float:
    """Relative error of a sum of products of ``terms`` terms, with the extra roundings of interval arithmetic."""
    n = terms + ROUNDINGS
    if n * unit >= 0.5:
        raise UnsupportedThreat(f"a sum of {terms} terms has no useful rounding bound in this precision;", hint="use float32.")
    return n * unit / (1 - n * unit)


def channel_affine(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """``(scale, shift)``, each [C], if the layer is affine per channel (normalization, frozen batch norm), else None."""
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        if layer.running_mean is None or layer.running_var is None:
            raise UnsupportedThreat("batch norm without running statistics mixes images;", hint="freeze it first.")
        scale = torch.rsqrt(layer.running_var + layer.eps)
        if layer.affine:
            scale = scale * layer.weight
        shift = -layer.running_mean * scale
        return scale, shift + layer.bias if layer.affine else shift
    if isinstance(layer, ChannelAffine):
        return layer.scale, layer.shift
    return None


def is_identity(layer: nn.Module) -> bool:
    """Layers that do nothing in eval mode."""
    return isinstance(layer, nn.Identity | nn.Dropout | nn.Dropout2d)


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Shape [C] so that it multiplies ``like`` [N, C, ...] channel by channel."""
    return values.reshape(1, -1, *([1] * (like.ndim - 2)))


def convolve(layer: nn.Conv2d, v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's convolution with another weight and bias."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnsupportedThreat("interval bounds need convolutions with numeric zero padding.")
    return F.conv2d(v, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def box(layer: nn.Module, bounds: Box) -> Box:
    """Enclose the image of a box under one layer (exact arithmetic; rounding is accounted for by :func:`noise`)."""
    lower, upper = bounds
    if is_identity(layer):
        return bounds
    if isinstance(layer, nn.ReLU | nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.Flatten):
        return layer(lower), layer(upper)  # monotone, entry by entry
    middle, radius = (lower + upper) / 2, (upper - lower) / 2
    if isinstance(layer, nn.Linear):
        middle, radius = layer(middle), F.linear(radius, layer.weight.abs())
    elif isinstance(layer, nn.Conv2d):
        middle = convolve(layer, middle, layer.weight, layer.bias)
        radius = convolve(layer, radius, layer.weight.abs(), None)
    else:
        affine = channel_affine(layer)
        if affine is None:
            raise _no_rule(layer)
        scale, shift = (per_channel(part, lower) for part in affine)
        middle, radius = middle * scale + shift, radius * scale.abs()
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


def noise(layer: nn.Module, size: Tensor, error: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Carry (largest magnitude, largest error), float64 [N, ...] each, through one layer computed with roundoff ``unit``."""
    if is_identity(layer) or isinstance(layer, nn.ReLU | nn.MaxPool2d | nn.Flatten):
        return layer(size), layer(error)
    tiny = torch.finfo(torch.float32).tiny  # what an underflow can lose, in either precision
    if isinstance(layer, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        terms = size[0, 0].numel()
        rate, out, carried = gamma(terms, unit), layer(size), layer(error)
    elif isinstance(layer, nn.Linear):
        weight = layer.weight.double().abs()
        terms, rate = layer.in_features, relative_error(layer, unit)
        out, carried = F.linear(size, weight, _magnitude(layer.bias)), F.linear(error, weight)
    elif isinstance(layer, nn.Conv2d):
        weight = layer.weight.double().abs()
        terms, rate = weight[0].numel(), relative_error(layer, unit)
        out = convolve(layer, size, weight, _magnitude(layer.bias))
        carried = convolve(layer, error, weight, None)
    else:
        affine = channel_affine(layer)
        if affine is None:
            raise _no_rule(layer)
        scale, shift = (per_channel(part.double().abs(), size) for part in affine)
        terms, rate = 1, gamma(1, unit)
        out, carried = size * scale + shift, error * scale
    # the factor 2 covers midpoint and radius, each of which may reach the full magnitude; (1 + rate) the second order
    return out + carried, (carried + 2 * rate * (out + carried)) * (1 + rate) + terms * tiny


def _magnitude(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double().abs()


def _no_rule(layer: nn.Module) -> UnsupportedThreat:
    return UnsupportedThreat(
        f"no interval rule for layer {type(layer).__name__};",
        hint="allowed: Linear, Conv2d, ReLU, Flatten, max and average pooling, frozen batch norm, normalization.",
    )


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers of a (possibly nested) ``Sequential`` in order."""
    if isinstance(network, nn.Sequential):
        return [layer for child in network for layer in layers_of(child)]
    return [cast(nn.Module, network)]
