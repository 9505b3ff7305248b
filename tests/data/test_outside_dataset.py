"""A data set of an installed package: found by its entry point, checked like all others, refused in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from patchcert_cli import data
from patchcert_cli.errors import DataError, UnknownName, UsageError

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "dataset.md"
MODULE = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Put a package with this module in place of an installed one; its data set has the module's name."""

    def installed(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[patchcert.datasets]\n{name} = {name}\n", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    return installed


def test_the_module_of_the_page_is_a_data_set(install) -> None:  # type: ignore[no-untyped-def]
    install("stripes", MODULE)
    images = data.open_dataset("stripes").load("test")
    assert images.name == "stripes"
    assert tuple(images.pixels.shape) == (100, 1, 8, 8)
    assert images.labels.tolist() == [0, 1] * 50
    with pytest.raises(UsageError, match="cannot be downloaded"):
        data.open_dataset("stripes").load("test", download=True)
    with pytest.raises(UnknownName, match="stripes"):
        data.open_dataset("stripe")


@pytest.mark.parametrize(
    ("name", "source", "error", "said"),
    [
        ("raising", "raise RuntimeError('no licence')", UsageError, "no licence"),
        ("empty", "", UsageError, "does not define data set 'empty'"),
        ("renamed", MODULE, UsageError, "does not define data set 'renamed'"),
    ],
)
def test_a_module_that_is_none_is_refused(install, name: str, source: str, error: type[Exception], said: str) -> None:  # type: ignore[no-untyped-def]
    install(name, source)
    with pytest.raises(error, match=said):
        data.open_dataset(name)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("floats", "return torch.rand(4, 1, 8, 8), torch.zeros(4)", "uint8"),
        ("larger", "return torch.zeros(4, 1, 9, 8, dtype=torch.uint8), torch.zeros(4)", "has shape"),
        ("foreign", "return torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.full((4,), 2)", "has label 2"),
        ("lost", "raise FileNotFoundError('stripes.bin')", "stripes.bin"),
    ],
)
def test_what_it_reads_is_checked(install, name: str, line: str, said: str) -> None:  # type: ignore[no-untyped-def]
    body = MODULE.replace('"stripes"', f'"{name}"')
    install(name, body[: body.index("    generator =")] + f"    {line}\n")
    with pytest.raises(DataError, match=said):
        data.open_dataset(name).load("test")
