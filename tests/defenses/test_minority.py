"""Certified detection from images to records: alarms, rounding, the attack's judgement, and that recovery is never meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli import cards, data
from patchcert_cli.attacks import Attack, Target
from patchcert_cli.attacks.patch_pgd import PatchPGD
from patchcert_cli.cards import Card, Measured
from patchcert_cli.cards.published import ClaimKey, PublishedRecord, PublishedRecords
from patchcert_cli.cards.results import read_records
from patchcert_cli.certificate import ALERT, Certificate, Guarantee
from patchcert_cli.certifiers.masks import masked_detection
from patchcert_cli.certifiers.masks.mask_sets import MaskCoverage, MaskSet, MaskSpec
from patchcert_cli.certifiers.masks.masked_predictions import TOLERANCE
from patchcert_cli.defenses import Claim
from patchcert_cli.defenses._detection import GRID
from patchcert_cli.defenses.minority import Minority
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.errors import ClaimError, DataError, IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.evaluation import evaluate, reproduce, results, single_image
from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask
from patchcert_cli.reporting import text
from patchcert_cli.schema import read
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, Sparse, Threat
from patchcert_cli.training.recipe import Recipe
from tests.examples import minority, section
from tests.soundness.arena import Arena, check, draw_images

SHAPE = (1, 4, 4)
HALF = torch.full((1, *SHAPE), 0.5)


class Sums(nn.Module):
    """Logits from the sums of the left and of the right half; ``sharp`` scales them, and a floor never decides."""

    def __init__(self, sharp: float = 4.0) -> None:
        super().__init__()
        self.sharp = nn.Parameter(torch.tensor(sharp))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., :2].sum(dim=(1, 2, 3)), x[..., 2:].sum(dim=(1, 2, 3))
        return torch.stack([left, right, torch.zeros_like(left)], dim=1) * self.sharp


def made(network: nn.Module | None = None, *, covers: str = "patch:2x2", threshold: float = 0.0, **plan: int) -> Minority:
    masks = MaskSpec((covers,), **(plan or {"stride": 1}))
    defense = Minority(network or Sums(), input_shape=SHAPE, classes=("left", "right", "dark"), masks=masks, fill=(0.0,)).eval()
    defense.threshold = threshold
    return defense


def bright(left: float, right: float) -> Tensor:
    x = torch.zeros(1, *SHAPE)
    x[..., :2], x[..., 2:] = left, right
    return x


def test_a_contradiction_raises_an_alarm_and_agreement_is_certified() -> None:
    """Hiding 2x2 pixels takes up to half of a side's light away."""
    defense = made()
    x = torch.cat([bright(0.9, 0.1), bright(0.6, 0.5), bright(0.5, 0.5), bright(0.2, 1.0)])
    certificate = defense.certify(x, Patch(2, 2))
    assert certificate.prediction.tolist() == [0, ALERT, ALERT, 1] == defense.predict(x).tolist()
    assert certificate.certified.tolist() == [True, False, False, True]
    assert certificate.guarantee is Guarantee.DETECTION is defense.guarantee
    assert [defense.class_name(one) for one in certificate.prediction.tolist()] == ["left", "alarm", "alarm", "right"]
    attacked = x[:1].clone()
    attacked[..., :2, :2], attacked[..., 2:, 2:] = 0, 0.1  # half of the left half
    assert defense.predict(attacked).tolist() == [ALERT]
    attacked = x[3:].clone()
    attacked[..., :2, :2] = 1.0
    assert defense.predict(attacked).tolist() == [ALERT]


def test_an_attack_that_turns_the_label_sets_off_the_alarm() -> None:
    defense, x = made(), bright(0.5, 0.2)
    attacked = x.clone()
    attacked[..., :2, 2:] = 1.0
    assert defense.network(attacked).argmax(dim=1).tolist() == [1]
    certificate = defense.certify(x, Patch(2, 2))
    assert (certificate.prediction.tolist(), certificate.certified.tolist()) == ([0], [True])
    assert defense.predict(attacked).tolist() == [ALERT]


def test_a_threshold_silences_alarms_and_costs_certificates() -> None:
    x = torch.cat([bright(0.9, 0.1), bright(0.5, 0.4), bright(0.6, 0.5), bright(0.7, 0.5)])
    alarms, certified = [], []
    for threshold in (0.0, 0.5, 0.9, 0.999):
        defense = made(Sums(1.0), threshold=threshold)
        certificate = defense.certify(x, Patch(2, 2))
        alarms.append(int((certificate.prediction == ALERT).sum()))
        certified.append(int(certificate.certified.sum()))
    assert alarms == sorted(alarms, reverse=True) and alarms[0] > alarms[-1]
    assert certified[0] > 0 == certified[-1]


def test_confidence_at_the_threshold_raises_an_alarm_and_certifies_nothing() -> None:
    """Two classes at equal logits have a confidence of one half each, and the lower one is the label."""

    class Even(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            whole = x.flatten(1).amin(dim=1) > 0  # no pixel is hidden
            flat = torch.stack([whole.to(x) * 2, torch.ones_like(whole).to(x)], dim=1) * self.weight
            return torch.where(whole[:, None], flat, flat[:, 1:].flip(0).expand(-1, 2) * self.weight)

    defense = Minority(Even(), input_shape=SHAPE, classes=("a", "b"), masks=MaskSpec(("patch:2x2",)), fill=(0.0,)).eval()
    for threshold, answer in ((0.5, 0), (0.0, 0)):
        defense.threshold = threshold
        certificate = defense.certify(HALF, Patch(2, 2))
        assert certificate.prediction.tolist() == [answer]
        assert certificate.certified.tolist() == [False], "a logit margin of zero, and a confidence margin of zero"
    assert float(certificate.margin) == 0


def test_what_rounding_may_decide_is_not_certified() -> None:
    """A logit margin of half the tolerance, and the same image a little clearer."""

    class Barely(Sums):
        def forward(self, x: Tensor) -> Tensor:
            one = torch.ones(len(x), dtype=x.dtype, device=x.device)
            return torch.stack([one + self.sharp.to(x) * one, one, x.mean(dim=(1, 2, 3)) / 2], dim=1)

    for logit_margin, certified in ((TOLERANCE["float64"] / 2, False), (TOLERANCE["float64"] * 4, True), (1e-6, True)):
        network = Barely()
        network.sharp = nn.Parameter(torch.tensor(logit_margin, dtype=torch.float64))
        certificate = made(network).certify(HALF, Patch(1, 1))
        assert certificate.certified.tolist() == [certified], logit_margin
        assert torch.equal(certificate.certified, certificate.margin > certificate.tolerance)


class Single(Sums):
    """Other people's code that knows float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_a_network_that_cannot_be_asked_more_precisely_certifies_what_is_clear() -> None:
    clear, close = bright(0.9, 0.1), bright(0.9, 0.45001)
    exact, single_ = made(Sums()), made(Single())
    for x in (clear, close):
        assert torch.equal(exact.predict(x), single_.predict(x))
    assert single_.certify(clear, Patch(2, 2)).certified.tolist() == [True]
    tied = torch.full((1, *SHAPE), 0.5)
    assert single_.certify(tied, Patch(2, 2)).certified.tolist() == [False]


def test_the_published_condition_asks_all_masks() -> None:
    """Wide masks that overlap, and a threshold: one mask of several that hide a pixel is enough."""
    defense = made(Sums(1.0), covers="patch:1x1", threshold=0.8, stride=1, wider=1)
    x = torch.rand(200, *SHAPE, generator=torch.Generator().manual_seed(0))
    x[..., :2] *= torch.linspace(0, 2, 200)[:, None, None, None].clamp(max=1)
    x[..., 2:] *= 0.1
    some, every = defense.certify(x, Patch(1, 1)), defense.certify(x, Patch(1, 1), "all")
    assert (some.method, every.method) == ("agreement", "all")
    assert torch.equal(some.prediction, every.prediction)
    assert not bool((every.certified & ~some.certified).any())
    assert 0 < int(every.certified.sum()) < int(some.certified.sum()) < 200


def test_the_map_of_margins_has_the_certificate_as_its_smallest_entry() -> None:
    defense, x = made(), torch.rand(20, *SHAPE, generator=torch.Generator().manual_seed(1))
    chart, certificate = defense.margin_map(x, Patch(2, 1)), defense.certify(x, Patch(2, 1))
    assert chart.shape == (20, 3, 4)
    assert torch.equal(chart.flatten(1).amin(dim=1), certificate.margin)
    with pytest.raises(UsageError, match="a map needs one patch"):
        defense.margin_map(x, Sparse(1))


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchcert_cli.certifiers.masks.masked_predictions.computes_in_bfloat16", lambda device: True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defense = minority()
    x = torch.rand(30, *SHAPE, generator=torch.Generator().manual_seed(2))
    whole = defense.certify(x, Patch(2, 2))
    alone = Certificate.cat([defense.certify(image[None], Patch(2, 2)) for image in x])
    assert torch.equal(whole.prediction, alone.prediction) and torch.equal(whole.certified, alone.certified)
    assert len({ALERT, 0, 1, 2} & set(whole.prediction.tolist())) >= 2
    defense.prediction_dtype = "bfloat16"
    again = defense.certify(x, Patch(2, 2))
    assert torch.equal(again.prediction, whole.prediction) and torch.equal(again.certified, whole.certified)


def test_smaller_patches_are_certified_too() -> None:
    for seed in range(4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            defense = minority()
        x = draw_images(SHAPE, 20, seed)
        margins = {(h, w): defense.certify(x, Patch(h, w)).margin for h in (1, 2) for w in (1, 2, 3)}
        for (h, w), margin in margins.items():
            assert all(bool((margin <= other).all()) for (h2, w2), other in margins.items() if h2 <= h and w2 <= w)
        assert torch.equal(defense.certify(x, Sparse(1)).margin, margins[1, 1])


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(UnsupportedThreat, match=r"masks of this model do not cover patch:3x3"):
        made().certify(HALF, Patch(3, 3))
    with pytest.raises(UsageError, match="no proof 'rows'. Allowed: agreement, all"):
        made().certify(HALF, Patch(1, 1), "rows")
    broken = Sums(float("nan"))
    with pytest.raises(IntegrityError, match="NaN"):
        made(broken).predict(HALF)
    config = Recipe("patch:5x5", "mnist", "minority", options={"threshold": 0.25}).config()
    deployed = config["deployed"]
    assert (deployed["threshold"], deployed["masks"]["covers"]) == (0.25, ["patch:5x5"])
    assert cast(Minority, Minority.from_config(section("minority", config))).threshold == 0.25
    with pytest.raises(IntegrityError, match=r"threshold is 1.5, not in \[0, 1\)"):
        Minority.from_config({**deployed, "threshold": 1.5})
    with pytest.raises(UsageError, match=r"threshold is 1.0, not in \[0, 1\)"):
        Recipe("patch:5x5", "mnist", "minority", options={"threshold": 1.0})


def test_it_certifies_more_than_a_corrected_answer() -> None:
    """The same network, masks and images; one mask hides less than two."""
    x = torch.rand(100, *SHAPE, generator=torch.Generator().manual_seed(3))
    x[..., :2] *= torch.linspace(0, 1, 100)[:, None, None, None]
    detects = made(covers="patch:1x1")
    recovers = PatchCleanser(detects.network, input_shape=SHAPE, classes=detects.classes, masks=detects.plan, fill=(0.0,)).eval()
    found, corrected = detects.certify(x, Patch(1, 1)), recovers.certify(x, Patch(1, 1))
    assert int(found.certified.sum()) > int(corrected.certified.sum()) > 0


class Painter(Attack):
    """Writes what the test says into the top right corner."""

    kinds: ClassVar[tuple[str, ...]] = ("patch",)
    value: ClassVar[float] = 1.0

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        found = x.clone()
        found[..., :2, 2:] = self.value
        return found


def test_an_alarm_is_no_success_of_an_attack() -> None:
    defense, x = made(), torch.cat([bright(0.5, 0.2), bright(0.9, 0.1), bright(0.5, 0.5)])
    outcome = Painter()(defense, x, Patch(2, 2))
    assert outcome.clean_prediction.tolist() == [0, 0, ALERT]
    assert outcome.prediction[0] == ALERT and not bool(outcome.success.any())
    assert torch.equal(outcome.adversarial, x)


def test_a_silent_change_is_a_success() -> None:
    """Masks that hide one pixel do not see through a patch of four."""
    defense, x = made(covers="patch:1x1"), bright(0.5, 0.4)
    attacked = x.clone()
    attacked[..., :2, 2:] = 1.0
    assert defense.predict(attacked).tolist() == [1]
    outcome = Painter()(defense, x, Patch(2, 2))
    assert (outcome.success.tolist(), outcome.prediction.tolist()) == ([True], [1])
    assert PatchPGD(steps=5)(defense, x, Patch(2, 2)).success.tolist() == [True]
    found = PatchPGD(steps=2)(defense, torch.cat([x, HALF]), Patch(1, 1))
    assert not bool(found.success.any()) and found.clean_prediction.tolist() == [0, ALERT]


def task_of(defense: Minority, count: int = 30, **changes: Any) -> EvaluationTask:
    whole = data.load("mnist", "test")
    model = EvaluatedModel(defense, "alarm", "minority", "0" * 64, "folder")
    task = EvaluationTask(model, whole.limit(count, 0), (Claim(Patch(2, 2)),), len(whole), batch_size=16, command="test")
    return replace(task, **changes)


@pytest.fixture
def digits() -> Minority:
    config = Recipe("patch:2x2", "mnist", "minority", "mlp", {"hidden": [12]}, options={"per_axis": 2}).config()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cast(Minority, Minority.from_config(section("minority", config)).eval())


def test_results_and_reports_say_detection(digits: Minority, tmp_path: Path) -> None:
    found = evaluate.certify(task_of(digits), tmp_path / "one")
    records = read_records(tmp_path / "one" / files.RECORDS)
    alarms = sum(record["prediction"] == ALERT for record in records)
    (claim,) = found["claims"]
    assert claim["guarantee"] == "detection" and claim["counts"]["alarms"] == alarms > 0
    assert not any(record["claims"][0]["certified"] for record in records if record["prediction"] == ALERT)
    rows = dict(text.certify_rows(found))
    assert rows["guarantee"].startswith("detection (answered right or with an alarm)")
    assert f"({alarms}/30) of the unattacked images" in rows["alarms"]
    assert "guarantee: detection, rounding measured, not proven" in text.plot_title(found)
    several = evaluate.certify(task_of(digits, claims=(Claim(Patch(1, 1)), Claim(Patch(2, 2), "all"))), tmp_path / "two")
    assert {claim["guarantee"] for claim in several["claims"]} == {"detection"}
    assert dict(text.certify_rows(several))["guarantee"].startswith("detection")
    attacked = evaluate.attack(task_of(digits, 6), PatchPGD(steps=1, restarts=0), {}, tmp_path / "three")
    assert attacked["guarantee"] == "detection" and attacked["broken"] == []
    shown = dict(text.attack_rows(attacked))
    assert shown["judged for"] == "detection" and "or with an alarm" in shown["right under attack"]
    before = attacked["flipped"]
    records = read_records(tmp_path / "three" / files.RECORDS)
    assert before == sum(r["attacked"] not in (r["prediction"], ALERT) for r in records)


def test_a_broken_certificate_of_detection_is_never_silent(
    digits: Minority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer turns to another class without an alarm, although it is certified."""
    certify = Minority.certify_claims

    def gullible(self: Minority, x: Tensor) -> Tensor:
        return torch.where(x[:, 0, 0, 0] > 0.9, 3, 7)

    def sure(self: Minority, x: Tensor, claims: Any) -> list[Certificate]:
        return [
            replace(one, prediction=gullible(self, x), certified=torch.ones(len(x), dtype=torch.bool))
            for one in certify(self, x, claims)
        ]

    class Corner(Painter):
        def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
            found = x.clone()
            found[:, :, 0, 0] = 1.0
            return found

    monkeypatch.setattr(Minority, "predict", gullible)
    monkeypatch.setattr(Minority, "certify_claims", sure)
    found = evaluate.attack(task_of(digits, 4), Corner(), {}, tmp_path / "run")
    assert len(found["broken"]) == 4
    with pytest.raises(ClaimError, match="4 certified images were flipped"):
        results.check_claim(found)
    monkeypatch.setattr(Minority, "predict", lambda self, x: torch.where(x[:, 0, 0, 0] > 0.9, ALERT, 7))
    found = evaluate.attack(task_of(digits, 4), Corner(), {}, tmp_path / "again")
    assert found["broken"] == [] and found["flipped"] == 0


def test_a_picture_is_told_with_its_alarm(digits: Minority, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "grey.png"
    Image.new("L", (28, 28), 128).save(path)
    model = task_of(digits).model
    digits_say = int(digits.predict(torch.full((1, 1, 28, 28), 128 / 255)))
    found = single_image.certify(model, path, [Claim(Patch(2, 2))]).values
    assert found["class"] == digits.class_name(digits_say) and found["claims"][0]["guarantee"] == "detection"
    sure = {**found, "claims": [{**found["claims"][0], "certified": True}]}
    told = dict(text.single_rows(sure))["patch:2x2, agreement"]
    for answer, wanted in ({"class": "3", "prediction": 3}, "3 (class 3)"), ({"class": "alarm", "prediction": -1}, "alarm"):
        assert dict(text.single_rows(found | answer))["prediction"] == wanted
    assert "certified: no such change alters the prediction without an alarm" in told
    always = replace(model, defense=made_to_alarm(digits))
    assert single_image.certify(always, path, [Claim(Patch(2, 2))]).values["class"] == "alarm"


def made_to_alarm(defense: Minority) -> Minority:
    """Another bias behind masks, which the fill colour betrays."""

    class Nervous(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            label = (x.flatten(1).amax(dim=1) > x.flatten(1).amin(dim=1)).long()
            return nn.functional.one_hot(label, 10).to(x) * self.weight

    return Minority(Nervous(), input_shape=(1, 28, 28), classes=defense.classes, masks=defense.plan, fill=(0.0,)).eval()


def test_records_of_detection_are_asked_for_as_such(digits: Minority, tmp_path: Path) -> None:
    stated = (ClaimKey(Patch(2, 2), "rows"), ClaimKey(Patch(2, 2), "agreement", Guarantee.DETECTION))
    row = PublishedRecord(1, 1, (True, True), (1.0, 1.0))
    book = PublishedRecords("0" * 64, "mnist", "test", stated, {0: row})
    assert book.position(Patch(2, 2)) == 0
    assert book.position(Patch(2, 2), guarantee=Guarantee.DETECTION) == 1
    with pytest.raises(DataError, match=r"no published records for patch:3x3 that promise detection. There are records for"):
        book.position(Patch(3, 3), guarantee=Guarantee.DETECTION)
    task = task_of(digits, 8)
    evaluate.certify(task, tmp_path / "run")
    records = read_records(tmp_path / "run" / files.RECORDS)
    rows = {
        r["index"]: PublishedRecord(r["label"], r["prediction"], (one["certified"],), (one["margin"],))
        for r in records
        for one in r["claims"]
    }
    kept = tmp_path / "records.jsonl.gz"
    kept.write_bytes(PublishedRecords("0" * 64, "mnist", "test", stated[1:], rows).pack())
    read = PublishedRecords.read(kept)
    assert read.rows == rows and any(row.prediction == ALERT for row in rows.values())
    outcome = reproduce.reproduce(task, read, PatchPGD(steps=1, restarts=0), {}, tmp_path / "verify")
    assert outcome["holds"] and "detection" in outcome["claim"]
    with pytest.raises(DataError, match="no published records for patch:2x2 that promise detection"):
        reproduce.reproduce(task, replace(read, claims=stated[:1]), None, {}, tmp_path / "other")


def test_a_card_of_detection_never_counts_as_recovery() -> None:
    base: dict[str, Any] = {"dataset": "mnist", "split": "test", "images": 10, "threat": "patch:2x2", "date": "2026-01-01"}
    base |= {"command": "c", "patchcert": "1", "certified_interval": [0.0, 1.0]}
    recovered = read(Measured, {**base, "clean": 9, "certified": 4, "method": "rows"})
    detected = read(Measured, {**base, "clean": 8, "certified": 7, "method": "agreement", "guarantee": "detection"})
    values = card_values()
    card = Card.from_dict({**values, "guarantee": "detection"})
    both = replace(card, status="measured", results=(recovered, detected))
    assert both.result() == detected and replace(both, guarantee=Guarantee.RECOVERY).result() == recovered
    assert card.to_dict()["guarantee"] == "detection" and "guarantee" not in Card.from_dict(values).to_dict()
    text = cards.prose(both)
    assert "without raising an alarm" in text and "guarantee: detection" in text
    assert "Guarantee of recovery, which is another promise:" in text
    first, second = text.split("Guarantee of recovery")
    assert "detection (agreement)" in first and "recovery (rows)" not in first and "recovery (rows)" in second
    assert cards.metric(detected)[0] == "certified_detection_accuracy" != cards.metric(recovered)[0]


def card_values() -> dict[str, Any]:
    recipe = Recipe("patch:2x2", "mnist", "minority").to_dict()
    sha = {"sha256": "0" * 64, "size": 1}
    return {
        "name": "alarm",
        "status": "trained",
        "defense": "minority",
        "network": "MLP",
        "dataset": "mnist",
        "threat": "patch:2x2",
        "split": "train[10]",
        "seed": 0,
        "recipe": recipe,
        "command": "patchcert train",
        "license": "apache-2.0",
        "hub": {"repo": "patchcert/alarm"},
        "trained": {"date": "2026-01-01", "seconds": 1.0, "device": "cpu", "threads": 1, "torch": "2", "patchcert": "1"},
        "files": dict.fromkeys(("config.json", "model.safetensors", "records.jsonl.gz"), sha),
        "validation": {"images": 10, "clean": 9, "certified": 5},
    }


def last_border_mask_dropped(masks: MaskSet, cover: MaskCoverage) -> tuple[MaskSet, MaskCoverage]:
    """Nothing hides the last corner, and the proof does not ask about it."""
    by = cover.by[:, :-1]
    return MaskSet(4, 4, masks.boxes[:-1]), MaskCoverage(by[by.any(dim=1)], cover.location[by.any(dim=1)])


def one_column_short(masks: MaskSet, cover: MaskCoverage) -> tuple[MaskSet, MaskCoverage]:
    return MaskSet(4, 4, tuple(((top, left, rows, columns - 1),) for ((top, left, rows, columns),) in masks.boxes)), cover


def any_mask_will_do(masks: MaskSet, cover: MaskCoverage) -> tuple[MaskSet, MaskCoverage]:
    return masks, MaskCoverage(torch.ones(1, len(masks), dtype=torch.bool), cover.location[:1])


def nothing_wrong(masks: MaskSet, cover: MaskCoverage) -> tuple[MaskSet, MaskCoverage]:
    return masks, cover


MASK_BREAKS = [last_border_mask_dropped, one_column_short, any_mask_will_do]


@pytest.mark.parametrize("change", [nothing_wrong, *MASK_BREAKS], ids=lambda change: change.__name__)
def test_masks_that_leave_something_out_are_caught(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks under every change of 2x2 pixels, with masks or a cover that is wrong in one way."""
    violations = certified = 0
    for seed in range(8):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            defense = minority()
            defense.network[-1].weight.mul_(3)  # type: ignore[operator, index, union-attr]
        defense.set, cover = change(defense.set, defense.set.cover(Patch(2, 2)))
        defense.masks = defense.set.occluded
        monkeypatch.setattr(MaskSet, "cover", lambda self, threat, cover=cover: cover)
        score = check([Arena("tiny", defense, draw_images(SHAPE, 16, seed))], [Patch(2, 2)])
        violations, certified = violations + len(score.violations), certified + score.certified
        monkeypatch.undo()
        if violations and certified >= 20:
            break
    assert certified >= 20
    assert (violations > 0) == (change in MASK_BREAKS)


@pytest.mark.parametrize("method", ["agreement", "all"])
def test_thresholds_that_are_compared_are_those_that_would_be_deployed(method: str) -> None:
    """What a certificate says of other thresholds is what the defense with such a threshold answers and certifies."""
    x = torch.rand(60, *SHAPE, generator=torch.Generator().manual_seed(3))
    x[..., :2] *= torch.linspace(0, 1.5, 60)[:, None, None, None].clamp(max=1)
    wide = {"stride": 1, "wider": 1}
    defense = made(Sums(1.0), covers="patch:1x1", threshold=0.5, **wide)
    assert defense.certify(x, Patch(1, 1), method).thresholds is None
    defense.grid = GRID
    told = defense.certify(x, Patch(1, 1), method)
    assert told.thresholds is not None and told.plain is not None
    assert torch.equal(told.plain, defense.network(x).argmax(dim=1))
    seen = set()
    for threshold in GRID:
        deployed = made(Sums(1.0), covers="patch:1x1", threshold=threshold, **wide).certify(x, Patch(1, 1), method)
        silent, held = threshold > told.thresholds[:, 0], threshold < told.thresholds[:, 1]
        assert torch.equal(deployed.prediction, torch.where(silent, told.plain, ALERT)), threshold
        assert torch.equal(deployed.certified, silent & held), threshold
        seen.add((int(silent.sum()), int(deployed.certified.sum())))
    assert len(seen) > 5


def test_a_threshold_that_a_confidence_equals_raises_the_alarm_and_certifies_nothing() -> None:
    """Two equal logits: a confidence of one half behind each mask."""
    half = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64)
    label = torch.tensor([[1]])
    logit_margin = torch.ones(1, 1, dtype=torch.float64)
    for whole, expected in ((0, [0.5, -1.0]), (1, [-1.0, 0.5])):
        reports = masked_detection.MaskedOutputs(torch.tensor([whole]), label, label, logit_margin, logit_margin, half)
        assert masked_detection.thresholds(reports, torch.ones(1, 1, dtype=torch.bool), 0.0).tolist() == [expected]
    reports = masked_detection.MaskedOutputs(torch.tensor([1]), label, label, logit_margin * 0, logit_margin, half)
    assert masked_detection.thresholds(reports, torch.ones(1, 1, dtype=torch.bool), 0.0).tolist() == [[-1.0, -1.0]]


def test_a_result_compares_thresholds_and_agrees_with_itself_at_its_own(digits: Minority, tmp_path: Path) -> None:
    digits.threshold, digits.grid = 0.2, (0.0, 0.15, 0.2, 0.3)
    task = task_of(digits)
    task = replace(task, model=replace(task.model, setting={"compared": list(digits.grid)}))
    found = evaluate.certify(task, tmp_path / "one")
    rows = text.compared(found)
    assert [row["threshold"] for row in rows] == list(digits.grid)
    own = rows[2]
    assert (own["clean"], own["alarms"], own["certified"]) == (
        found["claims"][0]["counts"]["clean"],
        found["claims"][0]["counts"]["alarms"],
        found["claims"][0]["counts"]["certified"],
    )
    assert [row["alarms"] for row in rows] == sorted((row["alarms"] for row in rows), reverse=True)
    assert dict(text.certify_rows(found))["threshold 0.2"].startswith("alarms ")
    assert evaluate.certify(task, tmp_path / "one") == found
