"""HiCert's rule as a defense, and the published metric of detection, from images to results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli.certificate import ALERT, Guarantee
from patchcert_cli.certifiers.masks.mask_sets import MaskSet
from patchcert_cli.defenses._detection import DetectingClassifier
from patchcert_cli.defenses.hicert import HiCert
from patchcert_cli.defenses.minority import Minority
from patchcert_cli.errors import UsageError
from patchcert_cli.evaluation import evaluate
from patchcert_cli.reporting import text
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch
from patchcert_cli.training.recipe import Recipe
from tests.defenses.test_minority import HALF, MASK_BREAKS, SHAPE, Sums, bright, nothing_wrong, task_of
from tests.examples import section, tiny
from tests.soundness.arena import changes, draw_images


def made(threshold: float, kind: type[DetectingClassifier] = HiCert, **plan: int) -> DetectingClassifier:
    from patchcert_cli.certifiers.masks.mask_sets import MaskSpec

    masks = MaskSpec(("patch:2x2",), **(plan or {"stride": 1}))
    classes = ("left", "right", "dark")
    return kind(Sums(1.0), input_shape=SHAPE, classes=classes, masks=masks, fill=(0.0,), threshold=threshold).eval()


def reached(defense: DetectingClassifier, x: Tensor, threat: Patch) -> Tensor:
    """The answers without an alarm that any allowed change gets, bool [B, K]."""
    mask, value = changes(defense.input_shape, threat)
    after = defense.predict(torch.where(mask[:, None], value[:, None], x).flatten(0, 1)).reshape(len(mask), -1)
    return torch.stack([(after == k).any(dim=0) for k in range(len(defense.classes))], dim=1)


def silently_wrong(or_alarm: Tensor, answers: Tensor) -> int:
    """How many images and classes of ``or_alarm`` an allowed change answers with another class and without an alarm."""
    others = torch.stack([answers[:, torch.arange(answers.shape[1]) != k].any(dim=1) for k in range(answers.shape[1])], dim=1)
    return int((or_alarm & others).sum())


def some_defense(name: str, seed: int, threshold: float) -> DetectingClassifier:
    defense: Any = tiny(name, seed)
    with torch.no_grad():
        defense.network[-1].weight.mul_(3)
    defense.threshold = threshold
    return defense


@pytest.mark.parametrize("name", ["hicert", "minority"])
def test_no_change_of_a_tiny_network_gets_another_class_without_an_alarm(name: str) -> None:
    """All changes of 2x2 pixels; images that raise an alarm themselves are among those that count."""
    held = alarmed = uncertain = 0
    for seed, threshold in ((0, 0.0), (1, 0.5), (2, 0.7)):
        defense, x = some_defense(name, seed, threshold), draw_images(SHAPE, 16, seed)
        answers, certificate = reached(defense, x, Patch(2, 2)), defense.certify(x, Patch(2, 2))
        assert certificate.or_alarm is not None and silently_wrong(certificate.or_alarm, answers) == 0
        of_answer = certificate.or_alarm[torch.arange(16), certificate.prediction.clamp(min=0)]
        assert bool(of_answer[certificate.certified].all()), "certified answers count"
        assert not bool((certificate.certified & (certificate.prediction == ALERT)).any())
        held, uncertain = held + int(certificate.or_alarm.sum()), uncertain + int((~certificate.or_alarm).sum())
        alarmed += int(certificate.or_alarm[certificate.prediction == ALERT].sum())
    assert min(held, uncertain) > 10 and (alarmed > 10 or name == "minority")


@pytest.mark.parametrize("change", [nothing_wrong, *MASK_BREAKS], ids=lambda change: change.__name__)
def test_masks_that_leave_something_out_are_caught(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = 0
    for seed in range(2):
        defense, x = some_defense("hicert", seed, 0.5), draw_images(SHAPE, 12, seed)
        defense.set, cover = change(defense.set, defense.set.cover(Patch(2, 2)))
        defense.masks = defense.set.occluded
        monkeypatch.setattr(MaskSet, "cover", lambda self, threat, cover=cover: cover)
        found = defense.certify(x, Patch(2, 2)).or_alarm
        assert found is not None
        wrong += silently_wrong(found, reached(defense, x, Patch(2, 2)))
        monkeypatch.undo()
    assert (wrong > 0) == (change in MASK_BREAKS)


def test_low_confidence_raises_an_alarm_and_detection_is_still_proven() -> None:
    """The images of a dim left half: agreement without confidence, a contradiction without confidence, and both with it."""
    x = torch.cat([bright(0.9, 0.1), bright(0.3, 0.1), bright(0.5, 0.4)])
    found = {threshold: made(threshold).certify(x, Patch(2, 2)) for threshold in (0.0, 0.9, 1.0)}
    assert [found[at].prediction.tolist() for at in (0.0, 0.9, 1.0)] == [[0, 0, ALERT], [0, ALERT, ALERT], [ALERT] * 3]
    for threshold, certificate in found.items():
        assert torch.equal(certificate.certified, certificate.prediction != ALERT)
        assert certificate.guarantee is Guarantee.DETECTION
        assert certificate.or_alarm is not None and bool(certificate.or_alarm.all()) == (threshold == 1)
    assert found[0.0].or_alarm is not None and found[0.9].or_alarm is not None
    assert found[0.0].or_alarm[:, 0].tolist() == [True, True, False]
    assert bool(found[0.9].or_alarm[1].all()), "each attack on the second image raises an alarm"
    minority = made(0.0, Minority).certify(x, Patch(2, 2))
    assert torch.equal(minority.prediction, found[0.0].prediction) and torch.equal(minority.certified, found[0.0].certified)


@pytest.mark.parametrize("kind", [HiCert, Minority])
@pytest.mark.parametrize("method", ["agreement", "all"])
def test_thresholds_that_are_compared_are_those_that_would_be_deployed(kind: type[DetectingClassifier], method: str) -> None:
    """What a certificate says of other thresholds is what the defense with such a threshold answers, certifies and counts."""
    x = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(3))
    x[..., :2] *= torch.linspace(0, 1.5, 40)[:, None, None, None].clamp(max=1)
    defense = made(0.5, kind, stride=1, wider=1)
    alone = defense.certify(x, Patch(1, 1), method)
    assert alone.thresholds is alone.silent is alone.or_alarm_thresholds is None and alone.or_alarm is not None
    defense.grid = tuple(t for t in kind.compared if t * 10 % 2 < 1e-9 or t > 0.9)
    compared = defense.certify(x, Patch(1, 1), method)
    assert torch.equal(compared.or_alarm, alone.or_alarm)  # type: ignore[arg-type]
    results = set()
    for threshold in defense.grid:
        deployed = made(threshold, kind, stride=1, wider=1).certify(x, Patch(1, 1), method)
        silent, held, counted = (
            (ends[..., 0] < threshold) & (threshold < ends[..., 1])
            for ends in (compared.silent, compared.thresholds, compared.or_alarm_thresholds)
            if ends is not None
        )
        assert torch.equal(deployed.prediction, torch.where(silent, compared.plain, ALERT)), threshold  # type: ignore[arg-type]
        assert torch.equal(deployed.certified, held) and torch.equal(deployed.or_alarm, counted), threshold  # type: ignore[arg-type]
        results.add((int(silent.sum()), int(held.sum()), int(counted.sum())))
    assert len(results) > 3


def test_the_published_metric_is_beside_the_certified_answers(tmp_path: Path) -> None:
    config = Recipe("patch:2x2", "mnist", "hicert", "mlp", {"hidden": [12]}, options={"per_axis": 2}).config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defense: Any = HiCert.from_config(section("hicert", config)).eval()
    assert defense.threshold == 0.8 == HiCert.deployed_threshold()
    defense.threshold, defense.grid = 0.15, (0.0, 0.15, 1.0)
    task = task_of(defense, 30)
    task = replace(task, model=replace(task.model, kind="hicert", setting={"compared": list(defense.grid)}))
    found = evaluate.certify(task, tmp_path / "run")
    counts, rows = found["claims"][0]["counts"], {row["threshold"]: row for row in text.compared(found)}
    assert counts["certified"] == counts["clean"] < counts["or_alarm"], "silent and right is certified; alarms count besides"
    assert {key: rows[0.15][key] for key in counts} == counts
    assert (rows[1.0]["alarms"], rows[1.0]["clean"], rows[1.0]["certified"], rows[1.0]["or_alarm"]) == (30, 0, 0, 30)
    assert rows[0.0]["certified"] >= counts["certified"]
    shown = dict(text.certify_rows(found))
    assert "silent on the clean image, right" in shown["certified"]
    assert shown[
        "published metric"
    ] == f"{counts['or_alarm'] / 30:.2%} ({counts['or_alarm']}/30) certified incl. clean alerts".replace("%", " %")
    assert "published metric 100" in shown["threshold 1"]


def test_records_without_the_published_metric_are_still_read(tmp_path: Path) -> None:
    """Records as they were before: a run that was begun then goes on, and its result leaves the metric out."""
    defense: Any = made(0.2, Minority)
    digits: Any = Minority(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)),
        input_shape=(1, 28, 28),
        classes=tuple("0123456789"),
        masks=defense.plan,
        fill=(0.0,),
    ).eval()
    digits.grid = (0.0, 0.5)
    task = task_of(digits, 6)
    task = replace(task, model=replace(task.model, setting={"compared": [0.0, 0.5]}))
    new = evaluate.certify(task, tmp_path / "run")
    records = tmp_path / "run" / files.RECORDS
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        del line["silent"]
        for claim in line["claims"]:
            del claim["or_alarm"], claim["or_alarm_thresholds"]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    (tmp_path / "run" / files.RESULT).unlink()
    old = evaluate.certify(task, tmp_path / "run")
    before, after = (one["claims"][0]["counts"] for one in (new, old))
    assert after == {key: value for key, value in before.items() if key != "or_alarm"}
    rows = [{key: value for key, value in row.items() if key != "or_alarm"} for row in text.compared(new)]
    assert text.compared(old) == rows
    assert "published metric" not in dict(text.certify_rows(old))


def test_thresholds_are_confidences() -> None:
    assert HiCert.takes_threshold(1.0) and HiCert.takes_threshold(0.0) and not Minority.takes_threshold(1.0)
    for threshold in (-0.1, 1.5, float("nan")):
        assert not HiCert.takes_threshold(threshold)
        with pytest.raises(UsageError, match=r"threshold is (.*, not in \[0, 1\]|nan, not a number)"):
            Recipe("patch:5x5", "mnist", "hicert", options={"threshold": threshold})
    assert made(1.0).certify(HALF, Patch(2, 2)).margin.isfinite().all()
