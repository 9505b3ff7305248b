"""Evaluation runs: one record per image whatever happens, and a broken certificate is never silent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli import attacks, checkpoint, data, defenses
from patchcert_cli.certificate import Certificate
from patchcert_cli.defenses import Claim
from patchcert_cli.errors import ClaimError, DataError, IntegrityError, Interrupted, MachineError, UsageError
from patchcert_cli.evaluation import estimate, evaluate, results
from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask
from patchcert_cli.progress import Silent
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch
from patchcert_cli.training.recipe import Recipe


def make_task(count: int = 40, **changes: Any) -> EvaluationTask:
    recipe = Recipe("patch:5x5", network_options={"hidden": [12]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defense = defenses.build(recipe.config()["deployed"])
    defense.group = lambda claims: 0  # type: ignore[method-assign]
    whole = data.load("mnist", "test")
    model = EvaluatedModel(defense, "random", "ibp", "0" * 64, "folder")
    task = EvaluationTask(model, whole.limit(count, 0), (Claim(Patch(2, 2)),), len(whole), batch_size=16, command="test")
    return replace(task, **changes)


def no_time() -> float:
    """A clock by which nothing takes any time: batches grow eightfold from one image on."""
    return 0.0


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / files.RECORDS).read_text().splitlines()]


def verdicts(records: list[dict[str, Any]]) -> dict[int, tuple[int, bool]]:
    return {record["index"]: (record["prediction"], record["claims"][0]["certified"]) for record in records}


def test_a_run_folder_holds_result_records_and_manifest(tmp_path: Path) -> None:
    task = make_task()
    found = evaluate.certify(task, tmp_path / "run")
    keys = "model defense dataset split images clean_accuracy claims seconds"
    assert set(f"{keys} images_per_second device records".split()) <= set(found)
    assert files.read_json(tmp_path / "run" / files.RESULT) == found
    manifest = files.read_json(tmp_path / "run" / files.MANIFEST)
    assert {"model_sha256", "threat", "versions", "device", "numerics"} <= set(manifest)
    records = read(tmp_path / "run")
    assert sorted(r["index"] for r in records) == task.images.index.tolist()
    assert {"index", "label", "prediction"} <= set(records[0])
    assert set(records[0]["claims"][0]) == {"certified", "margin", "worst", "runner_up", "method", "arithmetic"}
    right = [r["prediction"] == r["label"] for r in records]
    assert found["clean_accuracy"] == sum(right) / 40
    certified = [r["claims"][0]["certified"] and ok for r, ok in zip(records, right, strict=True)]
    (claim,) = found["claims"]
    assert claim["certified_accuracy"] == sum(certified) / 40 == claim["counts"]["certified"] / 40
    assert not found["full_split"]


def test_batch_size_does_not_change_a_record(tmp_path: Path) -> None:
    runs = [tmp_path / str(size) for size in (1, 7, 40)]
    for folder in runs:
        evaluate.certify(make_task(batch_size=int(folder.name)), folder)
    assert verdicts(read(runs[0])) == verdicts(read(runs[1])) == verdicts(read(runs[2]))


def test_a_stopped_run_resumes_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    whole = evaluate.certify(make_task(), tmp_path / "whole")

    class Stop(Silent):
        def update(self, done: int, total: int, text: str) -> None:
            if done == 9:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted at 9 of 40 images. Resume with the same command"):
        evaluate.certify(make_task(), tmp_path / "cut", progress=Stop(), clock=no_time)
    with (tmp_path / "cut" / files.RECORDS).open("a") as stream:
        stream.write('{"index": 9, "lab')  # what a crash leaves
    found = evaluate.certify(make_task(), tmp_path / "cut")
    assert found["resumed"] == 9
    assert verdicts(read(tmp_path / "cut")) == verdicts(read(tmp_path / "whole"))
    assert found["claims"] == whole["claims"]
    assert evaluate.certify(make_task(), tmp_path / "cut") == found  # complete: nothing is computed again


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    evaluate.certify(make_task(), tmp_path / "run")
    with pytest.raises(UsageError, match="made with other settings .*patch:2x2.*patch:3x3.*--fresh"):
        evaluate.certify(make_task(claims=(Claim(Patch(3, 3)),)), tmp_path / "run")
    assert (
        evaluate.certify(make_task(claims=(Claim(Patch(3, 3)),)), tmp_path / "run", fresh=True)["claims"][0]["threat"]
        == "patch:3x3"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        evaluate.certify(make_task(), tmp_path / "mine", fresh=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "run" / files.RECORDS).write_text("{]\n")
    with pytest.raises(IntegrityError, match="damaged"):
        evaluate.certify(make_task(claims=(Claim(Patch(3, 3)),)), tmp_path / "run")


def test_out_of_memory_halves_the_batch_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = evaluate.certify(make_task(), tmp_path / "reference")
    task, sizes = make_task(), []
    real = task.model.defense.certify_claims

    def short_of_memory(limit: int) -> Any:
        def certify(x: Tensor, claims: Sequence[Claim]) -> list[Certificate]:
            sizes.append(len(x))
            if len(x) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(x, claims)

        return certify

    monkeypatch.setattr(task.model.defense, "certify_claims", short_of_memory(5))
    assert evaluate.certify(task, tmp_path / "small", clock=no_time)["claims"] == reference["claims"]
    assert sizes[:4] == [1, 8, 4, 4] and max(sizes[2:]) == 4
    assert verdicts(read(tmp_path / "small")) == verdicts(read(tmp_path / "reference"))
    monkeypatch.setattr(task.model.defense, "certify_claims", short_of_memory(0))
    with pytest.raises(MachineError, match="batch of one image"):
        evaluate.certify(task, tmp_path / "none")

    def broken(x: Tensor, claims: Sequence[Claim]) -> list[Certificate]:
        raise RuntimeError("a bug")

    monkeypatch.setattr(task.model.defense, "certify_claims", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        evaluate.certify(task, tmp_path / "bug")


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    records = tmp_path / "run" / files.RECORDS
    saved = tmp_path / "saved"

    class Fill(Silent):
        def update(self, done: int, total: int, text: str) -> None:
            if done == 9:
                records.rename(saved)
                records.symlink_to("/dev/full")

    with pytest.raises(MachineError, match="No space left on device. Free some space .* 9 images are kept"):
        evaluate.certify(make_task(), tmp_path / "run", progress=Fill(), clock=no_time)
    records.unlink()
    saved.rename(records)
    assert evaluate.certify(make_task(), tmp_path / "run")["resumed"] == 9


def test_an_attack_is_held_against_the_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(count=12)
    attacker = attacks.for_threat(task.threat, seed=0, steps=2, restarts=0, locations=2)
    found = evaluate.attack(task, attacker, {"steps": 2}, tmp_path / "sound")
    results.check_claim(found)
    assert found["attacked_accuracy"] >= found["claims"][0]["certified_accuracy"]
    assert found["queries"] > 0 and found["broken"] == []
    real = task.model.defense.certify_claims

    def everything(x: Tensor, claims: Sequence[Claim]) -> list[Certificate]:
        return [replace(one, certified=torch.ones_like(one.certified)) for one in real(x, claims)]

    monkeypatch.setattr(task.model.defense, "certify_claims", everything)
    found = evaluate.attack(replace(task, claims=(Claim(Patch(14, 14)),)), attacker, {"steps": 2}, tmp_path / "broken")
    assert found["broken"]
    with pytest.raises(ClaimError, match="certified images were flipped") as caught:
        results.check_claim(found)
    assert caught.value.code == 8
    kept = list((tmp_path / "broken").glob(f"*{evaluate.BROKEN}"))
    tensors, _ = checkpoint.unpack(kept[0])
    assert tensors["adversarial"].shape[1:] == (1, 28, 28)


def test_images_that_do_not_fit_are_refused() -> None:
    task = make_task()
    with pytest.raises(UsageError, match="does not fit a 28x28 image"):
        estimate.evaluation(replace(task, claims=(Claim(Patch(29, 3)),)), Path("x"))
    with pytest.raises(UsageError, match="--batch-size is 0"):
        replace(task, batch_size=0).check()
    wrong = replace(task.images, pixels=torch.zeros(40, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(DataError, match="takes"):
        replace(task, images=wrong).check()
    assert estimate.evaluation(task, Path("x"))["atoms"] == 27 * 27
