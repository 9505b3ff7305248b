"""The public names exist where docs/python.md lists them, and the Python of the documentation runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import patchcert_cli

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python.md").read_text()


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_all_public_names_are_there_and_documented() -> None:
    tree = ast.parse((ROOT / "patchcert_cli" / "__init__.py").read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    public = set(patchcert_cli.__all__) - {"__version__"}
    assert public <= typed  # what a type checker sees is what there is
    for name in public:
        assert getattr(patchcert_cli, name).__name__ == name
        assert re.search(rf"`{name}\b", PAGE), name


def test_the_python_of_the_documentation_runs() -> None:
    (program,) = blocks(PAGE)
    exec(compile(program, "docs/python.md", "exec"), {})


def test_the_python_of_the_readme_runs() -> None:
    (program,) = blocks((ROOT / "README.md").read_text())
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    exec(compile(program, "README.md", "exec"), {"images": torch.rand(2, 1, 28, 28), "network": network})


def test_the_package_is_imported_without_torch() -> None:
    code = "import sys, patchcert_cli as pc; dir(pc); pc.parse_threat('patch:5x5'); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
