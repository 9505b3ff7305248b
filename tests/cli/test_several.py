"""Several models and several threats in one command, and commands that print nothing but what was asked for."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import check_refused

from patchcert_cli import checkpoint, defenses
from patchcert_cli.cli import several
from patchcert_cli.errors import UsageError
from patchcert_cli.training.recipe import Recipe
from tests.evaluation.test_ranks import together


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    """Two random MNIST models in ``runs/a`` and ``runs/b``."""
    recipe = Recipe("patch:5x5", network_options={"hidden": [12]})
    for seed, name in enumerate("ab"):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            checkpoint.save_defense(tmp_path / "runs" / name, defenses.build(recipe.config()["deployed"]), recipe.config())
    return "runs/a", "runs/b"


def manifests() -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in Path("runs").glob("certify-*/manifest.json")}


def test_each_model_is_certified_as_if_alone(patchcert: Any, two: tuple[str, str]) -> None:
    done = patchcert("certify", *two, "--patch", "2", "--limit", "12", "--json", "both.json")
    assert done.code == 0, done.err
    head, *rows = done.out.splitlines()
    assert head.split()[:3] == ["model", "threat", "clean"] and [row.split()[0] for row in rows] == list(two)
    both, together = json.loads(Path("both.json").read_text()), manifests()
    assert [one["model"] for one in both] == list(two) and len(together) == 2
    records = {path: Path(path).read_bytes() for path in (one["records"] for one in both)}
    for name, one in zip(two, both, strict=True):
        alone = json.loads(patchcert("certify", name, "--patch", "2", "--limit", "12", "--fresh", "--json", "-").out)
        assert alone["records"] == one["records"] and alone["claims"] == one["claims"]
        assert Path(one["records"]).read_bytes() == records[one["records"]]
        command = together[Path(one["records"]).parent.name]["command"]
        assert command == f"patchcert certify {name} --patch 2 --limit 12 --json both.json"


def test_an_error_of_one_model_does_not_lose_the_others(patchcert: Any, two: tuple[str, str]) -> None:
    done = patchcert("certify", two[0], "runs/none", two[1], "--patch", "2", "--limit", "4", "--json", "-")
    first, broken, last = json.loads(done.out)
    assert done.code == 3 and (first["model"], last["model"]) == two
    assert broken["model"] == "runs/none" and broken["error"]["code"] == 3 and "runs/none" in broken["error"]["message"]
    assert done.err.count("error[3]: ") == 1
    shown = patchcert("certify", two[0], "runs/none", "--patch", "2", "--limit", "4")
    assert shown.code == 3 and [row.split()[0] for row in shown.out.splitlines()] == ["model", two[0]]


def test_attacks_of_several_models_are_one_table(patchcert: Any, two: tuple[str, str]) -> None:
    words = ("attack", *two, "--patch", "2", "--limit", "2", "--steps", "1", "--locations", "1")
    rows = patchcert(*words).out.splitlines()
    assert [row.split()[0] for row in rows] == ["model", *two] and "right under attack" in rows[0]
    assert [one["method"] for one in json.loads(patchcert(*words, "--json").out)] == ["attack", "attack"]
    planned = patchcert(*words, "--dry-run", "--json", "-")
    assert [one["images"] for one in json.loads(planned.out)] == [2, 2], planned.err


@pytest.mark.parametrize("flag", ["--out", "--plot", "--image", "--map"])
def test_what_is_about_one_model_is_refused_with_several(patchcert: Any, flag: str) -> None:
    done = patchcert("certify", "mnist-ibp-p2", "mnist-ibp-p5", "--patch", "2", flag, "x.png")
    assert done.code == 2
    check_refused(done.err, 2, f"{flag} is for one model")


@pytest.mark.parametrize(
    ("words", "threats"),
    [
        ("--patch 1..3", ["patch:1x1", "patch:2x2", "patch:3x3"]),
        ("--patch 1,2,5", ["patch:1x1", "patch:2x2", "patch:5x5"]),
        ("--patch 2x5,5x2", ["patch:2x5", "patch:5x2"]),
        ("--patch 1%,2%", ["patch:1%", "patch:2%"]),
        ("--patch 4,1..2,4", ["patch:4x4", "patch:1x1", "patch:2x2"]),
        ("--k 1..3", ["sparse:1", "sparse:2", "sparse:3"]),
        ("--k 1,2,4 --unit value", ["sparse:1:value", "sparse:2:value", "sparse:4:value"]),
    ],
)
def test_lists_of_threats_are_certified_from_one_pass(
    patchcert: Any, two: tuple[str, str], words: str, threats: list[str]
) -> None:
    done = patchcert("certify", two[0], *words.split(), "--limit", "3", "--json", "-")
    assert done.code == 0, done.err
    assert [claim["threat"] for claim in json.loads(done.out)["claims"]] == threats


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("attack runs/a --patch 1,2", "--patch 1,2 names 2 threat models"),
        ("attack runs/a --k 1..9", "--k 1..9 names 9 threat models"),
        ("train --patch 1..3", "--patch 1..3 names 3 threat models"),
        ("zoo verify mnist-ibp-p2 --patch 1,2", "names 2 threat models"),
        ("certify runs/a --patch 1,,2", "invalid patch ''"),
        ("certify runs/a --patch 1,x", "invalid patch 'x'"),
        ("certify runs/a --k 1,0", "invalid sparse budget '0'"),
        ("certify runs/a --k 3..1", "invalid range '3..1'"),
        ("certify runs/a --k one", "invalid sparse budget 'one'"),
    ],
)
def test_lists_that_a_command_cannot_take_are_refused(patchcert: Any, two: tuple[str, str], words: str, part: str) -> None:
    done = patchcert(*words.split())
    assert (done.code, done.out) == (2, "")
    check_refused(done.err, 2, part)


def test_quiet_prints_the_result_and_nothing_else(patchcert: Any, two: tuple[str, str]) -> None:
    words = ("certify", two[0], "--patch", "2", "--limit", "3")
    loud = patchcert(*words)
    for flag in ("-q", "--quiet"):
        done = patchcert(*words, flag)
        assert (done.out, done.err) == (loud.out, "")
    assert loud.err and patchcert(*words).err  # the next command is not quiet
    assert patchcert("certify", "runs/none", "--patch", "2", "-q").err.startswith("error[3]: ")


def test_attacks_are_chosen_by_name(patchcert: Any, two: tuple[str, str]) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in patchcert("attack", "--attack", "list").out.splitlines()}
    assert rows["patch_pgd"] == ["patch", "patch"] and rows["sparse"] == ["sparse", "sparse"] and rows["saved"][-1] == "-"
    words = ("attack", two[0], "--patch", "2", "--limit", "2", "--steps", "1", "--locations", "1", "--json", "-")
    default, named = patchcert(*words), patchcert(*words, "--attack", "patch_pgd")
    assert json.loads(default.out)["records"] == json.loads(named.out)["records"]
    for more, code, part in (
        (["--attack", "patch_pdg"], 3, "Did you mean patch_pgd"),
        (["--attack", "wind"], 3, "sparse (sparse)"),
        (["--attack", "sparse"], 2, "does not know the threat patch:2x2"),
        (["--attack", "saved"], 2, "--saved FOLDER"),
    ):
        done = patchcert(*words[:6], *more)
        assert done.code == code, done.err
        check_refused(done.err[done.err.index("error[") :], code, part)


def test_ranks_share_what_is_alone_and_the_first_has_all_in_order() -> None:
    names, taken = ["d", "a", "bad", "c"], []

    def attempt(name: str) -> dict[str, Any]:
        taken.append(name)
        return {"image": name, "model_sha256": "one"} if name != "bad" else {"image": name, "error": {"code": 2}}

    first, second = together(2, lambda _: list(several._shared(names, attempt, "image")))
    assert [one["image"] for one in first] == names and first == [attempt(name) for name in names] and second == []
    assert sorted(taken[:4]) == sorted(names)
    assert list(several._shared(names, attempt, "image")) == first
    other = threading.Event()

    def unlike(rank: int) -> dict[str, Any]:
        _ = other.set() if rank else other.wait(20)  # each rank takes some
        return {"model_sha256": str(rank)}

    first, _ = together(2, lambda rank: list(several._shared(names, lambda _: unlike(rank), "image")))
    assert isinstance(first, UsageError) and "the ranks have other models" in first.message
    refused = together(3, lambda _: list(several._shared(names[:2], attempt, "image")))
    assert all(isinstance(one, UsageError) and "3 processes are more than the 2 images" in one.message for one in refused)
    refused = together(2, lambda rank: list(several._shared([*names, str(rank)], attempt, "image")))
    assert all(isinstance(one, UsageError) and "another images" in one.message for one in refused)
