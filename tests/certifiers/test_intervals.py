"""Interval bounds of whole networks, compared with one boxed copy of the image per location (``reference.py``)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals, margin_chunks
from patchcert_cli.errors import UnsupportedThreat, UsageError
from patchcert_cli.layers import precision
from patchcert_cli.threats import Patch, PatchPercent, Sparse, parse_threat

from . import reference
from .networks import LAYOUTS, Shape, images, network

EPSILONS = (0.0, 0.3, 1.0)
SPARSE = [Sparse(1), Sparse(3), Sparse(2, "value"), Sparse(5, "value")]
SPARSE_NAMES = [name for name, layout in LAYOUTS.items() if layout.sparse]


def patches(shape: Shape) -> list[tuple[int, int]]:
    return [(1, 1), (2, 2), (1, 3), (3, 2), (shape[1], 1), (shape[1], shape[2])]


def targets(classes: int, count: int) -> Tensor:
    return torch.arange(count) % classes


def margins(net: nn.Module, x: Tensor, target: Tensor, threat: Patch | Sparse, epsilon: float = 1.0) -> intervals.Margins:
    with torch.no_grad():
        return intervals.lower_margins(net, x, target, threat, epsilon=epsilon)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-11 * (1 + expected.abs().max()))


@pytest.mark.parametrize("name", LAYOUTS)
def test_patch_margins_equal_the_minimum_over_boxed_copies(name: str) -> None:
    shape, net = LAYOUTS[name].shape, precision.double(network(name))
    x = images(shape, 4).double()
    path = reference.steps(net, shape)  # type: ignore[arg-type]
    target = targets(len(reference.forward(path, reference.numbers(x[0]))), len(x))
    for size in patches(shape):
        for epsilon in EPSILONS:
            found = margins(net, x, target, Patch(*size), epsilon)
            for i, image in enumerate(x):
                slow = reference.patch_margins(path, reference.numbers(image), shape, size, int(target[i]), epsilon)
                table = torch.tensor(slow, dtype=torch.float64)  # [A, K]
                assert close(found.values[i], table.amin(dim=0)), (size, epsilon)
                assert close(table.gather(0, found.worst[i][None])[0], table.amin(dim=0)), "worst is not where the minimum is"


@pytest.mark.parametrize("name", SPARSE_NAMES)
def test_sparse_margins_equal_the_k_largest_gains(name: str) -> None:
    shape, net = LAYOUTS[name].shape, precision.double(network(name))
    x = images(shape, 4).double()
    path = reference.steps(net, shape)  # type: ignore[arg-type]
    target = targets(len(reference.forward(path, reference.numbers(x[0]))), len(x))
    pixels = shape[1] * shape[2]
    for threat in [*SPARSE, Sparse(pixels), Sparse(pixels * shape[0], "value")]:
        for epsilon in EPSILONS:
            found = margins(net, x, target, threat, epsilon).values
            for i, image in enumerate(x):
                slow = reference.sparse_margins(
                    path, reference.numbers(image), shape, threat.k, threat.unit, int(target[i]), epsilon
                )
                assert close(found[i], torch.tensor(slow, dtype=torch.float64)), (threat, epsilon)


def test_every_layout_was_compared() -> None:
    assert len(LAYOUTS) >= 20
    assert 15 <= len(SPARSE_NAMES) < len(LAYOUTS)


@pytest.mark.parametrize("name", ["mlp-rgb", "conv-stride", "average-pool-first"])
def test_chunks_of_one_location_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = precision.double(network(name)), images(LAYOUTS[name].shape, 5).double()
    whole = margins(net, x, targets(3, 5), Patch(2, 2))
    monkeypatch.setattr(margin_chunks, "CHUNK_BYTES", {"cpu": 1})
    single = margins(net, x, targets(3, 5), Patch(2, 2))
    assert torch.equal(whole.worst, single.worst)
    assert close(single.values, whole.values)


@pytest.mark.parametrize("name", ["mlp2", "conv-dilated"])
@pytest.mark.parametrize("threat", [Patch(2, 2), Sparse(2)], ids=str)
def test_targets_in_any_order_and_absent_classes(name: str, threat: Patch | Sparse) -> None:
    net, x = precision.double(network(name)), images(LAYOUTS[name].shape, 6).double()
    for target in ([2, 0, 1, 2, 0, 2], [2] * 6, [0] * 6, [1, 1, 0, 1, 1, 0]):
        together = margins(net, x, torch.tensor(target), threat).values
        for i, y in enumerate(target):
            alone = margins(net, x[i : i + 1], torch.tensor([y]), threat).values[0]
            assert close(together[i], alone)
            assert float(together[i, y]) == 0


def test_percent_patch_is_its_square() -> None:
    net, x = network("mlp2"), images(LAYOUTS["mlp2"].shape, 3)
    percent = parse_threat("patch:20%")
    assert isinstance(percent, PatchPercent)
    with torch.no_grad():
        found = intervals.lower_margins(net, x, targets(3, 3), percent)
    assert percent.resolve(4, 5) == Patch(2, 2)
    assert torch.equal(found.values, margins(net, x, targets(3, 3), Patch(2, 2)).values)


@pytest.mark.parametrize("name", ["mlp2", "mlp3", "mlp-rgb"])
@pytest.mark.parametrize("epsilon", [0.3, 1.0])
def test_margins_at_the_worst_locations_are_the_minimum(name: str, epsilon: float) -> None:
    """The gradient is compared with autograd through all boxed copies of the image."""
    shape, net = LAYOUTS[name].shape, precision.double(network(name)).requires_grad_(True)
    x = images(shape, 5).double()
    classes = net[-1].out_features  # type: ignore[index]
    target, patch = targets(classes, 5), Patch(2, 3)
    worst = margins(net, x, target, patch, epsilon).worst
    direction = torch.rand(5, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fast = intervals.margins_at(net, x, target, patch, worst, epsilon=epsilon)
    slow = torch.stack([boxed_margins(net, x, target, mask, epsilon) for mask in masks(shape, patch)]).amin(dim=0)
    assert close(fast.detach(), slow.detach())
    assert close(fast.detach(), margins(net, x, target, patch, epsilon).values)
    parameters = list(net.parameters())
    for a, b in zip(
        torch.autograd.grad((fast * direction).sum(), parameters),
        torch.autograd.grad((slow * direction).sum(), parameters),
        strict=True,
    ):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-12


def test_margins_at_chosen_locations_takes_the_smallest_of_them() -> None:
    shape, net = LAYOUTS["mlp-rgb"].shape, precision.double(network("mlp-rgb"))
    x, target, patch = images(shape, 4).double(), targets(3, 4), Patch(2, 2)
    chosen = torch.randint(12, (4, 5), generator=torch.Generator().manual_seed(0))
    found = intervals.smallest_margins(net, x, target, patch, chosen)
    path = reference.steps(net, shape)  # type: ignore[arg-type]
    for i, image in enumerate(x):
        table = torch.tensor(reference.patch_margins(path, reference.numbers(image), shape, (2, 2), int(target[i])))
        assert close(found[i], table[chosen[i]].amin(dim=0))


def masks(shape: Shape, patch: Patch) -> list[Tensor]:
    found = []
    for top in range(shape[1] - patch.height + 1):
        for left in range(shape[2] - patch.width + 1):
            mask = torch.zeros(shape[1:], dtype=torch.float64)
            mask[top : top + patch.height, left : left + patch.width] = 1
            found.append(mask)
    return found


def boxed_margins(net: nn.Module, x: Tensor, target: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """Differentiable margins of one location in the form ``W+ lo + W- hi``: [B, K]."""
    low, high = x - epsilon * mask * x, x + epsilon * mask * (1 - x)
    layers = list(net.children())
    for layer in layers[:-1]:
        if isinstance(layer, nn.Linear):
            plus, minus = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
            low, high = low @ plus.t() + high @ minus.t() + layer.bias, high @ plus.t() + low @ minus.t() + layer.bias
        else:
            low, high = layer(low), layer(high)
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    row = last.weight[target][:, None] - last.weight
    bound = (row.clamp(min=0) * low[:, None] + row.clamp(max=0) * high[:, None]).sum(dim=2)
    return bound + last.bias[target][:, None] - last.bias


@pytest.mark.parametrize("threat", [Patch(5, 1), Sparse(21), Sparse(21, "value")], ids=str)
def test_threats_that_do_not_fit_are_refused(threat: Patch | Sparse) -> None:
    with pytest.raises(UsageError):
        margins(network("mlp2"), images(LAYOUTS["mlp2"].shape, 1), torch.tensor([0]), threat)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if not layout.sparse])
def test_sparse_needs_an_affine_first_layer(name: str) -> None:
    with pytest.raises(UnsupportedThreat, match="begin with a linear or convolutional layer"):
        margins(network(name), images(LAYOUTS[name].shape, 1), torch.tensor([0]), Sparse(1))


@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.LayerNorm(6), nn.BatchNorm1d(6, track_running_stats=False)], ids=repr)
def test_layers_without_a_rule_are_refused(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), layer, nn.Linear(6, 3)).eval()
    with pytest.raises(UnsupportedThreat):
        margins(net, images((1, 3, 3), 2), torch.tensor([0, 1]), Patch(1, 1))


def test_a_single_linear_layer_is_merged_with_the_difference() -> None:
    shape, net = (1, 3, 4), nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double().requires_grad_(False)
    x, target = images(shape, 3).double(), targets(3, 3)
    path = reference.steps(net, shape)
    for i, image in enumerate(x):
        pixels = reference.numbers(image)
        slow = torch.tensor(reference.patch_margins(path, pixels, shape, (2, 2), int(target[i]))).amin(dim=0)
        assert close(margins(net, x, target, Patch(2, 2)).values[i], slow)
