"""Slow networks, by a clock that only passes move: records on disk every half minute, passes in between, nothing lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from patchcert_cli import attacks
from patchcert_cli.attacks import Attack, Target
from patchcert_cli.certifiers.masks import masked_predictions
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.data.images import Images
from patchcert_cli.defenses import Claim
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.errors import Interrupted, UsageError
from patchcert_cli.evaluation import estimate, evaluate, reproduce, results, single_image
from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask
from patchcert_cli.layers import passes
from patchcert_cli.progress import Silent
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch

SHAPE, MASKS = (3, 12, 12), 9


class World:
    """A defense whose passes take ``each`` seconds of a clock that nothing else moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: float, images: int = 30) -> None:
        self.now, self.each, self.asked, honest = 0.0, each, 0, masked_predictions.logits_under_mask
        with torch.random.fork_rng():
            torch.manual_seed(3)
            network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 3))
            pixels = torch.randint(0, 256, (images, *SHAPE), dtype=torch.uint8)
        task = MaskSpec(("patch:2x2",), per_axis=3)
        self.defense = PatchCleanser(network.eval(), input_shape=SHAPE, classes=("a", "b", "c"), masks=task, fill=(0.5,) * 3)
        self.defense.test_once()

        def slow(network: nn.Module, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.asked += len(x)
            self.now += self.each * len(x)
            return honest(network, x, *rest)

        monkeypatch.setattr(masked_predictions, "logits_under_mask", slow)
        labels = torch.zeros(images, dtype=torch.int64)
        data = Images(pixels, labels, torch.arange(images), "imagenet", "test", "x")
        self.task = EvaluationTask(
            EvaluatedModel(self.defense, "slow", "patchcleanser", "0" * 64, "x"), data, (Claim(Patch(2, 2)),), images
        )

    def clock(self) -> float:
        return self.now


class Seen(Silent):
    """What was shown, with the time and the number of records on disk."""

    def __init__(self, world: World, folder: Path, each: Callable[[int], None] = lambda done: None) -> None:
        self.world, self.folder, self.each = world, folder, each
        self.shown: list[tuple[float, int, str]] = []

    def update(self, done: int, total: int, text: str) -> None:
        on_disk = records(self.folder)
        assert len(on_disk) == done
        self.shown.append((self.world.now, done, text))
        self.each(done)


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / files.RECORDS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_index(folder: Path) -> list[dict[str, Any]]:
    return sorted(records(folder), key=lambda record: record["index"])


@pytest.mark.parametrize("each", [0.0, 0.01, 0.2])
def test_a_record_is_on_disk_every_half_minute(each: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, each)
    seen = Seen(world, tmp_path / "run")
    found = evaluate.certify(world.task, tmp_path / "run", progress=seen, clock=world.clock)
    when = {}
    for time, done, _ in seen.shown:
        when.setdefault(done, time)
    times = list(when.values())
    assert max((later - sooner for sooner, later in itertools.pairwise(times)), default=0) <= 30
    assert found["seconds"] == pytest.approx(world.now) and found["images"] == 30
    if not each:  # and no more batches than that takes
        assert list(when) == [0, 1, 9, 30]


def test_an_image_that_takes_longer_shows_its_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_predictions, "PIXELS", 6 * 3 * 12 * 12)  # as few at a time as there are of larger pictures
    world = World(monkeypatch, 4.0, images=3)
    seen = Seen(world, tmp_path / "run")
    evaluate.certify(world.task, tmp_path / "run", progress=seen, clock=world.clock)
    times = [time for time, _, _ in seen.shown]
    assert max(later - sooner for sooner, later in itertools.pairwise(times)) <= 30
    first, second = [text for _, _, text in seen.shown if "passes" in text][:2]
    assert first == "no image yet; the next image: 6 of at most 45 passes"  # they set up much: their time tells nothing
    assert second.endswith("passes, at most 8 min left")  # 123 passes of 4 s
    assert all("left" not in text for _, done, text in seen.shown if done)  # then the pace of images says more


def test_ctrl_c_keeps_what_was_finished_and_the_pace_changes_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 0.0)
    evaluate.certify(world.task, tmp_path / "fast", clock=world.clock)
    world.each, asked = 0.5, world.asked

    def stop(done: int) -> None:
        if world.asked - asked > 250:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"interrupted at (\d+) of 30 images") as caught:
        evaluate.certify(world.task, tmp_path / "slow", progress=Seen(world, tmp_path / "slow", stop), clock=world.clock)
    kept = len(records(tmp_path / "slow"))
    assert 3 < kept < 30 and f"at {kept} of" in str(caught.value)
    evaluate.certify(world.task, tmp_path / "slow", clock=world.clock)
    assert by_index(tmp_path / "slow") == by_index(tmp_path / "fast")
    assert len(records(tmp_path / "slow")) == 30


def test_a_dry_run_tells_what_is_then_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 0.05)
    told = estimate.evaluation(world.task, tmp_path / "run", clock=world.clock)
    world.now = 0.0
    measured = evaluate.certify(world.task, tmp_path / "run", clock=world.clock)
    assert told["estimated_seconds"] == pytest.approx(measured["seconds"], rel=0.3)
    assert told["passes"] == pytest.approx(measured["passes"], rel=0.3)
    assert told["seconds_per_image"] == pytest.approx(measured["seconds"] / 30, rel=0.3)
    assert told["masks"] == "9 of 5x5 pixels" and told["passes_per_image_at_most"] == 45
    assert told["seconds_per_image_at_most"] == pytest.approx(45 * 0.05, rel=0.1)
    assert told["estimated_seconds_at_most"] >= measured["seconds"]


class Slow(Attack):
    """Takes eight queries of the surrogate, one row each."""

    kinds = ("patch",)
    candidates = 16  # as many as make one chunk

    def run(self, target: Target, x: torch.Tensor, threat: Any, index: torch.Tensor) -> torch.Tensor:
        for owner in target.groups(1):
            for _ in range(8):
                target.logits(x[owner], owner)
        return x


def test_an_attack_stops_in_time_and_says_what_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 0.01)
    many: Any = {"join": False, "clock": world.clock}
    whole = evaluate.attack(world.task, Slow(), {}, tmp_path / "whole", **many)
    assert "left" not in whole
    spent, world.now = world.now, 0.0
    part = evaluate.attack(world.task, Slow(), {}, tmp_path / "part", max_seconds=spent / 2, **many)
    assert 0 < part["images"] < 30 and part["left"] == 30 - part["images"]
    assert world.now <= spent / 2 + 12 * 0.01 * 8  # the pass that was running
    assert not (tmp_path / "part" / files.RESULT).exists() and not part["full_split"]
    rest = evaluate.attack(world.task, Slow(), {}, tmp_path / "part", **many)
    assert rest["resumed"] == part["images"] and rest["images"] == 30
    assert by_index(tmp_path / "part") == by_index(tmp_path / "whole")
    with pytest.raises(UsageError, match="no image was finished in 0.05 s. Give more --max-seconds"):
        evaluate.attack(world.task, Slow(), {}, tmp_path / "none", max_seconds=0.05, **many)


def test_a_dry_run_of_an_attack_asks_one_query_where_more_is_hopeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 1.0, images=4)
    attacker = attacks.for_threat(world.task.threat)
    told = estimate.evaluation(world.task, tmp_path, attacker, clock=world.clock)
    assert world.asked <= 2 * MASKS
    effort = attacker.most(world.defense, world.task.threat, hinted=True)
    assert effort is not None and told["queries_per_image_at_most"] == effort.queries
    assert told["seconds_per_query"] == MASKS / 2  # one row is seen behind each of the masks, and a slope counts twice
    assert told["estimated_seconds_at_most"] == pytest.approx(4 * effort.queries * MASKS / 2, rel=0.01)
    world.each, world.now = 1e-4, 0.0
    attacker = attacks.for_threat(world.task.threat, steps=1, restarts=0, locations=1, carried=1, rounds=1)
    told = estimate.evaluation(world.task, tmp_path, attacker, clock=world.clock)
    assert told["estimated_seconds"] <= told["seconds_per_image"] * 4 * 1.01 and "images" in told["measured_on"]


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 9, "restarts": 0, "locations": 2}, {"screen": True}])
@pytest.mark.parametrize("hinted", [False, True])
def test_no_image_takes_more_queries_than_foretold(
    options: dict[str, Any], hinted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(monkeypatch, 0.0, images=2)
    threat = world.task.threat
    attacker: Any = attacks.for_threat(threat, **{"steps": 2, "carried": 4, "rounds": 1, **options})
    x = world.task.images.pixels.float() / 255
    certificate = world.defense.certify(x, threat)
    start = attacks.Start(certificate.worst, certificate.runner_up) if hinted else None
    effort = attacker.most(world.defense, threat, hinted=hinted)
    found = attacker(world.defense, x, threat, start=start)
    assert int(found.queries.max()) <= effort.queries + effort.answers


def test_one_picture_shows_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, 0.0, images=1)
    shown = []

    class Note(Silent):
        def update(self, done: int, total: int, text: str) -> None:
            shown.append((done, total, text))

    with single_image._counted(world.defense, Note()):
        world.defense.certify(world.task.images.pixels.float() / 255, Patch(2, 2))
    assert shown[0] == (9, 45, "passes at most") and shown[-1][0] <= 45
    with passes.heard(lambda count: pytest.fail("heard after the end")), passes.heard(lambda count: None):
        pass


class Counting(dict[str, Any]):
    """A record that counts how often it is read."""

    reads = 0

    def __getitem__(self, key: str) -> Any:
        Counting.reads += 1
        return super().__getitem__(key)


def test_accuracy_so_far_reads_each_record_once() -> None:
    """As many reads for many batches as for one."""
    rows = [Counting(index=i, label=i % 3, prediction=0, claims=[{"certified": i % 2 == 0}]) for i in range(300)]
    reads = []
    for size in (300, 1):
        Counting.reads = 0
        standing = results.RunningCounts()
        for at in range(0, 300, size):
            standing.add(rows[at : at + size])
            assert str(standing)
        assert str(standing) == "clean 33.33%, certified 16.67%"
        reads.append(Counting.reads)
    assert reads == [5 * 300] * 2


class Number(int):
    """An index that counts how often it is looked up."""

    hashed = 0

    def __hash__(self) -> int:
        Number.hashed += 1
        return int.__hash__(self)


def test_choosing_what_to_attack_looks_each_image_up_once() -> None:
    held = [Number(i) for i in range(0, 400, 2)]
    assert reproduce.among([*range(400)], held, 3).tolist() == [0, 2, 4]
    Number.hashed = 0
    assert len(reproduce.among([Number(i) for i in range(400)], held, None)) == 200
    assert Number.hashed == 200 + 400
