"""Margins of all atoms of a threat, chunk by chunk, so that memory does not grow with their number.

Shapes: B images, G images of one target, C channels, H x W pixels, A atoms, K classes, N neurons of the layer at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.first_layer import (
    ConvolutionWindows,
    Split,
    first_layer_influence,
    location_masks,
    sparse_box,
    under_patch,
    window_sums,
)
from patchcert_cli.certifiers.rules import Box, propagate
from patchcert_cli.threats import Patch, Sparse

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}  # working memory of one chunk of locations: a core's caches, a part of the GPU


def open_stream(split: Split, x: Tensor, threat: Patch | Sparse, epsilon: float, visits: int = 0) -> Stream:
    """The stream that fits network and threat."""
    if isinstance(threat, Sparse):
        return SparseStream(split, x, threat, epsilon, visits)
    if split.is_dense:
        return DenseStream(split, x, threat, epsilon)
    if isinstance(split.first, nn.Linear) and not split.rest:  # a linear model: its only layer is merged with the contrast
        split = Split([], None, split.layers, split.scale)
    return GeneralStream(split, x, threat, epsilon)


class Contrast:
    """The last layer merged with ``e_target - e_class``: margins of one target class."""

    def __init__(self, split: Split, target: int) -> None:
        self.target = target
        self.final = split.rest[-1] if split.rest else None
        if isinstance(self.final, nn.Linear):
            weight, bias = self.final.weight, self.final.bias
            difference = weight[target] - weight  # [K, N]
            self.halves = torch.cat([difference.clamp(min=0), difference.clamp(max=0)], dim=1)
            self.offset = weight.new_zeros(len(weight)) if bias is None else bias[target] - bias

    def columns(self, bounds: Tensor) -> Tensor:
        """Margins [A', K, B] from stacked lower and upper inputs of the last layer, [A', 2N, B]."""
        return torch.matmul(self.halves, bounds) + self.offset[:, None]

    def rows(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Margins [A', K, B] from inputs of the last layer, [A', B, ...] each."""
        if isinstance(self.final, nn.Linear):
            return self.columns(torch.cat([lower, upper], dim=2).transpose(1, 2))
        shape = lower.shape[:2]
        layers = [self.final] if self.final is not None else []
        low, high = propagate(layers, (lower.flatten(0, 1), upper.flatten(0, 1)))
        margins = (low[:, self.target, None] - high).reshape(*shape, -1).transpose(1, 2).contiguous()
        margins[:, self.target] = 0
        return margins


class Stream(Protocol):
    """Margins of all atoms of one threat for one batch of images."""

    split: Split

    def chunks(self, group: Tensor, contrast: Contrast) -> Iterator[Tensor]:
        """Margins [A', K, G] for consecutive atoms, of the images with indices ``group`` [G], which share one target."""
        ...

    def worst_atom(self, target: Tensor, rival: Tensor, attained: Tensor) -> Tensor:
        """The atom, int64 [B], to name as the worst for each image and rival; ``attained`` is where the minimum was."""
        ...


class PatchStream:
    """What all streams over patch locations share: the worst atom is the location where the minimum was attained."""

    def worst_atom(self, target: Tensor, rival: Tensor, attained: Tensor) -> Tensor:
        return attained


def _chunk(per_atom_bytes: int, device: torch.device) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // per_atom_bytes)


class SparseStream:
    """One box of pre-activations holds every sparse change."""

    def __init__(self, split: Split, x: Tensor, threat: Sparse, epsilon: float, visits: int = 0) -> None:
        self.split, self.x = split, x
        self.box = sparse_box(split, x, threat, epsilon=epsilon, visits=visits)
        self.lower, self.upper = propagate(split.rest[:-1], self.box)

    def chunks(self, group: Tensor, contrast: Contrast) -> Iterator[Tensor]:
        yield contrast.rows(self.lower[group][None], self.upper[group][None])

    def worst_atom(self, target: Tensor, rival: Tensor, attained: Tensor) -> Tensor:
        """The pixel whose gains and losses weigh most in the margin bound, to first order in the first layer's box."""
        with torch.enable_grad():
            box = tuple(part.detach().requires_grad_() for part in self.box)
            lower, upper = propagate(self.split.rest[:-1], (box[0], box[1]))
            final = self.split.rest[-1] if self.split.rest else None
            if isinstance(final, nn.Linear):
                contrast = final.weight[target] - final.weight[rival]  # [B, N]
                margin = contrast.clamp(min=0) * lower + contrast.clamp(max=0) * upper
            else:
                lower, upper = propagate([final] if final is not None else [], (lower, upper))
                margin = lower.gather(1, target[:, None]) - upper.gather(1, rival[:, None])
            falls, rises = torch.autograd.grad(margin.sum(), box)
        return first_layer_influence(self.split, self.x, falls, -rises).flatten(1).argmax(dim=1)


class DenseStream(PatchStream):
    """All patch locations of a fully connected network, with neurons as rows and images as columns.

    One chunk is a batched product over patch pixels added to the clean pre-activation, so the work per location is h*w*C*N
    products instead of H*W*C*N.
    """

    def __init__(self, split: Split, x: Tensor, patch: Patch, epsilon: float) -> None:
        self.split, self.x, self.patch, self.epsilon = split, x, patch, epsilon
        weight = split.dense_weight((x.shape[1], x.shape[2], x.shape[3]))
        self.weight = under_patch(weight.permute(1, 2, 3, 0).contiguous(), patch).transpose(1, 2)  # [A, N, P]
        self.radius = window_sums(weight.abs(), patch).t()[:, :, None] * (epsilon / 2)  # [A, N, 1]
        self.clean = split.clean(x).t()  # [N, B]
        self.widest = max(layer.in_features for layer in split.rest if isinstance(layer, nn.Linear))

    def chunks(self, group: Tensor, contrast: Contrast) -> Iterator[Tensor]:
        x = self.x[group]
        hidden = under_patch((0.5 - x).permute(1, 2, 3, 0).contiguous(), self.patch)  # [A, P, B]
        clean = self.clean[:, group][None]  # [1, N, G]
        atoms, neurons, images = self.weight.shape[0], self.weight.shape[1], len(x)
        step = _chunk(2 * self.widest * images * x.element_size(), x.device)
        room, buffer = x.new_empty(min(step, atoms), neurons, images), x.new_empty(min(step, atoms), 2 * neurons, images)
        for start in range(0, atoms, step):
            part = slice(start, min(start + step, atoms))
            middle, bounds = room[: part.stop - start], buffer[: part.stop - start]
            torch.baddbmm(clean, self.weight[part], hidden[part], alpha=self.epsilon, out=middle)
            torch.sub(middle, self.radius[part], out=bounds[:, :neurons])
            torch.add(middle, self.radius[part], out=bounds[:, neurons:])
            for layer in self.split.rest[:-1]:
                bounds = _columns_rule(layer, bounds)
            yield contrast.columns(bounds)


def _columns_rule(layer: nn.Module, bounds: Tensor) -> Tensor:
    """One layer of a fully connected network on stacked bounds [A', 2N, B], lower above upper."""
    if isinstance(layer, nn.Linear):
        lower, upper = bounds.chunk(2, dim=1)
        middle = torch.matmul(layer.weight, (lower + upper) / 2)
        if layer.bias is not None:
            middle += layer.bias[:, None]
        radius = torch.matmul(layer.weight.abs(), (upper - lower) / 2)
        return torch.cat([middle - radius, middle + radius], dim=1)
    return bounds.relu_()


class GeneralStream(PatchStream):
    """All patch locations of any network: the first layer from window sums if it is a convolution, else boxed images."""

    def __init__(self, split: Split, x: Tensor, patch: Patch, epsilon: float) -> None:
        self.split, self.x, self.patch, self.epsilon = split, x, patch, epsilon
        self.windowed = isinstance(split.first, nn.Conv2d)
        layers = split.rest if self.windowed else split.layers
        self.body = layers[:-1] if split.rest else layers

    def chunks(self, group: Tensor, contrast: Contrast) -> Iterator[Tensor]:
        x = self.x[group]
        source: ConvolutionWindows | BoxedImages
        if self.windowed:
            source = ConvolutionWindows(self.split, x, self.patch, self.epsilon)
        else:
            source = BoxedImages(x, self.patch, self.epsilon)
        atoms = self.patch.count(x.shape[2], x.shape[3])
        widest = self.split.clean(x[:1]).numel() if self.windowed else x[0].numel()
        step = _chunk(4 * widest * x.element_size() * len(x), x.device)
        for start in range(0, atoms, step):
            stop = min(start + step, atoms)
            lower, upper = propagate(self.body, source.chunk(start, stop))
            shape = (stop - start, len(x), *lower.shape[1:])
            yield contrast.rows(lower.reshape(shape), upper.reshape(shape))


class BoxedImages:
    """The plain way: one boxed copy of each image per location."""

    def __init__(self, x: Tensor, patch: Patch, epsilon: float = 1.0) -> None:
        self.x, self.epsilon = x, epsilon
        self.masks = location_masks(patch, x)

    def chunk(self, start: int, stop: int) -> Box:
        """Lower and upper images for locations ``start`` to ``stop``: [A'*B, C, H, W] each."""
        moved = self.masks[start:stop, None, None] * self.epsilon  # [A', 1, 1, H, W]
        lower = self.x - moved * self.x
        return lower.flatten(0, 1), (lower + moved).flatten(0, 1)
