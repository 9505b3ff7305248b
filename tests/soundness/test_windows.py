"""Convolutional networks: strides, padding, dilation, pooling and borders, drawn at random, under every attack.

The same checks run against windows that are wrong in one known way (``window_breaks.py``), and must catch each.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals
from patchcert_cli.certifiers.bounds.first_layer import location_masks
from patchcert_cli.certifiers.bounds.rules import propagate
from patchcert_cli.certifiers.bounds.windows.windows import Windows
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import IntegrityError
from patchcert_cli.threats import Patch

from . import relations
from .arena import Arena, Attack, changes, check, draw_images
from .window_breaks import WINDOW_BREAKS

SHAPES = [(1, 6, 5), (1, 7, 7), (2, 4, 6)]
PATCHES: list[Attack] = [Patch(1, 1), Patch(2, 1), Patch(1, 3), Patch(2, 2)]
few = settings(max_examples=8, derandomize=True, deadline=None)


def random_layers(shape: tuple[int, int, int]) -> list[nn.Module]:
    """Two or three convolutions, pooling and normalization in between, then one or two dense layers."""

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), ()))]

    layers: list[nn.Module] = []
    v = torch.zeros(1, *shape)
    for _ in range(pick(2, 2, 3)):
        kernel, dilation = pick(1, 2, 3, 3), pick(1, 1, 1, 2)
        stride, padding = pick(1, 1, 2), pick(0, 1, 1)
        if min(v.shape[2:]) + 2 * padding <= dilation * (kernel - 1) + 1:
            continue
        wide = 4 if v.shape[1] == 1 else pick(2, 4)
        groups = pick(1, 1, 2) if v.shape[1] % 2 == 0 else 1
        layers.append(nn.Conv2d(v.shape[1], wide, kernel, stride, padding, dilation, groups))
        layers += [nn.BatchNorm2d(wide)] if pick(0, 0, 1) else []
        layers += [nn.ReLU()]
        if min(layers[-1](nn.Sequential(*layers).eval()(torch.zeros(1, *shape))).shape[2:]) > 2:
            layers += [[], [nn.MaxPool2d(2)], [nn.AvgPool2d(2, 1)], [nn.MaxPool2d(3, 2, 1)]][pick(0, 0, 1, 2, 3)]
        v = nn.Sequential(*layers).eval()(torch.zeros(1, *shape))
    width = v[0].numel()
    layers.append(nn.Flatten())
    if pick(0, 1):
        layers += [nn.Linear(width, 4), nn.ReLU()]
        width = 4
    return [*layers, nn.Linear(width, 3)]


def random_defense(shape: tuple[int, int, int], seed: int) -> IntervalDefense:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        network = nn.Sequential(*random_layers(shape)).eval()
        for layer in network:
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.3, 2)
                layer.weight.normal_()
        last = network[-1]
        assert isinstance(last, nn.Linear)
        spread = network(draw_images(shape, 64, seed)).std(dim=0)
        last.weight.div_(spread.clamp(min=0.01)[:, None])  # so that answers differ, and some of them are clear
        last.bias.normal_(0, 2)
    return IntervalDefense(network.requires_grad_(False), input_shape=shape, classes=("a", "b", "c")).eval()


@cache
def arenas() -> list[Arena]:
    return [
        Arena(f"{shape} {seed}", random_defense(shape, seed), draw_images(shape, 20, seed))
        for shape in SHAPES
        for seed in range(5)
    ]


@pytest.mark.parametrize("threat", PATCHES, ids=str)
def test_random_convolutional_networks_are_certified_soundly(threat: Attack) -> None:
    score = check(arenas(), [threat])
    assert score.violations == []
    assert score.unsupported == 0
    assert min(score.certified, score.uncertified, score.broken) >= 20, score


def margins_under(defense: IntervalDefense, x: Tensor, target: Tensor, patch: Patch) -> Tensor:
    """The smallest true margins that any content found: [B, K]."""
    mask, value = changes(defense.input_shape, patch)
    least = torch.full((len(x), 3), float("inf"))
    for m, v in zip(mask.split(512), value.split(512), strict=True):
        logits = defense.network(torch.where(m[:, None], v[:, None], x).flatten(0, 1)).reshape(len(m), len(x), 3)
        own = logits.gather(2, target.expand(len(m), -1)[:, :, None])
        least = torch.minimum(least, (own - logits).amin(dim=0))
    return least


@few
@given(st.sampled_from(SHAPES), st.integers(0, 10_000), st.sampled_from([Patch(1, 1), Patch(2, 2), Patch(1, 3)]))
def test_no_content_undercuts_the_margin_bounds(shape: tuple[int, int, int], seed: int, patch: Patch) -> None:
    defense = random_defense(shape, seed)
    x = draw_images(shape, 6, seed)
    target = torch.arange(6) % 3
    with torch.no_grad():
        bounds = intervals.lower_margins(defense.network, x, target, patch).values
        found = margins_under(defense, x, target, patch)
    assert bool((bounds <= found + 1e-4 * (1 + found.abs())).all())
    if patch == Patch(1, 1) and shape[0] == 1:
        assert float((found - bounds).amin()) <= 1 + float(found.abs().max()), "bounds that say nothing"


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 10_000), st.sampled_from([(1, 1), (2, 2), (1, 4), (3, 2), (4, 5)]), st.booleans())
def test_windows_equal_boxed_copies(shape: tuple[int, int, int], seed: int, size: tuple[int, int], clip: bool) -> None:
    layers, x, patch = list(random_defense(shape, seed).network.double()), draw_images(shape, 3, seed).double(), Patch(*size)
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            windows = Windows(layers, x, patch, 1.0, clip=clip)
            for alike in windows.patch_windows.classes():
                moved = location_masks(patch, x)[alike][:, None, None]
                lower = (x - moved * x).flatten(0, 1)
                expected = propagate(layers, (lower, lower + moved.expand(-1, 3, shape[0], -1, -1).flatten(0, 1)))
                for a, b in zip(windows.everywhere(alike), expected, strict=True):
                    assert float((a - b).abs().max()) <= 1e-11 * (1 + float(b.abs().max()))


@few
@given(st.sampled_from(SHAPES), st.integers(0, 10_000), st.permutations(range(6)))
def test_order_relations(shape: tuple[int, int, int], seed: int, order: list[int]) -> None:
    defense = random_defense(shape, seed)
    x = draw_images(shape, 6, seed)
    assert relations.batches_do_not_matter(defense, x, Patch(2, 2), torch.tensor(order)) == []
    strong = defense.certify(x, Patch(3, 3))
    for height, width in ((1, 1), (2, 3), (3, 1), (3, 3)):
        assert relations._implied(strong, defense.certify(x, Patch(height, width))) == []


@pytest.mark.gpu
def test_the_device_does_not_matter() -> None:
    for arena in arenas()[::3]:
        here = arena.defense.certify(arena.images, Patch(2, 2))
        there = arena.defense.to("cuda").certify(arena.images.to("cuda"), Patch(2, 2))
        arena.defense.to("cpu")
        assert torch.equal(here.prediction, there.prediction.cpu())
        assert torch.equal(here.certified, there.certified.cpu())
        assert bool(((here.margin - there.margin.cpu()).abs() <= here.tolerance + there.tolerance.cpu()).all())


@pytest.mark.parametrize("broken", WINDOW_BREAKS)
def test_broken_windows_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(arenas()[:3], PATCHES, method="interval").violations == []
    WINDOW_BREAKS[broken](monkeypatch)
    try:
        found = check(arenas(), PATCHES, method="interval", until_found=True).violations
    except IntegrityError:  # bounds that are not ordered stop a proof where they are made
        return
    assert found != []
