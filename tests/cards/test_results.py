"""Results and records of runs: one shape for one claim and for several, and both formats are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_folders import make_run, result_of

from patchcert_cli.cards.results import CertifyResult, current_record, current_result, read_records
from patchcert_cli.errors import IntegrityError
from patchcert_cli.threats import Guarantee, Patch

FIRST = {
    "index": 3,
    "label": 1,
    "prediction": 1,
    "certified": True,
    "margin": 0.5,
    "worst": [0, 0, 2, 2],
    "rival": 2,
    "method": "rows",
}
SECOND = {
    "index": 3,
    "label": 1,
    "prediction": 1,
    "claims": [{"certified": True, "margin": 0.5, "worst": [0, 0, 2, 2], "runner_up": 2, "method": "rows"}],
}


def test_records_of_the_first_format_have_the_same_verdicts_in_a_list(tmp_path: Path) -> None:
    assert current_record(FIRST) == SECOND == current_record(SECOND)
    path = tmp_path / "records.jsonl"
    path.write_text(f"{json.dumps(FIRST)}\n{json.dumps(SECOND)}\n")
    assert read_records(path) == [SECOND, SECOND]
    attacked = {"index": 3, "label": 1, "prediction": 1, "attacked": 2, "flipped": True, "queries": 7}
    assert current_record(attacked) == {**attacked, "claims": []}


def test_a_result_of_the_first_format_has_the_same_numbers_in_a_list(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run)
    first = result_of(run)
    second = current_result(first)
    (claim,) = second["claims"]
    assert claim["counts"] == first["counts"] and claim["certified_interval"] == first["certified_interval"]
    assert second["counts"] == {"clean": 9300} and second["seconds"] == first["seconds"]
    assert not {"threat", "method", "certified_accuracy"} & set(second)
    assert current_result(second) == second
    read = CertifyResult.from_dict(first, "here")
    assert read == CertifyResult.from_dict(second, "here")
    assert (read.claims[0].threat, read.claims[0].guarantee) == (Patch(2, 2), Guarantee.RECOVERY)


def test_an_attack_of_the_first_format_keeps_what_is_about_the_attack(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run)
    about = {"attack": {}, "attacked_accuracy": 0.5, "method": "attack", "guarantee": "recovery"}
    joined = current_result(result_of(run, **about))
    assert joined["method"] == "attack" and joined["threat"] == "patch:2x2" and len(joined["claims"]) == 1
    alone = result_of(run, **about, counts={"clean": 9300})
    del alone["certified_accuracy"], alone["certified_interval"]
    assert current_result(alone)["claims"] == []


def test_all_that_is_wrong_with_a_result_is_listed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run)
    with pytest.raises(IntegrityError, match=r"'r.json' .*images is 'x'.*claims\[0\]\.threat is 'line:3'"):
        CertifyResult.from_dict(result_of(run, images="x", threat="line:3"), "r.json")
