"""Several attacks in turn: the best of them for each image, whatever batch it is in, and who flipped it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from patchcert_cli import attacks
from patchcert_cli.attacks import Attack, AttackResult, Combined, Start, Target
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import UnknownName, UnsupportedThreat, UsageError
from patchcert_cli.threats import Patch, Threat, parse_threat

from .test_attack_strength import check, images

Build = Callable[[int], IntervalDefense]
PATCH = Patch(2, 3)


class Flipper(Attack):
    """Knows the answer for the images of its parity, by their numbers; it offers nothing before."""

    kinds: ClassVar[tuple[str, ...]] = ("patch",)
    parity: ClassVar[int] = 0

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        target.logits(x, torch.arange(len(x)))
        found, mine = x.clone(), index % 3 == self.parity
        found[mine, :, 0, 0] = 1
        return found


class Odd(Flipper):
    parity = 1


@pytest.fixture
def pixel(linear: Callable[[Tensor, Tensor], IntervalDefense]) -> IntervalDefense:
    """The first pixel decides."""
    weight = torch.zeros(2, 1, 4, 4)
    weight[1, 0, 0, 0] = 1
    return linear(weight, torch.tensor([0.5, 0.0]))


def test_each_image_is_flipped_by_the_first_that_can(pixel: IntervalDefense) -> None:
    both = Combined(("flipper", "odd"), (Flipper(), Odd()))
    found = both(pixel, torch.zeros(6, 1, 4, 4), Patch(1, 1), index=torch.arange(6))
    assert found.success.tolist() == [True, True, False] * 2
    assert found.by.tolist() == [0, 1, -1] * 2
    assert found.queries.tolist() == [3, 6, 6] * 2  # the clean answer, one pass, and the last answer, of each
    assert found.flipped_at.tolist() == [3, 6, 0] * 2
    check(pixel, torch.zeros(6, 1, 4, 4), Patch(1, 1), found)


@pytest.mark.parametrize("text", ["patch:1x2", "sparse:2"])
def test_all_finds_what_any_finds_and_no_batch_matters(cnn: Build, text: str) -> None:
    defense, threat, x = cnn(1), parse_threat(text), images(4, (3, 6, 6), 1)
    weak = {"steps": 1, "budget": 16} | ({"restarts": 0, "locations": 1} if text[0] == "p" else {"iterations": 2})
    together = attacks.combined(["all"], threat, defense, seed=2, **weak)
    assert together.names == (("patch_pgd", "patch_rs") if text[0] == "p" else ("sparse", "sparse_rs"))
    index = torch.arange(50, 54)
    found = together(defense, x, threat, index=index)
    check(defense, x, threat, found)
    each = [one(defense, x, threat, index=index) for one in together.attacks]
    assert torch.equal(found.success, each[0].success | each[1].success)
    assert torch.equal(found.by == 0, each[0].success)
    assert torch.equal(found.queries, torch.where(each[0].success, each[0].queries, each[0].queries + each[1].queries))
    single = AttackResult.cat([together(defense, x[i : i + 1], threat, index=index[i : i + 1]) for i in range(4)])
    for field in ("success", "prediction", "queries", "flipped_at", "by"):
        assert torch.equal(getattr(single, field), getattr(found, field)), field
    empty = together(defense, x[:0], threat)
    assert empty.adversarial.shape == (0, 3, 6, 6)


def test_the_queries_until_a_flip_are_counted(cnn: Build) -> None:
    defense, x = cnn(0), images(12, (3, 6, 6), 0)
    for name, effort in (("patch_pgd", {"steps": 5}), ("patch_rs", {"budget": 64})):
        found = attacks.for_threat(Patch(1, 1), name, **effort)(defense, x, Patch(1, 1))
        assert found.success.any() and not found.success.all()
        assert torch.equal(found.flipped_at > 0, found.success)
        assert (found.flipped_at[found.success] < found.queries[found.success]).all()
        assert torch.equal(found.by, found.success.long() - 1)


def test_the_most_is_the_sum_and_hints_reach_each(cnn: Build) -> None:
    defense, x = cnn(2), images(5, (3, 6, 6), 3)
    proof = defense.certify(x, PATCH)
    start = Start(proof.worst, proof.runner_up, further=PATCH.locations(6, 6)[None, :3].expand(5, -1, -1))
    assert start.places.shape == (5, 4, 4)
    together = attacks.combined(["patch_rs", "patch_pgd"], PATCH, defense, budget=32, steps=2)
    assert together.names == ("patch_pgd", "patch_rs")  # the default one first
    each = [one.most(defense, PATCH, hinted=True) for one in together.attacks]
    most = together.most(defense, PATCH, hinted=True)
    assert most is not None and most.queries == sum(one.queries for one in each if one is not None)
    found = together(defense, x, PATCH, start=start)
    assert (found.queries <= most.queries + most.answers).all()
    assert not (found.success & proof.certified).any()
    assert Combined(("flipper",), (Flipper(),)).most(defense, PATCH, hinted=True) is None


def test_an_attack_that_does_not_suit_the_defense_is_no_part_of_all(cnn: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacks.by_name("patch_rs"), "suits", classmethod(lambda cls, defense: False))
    assert attacks.combined(["all"], PATCH, cnn(0)).names == ("patch_pgd",)


BAD_LISTS = [
    ("patch_pgd,patch_sr", UnknownName, "patch_rs"),
    ("patch_pgd,,patch_rs", UsageError, "not a list of attacks"),
    ("all,patch_rs", UsageError, "not a list of attacks"),
    ("patch_rs,patch_rs", UsageError, "twice"),
]


@pytest.mark.parametrize(("text", "error", "part"), BAD_LISTS)
def test_a_list_that_is_none_is_refused(text: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        attacks.listed(text)


def test_attacks_that_do_not_know_the_threat_and_strange_options_are_refused(cnn: Build) -> None:
    with pytest.raises(UnsupportedThreat, match="sparse does not know the threat patch:2x3"):
        attacks.combined(["patch_pgd", "sparse"], PATCH, cnn(0))
    with pytest.raises(UsageError, match="none of patch_rs, patch_pgd has an option iterations"):
        attacks.combined(["patch_rs", "patch_pgd"], PATCH, cnn(0), iterations=3)
    assert attacks.listed("patch-rs, patch_pgd") == ["patch_rs", "patch_pgd"]


WRONG_PLACES = [torch.zeros(2, 3, 4), torch.zeros(3, 4), torch.tensor([[[9, 0, 2, 3]]] * 3)]


@pytest.mark.parametrize("further", WRONG_PLACES, ids=["too few", "flat", "outside"])
def test_further_locations_that_do_not_fit_are_refused(cnn: Build, further: Tensor) -> None:
    start = Start(torch.tensor([[0, 0, 2, 3]] * 3), torch.zeros(3), further)
    with pytest.raises(UsageError, match=r"^(further locations|a start) "):
        attacks.for_threat(PATCH)(cnn(0), images(3, (3, 6, 6), 0), PATCH, start=start)
