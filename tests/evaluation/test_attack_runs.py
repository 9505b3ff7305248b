"""Runs of attacks: who flipped which image within how many queries, also after an interruption and of earlier versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from patchcert_cli import attacks
from patchcert_cli.evaluation import attack_results, evaluate, hints
from patchcert_cli.evaluation.run_folder import Record
from patchcert_cli.progress import Silent
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch

from .test_evaluate import make_task, no_time, read

LOOK = {"steps": 2, "restarts": 0, "locations": 2, "budget": 8}


def both(task: Any) -> attacks.Combined:
    return attacks.combined(["all"], task.threat, task.model.defense, **LOOK)


def test_each_record_names_the_attack_and_the_queries(tmp_path: Path) -> None:
    task = make_task(count=12, batch_size=4)
    found = evaluate.attack(task, both(task), {}, tmp_path / "run")
    records = read(tmp_path / "run")
    flipped = [r for r in records if r["flipped"]]
    assert {r["by"] for r in flipped} <= {"patch_pgd", "patch_rs"} and len(flipped) == found["flipped"] > 0
    assert all(r["by"] is None and "flipped_at" not in r for r in records if not r["flipped"])
    assert all(0 < r["flipped_at"] < r["queries"] for r in flipped)
    first, second = found["by"]
    assert first == {"attack": "patch_pgd", "images": 12, "flipped": sum(r["by"] == "patch_pgd" for r in flipped)}
    assert second["images"] == 12 - first["flipped"] and first["flipped"] + second["flipped"] == found["flipped"]
    right = [r for r in flipped if r["prediction"] == r["label"]]
    assert found["curve"][-1] == [max(r["queries"] for r in records), len(right)]
    for queries, count in found["curve"][:-1]:
        assert sum(r["flipped_at"] <= queries for r in right) == count


class Stop(Silent):
    """Ctrl-C after the first batch."""

    def update(self, done: int, total: int, text: str) -> None:
        if done:
            raise KeyboardInterrupt


def test_several_attacks_resume_and_give_the_same_records(tmp_path: Path) -> None:
    task = make_task(count=6, batch_size=2)
    evaluate.attack(task, both(task), {}, tmp_path / "whole", clock=no_time)
    with pytest.raises(Exception, match="interrupted at 2 of 6"):
        evaluate.attack(task, both(task), {}, tmp_path / "run", clock=no_time, progress=Stop())
    evaluate.attack(task, both(task), {}, tmp_path / "run", clock=no_time)
    assert read(tmp_path / "run") == read(tmp_path / "whole")


def test_records_of_earlier_versions_are_read_and_have_no_curve(tmp_path: Path) -> None:
    task = make_task(count=4)
    attacker = attacks.for_threat(task.threat, steps=1, restarts=0, locations=1)
    evaluate.attack(task, attacker, {}, tmp_path / "run")
    path = tmp_path / "run" / files.RECORDS
    rows = [{key: value for key, value in row.items() if key != "flipped_at"} for row in read(tmp_path / "run")]
    assert any(row["flipped"] for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run" / files.RESULT).unlink()
    again = evaluate.attack(task, attacker, {}, tmp_path / "run")
    assert again["flipped"] == sum(row["flipped"] for row in rows) and "curve" not in again and "by" not in again


def row(at: int | None, queries: int, right: bool = True) -> Record:
    return {"label": 1, "prediction": int(right), "flipped": at is not None, "queries": queries} | (
        {"flipped_at": at} if at else {}
    )


def test_a_curve_counts_right_images_and_is_short() -> None:
    assert attack_results.curve([]) == []
    assert attack_results.curve([row(None, 9)]) == [[9, 0]]
    found = attack_results.curve([row(5, 6), row(3, 4), row(5, 7), row(2, 3, right=False), row(None, 90)])
    assert found == [[3, 1], [5, 3], [90, 3]]
    many = attack_results.curve([row(at, at + 1) for at in range(1, 1004)])
    assert len(many) <= attack_results.POINTS + 2 and many[0] == [1, 1] and many[-2:] == [[1003, 1003], [1004, 1003]]


def test_hints_begin_at_the_worst_location_and_spread() -> None:
    locations = Patch(2, 2).locations(5, 5)  # 16 of them
    margins = torch.rand(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = locations[margins.argmin(dim=1)]
    found = hints.spread(margins, locations, first, 15)
    assert found.shape == (3, 15, 4)
    for image in range(3):
        order = [first[image].tolist(), *found[image].tolist()]
        assert len({tuple(box) for box in order}) == 16  # all of them, once each
    margins = torch.zeros(1, 16)
    margins[0, [0, 1, 15]] = torch.tensor([-3.0, -2.0, -1.0])
    far = hints.spread(margins, Patch(4, 4).locations(7, 7), torch.tensor([[0, 0, 4, 4]]), 2)[0].tolist()
    assert far[0] == [3, 3, 4, 4]  # not next to the worst one
    assert hints.spread(torch.zeros(2, 1), locations[:1], locations[:1].expand(2, 4), 5).shape == (2, 0, 4)
