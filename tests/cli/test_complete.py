"""Completion in the shell, as a shell asks for it: names alone, and no torch."""

from __future__ import annotations

import os
import sys

import pytest

from patchcert_cli import attacks, data, defenses, models
from patchcert_cli.catalog import bundled
from patchcert_cli.cli import complete
from tests import quick_process

# what a shell runs, and then whether torch was imported on the way
PROGRAM = """
import sys
from patchcert_cli.cli import main
sys.argv = ["patchcert"]
try:
    main.run()
finally:
    print("torch" if "torch" in sys.modules else "quick", file=sys.stderr)
"""


def offered(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash is offered for the last word of a line."""
    from patchcert_cli.cli import main

    words = line.split(" ")
    monkeypatch.setenv("_PATCHCERT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    monkeypatch.setattr(sys, "argv", ["patchcert"])
    with pytest.raises(SystemExit) as stop:
        main.run()
    assert not stop.value.code
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("patchcert cert", ["certify"]),
        ("patchcert certify mnist-ibp-p5", ["mnist-ibp-p5", "mnist-ibp-p5-linear", "mnist-ibp-p5-muon"]),
        (
            "patchcert certify mnist-bagcert cifar-bagcert-rf7-",
            [
                f"cifar-bagcert-rf7-{end}"
                for end in ("768", "balanced", "balanced-base", "framed", "large", "taught", "taught-long", "wide")
            ],
        ),
        ("patchcert attack mnist-ibp-k", ["mnist-ibp-k10", "mnist-ibp-k4"]),
        ("patchcert attack mnist-bagcert --attack patch_p", ["patch_pgd"]),
        ("patchcert attack mnist-bagcert --attack patch_pgd,patch_r", ["patch_pgd,patch_rs"]),
        ("patchcert zoo show cifar-partit", ["cifar-partition"]),
        ("patchcert zoo verify mnist-bag", ["mnist-bagcert"]),
        ("patchcert zoo pull mnist-bag", ["mnist-bagcert"]),
        ("patchcert train --recipe cifar-ibp-p5-m", ["cifar-ibp-p5-modern"]),
        ("patchcert train --defense patchg", ["patchguard"]),
        ("patchcert train --network setw", ["setwise"]),
        ("patchcert train --dataset cif", ["cifar10"]),
        ("patchcert train --track wan", ["wandb"]),
        ("patchcert certify --data mn", ["mnist"]),
        ("patchcert certify mnist-bagcert --condition 3.", ["3.1", "3.2", "3.3"]),
        ("patchcert certify mnist-ibp-p5 --bounds lin", ["linear"]),
        ("patchcert reproduce metzen-2021 --table cond", ["conditions"]),
        ("patchcert certify timm:resnet18 --defense hice", ["hicert"]),
        ("patchcert reproduce chiang", ["chiang-2020"]),
        ("patchcert certify ./runs/", []),  # the shell offers files
    ],
)
def test_a_shell_is_offered_names(
    line: str, wanted: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offered(line, capsys, monkeypatch) == wanted


def test_all_names_are_offered() -> None:
    assert complete.models("") == bundled.names()
    assert complete.defenses("") == defenses.names() and complete.networks("") == models.names()
    assert complete.attacks("") == [*attacks.names(), "all", "list"] and complete.one_attack("") == [*attacks.names(), "none"]
    assert complete.datasets("") == [*data.DATASETS, "imagefolder:"]
    assert set(complete.recipes("")) < set(bundled.names())


@pytest.mark.parametrize("line", ["certify mnist-b", "certify --data ", "train --recipe ", "train --track ", "attack --attack "])
def test_completion_is_quick(line: str) -> None:
    environment = {**os.environ, "_PATCHCERT_COMPLETE": "complete_bash", "COMP_WORDS": f"patchcert {line}"}
    environment["COMP_CWORD"] = str(len(line.split(" ")))
    done = quick_process.run(["patchcert"], environment, PROGRAM)
    assert done.returncode == 0 and done.stdout.split() and done.stderr.splitlines()[-1] == "quick", done.stderr
