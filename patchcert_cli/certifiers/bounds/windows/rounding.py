"""What rounding can do to bounds in windows, and to the network itself, from the sizes that activations really have.

Shapes: B images, maps [B, C, H, W], features [B, F]; u the unit roundoff.

**Claim.** Let every exact value (clean, lower, upper) before a layer be at most ``size``, and let the computed clean value c
and the computed ends of the box, the real numbers ``c + d - r`` and ``c + d + r``, be off by at most ``error``, cell by cell and
at every location. Then the same holds after the layer with what is carried here. Proof, with S = size + 2 error:

* Affine ``W v + b``. Take c, d, r as they were computed: ``W c + b + W d -/+ |W| r`` weighs each entry's lower end with one sign
  of w and its upper end with the other, as plain interval arithmetic does (c cancels, because the clean values that d was
  measured from are those that W is applied to). So errors carry over as ``|W| error``. New errors are those of three products,
  with ``|c| <= size + error``, ``r <= size + error``, and ``|d| <= r + 2 error``, since exact clean values lie in their boxes.
  Where values have no signs, r is half of that. So they are at most those of 2 products of size S, or of 3 if values have signs,
  and of one more in the dense layer, which adds the clean value as one more term of the sum. Where windows and clean maps are
  multiplied as plain matrices, no fast convolution algorithm makes them larger.
* ReLU and max pooling. The ends are formed (two roundings each), cut or compared (none), and middle, r and d are formed again:
  five roundings of numbers of at most 2 S. Together less than 16 u S. Both layers are monotone and carry errors unchanged.
* An exact pre-activation is at most the largest computed upper end of all locations plus ``error``: if that is not positive, the
  neuron is 0 at all locations, exactly, computed or not; else it bounds the size after the ReLU.

The deployed float64 pass at an attacked input has exact activations inside the boxes, so the same sizes bound its rounding. Its
error and that of margins in float64 share one bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.rules import (
    UNIT,
    carry,
    gamma,
    is_exact,
    largest_sum,
    magnitude,
    not_negative,
    overflow,
    terms_of,
)
from patchcert_cli.certifiers.bounds.windows.partition import Partition

UNITS = UNIT[torch.float32], UNIT[torch.float64]
FORMED = 16.0  # roundings of size S that bound the error of forming middle and radius again
IMAGES = 16  # at a time


@dataclass(frozen=True)
class Errors:
    """Bounds of rounding errors, float64 [B] each.

    Attributes:
        single: of margins in float32.
        double: of margins in float64, and of ``f_y - f_c`` in a float64 pass at any attacked input.
    """

    single: Tensor
    double: Tensor


@torch.no_grad()
def errors(
    partition: Partition,
    last: list[nn.Module],
    x: Tensor,
    highest: Mapping[int, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Errors:
    """Rounding errors of bounds in windows, and of the network itself.

    Args:
        last: the layers after the partition, which the margins merge with a difference of classes.
        x: [B, C, H, W].
        highest: :attr:`Windows.highest` over all locations, computed in ``dtype``.
    """
    parts = []
    for rows in torch.split(torch.arange(len(x), device=x.device), IMAGES):
        some = {at: values[rows] for at, values in (highest or {}).items()}
        parts.append(_errors(partition, last, x[rows], some, UNITS.index(UNIT[dtype])))
    return Errors(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _errors(partition: Partition, last: list[nn.Module], x: Tensor, highest: Mapping[int, Tensor], which: int) -> list[Tensor]:
    """Bounds for both types, where ``highest`` was computed in the type with number ``which``."""
    size = torch.ones_like(x, dtype=torch.float64)
    found = [unit * size for unit in UNITS]
    inside, joined = len(partition.inner), len(partition.layers) - len(partition.tail)
    signed = False  # pixels are not negative
    for at, layer in enumerate([*partition.layers, *last]):
        if at <= inside:
            found = [error + FORMED * unit * (size + error) for error, unit in zip(found, UNITS, strict=True)]
        if at in highest:
            top = highest[at].permute(0, 3, 1, 2) if at < inside else highest[at]
            top = top.double() + found[which]
            size = torch.minimum(size, top.clamp(min=0))
            found = [error.masked_fill(top + error <= 0, 0) for error in found]
        products = 2.0 + signed + (layer is partition.dense_entry) if at < joined else 2.0
        size, found = _through(layer, size, found, products)
        if not is_exact(layer) or isinstance(layer, nn.ReLU):
            signed = not isinstance(layer, nn.ReLU)
    return [difference(size, error, unit) for error, unit in zip(found, UNITS, strict=True)]


def _through(layer: nn.Module, size: Tensor, errors: list[Tensor], products: float) -> tuple[Tensor, list[Tensor]]:
    """Largest magnitude and errors after a layer, of which ``products`` of size S are computed."""
    carried = carry(layer, torch.cat(errors)).chunk(len(errors))
    if is_exact(layer):
        return carry(layer, size), list(carried)
    out, terms, found = magnitude(layer, size), terms_of(layer, size), []
    for error, unit in zip(carried, UNITS, strict=True):
        rate = gamma(terms, unit)
        error = (error + products * rate * (out + 2 * error)) * (1 + rate) + terms * torch.finfo(torch.float32).tiny
        found.append(overflow(largest_sum(layer, size, out) + error, error, unit))
    return out, found


def difference(size: Tensor, error: Tensor, unit: float) -> Tensor:
    """Error [B] of a difference of two outputs: both ends, and the roundings of the difference itself."""
    total = 2 * error.flatten(1).amax(dim=1) + 4 * unit * size.flatten(1).amax(dim=1)
    return not_negative(total.nan_to_num(nan=float("inf"), posinf=float("inf")))
