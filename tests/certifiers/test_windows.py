"""Bounds in windows, compared with a boxed copy of the image per location pushed through every layer, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals, margin_chunks
from patchcert_cli.certifiers.bounds.first_layer import Split, location_masks
from patchcert_cli.certifiers.bounds.rules import Box, propagate
from patchcert_cli.certifiers.bounds.windows import partition, products, windows
from patchcert_cli.certifiers.bounds.windows.patch_windows import AlignedGroup, PatchWindows, SlidingAxis
from patchcert_cli.certifiers.bounds.windows.windows import Windows
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.layers.supported_layers import layers_of
from patchcert_cli.threats import Patch

from .networks import LAYOUTS, Layout, images, network

MORE = {
    "five-layers": Layout(
        lambda: [
            *(Normalize((0.4, 0.6), (0.3, 0.2)), nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 3, 4, 2, 1), nn.ReLU()),
            *(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, 1, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3)),
        ],
        (2, 16, 12),
    ),
    "two-phases": Layout(
        lambda: [
            *(nn.Conv2d(1, 2, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 1)), nn.BatchNorm2d(3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(24, 3)),
        ],
        (1, 10, 9),
    ),
    "no-relu-between": Layout(
        lambda: [nn.Conv2d(1, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(24, 3)], (1, 8, 6)
    ),
    "dilated-groups": Layout(
        lambda: [
            *(nn.Conv2d(2, 4, 3, 1, 2, 2, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 2, 2), nn.ReLU()),
            *(nn.Conv2d(4, 2, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
        ],
        (2, 8, 6),
    ),
    "overlapping-pools": Layout(
        lambda: [
            *(nn.Conv2d(1, 2, 3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.ReLU(), nn.AvgPool2d(3, 2, 1), nn.Conv2d(2, 2, 2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(12, 3)),
        ],
        (1, 8, 6),
    ),
    "ceil-pool": Layout(
        lambda: [
            *(nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, 3, ceil_mode=True), nn.ReLU()),
            *(nn.MaxPool2d(2, 1, dilation=2), nn.Flatten(), nn.Linear(4, 3)),
        ],
        (1, 11, 10),
    ),
    "odd-average": Layout(
        lambda: [nn.AvgPool2d((2, 3), (1, 2), (1, 0), divisor_override=5), nn.ReLU(), nn.Flatten(), nn.Linear(28, 3)], (1, 6, 9)
    ),
    "global-average": Layout(
        lambda: [nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 3)],
        (1, 7, 6),
    ),
    "uneven-average": Layout(
        lambda: [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2, 2, 1, count_include_pad=False), nn.Flatten(), nn.Linear(12, 3)],
        (1, 6, 5),
    ),
    "adaptive-average": Layout(
        lambda: [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Conv2d(2, 2, 2, 1, 1), nn.ReLU(), nn.Flatten()],
        (1, 6, 5),
    ),
    "norm-of-features": Layout(
        lambda: [
            nn.Conv2d(1, 2, 3),
            nn.Flatten(),
            nn.BatchNorm1d(24),
            nn.ReLU(),
            nn.Linear(24, 4),
            nn.ReLU(),
            nn.Linear(4, 3),
        ],
        (1, 6, 5),
    ),
    "linear-on-rows": Layout(lambda: [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(3, 2), nn.Flatten(), nn.Linear(16, 3)], (1, 6, 5)),
}
EVERY = {**LAYOUTS, **MORE}
ODD = ("uneven-average", "adaptive-average", "norm-of-features", "linear-on-rows")  # what comes next has no windows
WHOLE_MAPS = (*ODD, "conv-last", "conv-alone", "pool-last")  # or nothing comes


@pytest.fixture(autouse=True)
def more_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, layout in MORE.items():
        monkeypatch.setitem(LAYOUTS, name, layout)


def sizes(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(1, 1), (3, 2), (shape[1], 1), (shape[1], shape[2])]


def boxed(layers: list[nn.Module], x: Tensor, patch: Patch, epsilon: float, location: Tensor, owner: Tensor) -> Box:
    """One boxed copy of the image per pair, through every layer."""
    moved = location_masks(patch, x)[location, None] * epsilon
    lower = x[owner] * (1 - moved)
    return propagate(layers, (lower, lower + moved))


def gap(found: Box, expected: Box) -> float:
    assert all(a.shape == b.shape for a, b in zip(found, expected, strict=True))
    return max(float((a - b).abs().max()) / (1 + float(b.abs().max())) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "of one size"])
def test_windows_equal_boxed_copies(name: str, clip: bool) -> None:
    shape, net = EVERY[name].shape, network(name).double()
    x, layers = images(shape, 2).double(), layers_of(net)
    for size in sizes(shape):
        patch = Patch(*size)
        for cut, gradient in ((len(layers), False), (len(layers) - 1, True), (len(layers) - 1, False)):
            with torch.set_grad_enabled(gradient):
                bounds = Windows(layers[:cut], x, patch, 0.7, clip=clip)
                seen = []
                for alike in bounds.patch_windows.classes():
                    seen += alike.tolist()
                    owner, location = torch.arange(2).repeat(len(alike)), alike.repeat_interleave(2)
                    expected = boxed(layers[:cut], x, patch, 0.7, location, owner)
                    assert gap(bounds.everywhere(alike), expected) <= 1e-12, (size, cut)
                    assert gap(bounds.bounds(owner, location), expected) <= 1e-12, (size, cut)
                assert sorted(seen) == list(range(patch.count(*shape[1:])))


@pytest.mark.parametrize("name", ["five-layers", "two-phases", "overlapping-pools", "conv-max-pool"])
def test_pairs_in_any_order_and_number(name: str) -> None:
    shape, net = EVERY[name].shape, network(name).double()
    x, layers, patch = images(shape, 4).double(), layers_of(net)[:-1], Patch(3, 2)
    generator = torch.Generator().manual_seed(0)
    bounds = Windows(layers, x, patch, 1.0, clip=False)
    for count in (1, 7, 60):
        owner = torch.randint(4, (count,), generator=generator)
        location = torch.randint(patch.count(*shape[1:]), (count,), generator=generator)
        assert gap(bounds.bounds(owner, location), boxed(layers, x, patch, 1.0, location, owner)) <= 1e-12


@pytest.mark.parametrize("long", [1, 10**6], ids=["columns of windows", "all columns"])
@pytest.mark.parametrize("few", [1, 10**6], ids=["clipped", "of one size"])
def test_all_ways_through_the_stream_agree(long: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, target = network("five-layers").double(), torch.tensor([2, 0, 1, 2])
    x = images(MORE["five-layers"].shape, 4).double()
    with torch.no_grad():
        expected = intervals.lower_margins(net, x, target, Patch(3, 3))
        monkeypatch.setattr(windows, "LONG", long)
        monkeypatch.setattr(margin_chunks, "FEW", few)
        monkeypatch.setattr(margin_chunks, "CHUNK_BYTES", {"cpu": 10_000})
        for count in (3, 128):
            monkeypatch.setattr(margin_chunks, "IMAGES", count)
            found = intervals.lower_margins(net, x, target, Patch(3, 3))
            assert float((found.values - expected.values).abs().max()) <= 1e-12
            assert torch.equal(found.worst, expected.worst)


def test_pairs_of_some_images_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network("five-layers").double(), images(MORE["five-layers"].shape, 7).double()
    target, patch = torch.tensor([2, 0, 1, 2, 0, 2, 1]), Patch(3, 3)
    owner, location = torch.tensor([6, 0, 6, 1]), torch.tensor([5, 40, 0, 7])
    expected = intervals.margins_table(net, x[owner], target[owner], patch, location[:, None])[:, 0]
    monkeypatch.setattr(margin_chunks, "IMAGES", 2)  # nothing is asked about images 2 to 5
    with torch.no_grad():
        stream = margin_chunks.WindowMargins(Split.of(net, x.shape[1]), x, patch, 1.0)
        found = stream.at_pairs(owner, location, target[owner])
    torch.testing.assert_close(found, expected.detach(), atol=1e-12, rtol=0)


def chosen_margins(net: nn.Sequential, x: Tensor, target: Tensor, patch: Patch, chosen: Tensor, epsilon: float) -> Tensor:
    """Margins [B, R, K] from boxed copies, in the form ``W+ lo + W- hi``."""
    owner = torch.arange(len(x)).repeat_interleave(chosen.shape[1])
    lower, upper = boxed(layers_of(net)[:-1], x, patch, epsilon, chosen.flatten(), owner)
    last = net[-1]
    assert isinstance(last, nn.Linear)
    row = (last.weight[target][:, None] - last.weight)[owner]  # [U, K, N]
    value = (row.clamp(min=0) * lower[:, None] + row.clamp(max=0) * upper[:, None]).sum(dim=2)
    value = value if last.bias is None else value + (last.bias[target][:, None] - last.bias)[owner]
    return value.reshape(*chosen.shape, -1)


TRAINED = [name for name, layout in EVERY.items() if isinstance(layout.build()[-1], nn.Linear)]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("per_class", [True, False])
def test_margins_at_locations_and_their_gradient(name: str, per_class: bool) -> None:
    shape, net = EVERY[name].shape, network(name).double().requires_grad_(True)
    x = images(shape, 3).double().requires_grad_(True)
    generator, last = torch.Generator().manual_seed(1), net[-1]
    assert isinstance(last, nn.Linear)
    classes = last.out_features
    target, patch = torch.arange(3) % classes, Patch(2, 3)
    chosen = torch.randint(patch.count(*shape[1:]), (3, classes if per_class else 5), generator=generator)
    weight = torch.rand(3, classes, dtype=torch.float64, generator=generator)
    for epsilon in (0.3, 1.0):
        bound = intervals.margins_at if per_class else intervals.smallest_margins
        found = bound(net, x, target, patch, chosen, epsilon=epsilon)
        table = chosen_margins(net, x, target, patch, chosen, epsilon)
        slow = torch.diagonal(table, dim1=1, dim2=2) if per_class else table.amin(dim=1)
        assert torch.allclose(found, slow, rtol=1e-10, atol=1e-10)
        leaves = [x, *net.parameters()]
        fast, expected = (torch.autograd.grad((part * weight).sum(), leaves, allow_unused=True) for part in (found, slow))
        for a, b in zip(fast, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert float((a - b).abs().max()) <= 1e-10 * (1 + float(b.abs().max())), name
    assert len(TRAINED) >= 20


def test_operations_have_the_gradients_of_their_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    draw: Callable[..., Tensor] = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    groups = [AlignedGroup(slice(0, 1), (-1, -2)), AlignedGroup(slice(1, 3), (-2, 1))]

    def product(v: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = products._Convolution.apply(v, weight, groups, (1, 2), (3, 2), None)
        return out

    assert torch.autograd.gradcheck(product, (draw(3, 3, 4, 2), draw(2, 3, 3, 2)))
    cells, outside = torch.tensor([[[1, 0]], [[3, 3]], [[0, 2]]]), torch.tensor([3])

    def rectify(deviation: Tensor, radius: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        middle, width = windows._Rectified.apply(deviation, radius, rows - 0.5, cells, outside)
        return middle, width

    assert torch.autograd.gradcheck(rectify, (draw(3, 1, 2, 2), draw(3, 1, 2, 2), draw(4, 2)))
    assert torch.autograd.gradcheck(rectify, (draw(3, 1, 2, 2), draw(1, 1, 2, 2), draw(4, 2)))


KERNELS = [(3, 1, 1, 1), (4, 2, 1, 1), (1, 1, 0, 1), (2, 3, 0, 1), (3, 2, 2, 2), (5, 1, 0, 1)]


@pytest.mark.parametrize("first", KERNELS)
@pytest.mark.parametrize("second", KERNELS)
def test_windows_hold_what_a_pixel_that_is_no_number_reaches(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """One line of pixels, those under the patch NaN, through two real layers: NaN must stay within the window."""
    length, side = 17, 3
    path, line = [], torch.zeros(length - side + 1, 1, length)
    for start in range(length - side + 1):
        line[start, 0, start : start + side] = float("nan")
    for kernel, stride, padding, dilation in (first, second):
        line = nn.functional.conv1d(line, torch.ones(1, 1, kernel), None, stride, padding, dilation)
        path.append((SlidingAxis(kernel, stride, padding, dilation, line.shape[2]),) * 2)
    touched = line[:, 0].isnan()
    dense = first[3] == second[3] == 1 and first[0] >= first[1] and second[0] >= second[1]  # no gaps between what outputs see
    for clip in (True, False):
        axis = PatchWindows(path, (length, length), Patch(side, side), clip=clip).axes[0]
        for start, row in enumerate(touched):
            begin, count = int(axis.first[-1, start]), int(axis.length[-1, start])
            inside = torch.zeros(touched.shape[1], dtype=torch.bool)
            inside[max(begin, 0) : max(begin + count, 0)] = True
            assert not bool((row & ~inside).any())
            if clip and dense:
                assert torch.equal(row, inside), "larger than what the patch reaches"


def test_a_pass_may_not_disturb_the_one_before() -> None:
    """Memory is used again: results of one call must survive the next."""
    net = network("five-layers").double()
    x, layers = images(MORE["five-layers"].shape, 3).double(), layers_of(net)
    with torch.no_grad():
        bounds = Windows(layers, x, Patch(2, 2), 1.0, clip=True)
        kept = [(bounds.everywhere(alike), alike) for alike in bounds.patch_windows.classes()]
        for found, alike in kept:
            fresh = Windows(layers, x, Patch(2, 2), 1.0, clip=True).everywhere(alike)
            assert all(torch.equal(a, b) for a, b in zip(found, fresh, strict=True))


def test_whole_maps_only_where_a_layer_needs_them() -> None:
    for name, layout in EVERY.items():
        net = network(name)
        found = partition.Partition.of(layers_of(net), torch.zeros(1, *layout.shape))
        assert (found.dense_entry is None and bool(found.tail)) == (name in WHOLE_MAPS), name
        assert (partition.first_global_layer(net, layout.shape) is not None) == (name in ODD), name


def test_windows_are_as_large_as_the_layers_make_them() -> None:
    found = partition.Partition.of(layers_of(network("five-layers")), torch.zeros(1, 2, 16, 12))
    windows = PatchWindows(found.path, (16, 12), Patch(2, 2), clip=True)
    rows, columns = (axis.length.amax(dim=1).tolist() for axis in windows.axes)
    assert list(zip(rows, columns, strict=True)) == [(2, 2), (4, 4), (4, 4), (6, 6), (4, 3), (4, 3)]
    assert windows.maps == [(16, 12), (16, 12), (8, 6), (8, 6), (4, 3), (4, 3)]
    assert found.dense_entry is not None and found.dense_entry.out_features == 5


def test_a_layer_without_a_rule_is_named_with_what_to_use_instead() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(32, 3))
    with pytest.raises(UnsupportedThreat, match="GELU") as caught:
        partition.first_global_layer(net, (1, 6, 6))
    assert "Use ReLU" in str(caught.value.hint)
