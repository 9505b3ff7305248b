"""What a network of whole numbers says of images behind pairs of masks: exact, and computed once where two masks share it.

**Theorem.** Level by level (:mod:`patchcert_cli.layers.levels`), let Z(i) be the positions of a map that see a pixel that mask i
hides. Behind masks i and j a position outside Z(j) has the value that it has behind i alone, and a position outside Z(i) the
value that it has behind j alone.
Proof. The image behind i and j differs from the image behind i alone only in pixels that j hides. A position outside Z(j)
sees none of them, so it sees the same whole numbers, and its value is an exact function of what it sees. For Z(i) exchange i
and j. QED.

So of a map behind two masks only the common part of Z(i) and Z(j) is computed, inside the smallest box around it; all else is
taken from the maps behind single masks. What is computed twice has the same bits, and a test compares them with the whole
network's.

Shapes: B images, C channels, H x W pixels, K classes, M masks, n passes, P positions of a map, h x w positions of a box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certifiers.masks.masked_predictions import Answers, Clear, Seen, logit_margins
from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import fixed_point, integers, passes
from patchcert_cli.layers.levels import Level, Levels

TESTED = 8  # passes of the test
TOGETHER = 8192  # passes whose boxes are computed at once
WHOLE = 256  # passes whose last maps, which all of them need, are computed at once
OUTSIDE = -(1 << 30)  # of a row that is not one of the map's
WORTH = 0.7  # share of a map's positions up to which computing boxes alone pays


class Zones:
    """Where masks are felt, map by map, for one network, one set of masks and images of one size.

    Attributes:
        felt: for the pixels and then for each level bool [M, H, W], Z of each mask.
        boxes: for each level int64 [M, M, 4], top, left, height and width of the smallest box around two masks' common part.
        parted: how many levels are computed in boxes; the others as a whole.
        order: int64 [M, M], a number for the sizes of two masks' boxes, of the last levels first.
    """

    def __init__(self, network: Levels, masks: Tensor) -> None:
        self._levels, self._windows = network.each, dict[tuple[int, int, int], Window]()
        self.felt, self.boxes, self.parted = [masks], [], 0
        for level in network.each:
            self.felt.append(spread(self.felt[-1], level))
            self.boxes.append(common(self.felt[-1]))
        for felt, boxes in zip(self.felt[1:], self.boxes, strict=True):
            positions = felt.shape[1] * felt.shape[2]
            if float((boxes[..., 2] * boxes[..., 3]).double().mean()) > WORTH * positions:
                break
            self.parted += 1
        self.order = torch.zeros(len(masks), len(masks), dtype=torch.int64)
        for boxes in self.boxes[: self.parted]:
            sizes = boxes[..., 2] * (1 + boxes[..., 3].max()) + boxes[..., 3]
            both = sizes * (self.order.max() + 1) + self.order
            self.order = torch.unique(both, return_inverse=True)[1]

    def window(self, number: int, height: int, width: int) -> Window:
        """What the boxes of this size in the map of a level see, for all pairs of masks that have such a box."""
        key = (number, height, width)
        if key not in self._windows:
            boxes = self.boxes[number]
            first, second = ((boxes[..., 2] == height) & (boxes[..., 3] == width)).nonzero().T
            corner = boxes[first, second]
            row, column = (_span(self._levels[number], corner[:, axis], (height, width)[axis]) for axis in (0, 1))
            self._windows[key] = self._seen(number, first, second, row, column)
        return self._windows[key]

    def whole(self, number: int) -> Window:
        """What the whole map of a level sees, or for the number of levels the last map, for all pairs of masks."""
        key = (number, 0, 0)
        if key not in self._windows:
            masks, size = len(self.felt[0]), self.felt[number].shape[1:]
            first, second = torch.ones(masks, masks).nonzero().T
            row, column = (torch.arange(length).expand(len(first), -1) for length in size)
            if number < len(self._levels):
                level, zero = self._levels[number], torch.zeros_like(first)
                row, column = (_span(level, zero, level.size(length)) for length in size)
            self._windows[key] = self._seen(number, first, second, row, column)
        return self._windows[key]

    def _seen(self, number: int, first: Tensor, second: Tensor, row: Tensor, column: Tensor) -> Window:
        """Rows [n, h] and columns [n, w] of the map before a level, for pairs of masks int64 [n]."""
        felt, masks = self.felt[number], len(self.felt[0])
        area = felt.shape[1] * felt.shape[2]
        inside = ((row >= 0) & (row < felt.shape[1]))[:, :, None] & ((column >= 0) & (column < felt.shape[2]))[:, None, :]
        place = torch.where(inside, row[:, :, None] * felt.shape[2] + column[:, None, :], 0)
        i, j = first[:, None, None], second[:, None, None]
        moved = felt.flatten()[j * area + place]  # what the second mask does not move is as behind the first
        if number == 0:  # of pixels, hidden ones are one and the same row
            own, at, inner = moved | felt.flatten()[i * area + place], place, torch.zeros_like(place)
        else:
            box = self.boxes[number - 1][first, second]
            down, right = row - box[:, :1], column - box[:, 1:2]
            own = ((down >= 0) & (down < box[:, 2:3]))[:, :, None] & ((right >= 0) & (right < box[:, 3:4]))[:, None, :]
            at = torch.where(moved, j, i) * area + place
            inner = down[:, :, None] * box[:, 3, None, None] + right[:, None, :]
        own = own & inside
        slot = torch.full((masks, masks), -1, dtype=torch.int64)
        slot[first, second] = torch.arange(len(first))
        offset = torch.where(inside, torch.where(own, inner, at), OUTSIDE)
        return Window(slot, offset.flatten(1).int(), own.flatten(1).int(), row.shape[1], column.shape[1])


@dataclass(frozen=True)
class Window:
    """Where in a table of rows each position of a part of a map is, for some pairs of masks.

    Attributes:
        slot: int64 [M, M], which of the n pairs two masks are.
        offset: int32 [n, h w], counted from the image's rows or from the pass's own; :data:`OUTSIDE` around the map.
        own: int32 [n, h w], 1 for rows of the pass's own box.
        height: h.
        width: w.
    """

    slot: Tensor
    offset: Tensor
    own: Tensor
    height: int
    width: int


def spread(felt: Tensor, level: Level) -> Tensor:
    """Which positions of the map that a level makes see one of ``felt``, bool [M, H, W] -> [M, H', W']."""
    size = [level.size(length) for length in felt.shape[1:]]
    spans = [level.span(0, length) for length in size]
    around = [(-spans[axis][0], sum(spans[axis]) - felt.shape[1 + axis]) for axis in (0, 1)]
    given = F.pad(felt[:, None].float(), (*around[1], *around[0]))
    return F.max_pool2d(given, level.kernel + level.step - 1, stride=level.step)[:, 0] > 0


def common(felt: Tensor) -> Tensor:
    """The smallest box around the positions that two masks share, int64 [M, M, 4]; of height and width 0 if there is none."""
    both = felt[:, None] & felt[None]  # [M, M, H, W]
    sides = []
    for axis in (3, 2):
        line = both.any(dim=axis)  # rows, then columns
        first, last = line.int().argmax(dim=2), line.shape[2] - line.flip(2).int().argmax(dim=2)
        sides.append((first, (last - first) * line.any(dim=2)))
    return torch.stack([sides[0][0], sides[1][0], sides[0][1], sides[1][1]], dim=2)


class Maps:
    """The values of one map behind masks, as rows: what surrounds it, for each image those behind single masks, then boxes.

    Attributes:
        rows: uint8 [n, C].
        each: rows of an image.
        own: the first row of boxes.
    """

    def __init__(self, images: int, each: int, around: Tensor, own: int) -> None:
        """Of ``images`` with ``each`` rows, surrounded by ``around`` [C], with room for ``own`` rows of boxes."""
        self.each, self.own = each, 1 + images * each
        self.rows = torch.empty(self.own + own, len(around), dtype=torch.uint8)
        self.rows[0] = around
        self.begin = self.own

    def take(self, maps: Tensor, at: int) -> None:
        """Keep whole maps [n, C, H, W] behind single masks; ``at`` such maps lie before them."""
        flat = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
        begin = 1 + at * maps.shape[2] * maps.shape[3]
        self.rows[begin : begin + len(flat)] = flat

    def part(self, maps: Tensor) -> Tensor:
        """Keep the boxes [n, C, h, w] of some passes; returns where each begins, int64 [n]."""
        n, channels, height, width = maps.shape
        flat, begin = maps.permute(0, 2, 3, 1).reshape(-1, channels), self.begin
        if begin + len(flat) > len(self.rows):
            self.rows = torch.cat([self.rows, self.rows.new_empty(len(self.rows) + len(flat), channels)])
        self.rows[begin : begin + len(flat)] = flat
        self.begin += len(flat)
        return begin + torch.arange(n) * height * width

    def read(self, window: Window, image: Tensor, first: Tensor, second: Tensor, start: Tensor) -> Tensor:
        """Parts of a map [n, C, h, w], channels last: which image, behind which two masks, where its own rows begin, all [n]."""
        pair, base = window.slot[first, second], (1 + image * self.each)[:, None]
        index = window.own.index_select(0, pair).mul_((start[:, None] - base).int())
        index = index.add_(window.offset.index_select(0, pair)).add_(base.int()).clamp_(min=0)
        found = self.rows.index_select(0, index.flatten())
        return found.reshape(len(image), window.height, window.width, -1).permute(0, 3, 1, 2)


class Passes:
    """Some images behind pairs of masks; their maps behind single masks are computed first."""

    def __init__(self, network: Levels, zones: Zones, steps: Tensor, fill: Tensor) -> None:
        """Look at ``steps``, whole numbers [B, C, H, W], behind masks of colour ``fill``, whole numbers [C, 1, 1]."""
        self.network, self.zones, masks = network, zones, len(zones.felt[0])
        image, mask = torch.ones(len(steps), masks).nonzero().T
        around = [level.before for level in network.each] + [torch.zeros(network.head.weight.shape[1], dtype=torch.uint8)]
        self.maps = [Maps(len(steps), steps.shape[2] * steps.shape[3], around[0], 1)]
        self.maps[0].take(network.pixels(steps), 0)
        self.hidden = self.maps[0].part(network.pixels(fill[None], torch.ones(1, 1, 1, dtype=torch.bool)))
        for felt, one in zip(zones.felt[1 : zones.parted + 1], around[1:], strict=False):
            self.maps.append(Maps(len(steps), masks * felt.shape[1] * felt.shape[2], one, 0))
        features = [torch.zeros(0, network.head.weight.shape[1], dtype=torch.int64)]
        for some in torch.split(torch.arange(len(image)), WHOLE):
            told = image[some], mask[some], mask[some]
            q = network.each[0](self.maps[0].read(zones.whole(0), *told, self.hidden.expand(len(some))))
            for number, level in enumerate(network.each[: zones.parted]):
                q = level.everything(q) if number else q
                self.maps[number + 1].take(q, int(some[0]))
            features.append(network.features(q, zones.parted))
        self.single = torch.cat(features).reshape(len(steps), masks, -1)

    def features(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The largest values over the last map of n passes, int64 [n, C]: which image, behind which two masks, int64 [n]."""
        made = self.single[image, first].clone()
        pairs = (first != second).nonzero()[:, 0]
        pairs = pairs[self.zones.order[first[pairs], second[pairs]].argsort()]  # boxes of one size come together
        for some in torch.split(pairs, TOGETHER) if len(pairs) else ():
            made[some] = self._together(image[some], first[some], second[some])
        return made

    def _together(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        levels, last = self.network.each, self.zones.parted
        start = self.hidden.expand(len(image))
        for number in range(last):
            start = self._boxes(number, start, image, first, second)
        made, window = [], self.zones.whole(last)
        for some in torch.split(torch.arange(len(image)), WHOLE):
            q = self.maps[last].read(window, image[some], first[some], second[some], start[some])
            made.append(self.network.features(levels[last](q), last + 1) if last < len(levels) else q.amax(dim=(2, 3)).long())
        for maps in self.maps[1:]:
            maps.begin = maps.own
        return torch.cat(made)

    def _boxes(self, number: int, start: Tensor, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Compute the common part of a level's map for each pass, whose boxes in the map before begin at ``start`` [n].

        Returns: where it begins in the table, int64 [n].
        """
        level, begin = self.network.each[number], torch.zeros(len(image), dtype=torch.int64)
        sizes = self.zones.boxes[number][first, second][:, 2:]
        for height, width in torch.unique(sizes, dim=0).tolist():
            if not height:
                continue
            at = (sizes == torch.tensor([height, width])).all(dim=1).nonzero()[:, 0]
            padded = torch.cat([at, at[:1].expand(_more(len(at)))])  # few sizes of batches, for which kernels are kept
            told = image[padded], first[padded], second[padded], start[padded]
            q = self.maps[number].read(self.zones.window(number, height, width), *told)
            begin[at] = self.maps[number + 1].part(level(q)[: len(at)])
        return begin


def _span(level: Level, first: Tensor, count: int) -> Tensor:
    """The positions that ``count`` positions from ``first`` [n] on see, int64 [n, m]."""
    begin, length = level.span(0, count)
    return first[:, None] * level.step + begin + torch.arange(length)


def _more(count: int) -> int:
    """How many passes to add so that there are few different counts: four in each doubling."""
    step = max(1, 1 << max(count.bit_length() - 3, 0))
    return -count % step


def largest(logits: Tensor) -> Tensor:
    """The largest logit of each pass, [n, K] -> [n]: the unit of logit margins; no decision depends on it."""
    return logits.abs().amax(dim=1).clamp(min=1e-300)


def told(logits: Tensor) -> Answers:
    """Answers of exact logits [n, K]. A logit margin is a share of the pass's largest logit; its sign is exact."""
    ranked = logits.sort(dim=1, descending=True, stable=True).indices  # of equals the lowest class first
    return Answers(ranked[:, 0], ranked[:, 1], logit_margins(logits, largest(logits)))


class ExactViews:
    """A network of whole numbers and masks.

    Attributes:
        arithmetic: labels are exact.
        tolerance: what a logit margin must exceed to be sure; 0, since none is rounded.
    """

    arithmetic = Arithmetic.EXACT
    tolerance = 0.0

    def __init__(self, network: Levels, masks: Tensor, fill: Tensor) -> None:
        """Look through masks, bool [M, H, W], of colour ``fill``, [C, 1, 1] in [0, 1], rounded to whole steps of 1/255."""
        self.network, self.masks, self.fill = network, masks, fixed_point.to_steps(fill)
        self._zones: list[Zones] = []

    def zones(self) -> list[Zones]:
        """Where the masks are felt, and for a mirrored network where the mirrored masks are."""
        if not self._zones:
            views = [self.masks, self.masks.flip(2)] if self.network.mirrored else [self.masks]
            self._zones = [Zones(self.network, masks.cpu()) for masks in views]
        return self._zones

    def asking(self, x: Tensor) -> Asked:
        """What to ask about images [B, C, H, W] in [0, 1]."""
        return Asked(self, x)

    def ask(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor) -> Answers:
        """Labels of n passes of images [B, C, H, W], each computed on its own: for a few passes of many images."""
        return told(self.each(x, image, first, second))

    def each(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Logits of n passes, float64 [n, K] on the CPU, each computed on its own, without what masks share."""
        steps, parts = fixed_point.to_steps(x), [torch.zeros(0, self.network.head.weight.shape[0], dtype=torch.float64)]
        device = self.masks.device
        for some in torch.split(torch.arange(len(image)), TOGETHER) if len(image) else ():
            hidden = self.masks[first[some].to(device)] | self.masks[second[some].to(device)]
            parts.append(self.logits(steps[image[some].to(device)], hidden).cpu())
        return torch.cat(parts)

    def look(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor, clear: Clear) -> Seen:
        """Logits of n passes of images [B, C, H, W], int64 [n] each, on the CPU; none is in doubt, so ``clear`` is not asked."""
        logits = self.asking(x).logits(image, first, second)
        return Seen(logits, largest(logits), torch.ones(len(logits), dtype=torch.bool))

    def bytes_each(self) -> int:
        """What the maps behind single masks hold for one image."""
        return sum(
            len(zones.felt[0]) * math.prod(felt.shape[1:]) * level.whole.weight.shape[0]
            for zones in self.zones()
            for felt, level in zip(zones.felt[1 : zones.parted + 1], self.network.each, strict=False)
        )

    @torch.no_grad()
    def test(self) -> None:
        """Compare what is computed in parts with the whole network in float64, on some images behind some pairs.

        Raises:
            IntegrityError: a number differs.
        """
        generator = torch.Generator().manual_seed(0)
        channels, (height, width) = len(self.fill), self.masks.shape[1:]
        x = torch.rand(2, channels, height, width, generator=generator).to(self.masks.device)
        image, first, second = (torch.randint(most, (TESTED,), generator=generator) for most in (2, *[len(self.masks)] * 2))
        found = self.asking(x).logits(image, first, second)
        with integers.only("float64"):
            right = self.each(x, image, first, second)
        if not torch.equal(found, right):
            raise IntegrityError("the network's whole numbers differ from those of float64.", hint="Install another torch.")

    def logits(self, steps: Tensor, hidden: Tensor) -> Tensor:
        """float64 [n, K] of whole numbers [n, C, H, W] behind bool [n, H, W], from the whole network."""
        return cast(Tensor, self.network(torch.where(hidden[:, None], self.fill.to(steps), steps), hidden))


class Asked:
    """Some images, about which passes are asked."""

    def __init__(self, views: ExactViews, x: Tensor) -> None:
        self._views, self._x = views, x
        self._passes: list[Passes] = []

    def __call__(self, image: Tensor, first: Tensor, second: Tensor) -> Answers:
        """Labels of n passes: which of the images behind which two masks, int64 [n]; on the CPU."""
        return told(self.logits(image, first, second))

    @torch.no_grad()
    def logits(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """float64 [n, K] on the CPU, without rounding error."""
        views, network = self._views, self._views.network
        passes.made(len(image))
        if self._x.device.type != "cpu" or not views.zones()[0].parted:
            return views.each(self._x, image, first, second)
        if not self._passes:
            steps = fixed_point.to_steps(self._x)
            sides = [steps, steps.flip(3)]
            self._passes = [Passes(network, zones, steps, views.fill) for zones, steps in zip(views.zones(), sides, strict=False)]
        features = [one.features(image, first, second) for one in self._passes]
        return network.logits(features[0] + features[1] if network.mirrored else features[0])
