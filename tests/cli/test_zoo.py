from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from model_folders import make_run, make_zoo, write_result
from typer.testing import CliRunner, Result

from patchcert_cli import cards
from patchcert_cli.catalog import bundled
from patchcert_cli.cli.zoo import app, list_
from patchcert_cli.errors import ClaimError, IntegrityError, PatchcertError, UnknownName, UsageError
from patchcert_cli.storage import files

NAME = "small-ibp-p2"


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(bundled.ENVIRONMENT, str(tmp_path / "zoo"))
    make_zoo(tmp_path / "zoo")
    return tmp_path / "zoo"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "p2")
    return tmp_path / "runs" / "p2"


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: str | Path) -> Result:
    done = call(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def fail(kind: type[PatchcertError], *arguments: str | Path) -> str:
    done = call(*arguments)
    assert isinstance(done.exception, kind), (done.output, done.exception)
    assert done.stdout == ""
    return str(done.exception)


def test_list_prints_one_unclipped_line_per_model(zoo: Path) -> None:
    name = "a-model-with-a-name-that-is-far-longer-than-any-column-of-a-terminal-would-be"
    make_zoo(zoo, name)
    lines = succeed("list").stdout.splitlines()
    heads = ["name", "defense", "threat", "clean", "certified", "published", "arithmetic", "size", "licence", "where"]
    assert lines[0].split() == heads
    size = f"{(zoo / NAME / files.WEIGHTS).stat().st_size / 1e3:.1f}"
    assert [line.split()[0] for line in lines[1:]] == [name, NAME]
    shares = ["93.00%", "60.00%", "60.40%"]
    assert lines[2].split()[1:] == ["ibp", "patch:2x2", *shares, "bounded", size, "kB", "apache-2.0", "bundled"]


@pytest.mark.parametrize(
    ("width", "heads", "left"),
    [
        (200, ["name", "defense", "threat", "clean", "certified", "published", "arithmetic", "size", "licence", "where"], ""),
        (80, ["name", "defense", "threat", "clean", "certified", "published", "arithmetic"], "not shown: size, licence, where;"),
        (40, ["name", "threat", "clean"], "not shown: defense, certified, published,"),
        (10, ["name"], "not shown: defense, threat, clean,"),
    ],
)
def test_a_terminal_gets_the_columns_that_it_has_room_for(
    zoo: Path, width: int, heads: list[str], left: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    for names in ((NAME,), (NAME, "a-model-with-a-name-that-is-far-longer-than-any-column-of-a-terminal-would-be")):
        make_zoo(zoo, names[-1])
        list_(dataset=None, threat=None, json=None, quiet=False)
        captured = capsys.readouterr()
        lines = re.sub(r"\x1b\[[0-9;]*m", "", captured.out).splitlines()
        assert {line.split()[0] for line in lines[1:] if line} == set(names)
        if len(names) == 1:
            assert lines[0].split() == heads and captured.err.startswith(left)


def test_list_filters(zoo: Path) -> None:
    assert NAME in succeed("list", "--dataset", "mnist", "--threat", "patch").stdout
    done = succeed("list", "--threat", "sparse")
    assert (done.stdout, done.stderr) == ("", "no model fits\n")
    assert "mnist" in fail(UnknownName, "list", "--dataset", "mnits")
    assert "patch or sparse" in fail(UsageError, "list", "--threat", "linf")


def test_list_json_is_one_value(zoo: Path) -> None:
    (one,) = json.loads(succeed("list", "--json").stdout)
    assert (one["name"], one["clean"], one["certified"], one["images"], one["published"]) == (NAME, 0.93, 0.6, 10000, 0.604)
    assert json.loads(succeed("list", "--dataset", "cifar10", "--json").stdout) == []


def test_list_tells_what_has_no_weights_or_measurement(zoo: Path, run: Path) -> None:
    succeed("add", run, "--name", "fresh")
    (zoo / NAME / files.WEIGHTS).unlink()
    rows = {line.split()[0]: line.split() for line in succeed("list").stdout.splitlines()}
    assert rows["fresh"][3:6] == ["-", "-", "-"]
    assert rows[NAME][-1] == "missing"


def test_list_imports_neither_torch_nor_the_hub_client(zoo: Path) -> None:
    code = (
        "import sys; from patchcert_cli.cli.zoo import app, list_; app(['list'], standalone_mode=False);"
        "print(sorted({'torch', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert NAME in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_show_prints_the_card(zoo: Path) -> None:
    text = succeed("show", NAME).stdout
    assert text == (zoo / NAME / files.CARD).read_text().split("\n---\n\n", 1)[1]
    for part in ("60.00% (6000/10000)", "60.40%", "learning_rate: 1.0e-05", "patchcert train --patch 2 --seed 3", "torch 2.6.0"):
        assert part in text
    assert cards.Card.from_dict(json.loads(succeed("show", NAME, "--json").stdout)) == cards.Card.read(zoo / NAME)
    assert f"Did you mean {NAME}?" in fail(UnknownName, "show", "small-ibp-p3")


def test_pull_says_where_the_files_are_and_why(zoo: Path) -> None:
    done = succeed("pull", NAME)
    assert done.stdout.splitlines()[0] == str(zoo / NAME)
    assert "sha256 ok" in done.stdout
    assert "not published on the Hub yet" in done.stderr
    value = json.loads(succeed("pull", NAME, "--offline", "--json").stdout)
    assert (value["folder"], value["source"]) == (str(zoo / NAME), "bundled")
    assert value["sha256"] == value["files"][files.WEIGHTS]["sha256"]


def test_pull_refuses_weights_that_changed(zoo: Path) -> None:
    weights = zoo / NAME / files.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert "sha256" in fail(IntegrityError, "pull", NAME)


def test_add_copies_a_run_with_its_results(zoo: Path, run: Path, tmp_path: Path) -> None:
    result = write_result(tmp_path / "r", run)
    command = (
        "add",
        run,
        "--name",
        "new",
        "--result",
        result,
        "--published",
        "patch:2=0.92/0.604",
        "--source",
        "table 1",
        "--json",
    )
    card = cards.Card.from_dict(json.loads(succeed(*command).stdout))
    assert card == bundled.card("new")
    assert (card.results[0].certified, str(card.published[0].threat), card.published[0].source) == (6000, "patch:2x2", "table 1")
    assert (
        "measured, 1 results" in succeed("add", run, "--name", "new", "--result", result, "--to", tmp_path / "elsewhere").stdout
    )
    assert "exists" in fail(UsageError, "add", run, "--name", "new")


@pytest.mark.parametrize("changes", [{"model_sha256": "0" * 64}, {"full_split": False}])
def test_add_refuses_other_weights_and_parts_of_the_split(
    zoo: Path, run: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    fail(ClaimError, "add", run, "--name", "new", "--result", write_result(tmp_path / "r", run, **changes))
    assert not (zoo / "new").exists()


@pytest.mark.parametrize(
    "text", ["patch:2", "patch:2=92/60", "patch:2=0.5/0.6", "patch:2=a/b", "round:2=0.9/0.6", "patch:2=nan/nan"]
)
def test_published_numbers_are_checked(zoo: Path, run: Path, text: str) -> None:
    fail(UsageError, "add", run, "--name", "new", "--published", text)


@pytest.mark.parametrize("command", ["list", "show", "pull", "add"])
def test_help_ends_with_examples(command: str) -> None:
    assert f"patchcert zoo {command} " in succeed(command, "--help").stdout
