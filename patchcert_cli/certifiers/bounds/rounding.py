"""From interval bounds to a verdict: what rounding may have done, and why it cannot certify.

Shapes: B images, C channels, H x W pixels, N first-layer neurons.

**Rounding rule.** Let m_c be the margin bounds of :mod:`intervals`, e a bound of their rounding error (float32,
any order of summation) and d the error of a float64 forward pass
at any x' in [0, 1], both from the error analysis of
:mod:`rules`. An image is certified at once if m_c > e + d for all c, and not certified if some
m_c <= -e. Every other image is bounded again in float64, and certified only if m_c exceeds that computation's own error + d. The
deployed prediction is the argmax of the float64 forward pass, lowest index first.

A sum of n products of which all but s are exactly zero errs by gamma_s only, since adding zero is exact: with normalization
folded into the first layer, black pixels cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.first_layer import Split, patch_max_change, sparse_max_change
from patchcert_cli.certifiers.bounds.intervals import minimum, resolve
from patchcert_cli.certifiers.bounds.margin_chunks import MarginIterator, WindowMargins, margin_iterator
from patchcert_cli.certifiers.bounds.rules import UNIT, gamma, noise, overflow, terms_of
from patchcert_cli.certifiers.bounds.windows.partition import Partition
from patchcert_cli.certifiers.bounds.windows.rounding import difference, errors
from patchcert_cli.threats import Patch, Sparse, Threat


@torch.no_grad()
def bound_error(split: Split, x: Tensor, threat: Patch | Sparse) -> Tensor:
    """Bound of the rounding error of the margins that :mod:`intervals` computes in the type of ``x``: float64 [B]."""
    unit = UNIT[x.dtype]
    if isinstance(split.first, nn.Linear) and (split.is_dense or isinstance(threat, Sparse)):
        return _difference_error(*_dense_first(split, x, threat, unit), unit)
    if isinstance(threat, Patch):
        found = errors(Partition.of(split.layers[:-1], x[:1]), split.layers[-1:], x)
        return found.single if x.dtype == torch.float32 else found.double
    if isinstance(split.first, nn.Conv2d):
        size, error = x.double(), torch.zeros_like(x, dtype=torch.float64)
        for layer in (*split.before, split.first):
            size, error = noise(layer, size, error, unit)
        reach = _reach(split, x, threat)
        # a sum over a window, or of the largest gains, has at most as many terms as the layer itself
        rate = gamma(terms_of(split.first, x) + _folded(split, unit), unit)
        return _difference_error(split.tail, size + reach, error + 2 * rate * (size + reach), unit)
    raise AssertionError("without an affine first layer there are no sparse margins")


def _folded(split: Split, unit: float) -> int:
    """Roundings of unit roundoff ``unit`` in the weights of the first layer times the scales before it, besides the last.

    In float32 that is one at most: scales are multiplied in float64, whose roundings together are less than one of float32.
    """
    return min(split.folded, 1) if unit == UNIT[torch.float32] else split.folded


def _reach(split: Split, x: Tensor, threat: Patch | Sparse) -> Tensor:
    """Largest possible change of each first-layer output, with room for its own rounding: float64."""
    shape = (x.shape[1], x.shape[2], x.shape[3])
    reach = patch_max_change(split, shape, threat) if isinstance(threat, Patch) else sparse_max_change(split, shape, threat)
    return reach.double() * (1 + 1e-3)


def _dense_first(split: Split, x: Tensor, threat: Patch | Sparse, unit: float) -> tuple[list[nn.Module], Tensor, Tensor]:
    """Layers still to come, and size and error [B, N] before them, for a linear first layer."""
    weight = split.dense_weight((x.shape[1], x.shape[2], x.shape[3])).flatten(1).double()
    bias, exact, reach = split.dense_bias(x).double(), x.flatten(1).double(), _reach(split, x, threat)
    terms = F.linear(exact, weight.abs(), bias.abs()) + reach
    moved = x.shape[1] * (threat.height * threat.width if isinstance(threat, Patch) else threat.k)
    count = (exact != 0).sum(dim=1) + moved + _folded(split, unit)
    rate = torch.tensor([gamma(n, unit) for n in count.tolist()], dtype=torch.float64, device=x.device)[:, None]
    size, black = torch.zeros_like(x[:1], dtype=torch.float64), torch.zeros_like(x[:1], dtype=torch.float64)
    for layer in split.before:
        size, black = noise(layer, size, black, unit)
    error = 2 * rate * terms + F.linear(black.flatten(1), cast(nn.Linear, split.first).weight.double().abs())
    error = overflow(terms, error + weight.shape[1] * torch.finfo(torch.float32).tiny, unit)
    middle = F.linear(exact, weight, bias)
    if split.tail and isinstance(split.tail[0], nn.ReLU):
        return split.tail[1:], (middle + reach).clamp(min=0) + error, error
    return split.tail, middle.abs() + reach + error, error


def _difference_error(layers: list[nn.Module], size: Tensor, error: Tensor, unit: float) -> Tensor:
    """Error of a difference of two outputs: both ends, and the roundings of the difference itself."""
    for layer in layers:
        size, error = noise(layer, size, error, unit)
    return difference(size, error, unit)


@torch.no_grad()
def forward_error(split: Split, like: Tensor, dtype: torch.dtype = torch.float64) -> float:
    """Bound of the error of ``f_y - f_c`` in a forward pass in ``dtype``, for every input in [0, 1] of the shape of ``like``."""
    ones = torch.ones_like(like[:1], dtype=torch.float64)
    return float(_difference_error(split.layers, ones, torch.zeros_like(ones), UNIT[dtype]))


@dataclass(frozen=True)
class Proof:
    """The smallest margin over classes and locations.

    Attributes:
        margin: float64 [B], lower bound of ``f_target - f_rival`` over all locations.
        tolerance: float64 [B], what rounding may have added to it, plus the rounding of the deployed float64 prediction.
        worst: int64 [B], the location index that attains it.
        rival: int64 [B], the class that attains it.
    """

    margin: Tensor
    tolerance: Tensor
    worst: Tensor
    rival: Tensor


def prove(network: nn.Module, exact: nn.Module, x: Tensor, target: Tensor, threat: Threat) -> Proof:
    """Bound the margins of ``target`` in float32, and again in float64 where rounding could decide (the rule above).

    Args:
        network: a ``Sequential`` in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].
        exact: a float64 copy of ``network``; its argmax is the deployed prediction.
        x: [B, C, H, W] in [0, 1].
        target: int64 [B], the deployed prediction.
        threat: a patch or sparse threat model.
    """
    resolved = resolve(threat, x.shape[2], x.shape[3], x.shape[1])
    if not len(x):
        none = torch.zeros(0, dtype=torch.float64, device=x.device)
        return Proof(none, none.clone(), target.clone(), target.clone())
    deployed = forward_error(Split.of(exact, x.shape[1]), x)
    stream = margin_iterator(Split.of(network, x.shape[1]), x, resolved, 1.0, watch=True)
    proof, error = _prove(stream, x, target, resolved, deployed)
    open_ = ((proof.margin > -error) & (proof.margin <= proof.tolerance)) | proof.margin.isinf()
    close = open_.nonzero()[:, 0]
    if not len(close) or x.dtype == torch.float64:
        return proof
    wide = margin_iterator(Split.of(exact, x.shape[1]), x[close].double(), resolved, 1.0)
    if isinstance(wide, WindowMargins) and isinstance(stream, WindowMargins):
        close, again = _prove_pairs(stream, wide, proof, error, close, target[close], deployed)
    else:
        again, _ = _prove(wide, x[close].double(), target[close], resolved, deployed)
    for name in ("margin", "tolerance", "worst", "rival"):
        getattr(proof, name)[close] = getattr(again, name)
    return proof


def _prove(stream: MarginIterator, x: Tensor, target: Tensor, threat: Patch | Sparse, deployed: float) -> tuple[Proof, Tensor]:
    """A proof in the type of ``x``, and the part of its tolerance that concerns the margins; ``deployed`` bounds the rest."""
    margins = minimum(stream, target)
    margin, rival = margins.values.scatter(1, target[:, None], float("inf")).min(dim=1)
    worst = stream.worst_location(target, rival, margins.worst.gather(1, rival[:, None])[:, 0])
    if stream.errors is None:
        error = bound_error(stream.split, x, threat)
        tolerance = error + deployed
    else:
        error = stream.errors.single if x.dtype == torch.float32 else stream.errors.double
        tolerance = error + stream.errors.double.clamp(max=deployed)
    broken = ~torch.isfinite(margins.values).all(dim=1)  # overflow or NaN, for any class, never certifies
    return Proof(margin.double().masked_fill(broken, float("-inf")), tolerance, worst, rival), error


def _prove_pairs(
    stream: WindowMargins, wide: WindowMargins, proof: Proof, error: Tensor, close: Tensor, target: Tensor, deployed: float
) -> tuple[Tensor, Proof]:
    """Those of the images ``close`` that may be certified, and their proof in float64, from few of their locations.

    Where the location that looks worst has no sufficient margin in float64, an image stays uncertified. Of the others, with m
    the smallest margin found and e the bound of its error, the exact minimum is at most m + e, so it is not attained where
    m + 2 e is exceeded. Of an image with a margin that is NaN, every location is evaluated.
    """
    assert stream.errors is not None
    tolerance = stream.errors.double[close] + stream.errors.double[close].clamp(max=deployed)
    every = torch.arange(len(close), device=close.device)
    first, _ = _at_pairs(wide, every, proof.worst[close], target)
    kept = (first > tolerance).nonzero()[:, 0]
    limit = (proof.margin[close] + 2 * error[close]).masked_fill(proof.margin[close].isinf(), float("inf"))
    asked = ~(stream.least[:, close[kept]] > limit[kept])
    asked[proof.worst[close[kept]], torch.arange(len(kept), device=close.device)] = True
    location, image = asked.nonzero().unbind(dim=1)
    least, rival = _at_pairs(wide, kept[image], location, target)
    margin = least.new_full(kept.shape, float("inf")).scatter_reduce(0, image, least, "amin")
    attained = (least == margin[image]).nonzero()[:, 0]
    pair = torch.full_like(kept, len(least)).scatter_reduce(0, image[attained], attained, "amin")
    return close[kept], Proof(margin, tolerance[kept], location[pair], rival[pair])


def _at_pairs(wide: WindowMargins, owner: Tensor, location: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest margin over classes of each pair (image, location), minus infinity if one is NaN, and its class: [N]."""
    if not len(owner):
        return owner.double(), owner
    margins = wide.at_pairs(owner, location, target[owner])
    least, rival = margins.scatter(1, target[owner][:, None], float("inf")).min(dim=1)
    return least.masked_fill(~torch.isfinite(margins).all(dim=1), float("-inf")), rival
