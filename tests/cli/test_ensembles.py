"""``certify --ensemble`` and ``--top`` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from patchcert_cli import checkpoint, defenses
from patchcert_cli.cards.results import CertifyResult
from patchcert_cli.errors import IntegrityError
from patchcert_cli.training.recipe import Recipe

SMALL = {"widths": [6, 6, 6], "mixes": [0, 0, 1]}


@pytest.fixture(autouse=True)
def models(tmp_path: Path) -> None:
    """Three random CIFAR-10 region scorers, ``runs/a`` to ``runs/c``, which vote for class 2 nearly everywhere, else for 3."""
    recipe = Recipe("patch:5x5", "cifar10", "bagcert", network_options=SMALL)
    for seed, name in enumerate("abc"):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            defense = defenses.build(recipe.config()["deployed"])
            with torch.no_grad():
                defense.scorer.head.bias.copy_(torch.tensor([-0.5, -0.5, 0.6, 0.0, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5]))
            defense.calibrate(torch.rand(8, 3, 32, 32))
            checkpoint.save_defense(tmp_path / "runs" / name, defense, recipe.config())


def refused(outcome, said: str) -> None:  # type: ignore[no-untyped-def]
    assert outcome.code == 2 and said in outcome.err, outcome.err


def test_several_models_are_one_defense(patchcert) -> None:  # type: ignore[no-untyped-def]
    given = ("--patch", "2", "--limit", "12", "--json", "-")
    for rule, names in (("majority", "abc"), ("cross", "ab"), ("sum", "ab")):
        found = json.loads(patchcert("certify", *(f"runs/{name}" for name in names), "--ensemble", rule, *given).out)
        assert found["model"] == f"{rule}:" + "+".join(f"runs/{name}" for name in names) and found["defense"] == "ensemble"
        (claim,) = found["claims"]
        assert claim["guarantee"] == ("detection" if rule == "cross" else "recovery") and claim["arithmetic"] == "exact"
        manifest = json.loads((Path(found["records"]).parent / "manifest.json").read_text())
        setting = manifest["setting"]
        assert setting["rule"] == rule and [one["model"] for one in setting["members"]] == [f"runs/{name}" for name in names]
    attacked = json.loads(
        patchcert("attack", "sum:runs/a+runs/b", "--patch", "2", "--limit", "1", "--steps", "1", "--json", "-").out
    )
    assert attacked["broken"] == [] and attacked["defense"] == "ensemble"


def test_what_cannot_be_combined_is_refused(patchcert) -> None:  # type: ignore[no-untyped-def]
    for words, said in (
        (("runs/a", "--ensemble", "sum"), "--ensemble combines 2 to 5 models, and 1 are given"),
        (("runs/a", "runs/b", "--ensemble", "best"), "no rule 'best' for an ensemble"),
        (("runs/a", "runs/b", "--ensemble", "majority"), "a majority of 2 members is the answer of the first one"),
        (("runs/a", "mnist-bagcert", "--ensemble", "cross"), "mnist-bagcert was trained on mnist, but runs/a on cifar10"),
        (("runs/a", "cifar-ibp-p5", "--ensemble", "sum"), "member 2 (IntervalDefense) has no votes"),
        (("runs/a", "runs/b", "--ensemble", "sum", "--top", "2"), "no proof that an answer stays among the first 2"),
    ):
        refused(patchcert("certify", *words, "--patch", "2", "--limit", "2"), said)
    sparse = ("--threat", "sparse", "--k", "2", "--limit", "2")
    refused(patchcert("certify", "runs/a", "runs/b", "--ensemble", "sum", *sparse), "with sparse:2 an attacker has 2")


def test_the_right_class_among_the_first(patchcert) -> None:  # type: ignore[no-untyped-def]
    given = ("certify", "runs/a", "--patch", "2", "--limit", "40")
    alone, found = (json.loads(patchcert(*given, *more, "--json", "-").out) for more in ((), ("--top", "2")))
    assert "top" not in alone["claims"][0] and found["claims"][0]["top"] == 2
    assert found["counts"] == alone["counts"], "the accuracy of the answer itself"
    records = [json.loads(line) for line in Path(found["records"]).read_text().splitlines()]
    clean = certified = 0
    for record in records:
        (verdict,) = record["claims"]
        assert verdict["ranking"][0] == record["prediction"] and verdict["stays"][0] == verdict["certified"]
        if record["label"] in verdict["ranking"]:
            clean, certified = clean + 1, certified + verdict["stays"][verdict["ranking"].index(record["label"])]
    assert found["claims"][0]["counts"] == {"clean": clean, "certified": certified}
    assert clean > alone["claims"][0]["counts"]["clean"] and certified >= alone["claims"][0]["counts"]["certified"]
    table = patchcert(*given, "--top", "2").out
    assert "certified top-2" in table and "clean top-2" in table
    with pytest.raises(IntegrityError, match="about the first 2 classes"):
        CertifyResult.from_dict(found, "result.json")


def test_tops_that_mean_nothing_are_refused(patchcert) -> None:  # type: ignore[no-untyped-def]
    for top in ("0", "10", "-1"):
        outcome = patchcert("certify", "runs/a", "--patch", "2", "--limit", "2", "--top", top)
        refused(outcome, f"the first {top} of 10 classes make no claim")
    refused(patchcert("certify", "runs/a", "--patch", "2", "--top", "2", "--condition", "3.2", "--limit", "2"), "one answer")
    masked = patchcert("certify", "cifar-masked-cnn", "--patch", "2", "--top", "2", "--limit", "2")
    refused(masked, "no proof that an answer stays among the first 2")


def test_one_image_and_its_first_classes(patchcert) -> None:  # type: ignore[no-untyped-def]
    from PIL import Image

    Image.new("RGB", (32, 32), (90, 120, 30)).save("one.png")
    found = json.loads(patchcert("certify", "runs/a", "--image", "one.png", "--patch", "2", "--top", "3", "--json", "-").out)
    (claim,) = found["claims"]
    assert claim["top"] == 3 and claim["ranking"][0] == found["class"] and claim["stays"][0] == claim["certified"]
    text = patchcert("certify", "runs/a", "--image", "one.png", "--patch", "2", "--top", "3").out
    assert "first 3" in text and claim["ranking"][1] in text
