"""Ensembles: answers from the members' answers, certificates from their sets, files, refusals and attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli import attacks, checkpoint
from patchcert_cli.defenses import Defense, surrogates
from patchcert_cli.defenses.ensemble import Ensemble
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.threats import ALERT, Guarantee, Patch, Patches, Sparse
from tests.examples import CLASSES, SHAPE, tiny
from tests.soundness.arena import changes, draw_images, pixel_votes, places, random_region


def made(rule: str, seed: int = 0) -> Ensemble:
    members = {
        "majority": [random_region("single", seed), random_region("single", seed + 10), random_region("single", seed + 20)],
        "cross": [random_region("single", seed), random_region("single", seed + 10)],
        "sum": [random_region("single", seed), random_region("single", seed + 10)],
    }
    return Ensemble(members[rule], rule).eval()


def brought_about(defense: Defense, images: Tensor, threat: Patch) -> list[list[set[int]]]:
    """For each image and location the answers that some content leads to."""
    mask, value = changes(defense.input_shape, threat)
    attacked = torch.where(mask[:, None], value[:, None], images)
    after = defense.predict(attacked.flatten(0, 1)).reshape(len(places(defense.input_shape, threat)), -1, len(images))
    return [[set(after[place, :, image].tolist()) for place in range(len(after))] for image in range(len(images))]


@pytest.mark.parametrize("rule", ["majority", "cross", "sum"])
def test_no_change_of_a_location_brings_about_what_its_set_lacks(rule: str) -> None:
    certified = broken = 0
    for seed in range(3):
        defense = made(rule, seed) if rule != "sum" else Ensemble([pixel_votes(), pixel_votes(0.2 + 0.1 * seed)], rule).eval()
        images = draw_images(defense.input_shape, 8, seed)
        for threat in (Patch(1, 2), Patch(2, 2)):
            found = defense.certify(images, threat, forced=rule != "cross")
            assert torch.equal(found.prediction, defense.predict(images))
            for image, sets in enumerate(brought_about(defense, images, threat)):
                answer = int(found.prediction[image])
                if found.forced is not None:
                    claimed = [set(one.nonzero()[:, 0].tolist()) for one in found.forced[image]]
                    assert all(real <= mine for real, mine in zip(sets, claimed, strict=True))
                    assert bool(found.certified[image]) == all(one == {answer} for one in claimed)
                allowed = {answer, ALERT} if rule == "cross" else {answer}
                held = all(real <= allowed for real in sets)
                assert held or not found.certified[image]
                certified, broken = certified + int(found.certified[image]), broken + (not held)
                if found.or_alarm is not None:
                    for label in range(len(defense.classes)):
                        assert not found.or_alarm[image, label] or all(real <= {label, ALERT} for real in sets)
    assert certified > 5 and broken > 5


@pytest.mark.parametrize("rule", ["majority", "cross", "sum"])
def test_answers_are_made_of_the_members(rule: str) -> None:
    defense, x = made(rule), torch.rand(30, 1, 4, 5)
    each = torch.stack([member.predict(x) for member in defense._each])
    answers = defense.predict(x)
    if rule == "sum":
        votes = [member.votes(x).sums() for member in defense._voting]
        assert torch.equal(answers, (votes[0] + votes[1]).argmax(dim=1))
    for image, given in enumerate(each.t().tolist()):
        if rule == "majority":
            assert int(answers[image]) == max(given, key=lambda one: (given.count(one), -given.index(one)))
        elif rule == "cross":
            assert int(answers[image]) == (given[0] if len(set(given)) == 1 else ALERT)
    assert torch.equal(torch.cat([defense.predict(part) for part in torch.split(x, 7)]), answers)
    assert defense.guarantee is (Guarantee.DETECTION if rule == "cross" else Guarantee.RECOVERY)


def test_weights_of_a_sum() -> None:
    members, x = [random_region("single", 0), random_region("pairs", 0)], torch.rand(20, 1, 4, 5)
    with pytest.raises(UsageError, match=r"member 2 takes \(1, 6, 6\)"):
        Ensemble(members, "sum")
    first, second = random_region("single", 1), random_region("single", 2)
    heavy = Ensemble([first, second], "sum", weights=(1, 1000))
    assert torch.equal(heavy.predict(x), second.predict(x))
    mine, alone = heavy.certify(x, Patch(1, 1)), second.certify(x, Patch(1, 1))
    assert bool((mine.certified | ~alone.certified | (alone.margin <= 1)).all())
    for rule, weights in (("sum", (1,)), ("sum", (0, 1)), ("cross", (1, 1))):
        with pytest.raises(UsageError, match="do not fit 2 members"):
            Ensemble([first, second], rule, weights=weights)


def test_what_makes_no_ensemble() -> None:
    one, other = tiny("bagcert"), tiny("ibp")
    refused: list[tuple[list[Defense], str, str]] = [
        ([one], "cross", "an ensemble of 1 members"),
        ([one] * 6, "sum", "an ensemble of 6 members"),
        ([one, other], "majority", "a majority of 2 members is the answer of the first"),
        ([one, other], "vote", "no rule 'vote'"),
        ([one, other], "sum", "member 2 .* has no votes"),
        ([one, tiny("minority")], "cross", "member 2 .* cannot say what can be forced"),
        ([one, tiny("roots")], "sum", "member 2 .* cannot say what can be forced"),
    ]
    for members, rule, said in refused:
        with pytest.raises(UsageError, match=said):
            Ensemble(members, rule)
    renamed = tiny("ibp")
    renamed.classes = ("x", "y", "z")
    with pytest.raises(UsageError, match="has the classes x, y, z, but member 1"):
        Ensemble([one, renamed], "cross")
    x = torch.rand(2, *SHAPE)
    for threat in (Sparse(2), Patches(2, Patch(1, 1))):
        with pytest.raises(UnsupportedThreat, match="an attacker has 2"):
            Ensemble([one, other], "cross").certify(x, threat)
    assert not Ensemble([one, other], "cross").locates


def config(members: list[dict[str, Any]], rule: str) -> dict[str, Any]:
    return {"format": 2, "deployed": Ensemble.deployed(members, rule), "dataset": "mnist", "threat": "patch:2x2"}


def section(widths: list[int]) -> dict[str, Any]:
    plan = {"widths": widths, "kernels": [1], "dilations": [1], "mixes": [0], "mean": [0.4], "std": [0.5]}
    network = {"name": "region", "options": plan}
    return {"defense": "bagcert", "input_shape": list(SHAPE), "classes": list(CLASSES), "network": network}


def test_an_ensemble_is_saved_and_loaded(tmp_path: Path) -> None:
    whole = config([section([4]), section([5]), section([6])], "majority")
    defense = checkpoint.defenses.build(whole["deployed"])
    for member in defense.members:
        member.calibrate(torch.rand(8, *SHAPE))
    checkpoint.save_defense(tmp_path, defense, whole)
    loaded, read = checkpoint.load_defense(tmp_path)
    assert isinstance(loaded, Ensemble) and loaded.rule == "majority" and read["deployed"] == whole["deployed"]
    assert all(name.startswith("members.") for name in loaded.state_dict())
    x = torch.rand(6, *SHAPE)
    assert torch.equal(loaded.certify(x, "patch:2x2").margin, defense.eval().certify(x, "patch:2x2").margin)


def test_configurations_of_members_are_checked(tmp_path: Path) -> None:
    whole = config([section([4]), section([4])], "sum")
    defense = checkpoint.defenses.build(whole["deployed"])
    checkpoint.save_defense(tmp_path, defense, whole)
    for change, said in (
        ({"members": [section([4]), {**section([4]), "input_shape": [1, 0, 4]}]}, "member 2: input_shape"),
        ({"members": [section([4]), whole["deployed"]]}, "member 2: network is not"),
        ({"members": "all"}, "members is not a short list"),
        ({"members": [section([4])]}, "an ensemble of 1 members"),
        ({"rule": "any"}, "rule is 'any'"),
    ):
        broken = {**whole, "deployed": {**whole["deployed"], **change}}
        (tmp_path / "config.json").write_text(checkpoint.json.dumps(broken))
        with pytest.raises(IntegrityError, match=said):
            checkpoint.load_defense(tmp_path)


def test_attacks_flip_no_certified_answer() -> None:
    for rule in ("majority", "sum", "cross"):
        defense = made(rule, 1)
        x = draw_images(defense.input_shape, 8, 3)
        found = defense.certify(x, Patch(2, 2))
        outcome = attacks.by_name("patch_pgd")(steps=4)(defense, x, Patch(2, 2))
        assert not bool((outcome.success & found.certified).any())
        assert len(surrogates(defense)) == 1 + len(defense.members)


def test_maps_and_costs() -> None:
    defense = Ensemble([tiny("bagcert"), tiny("patchcleanser")], "cross")
    x = torch.rand(3, *SHAPE)
    found = defense.certify(x, Patch(2, 2))
    assert torch.equal(defense.margin_map(x, Patch(2, 2)).flatten(1).amin(dim=1), found.margin)
    assert defense.passes_per_image() == tiny("patchcleanser").passes_per_image()
    assert found.passes is not None and found.arithmetic == "measured"
    assert made("sum").passes_per_image() is None
