"""Mask sets: rectangles such that every location of a patch is hidden completely by one of them.

**Theorem.** Along an axis of n pixels let a patch of side p start anywhere from 0 to n - p. Let masks be m >= p + s - 1 pixels
long, or n if that is less, and start at 0, s, 2s, ... as far as n - m, and at n - m. Then every patch lies inside a mask.

*Proof.* A mask that starts at t holds the patch at a iff a + p - m <= t <= a. Let t >= 0 be the largest multiple of s up to a;
then t >= a - s + 1 >= a + p - m. If t <= n - m, a mask starts there. Otherwise n - m < t <= a, and a <= n - p gives
n - m >= a + p - m: the last mask holds the patch. A rectangle is inside a product of two intervals iff each side is inside its
own. QED. With s = ceil((n - p + 1) / k) there are at most k masks (Xiang, Mahloujifar & Mittal, PatchCleanser, USENIX Security
2022). A mask as long as its axis holds every patch along that axis, so strips over the whole height hold patches of any height.
Several patches at once lie under the union of as many masks.

:meth:`MaskSet.cover` relies on none of this: it counts hidden pixels.

Shapes: H x W pixels, M masks, A locations of a threat, U different sets of masks that hide a location, or as many of them as the
budget allows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from typing import Annotated, Any

import torch
from torch import Tensor

from patchcert_cli import schema
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.layers.boxes import box_mask, box_sums
from patchcert_cli.schema import Count, Must, Parsed
from patchcert_cli.threats import Threat, parse_threat

PER_AXIS = 6  # masks along each axis, as published
MAX_MASKS = 4096  # masks of a set
MAX_TABLE_ENTRIES = 1 << 28  # of the table of which masks hide which sets of locations
SHAPES = ("square", "column", "row")  # of masks that hide equally many pixels, the first is taken
ANY = "any"  # the shape whose masks hide the fewest pixels
ROWS_COMPARED = 1024  # rows of a coverage compared at a time

Box = tuple[int, int, int, int]
Shape = Annotated[str, Must(SHAPES.__contains__, " or ".join(SHAPES))]
ShapeOrAny = Annotated[str, Must((*SHAPES, ANY).__contains__, " or ".join((*SHAPES, ANY)))]


def axis_masks(length: int, side: int, *, stride: int, wider: int = 0) -> tuple[int, list[int]]:
    """The masks along an axis of ``length`` pixels for a patch of ``side``: their length, and where they start."""
    size = min(side + stride - 1 + wider, length)
    last = length - size
    return size, sorted({*range(0, last + 1, stride), last})


def _exclusive(per_axis: int, stride: int, passes: int) -> Iterable[str]:
    if sum(value > 0 for value in (per_axis, stride, passes)) > 1:
        yield "per_axis, stride and passes exclude each other"


def _budget_of_any(shape: str, passes: int) -> Iterable[str]:
    if shape == ANY and not passes:
        yield "shape any is chosen for a budget, so it needs passes"


def _covers_something(covers: tuple[Threat, ...]) -> Iterable[str]:
    if not covers:
        yield "covers names no threat"


@dataclass(frozen=True)
class MaskSpec:
    """Which masks a model has: what they cover, and one of three ways to say how many they are.

    Attributes:
        covers: the threats that they cover, one at a time; text such as ``patch:5x5`` is parsed.
        per_axis: at most this many along each axis; 6 if none of the three is given.
        stride: pixels from each to the next; the smaller, the more and the smaller they are.
        passes: the largest mask set whose pairs fit into this many forward passes.
        wider: pixels by which each side exceeds what covers the threat, so that masks overlap more.
        shape: ``square`` for rectangles of a length of their own along both axes, ``column`` for strips over the whole height,
            ``row`` for strips over the whole width; a strip has one axis, so pairs of strips are few. ``any``, together with
            ``passes``: the one whose masks hide the fewest pixels (:meth:`chosen`).
    """

    covers: tuple[Annotated[Threat, Parsed(parse_threat)], ...]
    per_axis: Count = 0
    stride: Count = 0
    passes: Count = 0
    wider: Count = 0
    shape: ShapeOrAny = "square"
    rules = (_exclusive, _budget_of_any, _covers_something)

    def __post_init__(self) -> None:
        object.__setattr__(self, "covers", tuple(parse_threat(one) if isinstance(one, str) else one for one in self.covers))

    @classmethod
    def read(cls, values: Any) -> MaskSpec:
        """From the ``masks`` entry of a configuration.

        Raises:
            IntegrityError: the settings are invalid.
        """
        try:
            return schema.read(cls, values, "masks")
        except schema.Invalid as problem:
            raise IntegrityError(f"invalid mask settings: {problem}.", hint="Correct masks in config.json.") from problem

    def to_dict(self) -> dict[str, Any]:
        """Inverse of :meth:`read`: what differs from the defaults."""
        numbers = {name: getattr(self, name) for name in ("per_axis", "stride", "passes", "wider")}
        shape = {} if self.shape == "square" else {"shape": self.shape}
        return {"covers": list(map(str, self.covers))} | {name: value for name, value in numbers.items() if value} | shape

    def masks(self, height: int, width: int) -> MaskSet:
        """The masks for images of this size.

        Raises:
            UsageError: a patch does not fit, or the budget of passes or memory is too small for any masks that leave something.
        """
        if not self.covers:
            raise UsageError("masks that cover nothing.", hint="Give covers a threat or more: ('patch:5x5',).")
        if self.shape == ANY:
            return self.chosen(height, width)[0].masks(height, width)
        if not self.passes:
            unions = self._unions(height, width, per_axis=self.per_axis or PER_AXIS, stride=self.stride)
            return self._leaving_something(self._set(height, width, unions))
        best = self._set(height, width, self._unions(height, width, per_axis=2))
        if best.passes > self.passes:
            raise UsageError(
                f"passes {self.passes} is too few for masks against {', '.join(map(str, self.covers))}.",
                hint=f"Allow {best.passes} or more.",
            )
        for per_axis in range(3, max(height, width) + 1):
            unions = self._unions(height, width, per_axis=per_axis)
            if unions is None or pairs(len(unions)) > self.passes:
                break
            best = MaskSet(height, width, unions)
        return self._leaving_something(best)

    def chosen(self, height: int, width: int) -> tuple[MaskSpec, str]:
        """These masks with a shape other than ``any``, and why it was taken; without text if it was given.

        Of the shapes whose pairs fit into the passes it is the one whose largest mask hides the fewest pixels. The masks of every
        shape cover the threats, so the choice concerns accuracy alone.

        Raises:
            UsageError: no shape fits the budget; the message is that of the first one.
        """
        if self.shape != ANY:
            return self, ""
        fitting, problems = [], []
        for shape in SHAPES:
            spec = replace(self, shape=shape)
            try:
                fitting.append((spec, spec.masks(height, width)))
            except UsageError as problem:
                problems.append(problem)
        if not fitting:
            raise problems[0]
        fitting.sort(key=lambda one: one[1].most_hidden)
        each = ", ".join(f"{spec.shape} {found.most_hidden} ({len(found)} masks)" for spec, found in fitting)
        return fitting[0][0], f"pixels that a mask hides with at most {self.passes} passes: {each}; the fewest are taken"

    def _leaving_something(self, masks: MaskSet) -> MaskSet:
        """The masks, of which none hides the whole image: its masked prediction would be the same for every image."""
        if masks.most_hidden == masks.height * masks.width:
            raise _nothing_left(", ".join(map(str, self.covers)), masks.height, masks.width)
        return masks

    def _set(self, height: int, width: int, unions: tuple[tuple[Box, ...], ...] | None) -> MaskSet:
        if unions is None:
            raise UsageError(
                f"more than {MAX_MASKS} masks are needed against {', '.join(map(str, self.covers))}.",
                hint="Use fewer per axis, for example 3.",
            )
        return MaskSet(height, width, unions)

    def _unions(self, height: int, width: int, *, per_axis: int, stride: int = 0) -> tuple[tuple[Box, ...], ...] | None:
        """The boxes of each mask; None if there are more than :data:`MAX_MASKS`, which is known before they are listed."""
        found: dict[tuple[Box, ...], None] = {}
        for threat in self.covers:
            sides, budget = _sides(threat, height, width)
            axes, whole = [], {"column": 0, "row": 1}.get(self.shape)  # the axis along which strips are as long as the image
            for axis, (length, side) in enumerate(zip((height, width), sides, strict=True)):
                if axis == whole:
                    axes.append([(0, length)])
                    continue
                size, starts = axis_masks(length, side, stride=stride or -(-(length - side + 1) // per_axis), wider=self.wider)
                axes.append([(start, size) for start in starts])
            (_, rows), (_, columns) = axes[0][0], axes[1][0]
            if (rows, columns) == (height, width):
                raise _nothing_left(str(threat), height, width)
            count = len(axes[0]) * len(axes[1])
            together = min(budget, count)
            if len(found) + math.comb(count, together) > MAX_MASKS:
                return None
            boxes = [(top, left, rows, columns) for (top, _), (left, _) in product(*axes)]
            found |= dict.fromkeys(combinations(boxes, together))
        return tuple(found)


def pairs(masks: int) -> int:
    """The number of pairs of masks, a mask with itself included: forward passes for one image."""
    return masks * (masks + 1) // 2


@dataclass(frozen=True)
class MaskCoverage:
    """Which masks hide what an attacker may touch.

    Attributes:
        by: bool [U, M], the masks that hide everything; a row for each set of masks that has no other inside it, since a
            condition of the kind "some mask of the set ..." that holds for a set holds for all larger ones.
        location: int64 [U], a location of such an attack, the first one.
    """

    by: Tensor
    location: Tensor


@dataclass(frozen=True)
class MaskSet:
    """Masks for images of ``height`` x ``width``; each is the union of some boxes (top, left, height, width)."""

    height: int
    width: int
    boxes: tuple[tuple[Box, ...], ...]

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def passes(self) -> int:
        """Pairs of masks, a mask with itself included: what evaluating all of them costs an image."""
        return pairs(len(self))

    @property
    def sizes(self) -> str:
        """How many masks of which size, as text: ``36 of 11x11``, or ``630 of two of 11x11``."""
        shapes = [" and ".join(dict.fromkeys(f"{rows}x{columns}" for _, _, rows, columns in union)) for union in self.boxes]
        found = Counter(zip(map(len, self.boxes), shapes, strict=True))
        return ", ".join(f"{many} of {'' if each == 1 else f'{each} of '}{shape}" for (each, shape), many in found.items())

    @property
    def most_hidden(self) -> int:
        """The pixels that the largest mask hides."""
        return int(self.occluded.flatten(1).sum(dim=1).max())

    @property
    def pair_hides_all(self) -> bool:
        """Whether some two masks together hide the whole image."""
        if 2 * self.most_hidden < self.height * self.width:
            return False
        left = (~self.occluded).flatten(1).float()
        return bool((left @ left.T == 0).any())  # sums of products of 0 and 1, exact in float32 up to 2^24 pixels

    @cached_property
    def occluded(self) -> Tensor:
        """bool [M, H, W], what each mask hides; shared, not to be written to."""
        each = [box_mask(torch.tensor(union), self.height, self.width).any(dim=0) for union in self.boxes]
        return torch.stack(each)

    def hides(self, threat: Threat) -> Tensor:
        """Whether a mask hides all of a location of the threat: bool [A, M]."""
        (rows, columns), _ = _sides(threat, self.height, self.width)
        inside = box_sums(self.occluded.long(), threat.locations(self.height, self.width))  # [M, A]
        return (inside == rows * columns).T

    def cover(self, threat: Threat) -> MaskCoverage:
        """Which masks hide what the threat may touch.

        Raises:
            UsageError: the threat does not fit the image.
            UnsupportedThreat: no mask hides something that the threat may touch.
        """
        hides = self.hides(threat)
        one = found = _smallest(MaskCoverage(hides, torch.arange(len(hides))))
        for _ in range(threat.budget - 1):
            if not bool(found.by.any(dim=1).all()):
                break
            if len(found.by) * len(one.by) * len(self) > MAX_TABLE_ENTRIES:
                raise UnsupportedThreat(f"{threat} is too many changes at once for masks.", hint="Two patches are possible.")
            first, second = torch.cartesian_prod(torch.arange(len(found.by)), torch.arange(len(one.by))).T
            found = _smallest(MaskCoverage(found.by[first] & one.by[second], found.location[first]))
        if not bool(found.by.any(dim=1).all()):
            raise UnsupportedThreat(
                f"the {len(self)} masks of this model do not cover {threat}.",
                hint=f"Choose masks that do, with --masks, or with masks.covers in its config.json, for example ['{threat}'].",
            )
        return found


def _nothing_left(covers: str, height: int, width: int) -> UsageError:
    hint = "Cover a smaller patch or fewer pixels, or allow more masks: more along each axis, or more passes."
    return UsageError(f"masks against {covers} hide all of a {height}x{width} image.", hint=hint)


def _sides(threat: Threat, height: int, width: int) -> tuple[tuple[int, int], int]:
    """Height and width of a location, and how many the attacker has."""
    threat.check(height, width)
    rows, columns = threat.locations(height, width)[0, 2:].tolist()
    return (rows, columns), threat.budget


def _smallest(cover: MaskCoverage) -> MaskCoverage:
    """The different rows of a cover that have no other inside them, each with its first location, in the order of these."""
    different, where = torch.unique(cover.by, dim=0, return_inverse=True)
    count = len(cover.by)
    first = torch.full((len(different),), count).scatter_reduce_(0, where, torch.arange(count), "amin")
    number, size = different.float(), different.sum(dim=1)
    larger = torch.zeros(len(different), dtype=torch.bool)
    for some in torch.split(torch.arange(len(different)), ROWS_COMPARED):
        common = number[some] @ number.T  # [n, N], masks that both have
        larger[some] |= ((common == size) & (size < size[some, None])).any(dim=1)
    order = first[~larger].sort().values
    return MaskCoverage(cover.by[order], cover.location[order])
