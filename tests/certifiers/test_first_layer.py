"""The first layer under attack, compared with loops over windows and with Python's sort (written out here)."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import first_layer
from patchcert_cli.certifiers.bounds.first_layer import Split, sparse_box, under_patch, window_sums
from patchcert_cli.certifiers.bounds.topk_gains import largest_gains
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.threats import Patch, Sparse

from .networks import LAYOUTS, images, network


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sums_by_sorting(weight: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sums of the k largest gains and losses: weight [N, C, P], x [B, C, P] -> [B, N] each."""
    up, down = torch.zeros(len(x), len(weight), dtype=torch.float64), torch.zeros(len(x), len(weight), dtype=torch.float64)
    for b, n in product(range(len(x)), range(len(weight))):
        w, v = weight[n].double().t().tolist(), x[b].double().t().tolist()  # [P][C]
        gains = [sum(max(a * (1 - c), -a * c) for a, c in zip(p, q, strict=True)) for p, q in zip(w, v, strict=True)]
        losses = [sum(max(a * c, -a * (1 - c)) for a, c in zip(p, q, strict=True)) for p, q in zip(w, v, strict=True)]
        up[b, n], down[b, n] = sum(sorted(gains)[-k:]), sum(sorted(losses)[-k:])
    return up, down


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 1), (4, 5)])
def test_windows_equal_loops(size: tuple[int, int]) -> None:
    values, patch = draw(3, 2, 4, 5), Patch(*size)
    sums = window_sums(values, patch)
    for a, (top, left, height, width) in enumerate(patch.locations(4, 5).tolist()):
        window = values[:, :, top : top + height, left : left + width]
        assert torch.allclose(sums[:, a], window.sum(dim=(1, 2, 3)), atol=1e-12)
    spread = draw(2, 4, 5, 7, seed=1)
    entries = under_patch(spread, patch)  # [A, C*h*w, M]
    assert sums.shape[1] == entries.shape[0] == patch.count(4, 5)
    for a, (top, left, height, width) in enumerate(patch.locations(4, 5).tolist()):
        expected = [spread[c, top + i, left + j] for c, i, j in product(range(2), range(height), range(width))]
        assert torch.equal(entries[a], torch.stack(expected))


@pytest.mark.parametrize("pixels", [1, 2, 9, 49, 80])
@pytest.mark.parametrize("channels", [1, 3])
def test_gains_equal_sorting(pixels: int, channels: int) -> None:
    weight, x = draw(4, channels, pixels), torch.rand(3, channels, pixels, generator=torch.Generator().manual_seed(1)).double()
    weight[1] = 0
    weight[2, :, ::2] = 0
    for k in sorted({1, 2, 5, pixels // 2, pixels} - {0}):
        if k <= pixels:
            found, expected = first_layer.largest_gains(weight, x, k), sums_by_sorting(weight, x, k)
            assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-11), k
            assert torch.allclose(found[1], expected[1], rtol=0, atol=1e-11), k


@pytest.mark.parametrize("pixels", [20, 49, 64, 100])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_gains_of_equal_weights_equal_sorting(pixels: int, k: int) -> None:
    """Weights of one magnitude give no order in which to visit the pixels; none may be left out."""
    generator = torch.Generator().manual_seed(pixels + k)
    weight = torch.randint(0, 2, (5, 1, pixels), generator=generator).double() * 2 - 1
    x = torch.rand(6, 1, pixels, generator=generator).double() / 2 + 0.25
    found, expected = first_layer.largest_gains(weight, x, k), sums_by_sorting(weight, x, k)
    assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-11)
    assert torch.allclose(found[1], expected[1], rtol=0, atol=1e-11)


def test_one_outstanding_pixel_is_found_wherever_it_is() -> None:
    missed = []
    for place in range(60):
        x = torch.full((1, 1, 60), 0.5)
        x[0, 0, place] = 0
        up, _ = first_layer.largest_gains(torch.ones(1, 1, 60), x, 1)
        missed += [place] if float(up) < 1 else []
    assert missed == []


@pytest.mark.parametrize("equal", [False, True], ids=["distinct", "equal"])
def test_gradient_of_gains_equals_autograd_through_a_sort(equal: bool) -> None:
    weight, k = draw(4, 2, 90), 2
    if equal:
        weight = weight.sign()
    x = torch.rand(5, 2, 90, generator=torch.Generator().manual_seed(1)).double()
    weight.requires_grad_(True)
    factors = draw(2, 5, 4, seed=2)
    fast = first_layer.largest_gains(weight, x, k)
    gain = (weight.clamp(min=0) - weight * x[:, None]).sum(dim=2)  # [B, N, P]
    loss = (weight.abs() - weight.clamp(min=0) + weight * x[:, None]).sum(dim=2)
    slow = [values.sort(dim=2, descending=True).values[..., :k].sum(dim=2) for values in (gain, loss)]
    found, expected = (
        torch.autograd.grad(sum((part * factor).sum() for part, factor in zip(parts, factors, strict=True)), weight)[0]
        for parts in (fast, slow)
    )
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.sparse])
@torch.no_grad()
def test_a_sparse_box_is_attained_neuron_by_neuron(name: str) -> None:
    """One changed pixel: the box is the extreme over all pixels of the layer's own corner values."""
    shape, net = LAYOUTS[name].shape, network(name).double()
    x, split = images(shape, 1).double(), Split.of(net, shape[0])
    corners = [split.clean(x)]
    for row, column in product(range(shape[1]), range(shape[2])):
        for values in product((0.0, 1.0), repeat=shape[0]):
            moved = x.clone()
            moved[0, :, row, column] = torch.tensor(values, dtype=torch.float64)
            corners.append(split.clean(moved))
    every = torch.cat(corners)
    low, high = sparse_box(split, x, Sparse(1))
    assert torch.allclose(low[0], every.amin(dim=0), rtol=0, atol=1e-11)
    assert torch.allclose(high[0], every.amax(dim=0), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.sparse])
def test_reach_bounds_every_change(name: str) -> None:
    shape, net = LAYOUTS[name].shape, network(name).double()
    split, x = Split.of(net, shape[0]), images(shape, 6).double()
    for threat in (Sparse(2), Sparse(3, "value")):
        low, high = sparse_box(split, x, threat)
        reach = first_layer.sparse_max_change(split, shape, threat)
        assert bool((torch.maximum(high - split.clean(x), split.clean(x) - low) <= reach + 1e-11).all())
    for patch in (Patch(1, 1), Patch(2, 2), Patch(*shape[1:])) if isinstance(split.first, nn.Linear) else ():
        changed = x.clone()
        changed[:, :, : patch.height, : patch.width] = 1 - changed[:, :, : patch.height, : patch.width]
        reach = first_layer.patch_max_change(split, shape, patch)
        assert bool(((split.clean(changed) - split.clean(x)).abs() <= reach + 1e-11).all())


def test_split_cuts_behind_the_first_weighted_layer() -> None:
    split = Split.of(network("conv-norm"), 2)
    assert isinstance(split.first, nn.Conv2d)
    assert len(split.before) == 1
    assert split.layers == list(network_layers(split))
    assert Split.of(network("average-pool-first"), 1).first is None
    assert Split.of(network("mlp-rgb"), 3).is_dense
    assert not Split.of(network("mlp-norm-inside"), 1).is_dense


def network_layers(split: Split) -> list[nn.Module]:
    assert split.first is not None
    return [*split.before, split.first, *split.tail]


def test_grouped_first_convolutions_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 2, groups=2), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(UnsupportedThreat, match="grouped"):
        Split.of(net, 2).kernel()


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}], ids=str)
def test_first_convolutions_with_other_paddings_are_refused(options: dict[str, object]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, **options), nn.Flatten(), nn.Linear(32, 3))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedThreat, match="zero padding"):
        Split.of(net, 1)


def test_few_visits_look_at_the_largest_weights_only() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(5, 1, 40, generator=generator), torch.rand(7, 1, 40, generator=generator)
    exact_up, exact_down = largest_gains(weight, x, 3)
    kept = weight.abs()[:, 0].argsort(dim=1, descending=True)[:, :10]
    few = torch.zeros_like(weight).scatter(2, kept[:, None], weight.gather(2, kept[:, None]))
    up, down = largest_gains(weight, x, 3, topk_limit=10)
    expected_up, expected_down = largest_gains(few, x, 3)
    assert torch.allclose(up, expected_up)
    assert torch.allclose(down, expected_down)
    assert bool((up <= exact_up + 1e-6).all()) and bool((down <= exact_down + 1e-6).all())
    assert all(torch.equal(a, b) for a, b in zip(largest_gains(weight, x, 3, topk_limit=40), (exact_up, exact_down), strict=True))
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(sum(part.sum() for part in largest_gains(weight, x, 3, topk_limit=10)), weight)
    assert int((gradient != 0).sum(dim=2).max()) <= 10
