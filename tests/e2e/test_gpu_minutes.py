"""``scripts/gpu_minutes.sh``: how it shares the time, what it refuses, what it leaves; training itself is replaced."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from patchcert_cli.catalog import bundled

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_minutes.sh"
ORDER = [
    *("cifar-masked-cnn", "cifar-strips-cnn", "mnist-masked-cnn", "cifar-bagcert-rf7-large"),
    *("cifar-smoothing-column-resnet18", "cifar-ibp-p2-guided", "cifar-ibp-p5-modern"),
    *("mnist-ibp-p2", "mnist-ibp-p5", "mnist-ibp-k4", "mnist-ibp-k10"),
]
# leaves the files of a run, and notes that it was called; the weights of cifar-strips-cnn are too large for one file
FAKE = """#!/bin/bash
echo "$*" >>calls
[ "$3" != mnist-ibp-k4 ] || exit "${FAIL:-0}"
out="$9"; mkdir -p "$out"
for name in README.md config.json recipe.yaml metrics.jsonl; do echo "$3" >"$out/$name"; done
size=1000; [ "$3" != cifar-strips-cnn ] || size=40000000
head -c "$size" /dev/zero >"$out/model.safetensors"
echo {} >"${11}"
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a script of bash")


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    fake = Path("fake")
    fake.write_text(FAKE)
    fake.chmod(0o755)
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**os.environ, "PATCHCERT": str(fake.resolve()), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def plan(*arguments: str) -> dict[str, float]:
    """Minutes of each recipe in their order."""
    done = script(*arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not Path("calls").exists()
    rows = [
        re.fullmatch(r"([\d.]+) minutes: \S+ train --recipe (\S+) --max-minutes ([\d.]+) .*", line)
        for line in done.stdout.splitlines()
    ]
    assert all(row and row[1] == row[3] for row in rows)
    return {row[2]: float(row[1]) for row in rows if row}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_order_is_that_of_the_table_and_each_has_a_recipe() -> None:
    assert list(plan("60")) == ORDER
    assert all((bundled.folder() / name / "recipe.yaml").is_file() for name in ORDER)


def test_the_shares_fill_the_time() -> None:
    for minutes in (6, 12, 60, 600):
        shares = plan(str(minutes))
        assert sum(shares.values()) + 0.2 * len(shares) == pytest.approx(minutes, abs=0.05)
        assert min(shares.values()) >= 0.3 - 1e-9
    assert list(plan("12")) == ORDER[:7]  # a hundredth of 12 minutes is too short
    assert plan("2", "mnist-ibp-p5") == {"mnist-ibp-p5": 1.8}
    assert plan("5.4", "mnist-ibp-p5", "cifar-strips-cnn", "mnist-ibp-k4") == {"cifar-strips-cnn": 5.2}
    assert plan("3", "mnist-ibp-p5", "mnist-ibp-p2") == {"mnist-ibp-p2": 1.3, "mnist-ibp-p5": 1.3}


def test_what_is_left_out_is_named() -> None:
    assert script("12", "--dry-run").stderr.splitlines() == [
        f"too little time for {name}: it is left out" for name in reversed(ORDER[7:])
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "no minutes given."),
        ("soon", "'soon' is not a number of minutes."),
        ("-3", "'-3' is not a number of minutes."),
        ("100000", "'100000' minutes are more than 99,999."),
        ("12 mnist-ibp", "'mnist-ibp' is not one of the recipes that this script trains."),
        ("12 --out", "--out needs a value."),
        ("12 --quick", "there is no option --quick."),
        ("0.4 mnist-ibp-p2", "0.4 minutes are below the 0.5 that a recipe needs."),
    ],
)
def test_wrong_input_is_refused_with_a_hint(arguments: str, said: str) -> None:
    done = script(*arguments.split())
    assert done.returncode == 2 and not done.stdout and not Path("calls").exists()
    assert done.stderr.splitlines() == [f"error[2]: {said}", "hint: Type: scripts/gpu_minutes.sh 12 --dry-run"]


def test_results_are_small_files_and_finished_models_are_skipped(tmp_path: Path) -> None:
    command = [
        "9",
        "mnist-ibp-p2",
        "cifar-strips-cnn",
        "--out",
        "there",
        "--runs",
        "work",
        "--data-dir",
        "d",
        "--",
        "--seed",
        "3",
    ]
    command[1:1] = ["mnist-ibp-k4"]
    Path("there").mkdir()
    done = script(*command, FAIL="6")
    assert done.returncode == 6 and "mnist-ibp-k4 ended with exit code 6; the same command goes on here" in done.stderr
    parts = sorted(path.name for path in Path("there").iterdir())
    assert parts == ["cifar-strips-cnn.tar.00", "cifar-strips-cnn.tar.01", "cifar-strips-cnn.tar.02", "mnist-ibp-p2.tar"]
    assert max(path.stat().st_size for path in Path("there").iterdir()) <= 15_000_000
    subprocess.run("cat there/cifar-strips-cnn.tar* | tar x", shell=True, check=True)
    assert (tmp_path / "cifar-strips-cnn" / "model.safetensors").stat().st_size == 40_000_000
    files = {path.name for path in (tmp_path / "cifar-strips-cnn").iterdir()}
    assert files == {"README.md", "config.json", "recipe.yaml", "metrics.jsonl", "model.safetensors", "train.json"}
    calls = Path("calls").read_text().splitlines()
    assert [call.split()[2] for call in calls] == ["cifar-strips-cnn", "mnist-ibp-p2", "mnist-ibp-k4"]
    assert all(call.endswith("--data-dir d --seed 3") for call in calls)
    assert script(*command).returncode == 1  # the fake leaves no files of this one, so nothing is packed
    assert [call.split()[2] for call in Path("calls").read_text().splitlines()[3:]] == ["mnist-ibp-k4"]


def test_ctrl_c_ends_all_of_it() -> None:
    done = script("9", "mnist-ibp-k4", "mnist-ibp-k10", FAIL="130")
    assert done.returncode == 130 and len(Path("calls").read_text().splitlines()) == 1
