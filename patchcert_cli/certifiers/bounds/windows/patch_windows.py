"""What a patch can change after each layer of a network: the windows of all its locations.

Shapes: S starts of a patch along one axis, T sliding layers (convolution, pooling), L locations, N pairs (image, location).

**Claim.** Let the input of a sliding layer differ from the clean one only inside a window. Then its output differs only at the
outputs that see the window (:func:`patchcert_cli.certifiers.geometry.touched_range`, G4), and what these change by depends on the
change inside the window alone. So windows of windows hold all that a patch can change, and rows and columns are independent. A
larger window is as right as the smallest one, as long as the change is taken as 0 wherever it is not computed.

``first[t]`` and ``length[t]`` are the window before sliding layer t, ``first[T]`` and ``length[T]`` that after the last.
``offset[t]`` is where the first output of window t + 1 begins to look, counted from the beginning of window t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.geometry import touched_range
from patchcert_cli.threats import Patch


@dataclass(frozen=True)
class SlidingAxis:
    """One axis of a sliding layer: output i sees inputs ``i * stride - padding + j * dilation``, j < kernel; i < size."""

    kernel: int
    stride: int
    padding: int
    dilation: int
    size: int

    @property
    def extent(self) -> int:
        """From the first input that an output sees to the last, both counted."""
        return self.dilation * (self.kernel - 1) + 1

    def touched(self, start: int, side: int, *, clip: bool) -> tuple[int, int]:
        """First output that sees ``[start, start + side)``, and how many do; ``clip`` counts those of the map only."""
        if clip:
            first, last = touched_range(start, side, kernel=self.extent, stride=self.stride, padding=self.padding, size=self.size)
            return first, last - first
        first = -((self.extent - 1 - self.padding - start) // self.stride)
        return first, max(0, (start + side - 1 + self.padding) // self.stride + 1 - first)


def pair(value: object) -> tuple[int, int]:
    """A layer's option for both axes."""
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[arg-type, return-value]


def is_sliding(layer: nn.Module) -> bool:
    """Whether each output of a layer sees a window of its input."""
    return isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d | nn.AdaptiveAvgPool2d)


def slides(layer: nn.Module, before: Sequence[int], after: Sequence[int]) -> tuple[SlidingAxis, SlidingAxis] | None:
    """Rows and columns of a layer between maps of height and width ``before`` and ``after``; None if it does not slide."""
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return SlidingAxis(before[0], 1, 0, 1, 1), SlidingAxis(before[1], 1, 0, 1, 1)
    if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return None
    dilation = pair(getattr(layer, "dilation", 1))
    rows, columns = zip(pair(layer.kernel_size), pair(layer.stride), pair(layer.padding), dilation, after, strict=True)
    return SlidingAxis(*rows), SlidingAxis(*columns)


@dataclass(frozen=True)
class AxisWindows:
    """Windows along one axis, for every start of the patch.

    Attributes:
        first: int64 [T + 1, S].
        length: int64 [T + 1, S].
        offset: int64 [T, S].
    """

    first: Tensor
    length: Tensor
    offset: Tensor

    @classmethod
    def of(cls, path: Sequence[SlidingAxis], starts: int, side: int, *, clip: bool) -> AxisWindows:
        """Follow ``starts`` patches of ``side`` pixels along ``path``.

        With ``clip`` windows end at the borders of their maps and so differ in length. Without, all have the length of the
        longest and may reach over the borders, unless that is the whole map.
        """
        first, length, offset = [list(range(starts))], [[side] * starts], []
        for slide in path:
            found = [slide.touched(*window, clip=clip) for window in zip(first[-1], length[-1], strict=True)]
            begins, counts = [start for start, _ in found], [count for _, count in found]
            if not clip:
                longest = max(counts)
                counts = [min(longest, slide.size)] * starts
                begins = begins if longest < slide.size else [0] * starts
            offset.append([b * slide.stride - slide.padding - a for a, b in zip(first[-1], begins, strict=True)])
            first.append(begins)
            length.append(counts)
        shape = (len(path), starts)
        return cls(torch.tensor(first), torch.tensor(length), torch.tensor(offset, dtype=torch.int64).reshape(shape))

    @cached_property
    def classes(self) -> list[Tensor]:
        """Starts whose windows have equal lengths, those with equal offsets side by side: int64 [S'] each."""
        lengths, offsets = self.length.t().tolist(), self.offset.t().tolist()
        order = sorted(range(len(lengths)), key=lambda start: (lengths[start], offsets[start], start))
        return [torch.tensor(list(alike)) for _, alike in groupby(order, key=lambda start: lengths[start])]

    @cached_property
    def phase(self) -> Tensor:
        """Number of the offsets that each start has: int64 [S]."""
        if not len(self.offset):
            return torch.zeros_like(self.first[0])
        number: Tensor = self.offset.unique(dim=1, return_inverse=True)[1]  # type: ignore[no-untyped-call]
        return number


@dataclass(frozen=True)
class AlignedGroup:
    """Consecutive pairs whose windows lie alike under the next layer: ``offset`` along rows and columns."""

    pairs: slice
    offset: tuple[int, int]

    def margins(
        self, window: tuple[int, int], slides: tuple[SlidingAxis, SlidingAxis], size: tuple[int, int]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """What ``size`` outputs see above and below, left and right of a window; negative if less than all of it."""
        rows, columns = (
            (-offset, (count - 1) * slide.stride + slide.extent + offset - length)
            for length, offset, slide, count in zip(window, self.offset, slides, size, strict=True)
        )
        return rows, columns


# pairs; rows of the window and of the map; columns of the window and of the map
AlignedRun = tuple[slice, list[tuple[int, int]], tuple[slice, slice]]


@dataclass(frozen=True)
class WindowBatch:
    """Windows of N pairs (image, location), all of one size.

    Attributes:
        owner: int64 [N], the image.
        first: int64 [2, T + 1, N], first row and column of the windows.
        sizes: height and width of the windows, T + 1 of them.
        groups: for each sliding layer, the pairs in groups of equal offsets.
        maps: height and width of the maps, T + 1 of them.
    """

    owner: Tensor
    first: Tensor
    sizes: list[tuple[int, int]]
    groups: list[list[AlignedGroup]]
    maps: list[tuple[int, int]]

    def cells(self, t: int, grown: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Tensor:
        """Numbers of the windows' cells in all maps one after the other, int64 [N, h, w]; those outside have that of a border.

        ``grown``: how many rows and columns more to take above, below, left and right.
        """
        rows, columns = self._lines(t, grown)
        height, width = self.maps[t]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        return ((self.owner[:, None] * height + rows) * width)[:, :, None] + columns[:, None, :]

    def outside(self, t: int, grown: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Tensor:
        """Which cells of the windows are outside their maps, int64 [X], counting all cells of [N, h, w]."""
        rows, columns = self._lines(t, grown)
        height, width = self.maps[t]
        out_row, out_column = (rows < 0) | (rows >= height), (columns < 0) | (columns >= width)
        if not bool(out_row.any()) and not bool(out_column.any()):
            return self.owner[:0]
        return (out_row[:, :, None] | out_column[:, None, :]).flatten().nonzero()[:, 0]

    def some(self, pairs: slice) -> WindowBatch:
        """These pairs, whose windows lie alike."""
        return replace(self, owner=self.owner[pairs], first=self.first[:, :, pairs], groups=[])

    def numbered(self) -> WindowBatch:
        """The same windows in maps of their own, one for each pair."""
        return replace(self, owner=torch.arange(len(self.owner), device=self.owner.device))

    def aligned_runs(self) -> list[AlignedRun]:
        """Consecutive pairs whose last windows lie at one place, and the rows and columns of these inside their map."""
        (h, w), (height, width), found = self.sizes[-1], self.maps[-1], []
        for group in aligned_groups(self.first[:, -1].cpu()):
            top, left = group.offset
            rows = [(i, top + i) for i in range(max(-top, 0), min(h, height - top))]
            begin, end = max(-left, 0), min(w, width - left)
            found.append((group.pairs, rows, (slice(begin, end), slice(left + begin, left + end))))
        return found

    def _lines(self, t: int, grown: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        """Rows [N, h] and columns [N, w] of the windows."""
        (height, width), device = self.sizes[t], self.owner.device
        rows = torch.arange(-grown[0], height + grown[1], device=device)
        columns = torch.arange(-grown[2], width + grown[3], device=device)
        return self.first[0, t][:, None] + rows, self.first[1, t][:, None] + columns


class PatchWindows:
    """The windows of a patch at every location of an image, after every sliding layer of ``path``."""

    def __init__(
        self, path: Sequence[tuple[SlidingAxis, SlidingAxis]], shape: tuple[int, int], patch: Patch, *, clip: bool
    ) -> None:
        sides = (patch.height, patch.width)
        self.axes = [
            AxisWindows.of([both[axis] for both in path], shape[axis] - sides[axis] + 1, sides[axis], clip=clip)
            for axis in (0, 1)
        ]
        self.maps = [shape, *((rows.size, columns.size) for rows, columns in path)]
        self.columns = shape[1] - patch.width + 1

    def classes(self) -> list[Tensor]:
        """Locations whose windows have equal sizes, those that lie alike side by side: int64 [L] each."""
        found = []
        for tops in self.axes[0].classes:
            for lefts in self.axes[1].classes:
                location = (tops[:, None] * self.columns + lefts).flatten()
                found.append(location[self.order(location)])
        return found

    def order(self, location: Tensor) -> Tensor:
        """How to sort ``location`` [N] so that windows that lie alike are side by side: int64 [N]."""
        if not len(location):
            return location
        top, left = location // self.columns, location % self.columns
        rows, columns = (axis.phase.to(location.device) for axis in self.axes)
        return ((rows[top] * (1 + columns.max()) + columns[left]) * (1 + location.max()) + location).argsort()

    def batch(self, owner: Tensor, location: Tensor) -> WindowBatch:
        """The windows of pairs (image ``owner``, ``location``), int64 [N] each; all of one size."""
        starts = (location // self.columns).cpu(), (location % self.columns).cpu()
        picked = [axis.first[:, start] for axis, start in zip(self.axes, starts, strict=True)]
        sides = [axis.length[:, start[0]].tolist() for axis, start in zip(self.axes, starts, strict=True)]
        offsets = torch.stack([axis.offset[:, start] for axis, start in zip(self.axes, starts, strict=True)])  # [2, T, N]
        groups = [aligned_groups(offsets[:, t]) for t in range(offsets.shape[1])]
        first = torch.stack(picked).to(owner.device)
        return WindowBatch(owner, first, list(zip(*sides, strict=True)), groups, self.maps)


def aligned_groups(offset: Tensor) -> list[AlignedGroup]:
    """Runs of equal columns of ``offset`` [2, N]."""
    cuts = ((offset[:, 1:] != offset[:, :-1]).any(dim=0).nonzero()[:, 0] + 1).tolist()
    rows, columns = offset[:, [0, *cuts]].tolist()
    bounds = [0, *cuts, offset.shape[1]]
    return [
        AlignedGroup(slice(a, b), (row, column)) for a, b, row, column in zip(bounds[:-1], bounds[1:], rows, columns, strict=True)
    ]
