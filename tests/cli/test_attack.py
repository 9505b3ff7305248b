"""``patchcert attack``: several attacks in one run, and requests that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import check_refused

from patchcert_cli import checkpoint, defenses
from patchcert_cli.evaluation.adversarial_images import png
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
    more = ("--save", "kept", "--plot", "queries.svg", "--json", "-")
    listed = patchcert(*words[:6], "--attack", "patch_rs,patch_pgd", *WEAK, *more)
    again = json.loads(listed.out)
    assert again["records"] == found["records"]  # the same run
    assert again["saved"]["images"] == found["flipped"] == len(list(Path("kept").glob("*.png")))
    assert Path("queries.svg").read_text().startswith("<?xml")
    folder = str(Path(found["records"]).parent)
    assert patchcert("report", "attacks", folder, folder, "--plot", "two.svg").out == "two.svg\n"
    refused = patchcert("report", "attacks", folder, "runs/a", "--plot", "three.png")
    assert refused.code == 5 and not Path("three.png").exists()


def test_one_image_is_attacked_and_drawn(patchcert: Any, model: str) -> None:
    Path("one.png").write_bytes(png(torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(1))))
    words = ("attack", model, "--image", "one.png", "--patch", "9", *WEAK[:-2])
    done = patchcert(*words, "--map", "map.png", "--save", "kept", "--json", "one.json")
    assert done.code == 0, done.err
    found = json.loads(Path("one.json").read_text())
    assert found["map"] == "map.png" and Path("map.png").read_bytes()[:4] == b"\x89PNG"
    assert found["flipped"] and Path("kept/0.png").exists() and f"to {found['attacked_class']} after" in done.out
    assert "rounded to 8 bits" in done.out


REFUSED = [
    (["--attack", "patch_pgd,patch_sr"], 3, "Did you mean patch_rs"),
    (["--attack", "patch_pgd,sparse"], 2, "sparse does not know the threat patch:2x2"),
    (["--attack", "patch_pgd,saved"], 2, "cannot be in a list"),
    (["--attack", "patch_rs,patch_rs"], 2, "twice"),
    (["--attack", "all", "--iterations", "3"], 2, "has an option iterations"),
    (["--map", "map.png"], 2, "--map draws one image"),
    (["--resize"], 2, "--resize goes with --image"),
    (["--image", "one.png"], 2, "--limit does not go with --image"),
    (["--save", "runs"], 2, "is not empty and holds no adversarial images"),
]


@pytest.mark.parametrize(("more", "code", "part"), REFUSED)
def test_what_does_not_go_together_is_refused(patchcert: Any, model: str, more: list[str], code: int, part: str) -> None:
    done = patchcert("attack", model, "--patch", "2", "--limit", "2", *more)
    assert done.code == code, done.err
    check_refused(done.err[done.err.index("error[") :], code, part)
