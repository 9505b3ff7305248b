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

Which layers have rules, and how look-alikes are recognized: :mod:`supported_layers`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import IntegrityError, UnsupportedThreat
from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.layers.supported_layers import IDENTITY, MONOTONE, check_padding, no_rule

Box = tuple[Tensor, Tensor]

REPORT = "Nothing was certified. Please report this network as a bug of patchcert."
ROUNDINGS = 8  # roundings besides the dot product itself: midpoint, radius, their sum, bias, normalization
SINGLE = 2.0**-24  # unit roundoff of float32
UNIT = {torch.float32: SINGLE, torch.float64: 2.0**-53}


def ordered(bounds: Box) -> Box:
    """The same bounds.

    Raises:
        IntegrityError: a lower end is above its upper end, so they are not what the proofs take them for. NaN passes: it
            certifies nothing.
    """
    if bool((bounds[0] > bounds[1]).any()):
        raise IntegrityError("interval bounds crossed: a lower end lies above its upper end.", hint=REPORT)
    return bounds


def not_negative(error: Tensor) -> Tensor:
    """The same bound of a rounding error.

    Raises:
        IntegrityError: it is negative somewhere. NaN passes: it certifies nothing.
    """
    if bool((error < 0).any()):
        raise IntegrityError("a bound of a rounding error is negative.", hint=REPORT)
    return error


def gamma(terms: int, unit: float) -> float:
    """Relative error of a sum of products of ``terms`` terms, with the extra roundings of interval arithmetic."""
    n = terms + ROUNDINGS
    if n * unit >= 0.5:
        raise UnsupportedThreat(f"a sum of {terms} terms has no useful rounding bound in this precision.", hint="Use float32.")
    return n * unit / (1 - n * unit)


def channel_affine(layer: nn.Module, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor] | None:
    """``(scale, shift, terms)``, each [C], of a layer that maps channel c to ``scale * v + shift``, else None.

    They are computed in ``dtype``, by default the type of the layer. ``terms`` bounds the magnitudes that ``shift`` is a sum of:
    they can cancel, their rounding errors do not.
    """
    if isinstance(layer, Normalize):
        scale, shift = (part.to(dtype or part.dtype) for part in (layer.scale, layer.shift))
        return scale, shift, shift.abs()
    if not isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        return None
    if layer.running_mean is None or layer.running_var is None:
        raise UnsupportedThreat("batch norm without running statistics mixes images.", hint="Freeze it first.")
    mean, variance = (part.to(dtype or part.dtype) for part in (layer.running_mean, layer.running_var))
    scale = torch.rsqrt(variance + layer.eps)
    if layer.affine:
        scale = scale * layer.weight.to(scale.dtype)
    moved = mean * scale
    if layer.affine:
        bias = layer.bias.to(scale.dtype)
        return scale, bias - moved, bias.abs() + moved.abs()
    return scale, -moved, moved.abs()


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Shape [C] so that it multiplies ``like`` [N, C, ...] channel by channel."""
    return values.reshape(1, -1, *([1] * (like.ndim - 2)))


def convolve(layer: nn.Conv2d, v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's convolution with another weight and bias."""
    check_padding(layer)
    return F.conv2d(v, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def box(layer: nn.Module, bounds: Box) -> Box:
    """Enclose the image of a box under one layer (exact arithmetic; rounding is accounted for by :func:`noise`)."""
    lower, upper = bounds
    if isinstance(layer, IDENTITY):
        return bounds
    if isinstance(layer, nn.ReLU):
        return lower.relu(), upper.relu()  # never in place
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
        raise no_rule(layer)
    return middle - radius, middle + radius


def propagate(layers: list[nn.Module], bounds: Box) -> Box:
    """Enclose the image of a box under a sequence of layers."""
    for layer in layers:
        bounds = box(layer, bounds)
    return ordered(bounds)


def is_exact(layer: nn.Module) -> bool:
    """Whether a layer rounds nothing."""
    return isinstance(layer, (*IDENTITY, nn.ReLU, nn.MaxPool2d, nn.Flatten))


def carry(layer: nn.Module, error: Tensor) -> Tensor:
    """Largest errors after a layer that rounds nothing, float64 [N, ...], from those before it."""
    affine = channel_affine(layer)
    if affine is not None:
        return error * per_channel(affine[0].double().abs(), error)
    if isinstance(layer, nn.Linear):
        return F.linear(error, layer.weight.double().abs())
    if isinstance(layer, nn.Conv2d):
        return convolve(layer, error, layer.weight.double().abs(), None)
    if isinstance(layer, nn.ReLU):
        return error.relu()
    if not isinstance(layer, (*IDENTITY, *MONOTONE)):
        raise no_rule(layer)
    outputs: Tensor = layer(error)
    if isinstance(layer, nn.MaxPool2d):  # the largest of nothing, where a dilated window lies in the padding alone
        outputs = outputs.masked_fill(outputs.isneginf(), float("inf"))
    return outputs


def terms_of(layer: nn.Module, size: Tensor) -> int:
    """How many terms an output of the layer is the sum of, on inputs like ``size``."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv2d):
        return layer.weight[0].numel()
    return size[0, 0].numel() if isinstance(layer, nn.AvgPool2d | nn.AdaptiveAvgPool2d) else 1


def magnitude(layer: nn.Module, size: Tensor) -> Tensor:
    """Sums of the magnitudes of the terms of each output, float64 [N, ...], from the largest magnitudes of the inputs."""
    outputs, affine = carry(layer, size), channel_affine(layer)
    if affine is not None:
        return outputs + per_channel(affine[2].double(), size)
    bias = layer.bias if isinstance(layer, nn.Linear | nn.Conv2d) else None
    if bias is None:
        return outputs
    return outputs + (per_channel(bias.double().abs(), outputs) if isinstance(layer, nn.Conv2d) else bias.double().abs())


def noise(layer: nn.Module, size: Tensor, error: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Carry (largest magnitude, largest error), float64 [N, ...] each, through one layer computed with roundoff ``unit``."""
    carried = carry(layer, error)
    if is_exact(layer):
        return carry(layer, size), carried
    out, terms = magnitude(layer, size), terms_of(layer, size)
    rate = gamma(terms, unit)
    # the factor 2 covers midpoint and radius, each of which may reach the full magnitude; (1 + rate) the second order
    error = (carried + 2 * rate * (out + carried)) * (1 + rate) + terms * torch.finfo(torch.float32).tiny
    return out + carried, not_negative(overflow(largest_sum(layer, size, out) + carried, error, unit))


def largest_sum(layer: nn.Module, size: Tensor, out: Tensor) -> Tensor:
    """The largest magnitude of a partial sum of each output, whose terms sum up to ``out`` at most: an average divides last."""
    if isinstance(layer, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
        return torch.maximum(out, size.flatten(2).sum(dim=2).amax(dim=1).reshape(-1, *([1] * (out.ndim - 1))))
    return out


def overflow(size: Tensor, error: Tensor, unit: float) -> Tensor:
    """``error``, but infinite where a value of magnitude ``size``, or a partial sum of it, might overflow."""
    largest = torch.finfo(torch.float32 if unit == SINGLE else torch.float64).max
    return error.masked_fill(~(size < largest / 16), float("inf"))
