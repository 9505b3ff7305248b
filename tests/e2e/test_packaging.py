"""An installed wheel finds its zoo, its bundled digits and its types."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
import zlib
from pathlib import Path

import pytest

from patchcert_cli.catalog import bundled

ROOT = Path(__file__).parents[2]
MOST = 95_000_000  # bytes of a wheel; PyPI takes files of 100 MB (docs/packaging.md)


def test_what_a_wheel_holds_is_not_too_large() -> None:
    """Weights, records, images and code, compressed as a wheel compresses them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name: ROOT / ("zoo" if name == "patchcert_cli.zoo" else name.replace(".", "/")) for name in settings["packages"]}
    data = {path for name, patterns in settings["package-data"].items() for one in patterns for path in folders[name].glob(one)}
    code = {path for folder in folders.values() for path in folder.glob("*.py")}
    sizes = {path: path.stat().st_size for path in data | code}
    assert sizes[ROOT / "zoo/cifar-bagcert-rf7/model.safetensors"] > 500_000 and ROOT / "patchcert_cli/py.typed" in sizes
    packed = sum(len(zlib.compress(path.read_bytes())) for path in sizes)
    assert 50_000_000 < packed < MOST


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wheel_holds_code_zoo_samples_and_types(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("patchcert-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"patchcert_cli/py.typed", "patchcert_cli/samples/mnist-test-images.idx.gz", "patchcert_cli/zoo/__init__.py"}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "patchcert_cli").rglob("*.py")}
    code |= {str(path.relative_to(ROOT)) for path in (ROOT / "patchcert_cli/reporting/site/templates").iterdir()}
    zoo = {f"patchcert_cli/zoo/{name}/{file}" for name in bundled.names() for file in bundled.card(name).files}
    papers = {str(path.relative_to(ROOT)) for path in (ROOT / "patchcert_cli/papers").glob("*.yaml")}
    assert papers and wanted | code | zoo | papers <= names
    assert not any(name.startswith(("zoo/", "tests/")) for name in names)
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = "import patchcert_cli.catalog.bundled as c; print(*c.names()); print(c.folder())"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "site", capture_output=True, text=True, check=True)
    listed, folder = done.stdout.splitlines()
    assert listed.split() == bundled.names()
    assert Path(folder).resolve().is_relative_to((tmp_path / "site").resolve())
