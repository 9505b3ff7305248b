"""Every example runs, and the package of ``examples/outside_defense`` is found and held against the exhaustive enemy."""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from patchcert_cli import attacks, data, defenses, models
from patchcert_cli.cli import main
from patchcert_cli.errors import UnknownName, UsageError
from patchcert_cli.threats import Patch, Sparse
from tests.soundness import arena

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "examples.md").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_a_script_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "plot.py":
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out
    assert f"examples/{name}" in PAGE


def run_cell(source: str, names: dict[str, Any]) -> str | None:
    """What a notebook shows below a cell: its last expression as HTML; None where it ends with a statement or with None."""
    cell = ast.parse(source)
    last = cell.body.pop() if isinstance(cell.body[-1], ast.Expr) else None
    exec(compile(cell, "cell", "exec"), names)
    value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None
    return None if value is None else value._repr_html_()


def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib").use("agg")
    pytest.importorskip("pandas")
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("patchcert is here, so nothing is installed"))
    names: dict[str, Any] = {}
    tables = [html for cell in cells if (html := run_cell("".join(cell["source"]), names))]
    assert len(tables) == 4 and all("<table" in html for html in tables)  # certificate, pandas, attack, own network
    assert "and 90 more rows" in tables[0] and names["table"]["right"].sum() == names["counts"].clean
    assert 0 < names["own_certificate"].certified.sum() < 100


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the outside package is installed into, by pip and without a network."""
    pytest.importorskip("setuptools")
    place = tmp_path_factory.mktemp("outside")
    source = place / "source"
    for path in sorted((EXAMPLES / "outside_defense").rglob("*")):  # a copy, since building writes beside the source
        if path.is_file() and "__pycache__" not in path.parts:
            copy = source / path.relative_to(EXAMPLES / "outside_defense")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--no-compile"]
    command = [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(place / "site"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return place / "site"


@pytest.fixture
def outside(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(installed))
    yield
    for name in [name for name in sys.modules if name.startswith("patchcert_blocks")]:
        del sys.modules[name]


def command(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["patchcert", *text.split()])
    with pytest.raises(SystemExit) as stop:
        main.run()
    assert not stop.value.code, text


@pytest.mark.usefixtures("outside")
def test_an_outside_package_is_trained_certified_and_attacked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("mnist", "test")
    for number in range(200):
        folder = Path("digits") / str(digits.labels[number].item())
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.pixels[number, 0].numpy()).save(folder / f"{number}.png")
    images = "--data imagefolder:./digits@28"
    command(
        f"train --defense blocks {images} --patch 2 --epochs 2 --network-option width=8 --batch-size 32 --out run", monkeypatch
    )
    command(f"certify run {images} --patch 1,2 --limit 50 --json certified.json", monkeypatch)
    found = json.loads(Path("certified.json").read_text())
    assert "blocks" in json.dumps(found)
    command(f"attack run {images} --patch 2 --limit 10 --attack noise", monkeypatch)


@pytest.mark.usefixtures("outside")
def test_the_proof_of_the_outside_defense_withstands_everything() -> None:
    assert "blocks" in defenses.names() and "noise" in attacks.names() and "block_scorer" in models.names()
    threats = [Patch(1, 1), Patch(2, 2), Patch(1, 3), Sparse(1), Sparse(2)]
    score = arena.check(arena.registered_arenas("blocks"), threats)
    assert score.violations == []
    assert score.certified > 50 and score.broken > 50


@pytest.mark.usefixtures("outside")
def test_the_outside_defense_refuses_other_networks() -> None:
    deployed = {"defense": "blocks", "input_shape": [1, 4, 4], "classes": ["a", "b"]}
    options = {"hidden": [4], "mean": [0.0], "std": [1.0]}
    with pytest.raises(Exception, match="block_scorer"):
        defenses.build({**deployed, "network": {"name": "mlp", "options": options}})


def test_without_the_package_its_names_are_unknown() -> None:
    with pytest.raises(UnknownName, match="blocks"):
        defenses.by_name("blocks")


def entry_points(folder: Path, name: str, lines: str) -> None:
    place = folder / f"{name}-1.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (place / "entry_points.txt").write_text(lines)


def test_broken_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site"
    entry_points(
        folder, "one", "[patchcert.defenses]\ntwice = one_module\nbroken = no_such_module_xyz\nempty = json\nibp = json\n"
    )
    entry_points(folder, "two", "[patchcert.defenses]\ntwice = two_module\nfunction = json:dumps\n")
    monkeypatch.syspath_prepend(str(folder))
    for name, words in (
        ("twice", "one_module and two_module"),
        ("broken", "no_such_module_xyz"),
        ("empty", "exactly one Defense"),
        ("function", "json:dumps"),
    ):
        with pytest.raises(UsageError, match=words):
            defenses.by_name(name)
    assert defenses.by_name("ibp").__name__ == "IntervalDefense"  # an outside package cannot replace what is here
