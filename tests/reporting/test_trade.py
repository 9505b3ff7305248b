"""The page about costs shows its measurements and the cards, and the measurements fit together."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from patchcert_cli.cards import weights_sha256
from patchcert_cli.catalog import bundled
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.storage import files
from patchcert_cli.threats import parse_threat

DOCS = Path(__file__).parents[2] / "docs"
DATA = files.read_json(DOCS / "trade.json")
ROWS = DATA["rows"]


def test_the_page_and_its_pictures_show_the_measurements(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_trade.py", "--check"])
    main = runpy.run_path(str(DOCS / "make_trade.py"))["main"]
    assert main() == 0, capsys.readouterr().err
    first = ROWS[0] | {"certified": ROWS[0]["certified"] + 1}
    files.write_json(tmp_path / "trade.json", DATA | {"rows": [first, *ROWS[1:]]})
    main.__globals__["DATA"] = tmp_path / "trade.json"
    assert main() == 1
    said = capsys.readouterr().err
    assert all(f"{name} is out of date: python docs/make_trade.py" in said for name in ("strips.md", "trade.svg", "sizes.svg"))


def test_the_measurements_are_of_these_models_and_masks() -> None:
    assert DATA["sample"] == torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[: len(DATA["sample"])].tolist()
    for row in ROWS:
        assert row["model_sha256"] == weights_sha256(bundled.card(row["model"]).files)
        assert row["verdicts"].count("1") == row["certified"] <= row["clean"] <= row["images"] == len(row["verdicts"])
        if "masks" in row:
            masks = MaskSpec.read(row["masks"]).masks(32, 32)
            masks.cover(parse_threat(row["threat"]))
            assert (masks.sizes, masks.passes) == (row["sizes"], row["pairs"]) and row["passes"] <= row["pairs"]
    own = [row for row in ROWS if row["model"] == DATA["majority"]["model"]]
    found = [row for row in own for masks in DATA["majority"]["masks"] if row.get("masks") == masks]
    assert len(found) == 3 and {row["images"] for row in found} == {DATA["majority"]["images"]}
    keys = [(row["model"], row["threat"], row["own"], str(row.get("masks"))) for row in ROWS]
    assert len(set(keys)) == len(keys)
