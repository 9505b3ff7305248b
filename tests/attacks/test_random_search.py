"""patch_rs and sparse_rs: random search keeps the rules, finds what enumeration finds, and needs no gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patchcert_cli import attacks
from patchcert_cli.attacks import AttackResult, Start, Target
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import UsageError
from patchcert_cli.threats import parse_threat

from .test_attack_strength import check, exhaustive, images

Build = Callable[[int], IntervalDefense]
THREATS = {"patch:2x3": "patch_rs", "patch:1": "patch_rs", "sparse:3": "sparse_rs", "sparse:4:value": "sparse_rs"}


class WithoutGradients(IntervalDefense):
    """Its logits carry no gradient, as those of an ONNX file."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


@pytest.mark.parametrize(("text", "name"), THREATS.items())
def test_results_keep_the_rules(cnn: Build, text: str, name: str) -> None:
    defense, threat, x = cnn(0), parse_threat(text), images(8, (3, 6, 6), 0)
    check(defense, x, threat, attacks.by_name(name)(seed=1, budget=64)(defense, x, threat))


@pytest.mark.parametrize(("text", "name"), [("patch:2x2", "patch_rs"), ("sparse:1", "sparse_rs"), ("sparse:2", "sparse_rs")])
def test_small_networks_are_attacked_nearly_as_well_as_by_enumeration(mlp: Build, text: str, name: str) -> None:
    threat = parse_threat(text)
    best = found = 0
    for seed in range(6):
        defense, x = mlp(seed), images(6, (1, 4, 4), seed)
        expected, proof = exhaustive(defense, x, threat), defense.certify(x, threat).certified
        result = attacks.by_name(name)(budget=600)(defense, x, threat)
        assert not (result.success & proof).any()
        best += int(expected.sum())
        found += int((result.success & expected).sum())
    assert best >= 3
    assert found >= 0.9 * best


@pytest.mark.parametrize(("text", "name"), THREATS.items())
def test_batches_and_their_order_do_not_matter(cnn: Build, text: str, name: str) -> None:
    defense, threat, x = cnn(1), parse_threat(text), images(5, (3, 6, 6), 1)
    attack, index = attacks.by_name(name)(seed=3, budget=48), torch.arange(100, 105)
    whole = attack(defense, x, threat, index=index)
    single = AttackResult.cat([attack(defense, x[i : i + 1], threat, index=index[i : i + 1]) for i in range(5)])
    for field in ("success", "prediction", "queries"):
        assert torch.equal(getattr(single, field), getattr(whole, field)), field
    torch.testing.assert_close(single.adversarial, whole.adversarial)


@pytest.mark.parametrize(("text", "name"), [("patch:2x2", "patch_rs"), ("sparse:2", "sparse_rs")])
def test_no_gradient_is_needed(mlp: Build, text: str, name: str) -> None:
    threat, flips = parse_threat(text), 0
    for seed in range(4):
        plain, x = mlp(seed), images(6, (1, 4, 4), seed)
        blind = WithoutGradients(plain.network, input_shape=plain.input_shape, classes=plain.classes).eval()
        result = attacks.by_name(name)(budget=100)(blind, x, threat)
        assert torch.equal(result.success, attacks.by_name(name)(budget=100)(plain, x, threat).success)
        flips += int(result.success.sum())
    assert flips > 0


def test_the_search_for_a_patch_begins_where_the_hint_says(linear: Callable[[Tensor, Tensor], IntervalDefense]) -> None:
    weight = torch.zeros(2, 1, 9, 9)
    weight[1, 0, 7:, 7:] = 1
    defense, threat = linear(weight, torch.tensor([0.5, 0.0])), parse_threat("patch:2x2")
    x, attack = torch.zeros(40, 1, 9, 9), attacks.by_name("patch_rs")(budget=1)
    location, goal = torch.tensor([[7, 7, 2, 2]]).expand(40, 4), torch.ones(40, dtype=torch.int64)
    hinted = attack(defense, x, threat, start=Start(location, goal)).success.float().mean()
    assert hinted > 0.5  # one candidate each: stripes of a corner color at the only place that matters
    assert attack(defense, x, threat).success.float().mean() < 0.3


@pytest.mark.parametrize("name", ["patch_rs", "sparse_rs"])
@pytest.mark.parametrize("option", [{"budget": 0}, {"proposals": 0}])
def test_options_out_of_range_are_refused(name: str, option: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(option))} 0 is out of range"):
        attacks.by_name(name)(**option)


def test_random_search_begins_at_every_location_of_the_hint(linear: Callable[[Tensor, Tensor], IntervalDefense]) -> None:
    weight = torch.zeros(2, 1, 9, 9)
    weight[1, 0, 7, 7] = 1
    defense = linear(weight, torch.tensor([0.5, 0.0]))
    x, goal = torch.zeros(40, 1, 9, 9), torch.ones(40, dtype=torch.int64)
    first, other = torch.tensor([[0, 0, 1, 1]]).expand(40, 4), torch.tensor([[7, 7, 1, 1]]).expand(40, 4)
    patch, pixel = parse_threat("patch:1"), parse_threat("sparse:1")
    search = attacks.by_name("patch_rs")(budget=4, proposals=4)
    hint = Start(first, goal, other[:, None])
    assert search(defense, x, patch, start=hint).success.float().mean() > 0.3  # one candidate in four, of a random corner color
    assert search(defense, x, patch, start=Start(first, goal)).success.float().mean() < 0.2
    for text, share in (("sparse:1", 0.5), ("sparse:1:value", 0.5)):
        found = attacks.by_name("sparse_rs")(budget=4, proposals=4)(defense, x, parse_threat(text), start=Start(other, goal))
        assert found.success.float().mean() > share  # two candidates in four
    assert attacks.by_name("sparse_rs")(budget=4, proposals=4)(defense, x, pixel).success.float().mean() < 0.2


def test_the_class_of_the_hint_is_among_the_rivals(cnn: Build) -> None:
    defense, x = cnn(0), images(6, (3, 6, 6), 0)
    everyone, location = torch.arange(6), torch.tensor([[0, 0, 1, 1]]).expand(6, 4)
    ranked = Target(defense, x).rivals(x, everyone, 3)
    for at in range(3):
        rivals = Target(defense, x, Start(location, ranked[:, at])).rivals(x, everyone, 2)
        assert torch.equal(rivals[:, 0], ranked[:, 0])
        assert torch.equal(rivals[:, 1], ranked[:, max(at, 1)])
