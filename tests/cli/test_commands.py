"""The command line as a user types it: results on stdout, one clear line and the documented exit code for every mistake."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import check_refused

from patchcert_cli import checkpoint, defenses
from patchcert_cli.cli import main
from patchcert_cli.cli.interrupts import interrupts
from patchcert_cli.training.recipe import Recipe


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A random MNIST model in ``runs/m``."""
    recipe = Recipe("patch:5x5", network_options={"hidden": [12]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checkpoint.save_defense(tmp_path / "runs" / "m", defenses.build(recipe.config()["deployed"]), recipe.config())
    return "runs/m"


def test_certify_prints_a_table_and_leaves_a_run_folder(patchcert, model: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", model, "--patch", "5", "--limit", "20")
    assert done.code == 0
    for word in ("patch:5x5", "clean", "certified", "/20)", "95 % interval", "recovery", "subset"):
        assert word in done.out
    assert "bundled" in done.err
    folder = next(Path("runs").glob("certify-m-patch-5x5-*"))
    assert {p.name for p in folder.iterdir()} == {"manifest.json", "records.jsonl", "result.json", ".lock"}
    again = patchcert("certify", model, "--patch", "5", "--limit", "20")
    assert "is complete" in again.err and again.out == done.out


def test_json_on_stdout_is_one_object_and_nothing_else(patchcert, model: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", model, "--patch", "2%", "--limit", "20", "--json", "-")
    assert done.code == 0
    value = json.loads(done.out)
    assert value["claims"][0]["threat"] == "patch:2%" and value["images"] == 20
    attacked = patchcert("attack", model, "--k", "1", "--limit", "5", "--iterations", "2", "--json", "-")
    assert attacked.code == 0
    assert {"attacked_accuracy", "queries", "claims"} <= set(json.loads(attacked.out))
    filed = patchcert("certify", model, "--patch", "2%", "--limit", "20", "--json", "r.json")
    assert json.loads(Path("r.json").read_text())["claims"][0]["threat"] == "patch:2%" and "certified" in filed.out


def test_the_models_own_threat_is_the_default(patchcert, model: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", model, "--limit", "10", "--json", "-")
    assert json.loads(done.out)["claims"][0]["threat"] == "patch:5x5"
    done = patchcert("certify", model, "--threat", "sparse:2:value", "--limit", "10", "--json", "-")
    assert json.loads(done.out)["claims"][0]["threat"] == "sparse:2:value"
    done = patchcert("certify", model, "--threat", "sparse", "--k", "3", "--unit", "pixel", "--limit", "10", "--json", "-")
    assert json.loads(done.out)["claims"][0]["threat"] == "sparse:3"


def test_a_dry_run_writes_nothing(patchcert, model: str) -> None:  # type: ignore[no-untyped-def]
    before = sorted(map(str, Path().rglob("*")))
    for words in (("certify", model, "--patch", "5"), ("attack", model, "--patch", "5", "--limit", "4", "--steps", "1")):
        done = patchcert(*words, "--dry-run", "--json", "-")
        assert done.code == 0 and json.loads(done.out)["atoms"] == 576
    assert patchcert("train", "--threat", "sparse", "--k", "10", "--dry-run").code == 0
    assert sorted(map(str, Path().rglob("*"))) == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("certify M --patch abc", 2, "invalid patch 'abc'."),
        ("certify M --patch 0", 2, "invalid patch '0'"),
        ("certify M --patch 29", 2, "patch 29x29 does not fit a 28x28 image."),
        ("certify M --patch 3x29", 2, "patch 3x29 does not fit"),
        ("certify M --threat sparse --k 0", 2, "invalid sparse budget '0'"),
        ("certify M --threat sparse --k 785", 2, "--k 785 exceeds the 784 pixels of a 28x28 image."),
        ("certify M --threat sparse", 2, "this model's own threat is patch:5x5"),
        ("certify M --threat blur", 2, "Use one of: patch, sparse, patches."),
        (
            "certify M --threat patches --patch 5",
            2,
            "--threat patches does not say how many, or how large.",
        ),
        ("certify M --patch 5 --k 3", 2, "--patch and --k describe different attackers"),
        ("certify M --patch 5 --unit value", 2, "--unit goes with --k only"),
        ("certify M --k 3 --unit byte", 2, "invalid unit 'byte'."),
        ("certify M --patch 5 --limit 0", 2, "--limit 0 leaves no image"),
        ("certify M --patch 5 --batch-size 0", 2, "--batch-size is 0."),
        ("certify M --patch 5 --device tpu", 2, "invalid device 'tpu'"),
        ("certify M --patch 5 --device mps", 2, "proofs need float64, which device 'mps' does not compute in"),
        ("certify M --patch 5 --device cuda:99", 7, "no device 'cuda:99'"),
        ("certify M --patch 5 --dataset mnits", 3, "Did you mean mnist?"),
        ("certify M --patch 5 --dataset cifar10 --data-dir .", 6, "no cifar10 test data"),
        ("certify mnist-ibp-p6 --patch 5", 3, "Did you mean mnist-ibp-p"),
        ("certify runs/none --patch 5", 3, "no folder 'runs/none'"),
        ("certify model.pth --patch 5", 5, "looks like a pickle, which could run code: it was not opened"),
        ("attack M --k 2 --restarts 3", 2, "has no option restarts"),
        ("train", 2, "no threat model given"),
        ("train --patch 5", 6, "Fetch it with: patchcert train --patch 5 --download"),
        ("train --patch 5 --network-option wide", 2, "--network-option 'wide' cannot be read"),
        ("train --patch 5 --option colour=red", 2, "colour is not a known entry"),
        ("train --patch 40 --epochs 0", 2, "epochs is 0, not 1 or more"),
        ("train --recipe nope --patch 5", 3, "no model 'nope'"),
    ],
)
def test_bad_input_is_one_clear_line(patchcert, model: str, words: str, code: int, said: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert(*words.replace(" M ", f" {model} ").split())
    assert (done.code, done.out) == (code, "")
    check_refused(done.err[done.err.index("error[") :], code, said)  # what is noted before it may stay


def test_a_run_folder_of_other_settings_is_refused(patchcert, model: str) -> None:  # type: ignore[no-untyped-def]
    assert patchcert("certify", model, "--patch", "5", "--limit", "5", "--out", "here").code == 0
    done = patchcert("certify", model, "--patch", "4", "--limit", "5", "--out", "here")
    assert done.code == 2 and "made with other settings (threat 'patch:5x5', not 'patch:4x4')" in done.err
    assert patchcert("certify", model, "--patch", "4", "--limit", "5", "--out", "here", "--fresh").code == 0


def test_a_broken_certificate_exits_8(patchcert, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from patchcert_cli.certifiers.bounds import rounding

    real = rounding.prove

    def sure(*given, **options):  # type: ignore[no-untyped-def]
        proof = real(*given, **options)
        proof.margin.fill_(1e9)
        return proof

    monkeypatch.setattr(rounding, "prove", sure)
    done = patchcert("attack", model, "--patch", "14", "--limit", "8", "--steps", "2")
    assert done.code == 8 and "certified images were flipped" in done.err
    assert "certified images flipped" in done.out


def test_help_is_quick_and_loads_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['patchcert', '--help']\n"
        "from patchcert_cli.cli.main import run\n"
        "try:\n    run()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules"
    )
    for words in ("'--help'", "'certify', '--help'", "'train', '--help'"):
        done = subprocess.run(
            [sys.executable, "-c", program.replace("'--help'", words)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Usage: patchcert" in done.stdout


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("cert", "no such command 'cert'", "Type: patchcert -h"),
        ("certify --ptch 5", "no such option: --ptch", "Type: patchcert certify -h"),
        ("certify --limit many", "invalid value for '--limit'", "Type: patchcert certify -h"),
        ("zoo show", "missing argument 'NAME'", "Type: patchcert zoo show -h"),
        ("certify --patch", "option '--patch' requires an argument", "Type: patchcert certify -h"),
    ],
)
def test_what_is_typed_wrongly_is_one_line_and_a_hint(patchcert: Any, words: str, message: str, hint: str) -> None:
    done = patchcert(*words.split())
    assert (done.code, done.out) == (2, "")
    first, second = done.err.splitlines()
    assert first.startswith(f"error[2]: {message}") and first[-1] in ".?" and second == f"hint: {hint}"


def test_ctrl_c_is_one_line_wherever_a_command_is(patchcert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchcert_cli.catalog.bundled.names", stopped)
    done = patchcert("zoo", "list")
    assert done.code == 130 and done.err.splitlines()[0] == "error[130]: interrupted." and len(done.err.splitlines()) == 2


def test_of_several_ranks_the_first_says_what_all_found(patchcert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchcert_cli.cli.main._as_rank", lambda: None)
    assert patchcert("certify", "--ptch", "5").err
    monkeypatch.setenv("RANK", "1")
    done = patchcert("certify", "--ptch", "5")
    assert (done.code, done.err) == (2, "")
    assert patchcert("certify", "--threat", "what").err, "an error that may be of this rank alone"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCERT_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["patchcert", "certify", "--patch", "abc"])
    from patchcert_cli.errors import UsageError

    with pytest.raises(UsageError):
        main.run()


def test_ctrl_c_during_an_import_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "import signal",
        "try:",
        "    signal.raise_signal(signal.SIGINT)",
        "except KeyboardInterrupt:",
        "    pass",
        "ended = True",
    ]
    (tmp_path / "swallowing_module.py").write_text("\n".join(lines))
    (tmp_path / "waiting_module.py").write_text("import signal\nwhile True:\n    signal.raise_signal(signal.SIGINT)\n")
    monkeypatch.syspath_prepend(tmp_path)
    outside, before = signal.getsignal(signal.SIGINT), signal.default_int_handler  # a program in the background may ignore it
    signal.signal(signal.SIGINT, before)

    def waits() -> None:
        with interrupts():
            assert importlib.import_module("swallowing_module").ended
            threading.Event().wait(30)

    def stops() -> None:
        with interrupts():
            signal.raise_signal(signal.SIGINT)

    def insists() -> None:
        with interrupts():
            importlib.import_module("waiting_module")

    try:
        for action in (waits, stops, insists):
            with pytest.raises(KeyboardInterrupt):
                action()
            assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, outside)
