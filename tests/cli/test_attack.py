"""``patchcert attack``: several attacks in one run, and requests that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import check_refused

from patchcert_cli import checkpoint, defenses
from patchcert_cli.training.recipe import Recipe


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A random MNIST model."""
    recipe = Recipe("patch:5x5", network_options={"hidden": [12]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint.save_defense(tmp_path / "runs" / "a", defenses.build(recipe.config()["deployed"]), recipe.config())
    return "runs/a"


WEAK = ("--steps", "1", "--restarts", "0", "--locations", "1", "--budget", "8")


def test_all_attacks_take_turns(patchcert: Any, model: str) -> None:
    words = ("attack", model, "--patch", "2", "--limit", "4", "--attack", "all", *WEAK)
    done = patchcert(*words, "--json", "all.json")
    assert done.code == 0, done.err
    found = json.loads(Path("all.json").read_text())
    (row,) = [line for line in done.out.splitlines() if line.startswith("flipped ")]
    first, second = found["by"]
    assert f"patch_pgd {first['flipped']} of 4 images, patch_rs {second['flipped']} of {4 - first['flipped']} images left" in row
    assert "in all" in row and found["attack"]["name"] == "patch_pgd,patch_rs"
    listed = json.loads(patchcert(*words[:6], "--attack", "patch_rs,patch_pgd", *WEAK, "--json", "-").out)
    assert listed["records"] == found["records"]  # the same run


REFUSED = [
    (["--attack", "patch_pgd,patch_sr"], 3, "Did you mean patch_rs"),
    (["--attack", "patch_pgd,sparse"], 2, "sparse does not know the threat patch:2x2"),
    (["--attack", "patch_pgd,saved"], 2, "is no part of a list"),
    (["--attack", "patch_rs,patch_rs"], 2, "twice"),
    (["--attack", "all", "--iterations", "3"], 2, "has an option iterations"),
]


@pytest.mark.parametrize(("more", "code", "part"), REFUSED)
def test_what_is_no_list_of_attacks_is_refused(patchcert: Any, model: str, more: list[str], code: int, part: str) -> None:
    done = patchcert("attack", model, "--patch", "2", "--limit", "2", *more)
    assert done.code == code, done.err
    check_refused(done.err[done.err.index("error[") :], code, part)
