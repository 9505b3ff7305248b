"""PatchGuard: what masks hold, the deployed rule, its training, and that storage and batches change nothing."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli import checkpoint, data
from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers.cells.robust_masking import MOST
from patchcert_cli.defenses import TrainingStep
from patchcert_cli.defenses.patchguard import STEPS, PatchGuard, PatchGuardOptions
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.threats import Patch, Sparse, parse_threat
from patchcert_cli.training import loop
from patchcert_cli.training.recipe import Recipe
from tests.examples import file_of, section
from tests.soundness import relations

from .test_bagcert import PLANS, SHAPE, images, same


def config(reach: int = 5, covers: str = "patch:3x3", stride: int = 1, **options: Any) -> dict[str, Any]:
    network = {**PLANS[reach], "mean": [0.4] * SHAPE[0], "std": [0.3] * SHAPE[0], "stride": stride}
    return {
        "defense": "patchguard",
        "input_shape": list(SHAPE),
        "classes": [str(c) for c in range(4)],
        "network": {"name": "region", "options": network},
        "options": options,
        "masks": {"covers": covers.split()},
        "recipe": {"stored": "float32"},
    }


def build(given: dict[str, Any] | None = None, seed: int = 2, lean: float = 0.3) -> PatchGuard:
    """Random weights; the larger ``lean``, the more classes differ in their evidence."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        defense = PatchGuard.from_config(section("patchguard", given or config())).eval()
        x = images(32, SHAPE, 99)
        scores = defense.scorer(x)
        defense.scorer.head.weight *= 3 / scores.std()
        scores = defense.scorer(x)
        defense.scorer.head.bias += lean * torch.randn(4) * scores.std(dim=(0, 2, 3)) - scores.mean(dim=(0, 2, 3))
        defense.calibrate(x)
    return defense


def left(evidence: Tensor, window: tuple[int, int], share: Fraction) -> list[int]:
    """The published rule on one image's evidence [K, N, M], window by window."""
    found = []
    for plane in evidence.tolist():
        sums = [
            sum(plane[row][column] for row in range(top, top + window[0]) for column in range(begin, begin + window[1]))
            for top in range(len(plane) - window[0] + 1)
            for begin in range(len(plane[0]) - window[1] + 1)
        ]
        total = sum(map(sum, plane))
        found.append(total - max(sums) if max(sums) > share * total else total)
    return found


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_answer_is_that_of_the_rule(share: float) -> None:
    defense, x = build(config(share=share)), images(40)
    evidence = defense.count(defense.scores(x))
    assert torch.equal(evidence, (defense.scores(x).clamp(min=0) * STEPS).round().long())
    sums = [left(image, (7, 7), Fraction(round(share * 1000), 1000)) for image in evidence]
    assert defense.predict(x).tolist() == [of.index(max(of)) for of in sums]
    unmasked = evidence.sum(dim=(2, 3)).argmax(dim=1).tolist()
    assert defense.predict(x).tolist() != unmasked, "masks never mattered"
    assert defense.count(torch.tensor([-1e30, -0.0, 1e30, float("inf")]).double()).tolist() == [0, 0, MOST, MOST]


@pytest.mark.parametrize(
    ("reach", "covers", "stride", "window"),
    [
        (5, "3x3", 1, (7, 7)),
        (5, "1", 1, (5, 5)),
        (7, "2x1", 1, (8, 7)),
        (5, "5%", 1, (8, 8)),  # 4x4 of 15x14
        (5, "3", 2, (4, 4)),  # 7 pixels meet at most 4 cells that are 2 apart
        (9, "5x2", 1, (7, 6)),  # no more cells than there are
    ],
)
def test_masks_hold_what_the_patch_reaches(reach: int, covers: str, stride: int, window: tuple[int, int]) -> None:
    if (reach, covers) == (9, "5x2"):
        with pytest.raises(UsageError, match=r"masks for patch:5x2 hide all of the 7x6 cells. Cover a smaller patch"):
            build(config(reach, f"patch:{covers}", stride))
        return
    defense = build(config(reach, f"patch:{covers}", stride))
    assert defense.masking.window == window
    threat = parse_threat(f"patch:{covers}")
    assert defense.note(threat) == ""
    defense.self_test()


def test_masks_are_made_for_the_patch_that_it_is_trained_against() -> None:
    def window(*covers: str, **options: Any) -> tuple[int, int]:
        return build(config(covers=" ".join(covers), **options)).masking.window

    assert (window("patch:2x4"), window("sparse:3"), window("patch:2x4", "patch:4x1")) == ((6, 8), (5, 5), (8, 8))
    assert build(config(share=0.25)).masking.share == Fraction(1, 4)
    for options, covers in (({}, "patch:5x5"), ({"covers": "2x3"}, "patch:2x3"), ({"covers": "1%"}, "patch:1%")):
        made = Recipe("patch:5x5", "cifar10", "patchguard", options=options).config()
        assert made["deployed"]["covers"] == [covers]


def test_what_masks_do_not_hold_is_not_certified() -> None:
    defense, x = build(config(covers="patch:3x3")), images(20)
    assert int(defense.certify(x, Patch(3, 3)).certified.sum()) > 0
    larger = defense.certify(x, Patch(3, 4))
    assert int(larger.certified.sum()) == 0 and bool(larger.margin.isneginf().all())
    assert defense.note(Patch(3, 4)) == "patch:3x4 reaches 7x8 cells, but a mask holds 7x7: no image can be certified"
    with pytest.raises(UsageError, match=r"no image can be certified. Draw a smaller patch"):
        defense.margin_map(x, Patch(3, 4))
    with pytest.raises(UnsupportedThreat, match=r"robust masking has no certificate against sparse:2. Allowed: one patch"):
        defense.certify(x, Sparse(2))
    with pytest.raises(UnsupportedThreat, match="sparse:1:value"):
        defense.certify(x, Sparse(1, "value"))
    same(defense.certify(x, Sparse(1)), defense.certify(x, Patch(1, 1)))


def test_smaller_patches_gain_from_every_mask_that_holds_them() -> None:
    defense, x = build(config(covers="patch:5x5")), images(60)
    margins = [defense.certify(x, Patch(side, side)).margin for side in (5, 3, 1)]
    assert bool((margins[0] <= margins[1]).all()) and bool((margins[1] <= margins[2]).all())
    assert bool((margins[0] < margins[2]).any())


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_weaker_attackers_and_other_batches_never_make_it_worse(share: float, seed: int) -> None:
    options = {"widths": [4], "kernels": [2], "dilations": [1], "mixes": [0], "mean": [0.4], "std": [0.3]}
    made = config(covers="patch:2x2", share=share) | {"input_shape": [1, 6, 6], "classes": ["a", "b", "c"]}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        defense = PatchGuard.from_config(section("patchguard", made | {"network": {"name": "region", "options": options}})).eval()
        x = torch.rand(12, 1, 6, 6)
        scores = defense.scorer(x)
        defense.scorer.head.bias += 2 * torch.randn(3) * scores.std(dim=(0, 2, 3)) - scores.mean(dim=(0, 2, 3))
        defense.calibrate(x)
    assert relations.smaller_patches(defense, x) == []
    assert relations.one_pixel_is_a_patch(defense, x) == []
    assert relations.percent_is_a_square(defense, x, 9) == []
    assert relations.batches_do_not_matter(defense, x, Patch(2, 1), torch.randperm(12)) == []


def test_the_map_of_margins_has_the_certificate_as_its_smallest_entry() -> None:
    defense, x = build(), images(12)
    chart, certificate = defense.margin_map(x, Patch(3, 2)), defense.certify(x, Patch(3, 2))
    assert chart.shape == (12, 13, 13)
    assert torch.equal(chart.flatten(1).amin(dim=1), certificate.margin)
    at = chart[torch.arange(12), certificate.worst[:, 0], certificate.worst[:, 1]]
    assert torch.equal(at, certificate.margin)
    with pytest.raises(UsageError, match="a map needs one patch"):
        defense.margin_map(x, Sparse(1))


def test_a_patch_without_bounds_does_not_win() -> None:
    """The enemy writes the largest evidence there is into what he reaches; certified answers stay."""
    defense, x = build(), images(40)
    evidence = defense.count(defense.scores(x))
    certificate, cover = defense.certify(x, Patch(3, 3)), defense.cover(Patch(3, 3))
    moved = torch.zeros(40, dtype=torch.bool)
    for rows in cover.rows.touched:
        for columns in cover.columns.touched:
            for rival in range(4):
                written = evidence.clone()
                inside = (slice(None), slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
                written[inside] = 0
                written[:, rival][inside[0], inside[2], inside[3]] = MOST
                moved |= defense.answer(written) != certificate.prediction
    assert torch.equal(certificate.certified, ~moved)  # this is the worst that he can do
    assert 0 < int(certificate.certified.sum()) < 40


def step(options: PatchGuardOptions, progress: float = 5.0) -> TrainingStep:
    return TrainingStep(Patch(3, 3), options, progress, 10, torch.Generator())


@pytest.mark.parametrize("progress", [0.5, 3.0])
def test_the_loss_takes_the_heaviest_window_of_the_true_class(progress: float) -> None:
    defense, x, label = build(), images(5), torch.tensor([0, 1, 2, 3, 0])
    with torch.no_grad():
        found = float(defense.training_loss(x, label, step(PatchGuardOptions(warm_up_epochs=1), progress)))
        evidence = F.relu(defense.scorer(x)).double()
    logits = evidence.mean(dim=(2, 3))
    for image, right in enumerate(label.tolist()):
        if progress >= 1:
            plane = evidence[image, right]
            sums = [float(plane[i : i + 7, j : j + 7].sum()) for i in range(11 - 6) for j in range(10 - 6)]
            logits[image, right] -= max(sums) / 110
    assert found == pytest.approx(float(F.cross_entropy(logits, label)), rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_surrogates_follow_the_deployed_answer(share: float) -> None:
    defense, x = build(config(share=share)), images(40)
    first, second = defense.surrogates()
    with torch.no_grad():
        scores = first.whole(x)
    deployed = defense.answer(defense.count(defense.scores(x)))
    sums = [left(image, (7, 7), Fraction(round(share * 1000), 1000)) for image in defense.count(defense.scores(x))]
    assert float((scores - torch.tensor(sums) / STEPS).abs().max()) <= first.tolerance
    assert float((scores.argmax(dim=1) == deployed).float().mean()) > 0.9
    assert second.whole(x).shape == (40, 4)
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(first.whole(point)[:, 0].sum(), point)
    assert bool((slope != 0).any())


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_batches_do_not_matter(share: float) -> None:
    defense, x = build(config(share=share)), images(11)
    whole = defense.certify(x, Patch(2, 3))
    same(Certificate.cat([defense.certify(image[None], Patch(2, 3)) for image in x]), whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(defense.certify(x, Patch(2, 3)), whole)
    assert torch.equal(defense.predict(x), whole.prediction)
    assert whole.method == "masking" and not bool(whole.tolerance.any())


def test_storage_changes_nothing(tmp_path: Path) -> None:
    given = config(7, "patch:2x2", share=0.1)
    defense, x = build(given), images(16)
    given = file_of("patchguard", given)
    checkpoint.save_defense(tmp_path, defense, given)
    again, _ = checkpoint.load_defense(tmp_path)
    same(again.certify(x, Patch(2, 2)), defense.certify(x, Patch(2, 2)))
    other = config()
    other["network"] = {"name": "mlp", "options": {"hidden": [3], "mean": [0.5, 0.5], "std": [1, 1]}}
    with pytest.raises(IntegrityError, match="patchguard needs a region scorer, not 'mlp'"):
        PatchGuard.from_config(section("patchguard", other))


def test_options_are_checked() -> None:
    for options, said in (
        ({"covers": "huge"}, "covers is 'huge', not a patch"),
        ({"share": 1.0}, r"share is 1.0, not in \[0, 1\)"),
    ):
        with pytest.raises(UsageError, match=said):
            Recipe("patch:3x3", defense="patchguard", options=options)


TINY = Recipe(
    "patch:1x1",
    defense="patchguard",
    network_options={"widths": [12, 24], "kernels": [3, 3], "dilations": [1, 1], "mixes": [0, 1], "places": True},
    epochs=4,
    batch_size=32,
    learning_rate=0.02,
    validation=150,
    options={"flip": False, "shift": 0, "warm_up_epochs": 2},
)


def test_training_raises_certified_accuracy(tmp_path: Path) -> None:
    some = data.load("mnist", "test").limit(750, 0)
    made = loop.train(TINY, some, tmp_path / "run")
    assert made.defense.certify(torch.zeros(1, 1, 28, 28), Patch(1, 1)).method == "masking"
    assert made.validation.clean >= 35 and made.validation.certified >= 5
