from __future__ import annotations

import builtins
import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from model_folders import make_zoo
from typer.testing import CliRunner

from patchcert_cli.catalog import bundled
from patchcert_cli.cli.main import app
from patchcert_cli.errors import IntegrityError, MachineError
from patchcert_cli.layers import integers
from patchcert_cli.layers.integers import Trial
from patchcert_cli.reporting import doctor
from patchcert_cli.storage import files


def facts(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["doctor", "--offline", "--json", "-", *arguments])
    assert done.stdout, (done.output, done.exception)
    value: dict[str, Any] = json.loads(done.stdout)
    assert bool(value["problems"]) == (done.exception is not None)
    return value


def test_a_sound_machine_has_no_problem() -> None:
    value = facts()
    assert value["problems"] == []
    for name in (
        "patchcert",
        "python",
        "torch",
        "torchvision",
        "gpu",
        "convolutions",
        "huggingface_hub",
        "hub",
        "cache",
        "free",
        "zoo",
        "token",
    ):
        assert value["facts"][name]
    assert "0 damaged" in value["facts"]["zoo"]
    assert "10000 of 10000 test images, bundled" in value["facts"]["mnist"]


@pytest.mark.parametrize(
    ("exact", "fast", "said"),
    [
        (None, True, r"float32 \(torch has no integer convolutions here\)"),
        (False, True, r"float32 \(integer convolutions are not exact on this processor\)"),
        (True, False, r"float32 \(integer convolutions are not faster\)"),
        (True, True, r"int8, exact, 2\.5 times as fast as float32"),
    ],
)
def test_it_says_what_convolutions_are_computed_with(
    exact: bool | None, fast: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(Trial("float32", True, 0.005), None)]
    if exact is not None:
        found.append((Trial("int8", exact, 0.002 if fast else 0.006), None))
    monkeypatch.setattr(integers, "trials", lambda layer, shape: found)
    (finding,) = [finding for finding in doctor._torch() if finding.name == "convolutions"]
    assert re.fullmatch(said, finding.value)
    assert finding.problem is None


def test_it_lists_every_extra_for_users() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS.values()) == extras.keys() - {"dev", "docs"}
    assert all(package in facts()["facts"]["extras"] for package in doctor.EXTRAS)


def test_the_hub_is_asked_once_and_its_absence_is_no_problem() -> None:
    findings = {finding.name: finding for finding in doctor.examine()}  # this process runs with HF_HUB_OFFLINE=1
    assert "HF_HUB_OFFLINE forbids asking it" in findings["hub"].value
    assert findings["hub"].problem is None


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    value = facts()
    assert value["facts"]["token"] == "set"
    assert "hf_secret" not in json.dumps(value)


def test_a_damaged_zoo_is_exit_code_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = make_zoo(tmp_path / "zoo")
    monkeypatch.setenv(bundled.ENVIRONMENT, str(tmp_path / "zoo"))
    assert facts()["problems"] == []
    (tmp_path / "zoo" / card.name / files.CONFIG).write_text("{}")
    (problem,) = facts()["problems"]
    assert problem["code"] == IntegrityError.code
    assert "1 models of the bundled zoo are damaged" in problem["problem"]


@pytest.mark.parametrize("package", ["torch", "torchvision"])
def test_a_broken_install_is_exit_code_7_with_the_repair(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *rest: Any, **more: Any) -> Any:
        if name == package:
            raise (ImportError if package == "torch" else RuntimeError)("operator torchvision::nms does not exist")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", broken)
    problems = [finding.problem for finding in doctor._torch() if finding.problem]
    assert len(problems) == 1
    assert isinstance(problems[0], MachineError)
    assert "pip install --force-reinstall torch torchvision" in str(problems[0])


def test_a_full_disk_and_a_bad_data_folder_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1))
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    codes = {problem["code"] for problem in facts("--data-dir", str(tmp_path / "data"))["problems"]}
    assert codes == {7, 6}


def test_a_home_that_is_no_folder_is_a_problem_and_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/dev/null/huggingface")
    value = facts()
    assert value["problems"] == [
        {
            "code": 7,
            "problem": "the cache '/dev/null/huggingface/hub': '/dev/null' is a file. Put the cache elsewhere with HF_HOME.",
        }
    ]
    assert value["facts"]["writable"] == "no" and value["facts"]["token"].startswith("none")
