"""Every option that names what to write is checked before anything is computed; what cannot be printed is one line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from refusals import check_refused

from patchcert_cli.cli import main, show, streams
from patchcert_cli.errors import MachineError

LONG = "x" * 300
MODELS: dict[tuple[str, ...], list[str]] = {
    ("certify",): ["nope"],
    ("attack",): ["nope"],
    ("train",): [],
    ("doctor",): [],
    ("report", "zoo"): [],
    ("report", "attacks"): ["nope"],
    ("report", "runs"): ["nope"],
    ("reproduce",): ["nope"],
    ("convert",): ["nope", "--out", "nope.safetensors"],
    ("zoo", "verify"): ["nope"],
    ("zoo", "add"): ["nope", "--name", "x"],
    ("zoo", "push"): ["nope"],
    ("zoo", "list"): [],
    ("zoo", "show"): ["nope"],
    ("zoo", "pull"): ["nope"],
    ("zoo", "remove"): ["nope"],
}
WRITES = {
    *((command, "--json") for command in MODELS),
    *(
        (command, "--out")
        for command in [
            ("certify",),
            ("attack",),
            ("train",),
            ("zoo", "verify"),
            ("zoo", "add"),
            ("report", "zoo"),
            ("report", "runs"),
            ("reproduce",),
        ]
    ),
    (("report", "attacks"), "--plot"),
    (("certify",), "--plot"),
    (("certify",), "--map"),
    (("attack",), "--plot"),
    (("attack",), "--map"),
    (("attack",), "--save"),
}


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["patchcert", *words])
    with pytest.raises(SystemExit) as stop:
        main.run()
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from leaves(one, (*path, name))
    else:
        yield path, command


def test_every_option_that_writes_is_in_the_list() -> None:
    found = set()
    for path, command in leaves(typer.main.get_command(main.app)):
        for option in command.params:
            if not getattr(option, "is_flag", False) and {"--json", "--out", "--plot", "--map", "--save"} & set(option.opts):
                found.add((path, option.opts[0]))
    assert found == WRITES | {(("convert",), "--out")}  # which classifiers/convert.py checks, as Python does


@pytest.mark.parametrize(("command", "option"), sorted(WRITES), ids=str)
def test_what_cannot_be_written_is_refused_first(
    command: tuple[str, ...],
    option: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    wrong = [("file/x", 2), (LONG, 2), ("/proc/x", 7)]
    wrong += [(".", 2)] if option in ("--json", "--plot", "--map") else [("file", 2), ("pipe", 2)]
    for path, code in wrong:
        found = run(capsys, monkeypatch, *command, *MODELS[command], option, path)
        assert found[:2] == (code, ""), (path, found)
        check_refused(found[2], code, f"]: {option} '")
        assert len(found[2]) < 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("words", [["zoo", "list"], ["zoo", "list", "--json"], ["zoo", "show", "mnist-ibp-p5"], ["--help"]])
def test_a_full_disk_behind_stdout_is_one_line_and_a_reader_that_left_is_none(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:  # what is left in it at the end goes nowhere, and does not fail
        monkeypatch.setattr(sys, "stdout", full)
        code, _, said = run(capsys, monkeypatch, *words)
        assert code == 7
        check_refused(said, 7, "stdout cannot be written to: No space left on device")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as left:
        monkeypatch.setattr(sys, "stdout", left)
        code, _, said = run(capsys, monkeypatch, *words)
        assert (code, said) == (141, "")  # as `git log | head`


def test_a_closed_stdout_is_refused_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    code, _, said = run(capsys, monkeypatch, "certify", "nope", "--patch", "5")
    assert code == 7
    check_refused(said, 7, "stdout is closed", ">/dev/null")


def test_a_full_stderr_stops_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run(capsys, monkeypatch, "zoo", "show", "nope")[0] == 3
        monkeypatch.setattr(sys, "stderr", None)
        assert run(capsys, monkeypatch, "zoo", "show", "nope")[0] == 3


def test_a_table_that_cannot_be_printed_does_not_cost_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with streams.guarded(), pytest.raises(MachineError, match="No space left"):
            show.result([("a", "b")], {"x": 1}, str(tmp_path / "r.json"))
        assert sys.stdout is full
    assert json.loads((tmp_path / "r.json").read_text()) == {"x": 1}


@pytest.mark.parametrize(
    "command", [["certify", "nope"], ["attack", "nope"], ["zoo", "verify", "nope"], ["train", "--patch", "5"]]
)
def test_a_seed_beyond_32_bits_is_refused(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (2**64, 2**32, -1):
        code, out, said = run(capsys, monkeypatch, *command, "--seed", str(seed))
        assert (code, out) == (2, "") and "seed" in said and "Traceback" not in said
        assert seed < 0 or str(2**32 - 1) in said


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("hiden=3", "network 'mlp' has no option 'hiden'"),
        ("classes=3", "network 'mlp' has no option 'classes'"),
        ("hidden=abc", "network option hidden is 'abc', not a list."),
        ("hidden=3,x", "network option hidden[1] is 'x', not a whole number."),
        ("norm=3", "network option norm is 3, not true or false."),
        ("hidden=-3", "network option hidden[0] is -3, not 1 or more."),
        ("hidden=0", "network option hidden[0] is 0, not 1 or more."),
        ("hidden", "--network-option 'hidden' cannot be read"),
    ],
)
def test_wrong_options_of_a_network_are_usage_errors(
    option: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = run(capsys, monkeypatch, "train", "--patch", "5", "--network-option", option, "--out", "run")
    assert (code, out) == (2, "")
    check_refused(err, 2, said)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("defense", "option", "said"),
    [
        ("bagcert", "bits=0", "network option bits is 0, not from 1 to 16."),
        ("bagcert", "bits=40", "network option bits is 40, not from 1 to 16."),
        ("bagcert", "dilations=0,1,1", "network option dilations[0] is 0, not 1 or more."),
        ("bagcert", "widths=0", "network option widths[0] is 0, not 1 or more."),
        ("bagcert", "widths=8,8", "each list needs one entry for each stage: widths has 2, kernels has 3"),
        ("bagcert", "kernels=0,0,0", "network option kernels[0] is 0, not 1 or more"),
        ("bagcert", "mixes=-1,0,0", "network option mixes[0] is -1, not 0 or more."),
        ("bagcert", "padding=-1", "network option padding is -1, not 0 or more."),
        ("smoothing", "bits=-4", "network option bits is -4, not from 1 to 16."),
        ("smoothing", "strides=0", "network option strides[0] is 0, not 1 or more."),
        ("partition", "bits=40", "network option bits is 40, not from 1 to 16."),
        ("partition", "blocks=8,0", "network option blocks[1] is 0, not 1 or more."),
        ("ibp", "channels=4,4", "network 'mlp' has no option 'channels'"),
    ],
)
def test_options_of_a_network_beyond_their_limits_are_refused_before_training(
    defense: str, option: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threat = ["--k", "4"] if defense == "partition" else ["--patch", "5"]
    words = ["train", *threat, "--defense", defense, "--data", "mnist", "--network-option", option, "--out", "run"]
    for more in ([], ["--dry-run"]):
        code, out, err = run(capsys, monkeypatch, *words, *more)
        assert (code, out) == (2, "")
        check_refused(err, 2, said)
        assert not Path("run").exists()


def test_too_long_a_name_of_what_is_read_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (["certify", LONG, "--patch", "5"], ["train", "--recipe", LONG], ["train", "--patch", "5", "--start", LONG]):
        code, out, said = run(capsys, monkeypatch, *words)
        assert (code, out) == (2, "")
        check_refused(said, 2, "too long")
