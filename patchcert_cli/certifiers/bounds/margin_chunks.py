"""Margins of all locations of a threat, chunk by chunk, so that memory does not grow with their number.

Shapes: B images, G images treated together, C channels, H x W pixels, A locations, K classes, N neurons of the layer at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.first_layer import Split, first_layer_influence, sparse_box, under_patch, window_sums
from patchcert_cli.certifiers.bounds.rules import propagate
from patchcert_cli.certifiers.bounds.windows.rounding import Errors, errors
from patchcert_cli.certifiers.bounds.windows.windows import Windows
from patchcert_cli.threats import Patch, Sparse

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}  # working memory of one chunk of locations: a core's caches, a part of the GPU
IMAGES = 128  # whose clean activations are kept at a time
MARGIN_BYTES = 1 << 28  # margins of all locations that are kept at a time
FEW = 8  # images below which windows of one size are faster than the least windows, which are of many sizes


def margin_iterator(
    split: Split, x: Tensor, threat: Patch | Sparse, epsilon: float, *, watch: bool = False, topk_limit: int = 0
) -> MarginIterator:
    """The stream that fits network and threat; with ``watch`` it may find out about rounding errors on its way."""
    if isinstance(threat, Sparse):
        return SparseMargins(split, x, threat, epsilon, topk_limit)
    if split.is_dense:
        return DenseMargins(split, x, threat, epsilon)
    if isinstance(split.first, nn.Linear) and not split.tail:  # a linear model: its only layer is merged with the contrast
        split = Split([], None, split.layers, split.scale)
    return WindowMargins(split, x, threat, epsilon, watch=watch)


class ClassDifference:
    """The last layer merged with ``e_target - e_class``: margins of G images with the class ``target``, or each with its own.

    Images with the same target should stand side by side: each run of them is one product.
    """

    def __init__(self, split: Split, target: int | Tensor) -> None:
        self.target = torch.as_tensor(target).reshape(-1)
        self.final = split.tail[-1] if split.tail else None
        classes, counts = (part.tolist() for part in self.target.unique_consecutive(return_counts=True))  # type: ignore[no-untyped-call]
        self.runs = [slice(None)] if len(classes) == 1 else [slice(a, b) for a, b in pairwise(accumulate(counts, initial=0))]
        if isinstance(self.final, nn.Linear):
            weight, bias = self.final.weight, self.final.bias
            differences = [weight[y] - weight for y in classes]  # [K, N] each
            self.halves = [torch.cat([part.clamp(min=0), part.clamp(max=0)], dim=1) for part in differences]
            self.offset = [weight.new_zeros(len(weight)) if bias is None else bias[y] - bias for y in classes]

    def columns(self, bounds: Tensor) -> Tensor:
        """Margins [A', K, G] from stacked lower and upper inputs of the last layer, [A', 2N, G]."""
        parts = [
            torch.matmul(halves, bounds[:, :, run]) + offset[:, None]
            for run, halves, offset in zip(self.runs, self.halves, self.offset, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def rows(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Margins [A', K, G] from inputs of the last layer, [A', G, ...] each."""
        if isinstance(self.final, nn.Linear):
            parts = []
            for run, halves, offset in zip(self.runs, self.halves, self.offset, strict=True):
                better, worse = halves.t().chunk(2)
                parts.append(lower[:, run] @ better + upper[:, run] @ worse + offset)
            return torch.cat(parts, dim=1).transpose(1, 2)
        shape = lower.shape[:2]
        layers = [self.final] if self.final is not None else []
        bounds = propagate(layers, (lower.flatten(0, 1), upper.flatten(0, 1)))
        low, high = (part.reshape(*shape, -1) for part in bounds)
        own = self.target.to(low.device).expand(shape)[:, :, None]
        return (low.gather(2, own) - high).scatter(2, own, 0).transpose(1, 2)


class MarginIterator(Protocol):
    """Margins of all locations of one threat for one batch of images.

    Attributes:
        errors: bounds of rounding errors, where all chunks were asked for, if they say more than :func:`rounding.bound_error`.
    """

    split: Split
    errors: Errors | None

    def groups(self, target: Tensor) -> list[Tensor]:
        """The images to treat together, those of equal targets side by side: their indices, int64 [G] each."""
        ...

    def chunks(self, group: Tensor, contrast: ClassDifference) -> Iterator[Tensor]:
        """Margins [A', K, G] for consecutive locations, of the images with indices ``group``, whose contrast is given."""
        ...

    def worst_location(self, target: Tensor, rival: Tensor, attained: Tensor) -> Tensor:
        """The location, int64 [B], to name as the worst for each image and class; ``attained`` is where the minimum was."""
        ...


def by_target(target: Tensor) -> list[Tensor]:
    """The images of each target: with one target, the last layer is one product per chunk."""
    return [(target == y).nonzero()[:, 0] for y in target.unique().tolist()]  # type: ignore[no-untyped-call]


class PatchMargins:
    """What all streams over patch locations share: the worst location is the location where the minimum was attained."""

    errors: Errors | None = None

    def worst_location(self, target: Tensor, rival: Tensor, attained: Tensor) -> Tensor:
        return attained


def _chunk(per_atom_bytes: int, device: torch.device) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // per_atom_bytes)


class SparseMargins:
    """One box of pre-activations holds every sparse change."""

    errors: Errors | None = None

    def __init__(self, split: Split, x: Tensor, threat: Sparse, epsilon: float, topk_limit: int = 0) -> None:
        self.split, self.x = split, x
        self.box = sparse_box(split, x, threat, epsilon=epsilon, topk_limit=topk_limit)
        self.lower, self.upper = propagate(split.tail[:-1], self.box)

    def groups(self, target: Tensor) -> list[Tensor]:
        return by_target(target)

    def chunks(self, group: Tensor, contrast: ClassDifference) -> Iterator[Tensor]:
        yield contrast.rows(self.lower[group][None], self.upper[group][None])

    def worst_location(self, target: Tensor, rival: Tensor, attained: Tensor) -> Tensor:
        """The pixel whose gains and losses weigh most in the margin bound, to first order in the first layer's box."""
        with torch.enable_grad():
            box = tuple(part.detach().requires_grad_() for part in self.box)
            lower, upper = propagate(self.split.tail[:-1], (box[0], box[1]))
            final = self.split.tail[-1] if self.split.tail else None
            if isinstance(final, nn.Linear):
                contrast = final.weight[target] - final.weight[rival]  # [B, N]
                margin = contrast.clamp(min=0) * lower + contrast.clamp(max=0) * upper
            else:
                lower, upper = propagate([final] if final is not None else [], (lower, upper))
                margin = lower.gather(1, target[:, None]) - upper.gather(1, rival[:, None])
            falls, rises = torch.autograd.grad(margin.sum(), box)
        return first_layer_influence(self.split, self.x, falls, -rises).flatten(1).argmax(dim=1)


class DenseMargins(PatchMargins):
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
        self.widest = max(layer.in_features for layer in split.tail if isinstance(layer, nn.Linear))

    def groups(self, target: Tensor) -> list[Tensor]:
        return by_target(target)

    def chunks(self, group: Tensor, contrast: ClassDifference) -> Iterator[Tensor]:
        x = self.x[group]
        hidden = under_patch((0.5 - x).permute(1, 2, 3, 0).contiguous(), self.patch)  # [A, P, B]
        clean = self.clean[:, group][None]  # [1, N, G]
        locations, neurons, images = self.weight.shape[0], self.weight.shape[1], len(x)
        step = _chunk(2 * self.widest * images * x.element_size(), x.device)
        room, buffer = x.new_empty(min(step, locations), neurons, images), x.new_empty(min(step, locations), 2 * neurons, images)
        for start in range(0, locations, step):
            part = slice(start, min(start + step, locations))
            middle, bounds = room[: part.stop - start], buffer[: part.stop - start]
            torch.baddbmm(clean, self.weight[part], hidden[part], alpha=self.epsilon, out=middle)
            torch.sub(middle, self.radius[part], out=bounds[:, :neurons])
            torch.add(middle, self.radius[part], out=bounds[:, neurons:])
            for layer in self.split.tail[:-1]:
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


class WindowMargins(PatchMargins):
    """All patch locations of any other network: only the windows that a patch can reach, until a layer joins all of them.

    Attributes:
        least: the smallest margin over classes at each location, [A, B], once all chunks were computed.
    """

    least: Tensor

    def __init__(self, split: Split, x: Tensor, patch: Patch, epsilon: float, *, watch: bool = False) -> None:
        self.split, self.x, self.patch, self.epsilon, self.watch = split, x, patch, epsilon, watch
        self.body = split.layers[:-1] if split.tail else split.layers
        self.locations = patch.count(x.shape[2], x.shape[3])

    def groups(self, target: Tensor) -> list[Tensor]:
        margins = self.locations * getattr(self.split.layers[-1], "out_features", 1) * self.x.element_size()
        return list(torch.split(target.argsort(stable=True), max(1, min(IMAGES, MARGIN_BYTES // margins))))

    def chunks(self, group: Tensor, contrast: ClassDifference) -> Iterator[Tensor]:
        x = self.x[group]
        windows = Windows(self.body, x, self.patch, self.epsilon, clip=len(x) >= FEW, watch=self.watch)
        step = _chunk(windows.widest(len(x)) * len(x) * x.element_size() // 2, x.device)
        margins = None
        for alike in windows.patch_windows.classes():
            for locations in torch.split(alike.to(x.device), step):
                bounds = windows.everywhere(locations)
                lower, upper = (part.reshape(len(locations), len(x), *part.shape[1:]) for part in bounds)
                found = contrast.rows(lower, upper)
                if margins is None:  # a location that is never asked for would not be certified
                    margins = found.new_full((self.locations, *found.shape[1:]), float("-inf"))
                margins[locations] = found
        assert margins is not None
        if self.watch:
            noted = errors(windows.partition, self.split.layers[len(self.body) :], x, windows.highest, x.dtype)
            own = torch.arange(margins.shape[1], device=x.device)[:, None] == contrast.target
            self._note(group, noted, margins.masked_fill(own, float("inf")).amin(dim=1))
        yield margins  # locations come class by class, so all of them at once

    def _note(self, group: Tensor, noted: Errors, least: Tensor) -> None:
        """Keep what was found out about the images ``group``."""
        if self.errors is None:
            unknown = torch.full((len(self.x),), float("inf"), dtype=torch.float64, device=self.x.device)
            self.errors = Errors(unknown, unknown.clone())
            self.least = least.new_full((len(least), len(self.x)), float("-inf"))
        self.errors.single[group], self.errors.double[group] = noted.single, noted.double
        self.least[:, group] = least

    def at_pairs(self, owner: Tensor, location: Tensor, target: Tensor) -> Tensor:
        """Margins of pairs (image ``owner``, ``location``), int64 [N] each, against their ``target`` [N]: [N, K]."""
        found, where = [], []
        for start in range(0, len(self.x), IMAGES):
            own = ((owner >= start) & (owner < start + IMAGES)).nonzero()[:, 0]
            if not len(own):
                continue
            windows = Windows(self.body, self.x[start : start + IMAGES], self.patch, self.epsilon, clip=False)
            order = own[windows.patch_windows.order(location[own])]
            for part in torch.split(order, _chunk(windows.widest(1) * self.x.element_size() // 2, self.x.device)):
                lower, upper = windows.bounds(owner[part] - start, location[part])
                runs = target[part].argsort(stable=True)
                margins = ClassDifference(self.split, target[part][runs]).rows(lower[runs][None], upper[runs][None])
                found.append(margins[0].t())
                where.append(part[runs])
        return torch.cat(found)[torch.cat(where).argsort()]
