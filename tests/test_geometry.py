"""Touched outputs of a sliding layer, compared with enumeration of every output and tap."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from patchcert_cli.geometry import touched_range


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
