"""The README keeps its word: every command in it runs, and its table and picture are what the cards say."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from patchcert_cli import data
from patchcert_cli.catalog import bundled
from patchcert_cli.cli import main
from patchcert_cli.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Much smaller than the published networks, and below their numbers.
COMPACT = (
    "cifar-bagcert-rf7",
    "cifar-bagcert-rf7-768",
    "cifar-bagcert-rf7-balanced",
    "cifar-bagcert-rf7-framed",
    "cifar-bagcert-rf7-taught",
    "cifar-bagcert-rf7-taught-long",
    "cifar-bagcert-rf7-wide",
    "cifar-ibp-p2",
    "cifar-ibp-p2-muon",
    "cifar-ibp-p5",
    "cifar-smoothing-column",
)


def block(heading: str) -> list[str]:
    """The lines of the first code block behind a heading or marker."""
    found = re.search(r"```\w*\n(.*?)```", README.split(heading, 1)[1], re.DOTALL)
    assert found is not None
    return [line.split("  #")[0].strip() for line in found[1].splitlines() if line.strip()]


def shortened(command: str) -> list[str]:
    """The command with a bound on its work: full runs take minutes, training hours."""
    words = shlex.split(command)[1:]
    if words[:2] == ["zoo", "verify"]:
        return [*words[: words.index("--limit")], "--limit", "4", "--attack", "none"]
    if words[0] == "train":
        return [*words, "--dry-run"]
    if words[0] in ("certify", "attack") and "--image" not in words:
        words = words[: words.index("--limit")] if "--limit" in words else words
        return [*words, "--limit", "2"]
    return words


def test_every_command_of_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    commands = block("## What you can type")
    assert len(commands) == 27
    picture = data.load("cifar10", "test").pixels[0].permute(1, 2, 0).numpy()
    Image.fromarray(picture).save("cat.png")
    Path("patches").mkdir()
    Image.fromarray(picture[:5, :5]).save("patches/corner.png")
    ours = tmp_path / "runs" / "p5"  # what the train command of the README would have left
    ours.mkdir(parents=True)
    for path in (bundled.folder() / "mnist-ibp-p5").iterdir():
        (ours / path.name).write_bytes(path.read_bytes())
    for command in commands:
        assert command.startswith("patchcert "), command
        monkeypatch.setattr(sys, "argv", ["patchcert", *shortened(command)])
        with pytest.raises(SystemExit) as stop:
            main.run()
        captured = capsys.readouterr()
        assert not stop.value.code, f"{command}: {captured.err}"
        assert captured.out, command


def test_both_set_up_commands_are_one_line_each_and_ci_runs_the_second() -> None:
    (install,), (test,) = block("<!-- set-up -->"), block("<!-- tests -->")
    assert install.startswith("python3 -m venv .venv && ") and install.endswith("patchcert certify --patch 5")
    assert test.endswith("-m pytest")
    extraction = next(line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("command="))
    script = f'{extraction}\nprintf "%s" "$command"'
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == test


def test_table_and_picture_are_what_the_cards_say() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "make_zoo.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in bundled.names():
        assert f"`{name}`" in README


def test_every_bundled_model_is_measured_on_the_whole_split_and_reproducible() -> None:
    found = bundled.cards()
    assert len(found) == len([path for path in (ROOT / "zoo").iterdir() if path.is_dir() and path.name[0] not in "._"])
    assert {"mnist-ibp-p2", "mnist-ibp-p5", "mnist-ibp-k4", "mnist-ibp-k10"} <= set(found)
    starts = {card.recipe.get("start") for card in found.values() if card.status == "measured"}
    for card in found.values():
        if card.public:
            assert card.command.startswith("patchcert certify ")
        else:
            assert Recipe.from_dict(card.recipe).command == card.command
        assert all(result.images == 10_000 for result in card.results)
        if card.status in ("recipe only", "public weights"):
            continue
        if card.status == "trained":  # a step on the way to a model that is measured
            assert card.name in starts and card.validation is not None
            continue
        assert card.status == "measured"
        published, measured = card.report(), card.result()
        assert measured is not None
        if published is None or card.name in COMPACT:
            continue
        assert measured.clean / measured.images >= published.clean
        assert measured.certified / measured.images >= published.certified


def test_a_compact_model_says_so_on_its_card() -> None:
    for name in COMPACT:
        assert "compact" in bundled.card(name).notes
