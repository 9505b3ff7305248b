"""Bounds at chosen pairs (image, location), for training: each a valid bound for a patch at that location.

Shapes: B images, C channels, H x W pixels, R locations of each image, U pairs, K classes, N neurons.

Nothing here certifies: a certificate needs all locations and the rounding rule (:mod:`rounding`).

**Theorem (lines).** Let f be a fully connected ReLU network, x an image, y a class, and let a ReLU's input z lie in [l, u] for
every x' that is allowed. Then relu(z) = z if l >= 0 and 0 if u <= 0; else it is at most u (z - l) / (u - l) and at least a z for
any a in [0, 1]. Going back from ``f_y - f_c`` layer by layer, and at each ReLU taking the line below where the coefficient is
positive and the one above where it is negative, gives A, d with ``f_y(x') - f_c(x') >= <A, x'> + d``. If x' differs from x only
inside a window L, with entries in [x - e x, x + e (1 - x)], then ``f_y(x') - f_c(x') >= <A, x> + d + e sum_{i in L}
min(A_i (1 - x_i), -A_i x_i)``; if at most k pixels change, the sum is that of the k smallest pixels instead.
Proof: each step holds for every allowed x', and a linear function of one entry is smallest at an end (Zhang et al., Efficient
Neural Network Robustness Certification with General Activation Functions, NeurIPS 2018). Any [l, u] that holds will do: here the
interval bounds at the same location.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.first_layer import Split, dense_box, location_masks, sparse_box
from patchcert_cli.certifiers.bounds.intervals import margins_table
from patchcert_cli.certifiers.bounds.rules import Box, box
from patchcert_cli.errors import UsageError
from patchcert_cli.threats import Patch, Sparse

PAIRS = {"cpu": 4096, "cuda": 32768}  # bounded at a time without gradient


@torch.no_grad()
def screen(network: nn.Module, x: Tensor, target: Tensor, patch: Patch, chosen: Tensor, *, epsilon: float = 1.0) -> Tensor:
    """Interval bounds :func:`intervals.margins_table` without gradient, some images at a time."""
    step = max(1, PAIRS.get(x.device.type, PAIRS["cpu"]) // chosen.shape[1])
    parts = [slice(start, start + step) for start in range(0, len(x), step)]
    return torch.cat([margins_table(network, x[part], target[part], patch, chosen[part], epsilon=epsilon) for part in parts])


def relu_boxes(
    network: nn.Module, x: Tensor, threat: Patch | Sparse, location: Tensor, *, epsilon: float = 1.0
) -> tuple[Tensor, list[Box]]:
    """What each ReLU of the network sees, with gradient, for one location of each image (any, if the threat is sparse).

    Args:
        location: int64 [B].

    Returns: the mean radius of the normalized input, and the boxes before the ReLUs, [B, ...] each.
    """
    split = Split.of(network, x.shape[1])
    area = x.shape[2] * x.shape[3]
    if isinstance(threat, Patch):
        touched = threat.height * threat.width / area
    else:
        touched = threat.k / (area * (x.shape[1] if threat.unit == "value" else 1))
    width = epsilon / 2 * touched * split.scale.abs().mean().to(x.dtype)
    image = torch.arange(len(x), device=x.device)
    layers, bounds = _entry(split, x, threat, image, location, epsilon)
    return width, _inner_boxes(layers, bounds)


def _entry(
    split: Split, x: Tensor, threat: Patch | Sparse, owner: Tensor, location: Tensor, epsilon: float
) -> tuple[list[nn.Module], Box]:
    """Layers, and the box before the first of them for each pair (image ``owner``, ``location``), [U, ...] each."""
    if isinstance(threat, Sparse):
        lower, upper = sparse_box(split, x, threat, epsilon=epsilon)
        return split.tail, (lower[owner], upper[owner])
    if split.is_dense:
        return split.tail, dense_box(split, x, threat, owner, location, epsilon)
    moved = location_masks(threat, x)[location, None] * epsilon  # [U, 1, H, W]
    lower = x[owner] * (1 - moved)
    return split.layers, (lower, lower + moved)


def require_dense(network: nn.Module, channels: int) -> Split:
    """Cut ``network``, for which there must be lines."""
    split = Split.of(network, channels)
    if not split.is_dense:
        raise UsageError("linear bounds in training need a fully connected network of two or more layers.", hint="Use linear=0.")
    return split


def linear_margins(
    network: nn.Module, x: Tensor, target: Tensor, threat: Patch | Sparse, chosen: Tensor, *, epsilon: float = 1.0
) -> Tensor:
    """Linear lower bounds of ``f_target - f_class``, each at a location of its own, with gradient (theorem above).

    Args:
        chosen: int64 [B, K], the location for each class; without meaning if the threat is sparse.

    Returns: [B, K]; 0 in the target's column.

    Raises:
        UsageError: the network is not fully connected.
    """
    split = require_dense(network, x.shape[1])
    final, shape = split.tail[-1], (x.shape[1], x.shape[2], x.shape[3])
    assert isinstance(final, nn.Linear)
    locations = threat.count(x.shape[2], x.shape[3]) if isinstance(threat, Patch) else 1
    image = torch.arange(len(x), device=x.device)[:, None].expand_as(chosen)
    where = chosen if isinstance(threat, Patch) else torch.zeros_like(chosen)
    pairs, owner = (image * locations + where).flatten().unique(return_inverse=True)  # type: ignore[no-untyped-call]
    layers, bounds = _entry(split, x, threat, pairs // locations, pairs % locations, epsilon)
    boxes = _inner_boxes(layers[:-1], bounds)
    form = (final.weight[target][:, None] - final.weight).flatten(0, 1)  # [B*K, N]
    bias = final.bias if final.bias is not None else final.weight.new_zeros(final.out_features)
    offset = (bias[target][:, None] - bias).flatten()
    for layer in reversed(layers[:-1]):
        if isinstance(layer, nn.ReLU):
            form, fall = _under_relu(form, boxes.pop(), owner)
            offset = offset + fall
        elif isinstance(layer, nn.Linear):
            offset = offset if layer.bias is None else offset + form @ layer.bias
            form = form @ layer.weight
    shared = (len(x), chosen.shape[1], -1)  # [B, K, ...]: an image serves all of its classes
    value = offset + (form.reshape(shared) * split.clean(x)[:, None]).sum(dim=2).flatten()
    pixels = x.flatten(1)[:, None]  # [B, 1, CHW]
    form = (form @ split.dense_weight(shape).flatten(1)).reshape(shared)
    least = torch.minimum(form * (1 - pixels), -form * pixels).reshape(-1, *shape)  # [B*K, C, H, W]
    return (value + epsilon * _smallest_change(least, threat, where.flatten(), x)).reshape(chosen.shape)


def _under_relu(form: Tensor, bounds: Box, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients [R, N] before a ReLU from those after it, and what the lines above take off: [R]."""
    lower, upper = bounds  # [U, N]
    open_ = (lower < 0) & (upper > 0)
    on = (lower >= 0).to(lower.dtype)
    above = torch.where(open_, upper / torch.where(open_, upper - lower, 1), on)
    below = torch.where(open_, (upper > -lower).to(lower.dtype), on)
    rise = torch.where(open_, -above * lower, 0)
    up, down = form.clamp(min=0), form.clamp(max=0)
    return up * below[owner] + down * above[owner], (down * rise[owner]).sum(dim=1)


def _smallest_change(least: Tensor, threat: Patch | Sparse, location: Tensor, x: Tensor) -> Tensor:
    """The smallest change that the threat allows, [R], from those of single entries, [R, C, H, W]."""
    if isinstance(threat, Patch):
        return (least.sum(dim=1) * location_masks(threat, x)[location]).flatten(1).sum(dim=1)
    entries = least.flatten(1) if threat.unit == "value" else least.sum(dim=1).flatten(1)
    return entries.topk(min(threat.k, entries.shape[1]), dim=1, largest=False).values.sum(dim=1)


def _inner_boxes(layers: list[nn.Module], bounds: Box) -> list[Box]:
    """The boxes before the ReLUs among ``layers``."""
    found = []
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            found.append(bounds)
        bounds = box(layer, bounds)
    return found
