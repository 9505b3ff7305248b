"""Predictions of integer networks for pairs of masks: exact, and computed once where two masks share them.

**Theorem.** Level by level (:mod:`patchcert_cli.layers.levels`), let Z(i) be the positions of a map that see a pixel that mask i
hides. Under masks i and j a position outside Z(j) has the value that it has under i alone, and a position outside Z(i) the
value that it has under j alone.
Proof. The image under i and j differs from the image under i alone only in pixels that j hides. A position outside Z(j)
sees none of them, so it sees the same whole numbers, and its value is an exact function of what it sees. For Z(i) exchange i
and j. QED.

So of a map under two masks only the common part of Z(i) and Z(j) is computed, inside the smallest box around it; all else is
taken from the maps under single masks. What is computed twice has the same bits, and a test compares them with the whole
network's.

Shapes: B images, C channels, H x W pixels, K classes, M masks, n passes, P positions of a map, h x w positions of a box.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certifiers.masks.mask_influence import MaskInfluence, ReadIndex
from patchcert_cli.certifiers.masks.masked_predictions import (
    Clear,
    MaskedLogits,
    MaskedPredictions,
    MaskedPredictor,
    logit_margins,
)
from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import fixed_point, integers, passes
from patchcert_cli.layers.levels import Levels

TESTED = 8  # passes of the test
TOGETHER = 8192  # passes whose boxes are computed at once
WHOLE = 256  # passes whose last maps, which all of them need, are computed at once


class Maps:
    """The values of one map under masks, as rows: what surrounds it, for each image those under single masks, then boxes.

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
        """Keep whole maps [n, C, H, W] under single masks; ``at`` such maps lie before them."""
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

    def read(self, window: ReadIndex, image: Tensor, first: Tensor, second: Tensor, start: Tensor) -> Tensor:
        """Parts of a map [n, C, h, w], channels last: which image, under which two masks, where its own rows begin, all [n]."""
        pair, base = window.slot[first, second], (1 + image * self.each)[:, None]
        index = window.own.index_select(0, pair).mul_((start[:, None] - base).int())
        index = index.add_(window.offset.index_select(0, pair)).add_(base.int()).clamp_(min=0)
        found = self.rows.index_select(0, index.flatten())
        return found.reshape(len(image), window.height, window.width, -1).permute(0, 3, 1, 2)


class Passes:
    """Some images under pairs of masks; their maps under single masks are computed first."""

    def __init__(self, network: Levels, influence: MaskInfluence, steps: Tensor, fill: Tensor) -> None:
        """Look at ``steps``, whole numbers [B, C, H, W], under masks of colour ``fill``, whole numbers [C, 1, 1]."""
        self.network, self.influence, masks = network, influence, len(influence.affected[0])
        image, mask = torch.ones(len(steps), masks).nonzero().T
        around = [level.before for level in network.each] + [torch.zeros(network.head.weight.shape[1], dtype=torch.uint8)]
        self.maps = [Maps(len(steps), steps.shape[2] * steps.shape[3], around[0], 1)]
        self.maps[0].take(network.pixels(steps), 0)
        self.occluded = self.maps[0].part(network.pixels(fill[None], torch.ones(1, 1, 1, dtype=torch.bool)))
        for affected, one in zip(influence.affected[1 : influence.partial_levels + 1], around[1:], strict=False):
            self.maps.append(Maps(len(steps), masks * affected.shape[1] * affected.shape[2], one, 0))
        features = [torch.zeros(0, network.head.weight.shape[1], dtype=torch.int64)]
        for some in torch.split(torch.arange(len(image)), WHOLE):
            told = image[some], mask[some], mask[some]
            q = network.each[0](self.maps[0].read(influence.map_index(0), *told, self.occluded.expand(len(some))))
            for number, level in enumerate(network.each[: influence.partial_levels]):
                q = level.everything(q) if number else q
                self.maps[number + 1].take(q, int(some[0]))
            features.append(network.features(q, influence.partial_levels))
        self.single = torch.cat(features).reshape(len(steps), masks, -1)

    def features(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """The largest values over the last map of n passes, int64 [n, C]: which image, under which two masks, int64 [n]."""
        made = self.single[image, first].clone()
        pairs = (first != second).nonzero()[:, 0]
        pairs = pairs[self.influence.order[first[pairs], second[pairs]].argsort()]  # boxes of one size come together
        for some in torch.split(pairs, TOGETHER) if len(pairs) else ():
            made[some] = self._together(image[some], first[some], second[some])
        return made

    def _together(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        levels, last = self.network.each, self.influence.partial_levels
        start = self.occluded.expand(len(image))
        for number in range(last):
            start = self._boxes(number, start, image, first, second)
        made, window = [], self.influence.map_index(last)
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
        sizes = self.influence.boxes[number][first, second][:, 2:]
        for height, width in torch.unique(sizes, dim=0).tolist():
            if not height:
                continue
            at = (sizes == torch.tensor([height, width])).all(dim=1).nonzero()[:, 0]
            padded = torch.cat([at, at[:1].expand(_more(len(at)))])  # few sizes of batches, for which kernels are kept
            told = image[padded], first[padded], second[padded], start[padded]
            q = self.maps[number].read(self.influence.box_index(number, height, width), *told)
            begin[at] = self.maps[number + 1].part(level(q)[: len(at)])
        return begin


def _more(count: int) -> int:
    """How many passes to add so that there are few different counts: four in each doubling."""
    step = max(1, 1 << max(count.bit_length() - 3, 0))
    return -count % step


def largest(logits: Tensor) -> Tensor:
    """The largest logit of each pass, [n, K] -> [n]: the unit of logit margins; no decision depends on it."""
    return logits.abs().amax(dim=1).clamp(min=1e-300)


def told(logits: Tensor) -> MaskedPredictions:
    """MaskedPredictions of exact logits [n, K]. A logit margin is a share of the pass's largest logit; its sign is exact."""
    ranked = logits.sort(dim=1, descending=True, stable=True).indices  # of equals the lowest class first
    return MaskedPredictions(ranked[:, 0], ranked[:, 1], logit_margins(logits, largest(logits)))


class ExactMaskedPredictor:
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
        self._zones: list[MaskInfluence] = []

    def influences(self) -> list[MaskInfluence]:
        """Where the masks are affected, and for a mirrored network where the mirrored masks are."""
        if not self._zones:
            views = [self.masks, self.masks.flip(2)] if self.network.mirrored else [self.masks]
            self._zones = [MaskInfluence(self.network, masks.cpu()) for masks in views]
        return self._zones

    def for_images(self, x: Tensor) -> Asked:
        """What to ask about images [B, C, H, W] in [0, 1]."""
        return Asked(self, x)

    def ask(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor) -> MaskedPredictions:
        """Labels of n passes of images [B, C, H, W], each computed on its own: for a few passes of many images."""
        return told(self.each(x, image, first, second))

    def each(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Logits of n passes, float64 [n, K] on the CPU, each computed on its own, without what masks share."""
        steps, parts = fixed_point.to_steps(x), [torch.zeros(0, self.network.head.weight.shape[0], dtype=torch.float64)]
        device = self.masks.device
        for some in torch.split(torch.arange(len(image)), TOGETHER) if len(image) else ():
            occluded = self.masks[first[some].to(device)] | self.masks[second[some].to(device)]
            parts.append(self.logits(steps[image[some].to(device)], occluded).cpu())
        return torch.cat(parts)

    def masked_logits(self, x: Tensor, image: Tensor, first: Tensor, second: Tensor, clear: Clear) -> MaskedLogits:
        """Logits of n passes of images [B, C, H, W], int64 [n] each, on the CPU; none is in doubt, so ``clear`` is not asked."""
        logits = self.for_images(x).logits(image, first, second)
        return MaskedLogits(logits, largest(logits), torch.ones(len(logits), dtype=torch.bool))

    def bytes_each(self) -> int:
        """What the maps under single masks hold for one image."""
        return sum(
            len(influence.affected[0]) * math.prod(affected.shape[1:]) * level.whole.weight.shape[0]
            for influence in self.influences()
            for affected, level in zip(influence.affected[1 : influence.partial_levels + 1], self.network.each, strict=False)
        )

    @torch.no_grad()
    def test(self) -> None:
        """Compare what is computed in parts with the whole network in float64, on some images under some pairs.

        Raises:
            IntegrityError: a number differs.
        """
        generator = torch.Generator().manual_seed(0)
        channels, (height, width) = len(self.fill), self.masks.shape[1:]
        x = torch.rand(2, channels, height, width, generator=generator).to(self.masks.device)
        image, first, second = (torch.randint(most, (TESTED,), generator=generator) for most in (2, *[len(self.masks)] * 2))
        found = self.for_images(x).logits(image, first, second)
        with integers.only("float64"):
            right = self.each(x, image, first, second)
        if not torch.equal(found, right):
            raise IntegrityError("the network's whole numbers differ from those of float64.", hint="Install another torch.")

    def logits(self, steps: Tensor, occluded: Tensor) -> Tensor:
        """float64 [n, K] of whole numbers [n, C, H, W] with pixels bool [n, H, W] hidden, from the whole network."""
        return cast(Tensor, self.network(torch.where(occluded[:, None], self.fill.to(steps), steps), occluded))


class Asked:
    """Some images, of which passes are requested."""

    def __init__(self, views: ExactMaskedPredictor, x: Tensor) -> None:
        self._views, self._x = views, x
        self._passes: list[Passes] = []

    def __call__(self, image: Tensor, first: Tensor, second: Tensor) -> MaskedPredictions:
        """Labels of n passes: which of the images under which two masks, int64 [n]; on the CPU."""
        return told(self.logits(image, first, second))

    @torch.no_grad()
    def logits(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """float64 [n, K] on the CPU, without rounding error."""
        views, network = self._views, self._views.network
        passes.made(len(image))
        if self._x.device.type != "cpu" or not views.influences()[0].partial_levels:
            return views.each(self._x, image, first, second)
        if not self._passes:
            steps = fixed_point.to_steps(self._x)
            sides = [steps, steps.flip(3)]
            self._passes = [
                Passes(network, influence, steps, views.fill) for influence, steps in zip(views.influences(), sides, strict=False)
            ]
        features = [one.features(image, first, second) for one in self._passes]
        return network.logits(features[0] + features[1] if network.mirrored else features[0])


Predictor = MaskedPredictor | ExactMaskedPredictor
