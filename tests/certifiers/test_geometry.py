"""Touched outputs of a sliding layer and touched bands, compared with enumeration of every output and pixel."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
from torch import nn

from patchcert_cli.certifiers.geometry import Axis, touched_range


def outputs(n: int, kernel: int, stride: int, padding: int) -> int:
    return (n + 2 * padding - kernel) // stride + 1


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_touched_range_equals_enumeration(kernel: int, stride: int, padding: int) -> None:
    empty = 0
    for n in range(max(kernel - 2 * padding, 1), 10):
        size = outputs(n, kernel, stride, padding)
        for start, side in product(range(n), range(1, n + 1)):
            if start + side > n:
                continue
            inside = set(range(start, start + side))
            seen = [i for i in range(size) if inside & {i * stride - padding + tap for tap in range(kernel)}]
            first, stop = touched_range(start, side, kernel=kernel, stride=stride, padding=padding, size=size)
            assert list(range(first, stop)) == seen, (n, start, side)
            assert 0 <= first <= stop
            empty += not seen
    assert empty > 0 or stride <= kernel, "a stride beyond the kernel leaves gaps"


@pytest.mark.parametrize("options", [(3, 2, 1, 1), (2, 3, 0, 1), (3, 1, 2, 2), (2, 2, 1, 3)], ids=str)
def test_outputs_outside_the_range_never_see_the_patch(options: tuple[int, int, int, int]) -> None:
    """A not-a-number under the patch stays within the claimed outputs of the real layer."""
    kernel, stride, padding, dilation = options
    layer, n = nn.Conv1d(1, 1, kernel, stride, padding, dilation), 9
    reach = dilation * (kernel - 1) + 1
    for start, side in product(range(n), (1, 2, 4)):
        x = torch.zeros(1, 1, n)
        x[..., start : start + side] = float("nan")
        out = layer(x)[0, 0].isnan()
        first, stop = touched_range(start, min(side, n - start), kernel=reach, stride=stride, padding=padding, size=len(out))
        claimed = torch.zeros(len(out), dtype=torch.bool)
        claimed[first:stop] = True
        assert bool((claimed | ~out).all())


def test_published_window_counts() -> None:
    """BagNet-17 on 224 pixels (stride 8, 26 cells): a 32 pixel patch touches at most 6 and at least 4 cells per axis."""
    spans = [touched_range(start, 32, kernel=17, stride=8, padding=0, size=26) for start in range(224 - 32 + 1)]
    assert {stop - first for first, stop in spans} == {4, 5, 6}


def starts(length: int, side: int) -> list[set[int]]:
    return [set(range(start, start + side)) for start in range(length - side + 1)]


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_sliding_axes_equal_enumeration(padding: int) -> None:
    for length, kernel, stride in product(range(1, 10), range(1, 6), range(1, 5)):
        if kernel > length + 2 * padding:
            continue
        cells = outputs(length, kernel, stride, padding)
        shown = [{i * stride - padding + tap for tap in range(kernel)} for i in range(cells)]
        for side in range(1, length + 1):
            axis = Axis.sliding(length, side, kernel=kernel, stride=stride, padding=padding)
            slow = [tuple(i for i in range(cells) if shown[i] & patch) for patch in starts(length, side)]
            assert (axis.cells, list(axis.touched)) == (cells, slow), (length, side, kernel, stride)


def test_band_axes_equal_enumeration() -> None:
    uneven = 0
    for length, stride in product(range(1, 11), range(1, 6)):
        for band, side in product(range(1, length + 1), repeat=2):
            axis = Axis.bands(length, side, band=band, stride=stride)
            firsts = list(range(0, length, stride))
            slow = [
                tuple(i for i, first in enumerate(firsts) if any((first + step) % length in patch for step in range(band)))
                for patch in starts(length, side)
            ]
            assert (axis.cells, list(axis.touched)) == (len(firsts), slow), (length, side, band, stride)
            formula = min(math.ceil((side + band - 1) / stride), len(firsts))
            if stride == 1:
                assert {len(cells) for cells in axis.touched} == {formula}
            uneven += max(len(cells) for cells in axis.touched) > formula
    assert uneven > 0, "the published formula never failed: strides that do not divide the length are missing"


@pytest.mark.parametrize(
    ("stride", "band", "side", "most"), [(10, 19, 32, 6), (5, 19, 32, 11), (10, 37, 32, 8), (10, 25, 32, 7), (20, 19, 32, 4)]
)
def test_published_band_counts_are_one_short(stride: int, band: int, side: int, most: int) -> None:
    axis = Axis.bands(224, side, band=band, stride=stride)
    assert max(len(cells) for cells in axis.touched) == most == math.ceil((side + band - 1) / stride) + 1


def test_one_cell_that_sees_everything() -> None:
    assert Axis.whole(6, 4) == Axis(1, ((0,), (0,), (0,)))


def test_published_axis_counts() -> None:
    """BagNet-17, -33 and -9 on 224 pixels under 32, and BagNet-17 on 192 under 30."""
    for length, kernel, side, cells, most in (
        (224, 17, 32, 26, 6),
        (224, 33, 32, 24, 8),
        (224, 9, 32, 27, 5),
        (192, 17, 30, 22, 6),
    ):
        axis = Axis.sliding(length, side, kernel=kernel, stride=8)
        assert (axis.cells, max(len(touched) for touched in axis.touched)) == (cells, most)


def random_axes() -> list[Axis]:
    draw = random.Random(0)
    axes = [
        Axis(6, tuple(tuple(sorted(draw.sample(range(6), draw.randrange(7)))) for _ in range(draw.randrange(1, 9))))
        for _ in range(200)
    ]
    for length, side, kernel, stride, padding in product((5, 8), (1, 3, 5), (1, 3, 5), (1, 2, 4), (0, 2)):
        axes.append(Axis.sliding(length, side, kernel=kernel, stride=stride, padding=padding))
        axes.append(Axis.bands(length, side, band=kernel, stride=stride))
    return axes


def test_distinct_starts_keep_every_largest_set_once() -> None:
    dropped = 0
    for axis in random_axes():
        sets = [set(cells) for cells in axis.touched]
        kept = axis.distinct()
        assert list(kept) == sorted(set(kept))
        for cells in sets:
            assert any(cells <= sets[start] for start in kept), "a set that no kept one covers"
        for one, other in product(kept, repeat=2):
            assert one == other or not sets[one] <= sets[other], "one too many"
        assert all(sets.index(sets[start]) == start for start in kept), "not the first of equals"
        assert axis.select(kept).touched == tuple(axis.touched[start] for start in kept)
        dropped += len(sets) - len(kept)
    assert dropped > 100


def test_matrices_mark_the_touched_cells() -> None:
    for axis in random_axes():
        mask = axis.matrix()
        assert mask.shape == (len(axis.touched), axis.cells) and mask.dtype == torch.float32
        assert [tuple(row.nonzero()[:, 0].tolist()) for row in mask] == list(axis.touched)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
