"""Every block of ``docs/claims.md`` runs, by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "claims.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
BLOCKS = [
    pytest.param(block, id=f"{section.splitlines()[0][:40]}-{number}")
    for section in SECTIONS
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs_and_asserts(block: str) -> None:
    assert "assert " in block
    exec(compile(block, "docs/claims.md", "exec"), {"__name__": "claims"})


def test_every_section_has_a_block_and_what_remains_true() -> None:
    assert len(SECTIONS) == 8
    for section in SECTIONS:
        assert "```python" in section
        assert "*What remains true.*" in section
