"""What a notebook shows, and tables of pandas: the same values as the objects have, and a clear error without pandas."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from patchcert_cli import attacks, data
from patchcert_cli.certificate import Certificate, Tally
from patchcert_cli.errors import MachineError
from patchcert_cli.evaluation import evaluate
from patchcert_cli.evaluation.models import EvaluatedModel
from patchcert_cli.evaluation.task import Claim, EvaluationTask
from patchcert_cli.threats import Patch
from tests.examples import tiny


def certificate(count: int = 12) -> Certificate:
    return tiny("ibp").certify(torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)), "patch:1x1")


def test_a_certificate_is_a_table_of_its_images() -> None:
    pandas = pytest.importorskip("pandas")
    found = certificate()
    table = found.to_pandas()
    assert isinstance(table, pandas.DataFrame) and len(table) == 12
    assert table["certified"].tolist() == found.certified.tolist() and table["certified"].dtype == bool
    assert table["margin"].tolist() == found.margin.tolist()
    assert table[["top", "left", "height", "width"]].to_numpy().tolist() == found.worst.tolist()
    assert set(table["threat"]) == {"patch:1x1"} and set(table["arithmetic"]) == {"bounded"}
    together = pandas.concat([table, tiny("bagcert").certify(torch.rand(2, 1, 4, 4), "patch:1x1").to_pandas()])
    assert together.groupby("arithmetic").size().to_dict() == {"bounded": 12, "exact": 2}


def test_a_notebook_shows_the_first_images() -> None:
    found = certificate()
    shown = found._repr_html_()
    assert f"{int(found.certified.sum())} of 12 answers certified" in shown and "patch:1x1" in shown
    assert shown.count("<tr>") == 1 + 10 and "and 2 more rows" in shown
    assert "more rows" not in certificate(10)._repr_html_()


def test_texts_cannot_be_read_as_html() -> None:
    other = Certificate(**{**vars(certificate()), "method": "<script>"})
    assert "<script>" not in other._repr_html_() and "&lt;script&gt;" in other._repr_html_()


def test_counts_are_one_row() -> None:
    pytest.importorskip("pandas")
    tally = Tally(10, 8, 5)
    (row,) = tally.to_pandas().to_dict("records")
    assert row["certified_accuracy"] == 0.5 and (row["certified_low"], row["certified_high"]) == tally.certified_interval
    assert "8 of 10 images right, 5 right and certified" in tally._repr_html_()
    assert "0 of 0 images" in Tally(0, 0, 0)._repr_html_()


def test_an_attack_is_a_table_of_its_images() -> None:
    pytest.importorskip("pandas")
    result = attacks.for_threat(Patch(2, 2), "patch_rs", budget=5)(tiny("ibp"), torch.rand(3, 1, 4, 4), Patch(2, 2))
    table = result.to_pandas()
    assert table["success"].tolist() == result.success.tolist() and table["queries"].tolist() == result.queries.tolist()
    assert f"{int(result.success.sum())} of 3 answers changed" in result._repr_html_()


def test_a_result_is_a_table_of_its_claims(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    images = data.Images(
        torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3).long(), torch.arange(3), "toy", "test", "here"
    )
    model = EvaluatedModel(tiny("ibp"), "tiny", "ibp", "0" * 64, "folder")
    task = EvaluationTask(model, images, (Claim(Patch(1, 1)), Claim(Patch(2, 2))), 3)
    result = evaluate.certify(task, tmp_path / "run")
    for one in (result, evaluate.certify(task, tmp_path / "run")):  # computed, and read
        table = one.to_pandas()
        assert table["threat"].tolist() == ["patch:1x1", "patch:2x2"]
        assert table["certified_accuracy"].tolist() == [claim["certified_accuracy"] for claim in result["claims"]]
        assert "tiny on 3 images of toy test" in one._repr_html_() and "top" not in table


def test_without_pandas_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MachineError, match="needs pandas") as problem:
        Tally(1, 1, 1).to_pandas()
    assert "patchcert[pandas]" in problem.value.hint
