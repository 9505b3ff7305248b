"""Files for services outside of the package say what the package says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import patchcert_cli

ROOT = Path(__file__).parents[2]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_names_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == patchcert_cli.__version__
    assert citation["title"] in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("marker", ["set-up", "tests"])
def test_the_workflow_types_the_commands_of_the_readme(marker: str) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    command = lines[lines.index(f"<!-- {marker} -->") + 2]
    assert command.startswith("python3 -m venv .venv && ")
    steps = [step.get("run", "") for step in read(".github/workflows/tests.yml")["jobs"]["readme"]["steps"]]
    typed = [step.replace('"$BIN/pip"', ".venv/bin/pip").replace('"$BIN/patchcert"', ".venv/bin/patchcert") for step in steps]
    typed = [step.replace('"$BIN/python"', ".venv/bin/python").replace("python -m venv", "python3 -m venv") for step in typed]
    assert any(step and command.endswith(step.removeprefix("python3 -m venv .venv && ")) for step in typed)


def test_pre_commit_runs_what_continuous_integration_runs() -> None:
    hooks = {hook["id"] for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]}
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert hooks == {"ruff-check", "ruff-format", "mypy"}
    assert all(tool in checks for tool in ("ruff check", "ruff format", "mypy"))
