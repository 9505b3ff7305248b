"""Defenses without a certificate on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

MODEL = "mnist-masked-cnn"


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (("certify", MODEL, "--defense", "lgs"), "LocalGradientsSmoothing has no certificate", "patchcert attack"),
        (("certify", "timm:x", "--defense", "watermark", "--patch", "2%"), "has no certificate", "patchcert attack"),
        (("attack", MODEL, "--defense", "lgs", "--masks", "3"), "lgs has no masks", "minority, patchcleanser"),
        (("attack", MODEL, "--defense", "lgs", "--precision", "bfloat16"), "--precision means nothing", "patchcleanser"),
        (("attack", MODEL, "--defense", "lgs", "--threshold", "0.5"), "lgs raises no alarms", "minority"),
        (("attack", MODEL, "--defense", "lgs", "--option", "block=40"), "block 40 does not fit 28x28", "1 to 28"),
        (("attack", MODEL, "--defense", "lgs", "--option", "blok=4"), "blok is not a known entry", "block (a whole"),
        (("attack", MODEL, "--defense", "lgs", "--option", "block"), "--option 'block' cannot be read", "NAME=VALUE"),
        (("attack", MODEL, "--option", "block=2"), "patchcleanser has masks and no settings", "lgs"),
        (("attack", "mnist-ibp-p5", "--option", "block=2"), "ibp, which has no settings to choose", "--defense lgs"),
        (("train", "--defense", "lgs", "--patch", "5"), "lgs cannot be trained", "ibp"),
    ],
)
def test_one_clear_error(patchcert: Any, words: tuple[str, ...], said: str, hint: str) -> None:
    more = ("--limit", "1") if words[0] == "attack" else ()
    found = patchcert(*words, *more)
    assert found.code == 2 and found.out == ""
    error, advice = [line for line in found.err.splitlines() if line.startswith(("error", "hint"))]
    assert said in error and hint in advice


def test_attack_reports_accuracy_alone(patchcert: Any, tmp_path: Path) -> None:
    words = ("attack", MODEL, "--defense", "lgs", "--option", "threshold=0.2", "--attack", "transfer", "--steps", "1")
    found = patchcert(*words, "--patch", "28", "--limit", "1", "--out", str(tmp_path / "run"), "--json", "-")
    assert found.code == 0
    result = json.loads(found.out)
    assert result["guarantee"] == "none" and result["defense"] == "lgs" and result["claims"] == []
    setting = json.loads((tmp_path / "run" / "manifest.json").read_text())["setting"]
    assert setting["threshold"] == 0.2 and setting["block"] == 0
