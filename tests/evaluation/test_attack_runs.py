"""Runs of attacks: who flipped which image within how many queries, also after an interruption and of earlier versions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli import attacks, checkpoint
from patchcert_cli.attacks import AttackResult
from patchcert_cli.certificate import Certificate
from patchcert_cli.data import image_files
from patchcert_cli.data.images import to_float
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.defenses import Claim
from patchcert_cli.errors import ClaimError, UsageError
from patchcert_cli.evaluation import attack_results, evaluate, hints, single_image
from patchcert_cli.evaluation.adversarial_images import LIST, AdversarialFolder, png
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


def test_kept_images_flip_the_answer_bit_by_bit_and_pngs_say_whether_they_do(tmp_path: Path) -> None:
    task, folder = make_task(count=8), tmp_path / "kept"
    attacker = attacks.for_threat(task.threat, steps=2, restarts=0, locations=1)
    plain = evaluate.attack(task, attacker, {}, tmp_path / "run")
    found = evaluate.attack(task, attacker, {}, tmp_path / "run", save=folder)  # of a run that kept none
    assert {key: value for key, value in found.items() if key != "saved"} == plain
    listed = files.read_json(folder / LIST)["images"]
    flipped = {r["index"]: r for r in read(tmp_path / "run") if r["flipped"]}
    assert found["saved"]["images"] == found["saved"]["png"] == len(listed) == len(flipped) > 0
    defense = task.model.defense
    for note in listed:
        record = flipped[note["index"]]
        tensors, own = checkpoint.unpack(folder / f"{note['index']}.safetensors")
        clean, adversarial = tensors["clean"][None], tensors["adversarial"][None]
        assert own == note and note["label"] == record["label"]
        assert int(defense.predict(clean)) == record["prediction"] == note["prediction"]
        assert int(defense.predict(adversarial)) == record["attacked"] == note["attacked"] != note["prediction"]
        assert task.threat.contains(adversarial != clean).all()
        top, left, height, width = note["changed"]
        outside = (adversarial != clean)[0, 0]
        outside[top : top + height, left : left + width] = False
        assert not outside.any() and height <= 2 and width <= 2
        pixels, _ = image_files.read(folder / note["png"], ResizeCrop((28, 28)), 1)
        answer = int(defense.predict(to_float(pixels)[None]))
        assert answer == note["png_answer"] and note["png_flips"] == (answer != note["prediction"])
    evaluate.attack(task, attacker, {}, tmp_path / "other", save=folder)  # the same run goes on with it
    again = evaluate.attack(task, attacker, {}, tmp_path / "third", save=tmp_path / "new")
    for note in listed:
        name = f"{note['index']}.safetensors"
        assert (folder / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    assert again["saved"]["images"] == len(listed)


def test_rounding_can_undo_a_flip_and_is_told(tmp_path: Path) -> None:
    task = make_task(count=1)
    defense, x = task.model.defense, torch.full((1, 1, 28, 28), 100 / 255)
    adversarial = x.clone()
    adversarial[0, 0, 3, 4] += 1e-4
    outcome = AttackResult(*(torch.zeros(1) for _ in fields(AttackResult)))
    outcome = replace(outcome, adversarial=adversarial, success=torch.ones(1).bool(), clean_prediction=defense.predict(x))
    kept = AdversarialFolder(tmp_path / "kept", {"run": 1})
    kept.claim()
    kept.keep(defense, x, [7], [None], task.threat, outcome)
    assert kept.has(7) and not kept.has(8)
    assert kept.listed() == {"folder": str(tmp_path / "kept"), "images": 1, "png": 1, "png_flips": 0}
    assert files.read_json(tmp_path / "kept" / LIST)["images"][0]["changed"] == [3, 4, 1, 1]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no adversarial images"):
        AdversarialFolder(tmp_path / "mine", {}).claim()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    AdversarialFolder(tmp_path / "one", {"seed": 0}).claim()
    AdversarialFolder(tmp_path / "one", {"seed": 0}).claim()
    before = (tmp_path / "one" / LIST).read_bytes()
    with pytest.raises(UsageError, match="of another run"):
        AdversarialFolder(tmp_path / "one", {"seed": 1}).claim()
    assert (tmp_path / "one" / LIST).read_bytes() == before


def test_a_flipped_certified_image_file_is_a_broken_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(count=1)
    path = tmp_path / "one.png"
    path.write_bytes(png(to_float(task.images.read())[0]))
    attacker = attacks.for_threat(Patch(14, 14), steps=2, restarts=0, locations=2)
    found = single_image.attack(task.model, path, Patch(14, 14), attacker, {"name": "x"}, save=tmp_path / "kept").values
    assert found["flipped"] and found["broken"] == [] and found["saved"]["images"] == 1
    assert found["attacked"] != found["prediction"] and found["flipped_at"] < found["queries"]
    single_image.check(found)
    real = task.model.defense.certify_claims

    def everything(x: Tensor, claims: Sequence[Claim]) -> list[Certificate]:
        return [replace(one, certified=torch.ones_like(one.certified)) for one in real(x, claims)]

    monkeypatch.setattr(task.model.defense, "certify_claims", everything)
    found = single_image.attack(task.model, path, Patch(14, 14), attacker, {"name": "x"}).values
    with pytest.raises(ClaimError, match="is certified and was flipped"):
        single_image.check(found)
