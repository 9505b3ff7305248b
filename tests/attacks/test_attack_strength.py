"""Every attack keeps the rules, finds what exhaustive search finds, repeats itself, and never flips a certified image."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli import attacks
from patchcert_cli.attacks import AttackResult
from patchcert_cli.defenses import Defense
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.threats import Patch, Sparse, Threat, parse_threat

Build = Callable[[int], IntervalDefense]
Linear = Callable[[Tensor, Tensor], IntervalDefense]
THREATS = ("patch:2x3", "patch:1", "patch:10%", "sparse:1", "sparse:3", "sparse:4:value")


def images(count: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def check(defense: Defense, x: Tensor, threat: Threat, result: AttackResult) -> None:
    """What must hold of every result, computed again from the outside."""
    adversarial = result.adversarial
    assert adversarial.shape == x.shape
    assert adversarial.dtype == torch.float32
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.equal(result.clean_prediction, defense.predict(x))
    assert torch.equal(result.prediction, defense.predict(adversarial))
    assert torch.equal(result.success, result.prediction != result.clean_prediction)
    assert torch.equal(result.success, (adversarial != x).flatten(1).any(dim=1))
    assert (result.queries > 2).all()
    for changed in adversarial != x:
        if isinstance(threat, Sparse):
            assert int((changed if threat.unit == "value" else changed.any(dim=0)).sum()) <= threat.k
        else:
            patch = threat.resolve(*x.shape[2:])  # type: ignore[attr-defined]
            touched = changed.any(dim=0).nonzero()
            extent = touched.amax(dim=0) - touched.amin(dim=0) + 1 if len(touched) else torch.zeros(2)
            assert extent[0] <= patch.height
            assert extent[1] <= patch.width


@pytest.mark.parametrize("text", THREATS)
@pytest.mark.parametrize("seed", range(3))
def test_results_keep_the_rules(cnn: Build, text: str, seed: int) -> None:
    defense, threat, x = cnn(seed), parse_threat(text), images(12, (3, 6, 6), seed)
    check(defense, x, threat, attacks.for_threat(threat, seed=seed)(defense, x, threat))


@pytest.mark.parametrize("text", ["patch:2x3", "sparse:3", "sparse:4:value"])
def test_attacks_do_flip(cnn: Build, text: str) -> None:
    threat = parse_threat(text)
    flips = sum(
        int(attacks.for_threat(threat)(cnn(seed), images(12, (3, 6, 6), seed), threat).success.sum()) for seed in range(3)
    )
    assert flips >= 4


def corners(x: Tensor, threat: Threat) -> Tensor:
    """Every allowed change of one image [C, H, W] to values 0 and 1, loop by loop: [n, C, H, W]."""
    channels, height, width = x.shape
    cells = list(itertools.product(range(channels), range(height), range(width)))
    if isinstance(threat, Patch):
        places = [
            [(c, top + i, left + j) for c in range(channels) for i in range(threat.height) for j in range(threat.width)]
            for top in range(height - threat.height + 1)
            for left in range(width - threat.width + 1)
        ]
    elif isinstance(threat, Sparse) and threat.unit == "value":
        places = [list(chosen) for chosen in itertools.combinations(cells, threat.k)]
    else:
        pixels = itertools.combinations(itertools.product(range(height), range(width)), threat.budget)
        places = [[(c, i, j) for c in range(channels) for i, j in chosen] for chosen in pixels]
    found = []
    for place in places:
        for bits in itertools.product((0.0, 1.0), repeat=len(place)):
            changed = x.clone()
            for cell, bit in zip(place, bits, strict=True):
                changed[cell] = bit
            found.append(changed)
    return torch.stack(found)


def exhaustive(defense: Defense, x: Tensor, threat: Threat) -> Tensor:
    return torch.stack([(defense.predict(corners(one, threat)) != defense.predict(one[None])).any() for one in x])


EXHAUSTIBLE = [("patch:2x2", 1), ("patch:1x3", 1), ("patch:1", 2), ("sparse:1", 2), ("sparse:2", 1), ("sparse:2:value", 2)]


@pytest.mark.parametrize(("text", "channels"), EXHAUSTIBLE)
@pytest.mark.parametrize("classes", [2, 4])
def test_linear_models_are_attacked_optimally(linear: Linear, text: str, channels: int, classes: int) -> None:
    threat, shape = parse_threat(text), (channels, 3, 4)
    random = torch.Generator().manual_seed(classes)
    flipped = []
    for seed in range(4):
        weight = torch.randn(classes, *shape, generator=random) / 2
        defense = linear(weight, 3 * torch.randn(classes, generator=random))
        x = images(6, shape, seed)
        expected = exhaustive(defense, x, threat)
        assert torch.equal(attacks.for_threat(threat)(defense, x, threat).success, expected)
        flipped += expected.tolist()
    assert 0 < sum(flipped) < len(flipped)


@pytest.mark.parametrize("text", ["patch:2x2", "sparse:1", "sparse:2"])
def test_small_networks_are_attacked_nearly_as_well_as_by_enumeration(mlp: Build, text: str) -> None:
    threat = parse_threat(text)
    best = found = 0
    for seed in range(6):
        defense, x = mlp(seed), images(6, (1, 4, 4), seed)
        expected = exhaustive(defense, x, threat)
        best += int(expected.sum())
        found += int((attacks.for_threat(threat)(defense, x, threat).success & expected).sum())
    assert best >= 3
    assert found >= 0.95 * best


@pytest.mark.parametrize("text", ["patch:2x2", "sparse:2", "sparse:3:value"])
def test_batches_and_their_order_do_not_matter(cnn: Build, text: str) -> None:
    defense, threat, x = cnn(1), parse_threat(text), images(9, (3, 6, 6), 1)
    index = torch.arange(100, 109)
    attack = attacks.for_threat(threat, seed=3)
    whole = attack(defense, x, threat, index=index)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = attack(defense, x[order], threat, index=index[order])
    single = AttackResult.cat([attack(defense, x[i : i + 1], threat, index=index[i : i + 1]) for i in range(9)])
    assert whole.success.any()
    for other, positions in ((shuffled, order), (single, torch.arange(9))):
        for name in ("success", "prediction", "queries", "clean_prediction"):
            assert torch.equal(getattr(other, name), getattr(whole, name)[positions]), name
        torch.testing.assert_close(other.adversarial, whole.adversarial[positions])


@pytest.mark.parametrize("text", ["patch:1", "patch:2x2", "sparse:1", "sparse:2"])
def test_no_certified_image_is_flipped(mlp: Build, text: str) -> None:
    threat = parse_threat(text)
    certified = flipped = 0
    for seed in range(5):
        defense, x = mlp(seed), images(12, (1, 4, 4), seed)
        proof = defense.certify(x, threat).certified
        result = attacks.for_threat(threat, seed=seed)(defense, x, threat)
        assert not (proof & result.success).any()
        certified += int(proof.sum())
        flipped += int(result.success.sum())
    assert certified > 0
    assert flipped > 0


@pytest.mark.parametrize("text", ["patch:2x2", "patch:1", "sparse:1", "sparse:1:value"])
@pytest.mark.parametrize("corner", [(0, 0), (0, 6), (4, 0), (4, 6)])
def test_every_corner_is_reached(linear: Linear, text: str, corner: tuple[int, int]) -> None:
    weight = torch.zeros(2, 1, 5, 7)
    weight[1, 0, corner[0], corner[1]] = 1
    defense, threat, x = linear(weight, torch.tensor([0.5, 0.0])), parse_threat(text), torch.zeros(3, 1, 5, 7)
    result = attacks.for_threat(threat)(defense, x, threat)
    assert result.success.all()
    assert (result.adversarial[:, 0, corner[0], corner[1]] > 0.5).all()


def test_random_search_finds_what_gradients_do_not_see() -> None:
    """Two of 16 pixels must both be white before anything happens: on a black image every slope is 0."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].weight[0, [3, 12]] = 1
        network[1].bias.fill_(-1.5)
        network[3].weight.copy_(torch.tensor([[0.0], [1.0]]))
        network[3].bias.copy_(torch.tensor([0.1, 0.0]))
    defense, x = IntervalDefense(network, input_shape=(1, 4, 4), classes=("a", "b")).eval(), torch.zeros(3, 1, 4, 4)
    assert not attacks.for_threat(Sparse(8), iterations=0)(defense, x, Sparse(8)).success.all()
    assert attacks.for_threat(Sparse(8), iterations=400)(defense, x, Sparse(8)).success.all()


def test_climbing_finds_a_content_between_black_and_white() -> None:
    """The answer changes only near one gray value, at which no corner is."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():  # f_1 - f_0 = 0.15 - |x_3 - 0.4|
        network[1].weight.copy_(torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, -1]]))
        network[1].bias.copy_(torch.tensor([-0.4, 0.4]))
        network[3].weight.copy_(torch.tensor([[1.0, 1.0], [0, 0]]))
        network[3].bias.copy_(torch.tensor([0.0, 0.15]))
    defense, x = IntervalDefense(network, input_shape=(1, 2, 2), classes=("a", "b")).eval(), torch.zeros(2, 1, 2, 2)
    assert not attacks.for_threat(Patch(1, 1), steps=0)(defense, x, Patch(1, 1)).success.any()
    result = attacks.for_threat(Patch(1, 1))(defense, x, Patch(1, 1))
    check(defense, x, Patch(1, 1), result)
    assert result.success.all()
