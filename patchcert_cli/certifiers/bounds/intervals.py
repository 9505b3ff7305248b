"""Interval bounds of a network for every location of a threat at once.

Shapes: B images, C channels, H x W pixels, A locations, K classes, N neurons of the layer at hand.

**Theorem.** Let f be a ``Sequential`` of linear, convolution, ReLU, flatten, pooling, frozen batch norm and normalization
layers, x an image in [0, 1], y a class, and T a threat model. For a patch, let m_c be the minimum over all locations L of the
interval lower bound of f_y - f_c on the box {x' : x' = x outside L, x' in [0, 1] inside L}; for a sparse threat, on the box of
pre-activations that :mod:`first_layer` gives. If m_c > 0 for every c != y then argmax f(x') = y for every x' that T allows.
Proof: each x' lies in one of the boxes, and interval arithmetic encloses (:mod:`rules`); the last linear layer is merged with
the difference e_y - e_c first. Source: Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020, section 3. Theirs
is computed on one boxed copy of the image per location; here only the windows that a patch reaches are computed for each
location (:mod:`windows`), and a fully connected network's first layer comes from sums over the patch window.

These are statements of exact arithmetic; :mod:`rounding` accounts for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.first_layer import Split, dense_box
from patchcert_cli.certifiers.bounds.margin_chunks import ClassDifference, MarginIterator, margin_iterator
from patchcert_cli.certifiers.bounds.rules import Box, propagate
from patchcert_cli.certifiers.bounds.windows.windows import Windows
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.threats import Patch, PatchPercent, Sparse, Threat


@dataclass(frozen=True)
class Margins:
    """Lower bounds of ``f_target - f_class`` over all locations.

    Attributes:
        values: [B, K], the minimum over locations; 0 in the target's own column.
        worst: int64 [B, K], the index of the location that attains it.
    """

    values: Tensor
    worst: Tensor


def resolve(threat: Threat, height: int, width: int, channels: int) -> Patch | Sparse:
    """The threat in pixels on this image size; raises if it does not fit or has no interval certificate."""
    if isinstance(threat, PatchPercent):
        return threat.resolve(height, width)
    if isinstance(threat, Patch | Sparse):
        threat.check(height, width, channels)
        return threat
    raise UnsupportedThreat(f"interval bounds have no certificate against {threat}.", hint="Allowed: patch, sparse.")


def lower_margins(
    network: nn.Module, x: Tensor, target: Tensor, threat: Threat, *, epsilon: float = 1.0, topk_limit: int = 0
) -> Margins:
    """Interval lower bounds of ``f_target - f_class`` over every location of ``threat``.

    Args:
        network: a ``Sequential`` in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].
        x: [B, C, H, W] in [0, 1].
        target: int64 [B], the class to defend.
        threat: a patch or sparse threat model.
        epsilon: below 1, touched entries move only this fraction of their way to 0 or 1 (for training ramps).
        topk_limit: for training against a sparse threat: the most pixels or values per neuron that are looked at; 0 is all.

    Gradients flow for sparse threats; for patches take them with :func:`margins_at` at the location found here.
    """
    split = Split.of(network, x.shape[1])
    resolved = resolve(threat, x.shape[2], x.shape[3], x.shape[1])
    with torch.set_grad_enabled(torch.is_grad_enabled() and isinstance(resolved, Sparse)):
        return minimum(margin_iterator(split, x, resolved, epsilon, topk_limit=topk_limit), target)


def minimum(stream: MarginIterator, target: Tensor) -> Margins:
    """The smallest margins over all locations of a stream; ``target`` is int64 [B]."""
    groups = stream.groups(target)
    parts = [_smallest(stream.chunks(group, ClassDifference(stream.split, target[group]))) for group in groups]
    back = torch.cat(groups).argsort()
    values, worst = (torch.cat(part, dim=1)[:, back].t() for part in zip(*parts, strict=True))
    return Margins(values, worst)


def _smallest(chunks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Minimum over locations and its index, [K, B] each, from chunks [A', K, B] in order."""
    values = worst = None
    seen = 0
    for chunk in chunks:
        lowest, index = chunk.min(dim=0)
        if values is None or worst is None:
            values, worst = lowest, index
        else:
            worst = torch.where(lowest < values, index + seen, worst)
            values = torch.minimum(lowest, values)
        seen += len(chunk)
    assert values is not None and worst is not None
    return values, worst


def margins_at(network: nn.Module, x: Tensor, target: Tensor, patch: Patch, chosen: Tensor, *, epsilon: float = 1.0) -> Tensor:
    """The interval lower bounds of ``f_target - f_class``, each class at a location of its own, with gradient.

    Where ``chosen`` is the worst location of each class, this is the minimum over all locations and has its gradient (the
    gradient of a minimum is that of its minimizer), at the cost of the few distinct locations instead of all.

    Args:
        chosen: int64 [B, K], the index of a location for each class.

    Returns: [B, K]; 0 in the target's column.
    """
    better, worse, offset, (lower, upper) = _contrasted(network, x, target, patch, chosen, epsilon)
    return (better * lower + worse * upper).sum(dim=2) + offset


def smallest_margins(
    network: nn.Module, x: Tensor, target: Tensor, patch: Patch, chosen: Tensor, *, epsilon: float = 1.0
) -> Tensor:
    """The smallest interval lower bounds of ``f_target - f_class`` over R locations of each image, with gradient.

    Args:
        chosen: int64 [B, R], indices of locations.

    Returns: [B, K]; 0 in the target's column.
    """
    better, worse, offset, (lower, upper) = _contrasted(network, x, target, patch, chosen, epsilon)
    return (lower @ better.transpose(1, 2) + upper @ worse.transpose(1, 2)).amin(dim=1) + offset


def margins_table(network: nn.Module, x: Tensor, target: Tensor, patch: Patch, chosen: Tensor, *, epsilon: float = 1.0) -> Tensor:
    """The interval lower bounds of ``f_target - f_class`` at each of R locations of each image, with gradient.

    Args:
        chosen: int64 [B, R], indices of locations.

    Returns: [B, R, K]; 0 in the target's column.
    """
    better, worse, offset, (lower, upper) = _contrasted(network, x, target, patch, chosen, epsilon)
    return lower @ better.transpose(1, 2) + upper @ worse.transpose(1, 2) + offset[:, None]


def _contrasted(
    network: nn.Module, x: Tensor, target: Tensor, patch: Patch, chosen: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Box]:
    """The last layer merged with ``e_target - e_class``, and the box before it at ``chosen`` locations [B, R].

    Returns: its weights for lower and for upper ends [B, K, N], its bias [B, K], and the box [B, R, N].
    """
    split = Split.of(network, x.shape[1])
    final = split.tail[-1] if split.tail else None
    if not isinstance(final, nn.Linear):
        raise UnsupportedThreat(
            "training on patches needs a network that ends in a linear layer after another layer.", hint="Use network mlp or cnn."
        )
    locations = patch.count(x.shape[2], x.shape[3])
    image = torch.arange(len(x), device=x.device)[:, None].expand_as(chosen)
    pairs, back = (image * locations + chosen).unique(return_inverse=True)  # type: ignore[no-untyped-call]  # distinct (image, location)
    lower, upper = _at_pairs(split, x, patch, pairs // locations, pairs % locations, epsilon)  # [U, N]
    contrast = final.weight[target][:, None] - final.weight  # [B, K, N]
    bias = final.bias if final.bias is not None else final.weight.new_zeros(final.out_features)
    return contrast.clamp(min=0), contrast.clamp(max=0), bias[target][:, None] - bias, (lower[back], upper[back])


def _at_pairs(split: Split, x: Tensor, patch: Patch, owner: Tensor, location: Tensor, epsilon: float) -> Box:
    """Bounds before the last layer for U pairs (image ``owner``, ``location``), [U, N] each, with gradient."""
    if not split.is_dense:
        windows = Windows(split.layers[:-1], x, patch, epsilon, clip=False)
        order = windows.patch_windows.order(location)
        back = order.argsort()
        lower, upper = windows.bounds(owner[order], location[order])
        return lower[back], upper[back]
    return propagate(split.tail[:-1], dense_box(split, x, patch, owner, location, epsilon))
