"""Linear lower bounds of margins, for all locations of a patch at once, for groups of them, and for each alone.

Shapes: B images, C channels, H x W pixels, A locations (one stands for all changes if the threat is sparse), K classes, G groups
of locations, U pairs of a group and a location of it, R pairs of a group and another class.

**Theorem (patch).** Let the boxes of a group enclose what each ReLU sees for every content at every one of its locations: the
elementwise union of the locations' interval bounds. One backward pass (:mod:`relaxations`) then gives A, c with
``f_y(x') - f_k(x') >= <A, x'> + c`` for all those x', so for a patch at location L
``f_y - f_k >= <A, x> + c + sum_{i in L} min(A_i (1 - x_i), -A_i x_i)``: one sum over the patch window serves all locations.

**Theorem (sparse).** If at most k pixels change, ``f_y - f_k >= <A, x> + c`` plus the k smallest of the pixels'
``sum_c min(A_c (1 - x_c), -A_c x_c)`` (of single values likewise). Interval bounds let each neuron choose its own k pixels;
here all neurons share them.

Proof: x' differs from x only there, entry by entry in [0, 1], and a linear function of one entry is smallest at an end.
Bounds of several groups, slopes or kinds all hold, so the largest counts; :mod:`refine` therefore never certifies less than
interval bounds do. These are statements of exact arithmetic; what rounding adds is ``Engine.loss`` (:mod:`relaxations`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.first_layer import Split, sparse_box, under_patch, window_sums
from patchcert_cli.certifiers.bounds.intervals import Margins, resolve
from patchcert_cli.certifiers.bounds.linear.relaxations import BENT, Form, Magnitudes, Slope, adaptive, backward, zero
from patchcert_cli.certifiers.bounds.margin_chunks import ClassDifference, margin_iterator
from patchcert_cli.certifiers.bounds.rules import Box, box, propagate
from patchcert_cli.layers import passes
from patchcert_cli.layers.boxes import box_mask
from patchcert_cli.threats import Patch, Sparse, Threat

SLOPES: tuple[Slope, ...] = (zero, adaptive)  # each gives a bound; the better one counts
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}  # working memory of one chunk of groups or of pairs


@dataclass(frozen=True)
class Query:
    """Which bounds are wanted: groups of locations of an image, and for each group some classes.

    Attributes:
        image: int64 [G], the image of each group.
        group: int64 [U], sorted; with ``location`` the members of the groups.
        location: int64 [U].
        owner: int64 [R], sorted: the group of each class.
        rival: int64 [R].
    """

    image: Tensor
    group: Tensor
    location: Tensor
    owner: Tensor
    rival: Tensor

    @classmethod
    def single(cls, image: Tensor, location: Tensor, rival: Tensor) -> Query:
        """A group for each (image, location, class), [U] each."""
        index = torch.arange(len(image), device=image.device)
        return cls(image, index, location, index, rival)

    @classmethod
    def grouped(cls, wanted: Tensor, tile: Tensor) -> Query:
        """Groups of the locations in one tile at which a bound is wanted, and the classes for which one is wanted anywhere in it.

        Args:
            wanted: bool [B, A, K].
            tile: int64 [A], the tile of each location.
        """
        tiles = int(tile.max()) + 1
        image, location = wanted.any(dim=2).nonzero().unbind(dim=1)
        image_rival, at, rival = wanted.nonzero().unbind(dim=1)
        keys, group = (image * tiles + tile[location]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        classes = wanted.shape[2]
        pairs = ((image_rival * tiles + tile[at]) * classes + rival).unique()  # type: ignore[no-untyped-call]
        owner = torch.searchsorted(keys, pairs // classes)
        order = group.argsort(stable=True)
        return cls(keys // tiles, group[order], location[order], owner, pairs % classes)

    def part(self, start: int, stop: int) -> Query:
        """The groups ``start`` to ``stop`` alone."""
        u0, u1 = torch.searchsorted(self.group, torch.tensor([start, stop], device=self.group.device)).tolist()
        r0, r1 = torch.searchsorted(self.owner, torch.tensor([start, stop], device=self.group.device)).tolist()
        return Query(
            self.image[start:stop], self.group[u0:u1] - start, self.location[u0:u1], self.owner[r0:r1] - start, self.rival[r0:r1]
        )


class Source(Protocol):
    """A threat as linear bounds see it."""

    locations: int
    cost: int  # bytes of working memory that one pair takes besides its boxes

    def boxes(self, image: Tensor, location: Tensor) -> Box:
        """What the first affine layer gives (the pixels if another layer comes first), [U] and [U] -> [U, ...] each."""
        ...

    def change(self, least: Tensor) -> Tensor:
        """Smallest change at each location from the smallest changes of single entries: [R, C, H, W] -> [R, A]."""
        ...


class PatchSource:
    """A patch at any location."""

    def __init__(self, split: Split, x: Tensor, patch: Patch) -> None:
        self.split, self.x, self.patch = split, x, patch
        shape = (x.shape[1], x.shape[2], x.shape[3])
        self.locations = patch.count(shape[1], shape[2])
        self.cost = 0
        if isinstance(split.first, nn.Linear):
            self.clean = split.clean(x)  # [B, N]
            self.weight = split.dense_weight(shape).flatten(1).t().contiguous()  # [CHW, N]
            entry = torch.arange(math.prod(shape), device=x.device).reshape(*shape, 1)
            self.entries = under_patch(entry, patch)[:, :, 0]  # [A, P], what each location covers
            self.half = (0.5 - x).flatten(1)
            self.cost = x.element_size() * self.entries.shape[1] * self.weight.shape[1]

    def boxes(self, image: Tensor, location: Tensor) -> Box:
        if isinstance(self.split.first, nn.Linear):
            return self._windows(image, location)
        moved = self._masks(location)
        lower = self.x[image] * (1 - moved)
        first = [] if self.split.first is None else [self.split.first]
        return propagate([*self.split.before, *first], (lower, lower + moved))

    def _masks(self, location: Tensor) -> Tensor:
        """1 under the patch, 0 elsewhere: [U] -> [U, 1, H, W]."""
        height, width = self.x.shape[2:]
        boxes = self.patch.locations(height, width).to(location.device)[location]
        return box_mask(boxes, height, width)[:, None].to(self.x.dtype)

    def _windows(self, image: Tensor, location: Tensor) -> Box:
        """Only the entries under the patch move a linear first layer; pairs that share a location share one product."""
        distinct, which, count = location.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
        order = which.argsort(stable=True)
        slot = torch.empty_like(which)
        slot[order] = torch.arange(len(which), device=which.device) - (count.cumsum(0) - count)[which[order]]
        entries = self.entries[distinct]  # [L, P]
        content = self.half.new_zeros(len(distinct), int(count.max()), entries.shape[1])
        content[which, slot] = self.half[image].gather(1, entries[which])
        weight = self.weight[entries]  # [L, P, N]
        middle = self.clean[image] + torch.bmm(content, weight)[which, slot]
        radius = (weight.abs().sum(dim=1) / 2)[which]
        return middle - radius, middle + radius

    def change(self, least: Tensor) -> Tensor:
        return window_sums(least, self.patch)


class SparseSource:
    """At most k changed pixels or values anywhere: one location that stands for all of them."""

    locations, cost = 1, 0

    def __init__(self, split: Split, x: Tensor, threat: Sparse) -> None:
        self.threat = threat
        self.box = sparse_box(split, x, threat)

    def boxes(self, image: Tensor, location: Tensor) -> Box:
        return self.box[0][image], self.box[1][image]

    def change(self, least: Tensor) -> Tensor:
        entries = least.flatten(1) if self.threat.unit == "value" else least.sum(dim=1).flatten(1)
        return entries.topk(min(self.threat.k, entries.shape[1]), dim=1, largest=False).values.sum(dim=1, keepdim=True)


class Engine:
    """Linear bounds of ``f_target - f_rival`` for the images of one batch.

    Args:
        network: a ``Sequential`` in eval mode and float64, images [B, C, H, W] in [0, 1] -> logits [B, K].
        x: float64 [B, C, H, W] in [0, 1].
        target: int64 [B].
        threat: in pixels.
    """

    def __init__(self, network: nn.Module, x: Tensor, target: Tensor, threat: Patch | Sparse) -> None:
        self.split, self.x, self.target, self.threat = Split.of(network, x.shape[1]), x, target, threat
        self.source: Source = (
            PatchSource(self.split, x, threat) if isinstance(threat, Patch) else SparseSource(self.split, x, threat)
        )
        self.layers = self.split.layers
        self.magnitudes = Magnitudes.of(self.layers, x)
        self.classes = network(x[:1]).shape[1]
        widths = [shape.numel() for shape in self.magnitudes.shapes]
        self.bytes = 8 * sum(widths)  # of all values of one image
        self.first = len(self.layers) - len(self.split.tail)  # the layer whose input ``source.boxes`` gives

    @property
    def loss(self) -> float:
        """Bound of the rounding error of every bound."""
        return self.magnitudes.loss

    @torch.no_grad()
    def bounds(self, query: Query) -> Tensor:
        """Lower bounds [R, A] for the classes of the query; they hold at the locations of the class's group only."""
        limit = CHUNK_BYTES.get(self.x.device.type, CHUNK_BYTES["cpu"])
        found = [self.x.new_empty(0, self.source.locations)]
        step = max(1, limit // (self.bytes * (2 + 4 * len(query.rival) // max(len(query.image), 1))))
        for start in range(0, len(query.image), step):
            part = query.part(start, start + step)
            boxes = self._unions(part, limit)
            found.append(torch.stack([self._evaluate(part, boxes, slope) for slope in SLOPES]).amax(dim=0))
            passes.made(0)
        return torch.cat(found)

    def _unions(self, query: Query, limit: int) -> dict[int, Box]:
        """For each layer that needs one the union box of each group, [G, ...], widened by rounding."""
        order = query.location.argsort(stable=True)  # pairs of one location share work
        found: dict[int, Box] = {}
        for part in torch.split(order, max(1, limit // max(2 * self.bytes, self.source.cost))):
            group, bounds = query.group[part], self.source.boxes(query.image[query.group[part]], query.location[part])
            for index, layer in enumerate(self.layers[self.first :], self.first):
                if isinstance(layer, BENT):
                    if index not in found:
                        empty = bounds[0].new_full((len(query.image), *bounds[0].shape[1:]), float("inf"))
                        found[index] = (empty, -empty)
                    spread = group.reshape(-1, *([1] * (bounds[0].ndim - 1))).expand_as(bounds[0])
                    found[index][0].scatter_reduce_(0, spread, bounds[0], "amin")
                    found[index][1].scatter_reduce_(0, spread, bounds[1], "amax")
                bounds = box(layer, bounds)
        widths = self.magnitudes.inflation
        return {index: (lower - widths[index], upper + widths[index]) for index, (lower, upper) in found.items()}

    def _evaluate(self, query: Query, boxes: dict[int, Box], slope: Slope) -> Tensor:
        """Lower bounds [R, A] with one choice of slopes."""
        image = query.image[query.owner]
        row = torch.arange(len(image), device=image.device)
        start = self.x.new_zeros(len(image), self.classes)
        start[row, self.target[image]] += 1
        start[row, query.rival] -= 1
        form = backward(self.layers, self.magnitudes.shapes, boxes, query.owner, Form(start, start.new_zeros(len(row))), slope)
        x = self.x[image]
        value = (form.weight * x).flatten(1).sum(dim=1) + form.offset
        least = torch.minimum(form.weight * (1 - x), -form.weight * x)  # [R, C, H, W]
        return value[:, None] + self.source.change(least)

    @torch.no_grad()
    def intervals(self, chosen: Tensor) -> Tensor:
        """Interval bounds at every location for some images, int64 [B'] -> [B', A, K]; infinite in the target's column."""
        stream = margin_iterator(self.split, self.x[chosen], self.threat, 1.0)
        target = self.target[chosen]
        table = self.x.new_empty(len(chosen), self.source.locations, self.classes)
        for group in stream.groups(target):
            table[group] = torch.cat(list(stream.chunks(group, ClassDifference(stream.split, target[group])))).permute(2, 0, 1)
        return table.scatter_(2, target[:, None, None].expand(-1, table.shape[1], 1), float("inf"))


def tiles(threat: Patch | Sparse, height: int, width: int, side: int, device: torch.device) -> Tensor:
    """The tile of each location, int64 [A], if the grid of locations is cut in tiles of ``side`` x ``side``; 0 is one tile."""
    if isinstance(threat, Sparse) or side < 1:
        return torch.zeros(1 if isinstance(threat, Sparse) else threat.count(height, width), dtype=torch.int64, device=device)
    top, left = threat.locations(height, width)[:, :2].to(device).unbind(dim=1)
    return (top // side) * (width // side + 1) + left // side


def raise_to(table: Tensor, query: Query, values: Tensor) -> None:
    """Take the larger of ``table`` [B, A, K] and the bounds [R, A] of a query, in place, where they hold."""
    member = torch.zeros(len(query.image), table.shape[1], dtype=torch.bool, device=table.device)
    member[query.group, query.location] = True
    row, location = member[query.owner].nonzero().unbind(dim=1)
    index = (query.image[query.owner[row]] * table.shape[1] + location) * table.shape[2] + query.rival[row]
    flat = table.view(-1)
    flat[index] = torch.maximum(flat[index], values[row, location])


def table(engine: Engine, side: int) -> Tensor:
    """Linear bounds of every margin at every location, [B, A, K]; a relaxation serves ``side`` x ``side`` locations (0: all)."""
    height, width = engine.x.shape[2:]
    wanted = torch.ones(len(engine.x), engine.source.locations, engine.classes, dtype=torch.bool, device=engine.x.device)
    wanted.scatter_(2, engine.target[:, None, None].expand(-1, wanted.shape[1], 1), False)
    query = Query.grouped(wanted, tiles(engine.threat, height, width, side, engine.x.device))
    found = engine.x.new_full(wanted.shape, float("-inf"))
    raise_to(found, query, engine.bounds(query))
    return found


@torch.no_grad()
def lower_margins(network: nn.Module, x: Tensor, target: Tensor, threat: Threat, *, side: int = 0) -> Margins:
    """Linear lower bounds of ``f_target - f_class`` over every location of ``threat``; compare :func:`intervals.lower_margins`.

    Args:
        network: a ``Sequential`` in eval mode and float64.
        x: float64 [B, C, H, W] in [0, 1].
        target: int64 [B], the class to defend.
        threat: a patch or sparse threat model.
        side: relaxations hold for tiles of ``side`` x ``side`` locations; 0 takes one for all locations, 1 one for each.
    """
    engine = Engine(network, x, target, resolve(threat, x.shape[2], x.shape[3], x.shape[1]))
    values, worst = table(engine, side).min(dim=1)
    return Margins(values.scatter(1, target[:, None], 0.0), worst)
