"""Clipped BagNet: how scores are clipped, the published certificate's counterexample, and training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli import checkpoint, data
from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers.cells import additive
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.defenses import TrainingStep
from patchcert_cli.defenses.clipped import STEPS, Clipped, ClippedOptions, thresholds
from patchcert_cli.errors import IntegrityError
from patchcert_cli.threats import Patch, Patches, Sparse
from patchcert_cli.training import loop
from patchcert_cli.training.recipe import Recipe
from tests.examples import file_of, section

from .test_bagcert import SHAPE, images, same

PLAN: dict[str, Any] = {"widths": [4, 6], "kernels": [2, 1], "dilations": [1, 1], "mixes": [0, 1]}  # 14x13 cells of 2x2 pixels
UNIT = ClippedOptions(clip="linear", slope=2.0, middle=0.5)  # clips to [0, 1]


def config(**options: Any) -> dict[str, Any]:
    network = {**PLAN, "mean": [0.4] * SHAPE[0], "std": [0.3] * SHAPE[0]}
    return {
        "defense": "clipped",
        "input_shape": list(SHAPE),
        "classes": [str(c) for c in range(4)],
        "network": {"name": "region", "options": network},
        "options": options,
        "recipe": {"stored": "float32"},
    }


def build(given: dict[str, Any] | None = None, seed: int = 7, lean: float = 1.0) -> Clipped:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        defense = Clipped.from_config(section("clipped", given or config())).eval()
        x = images(32, SHAPE, 99)
        defense.scorer.head.weight *= 0.5 / defense.scorer(x).std()
        scores = defense.scorer(x)
        defense.scorer.head.bias += lean * torch.randn(4) - scores.mean(dim=(0, 2, 3))
        defense.calibrate(x)
    return defense


def test_the_published_certificate_is_refuted() -> None:
    """Five cells and three classes: asked about the second class alone, the answer seems safe, but the third takes it."""
    cells = torch.tensor([[0.9, 0.3, 0.3], [0.9, 0.2, 0.9], [0.3, 0.5, 0.3], [0.6, 0.9, 0.1], [1, 0, 0.4]], dtype=torch.float64)
    scores, sums = cells.t()[None, :, None], cells.sum(dim=0)
    second = int(sums.topk(2).indices[1])
    assert (int(sums.argmax()), second) == (0, 2)

    def after(rival: int) -> float:
        """The lead that the worst patch on one cell leaves the answer."""
        return min(float(sums[0] - cell[0] - (sums[rival] - cell[rival] + 1)) for cell in cells)

    assert after(second) > 0, "the published rule certifies it"
    assert after(1) == pytest.approx(2.7 - 2.9)
    defense = one_cell_each()
    votes, cover = defense.count(scores), CellCoverage(Axis.sliding(1, 1, kernel=1), Axis.sliding(5, 1, kernel=1))
    proof = additive.prove(votes, cover)
    assert (int(proof.answer), int(proof.rival), int(proof.worst)) == (0, 1, 4)
    assert float(proof.margin) <= 0
    attacked = scores.clone()
    attacked[0, :, 0, 4] = torch.tensor([-9.0, 9.0, -9.0])  # clipped to 0, 1, 0
    assert int(defense.count(attacked).answer()) == 1
    for method in ("3.1", "3.2", "3.3"):
        assert float(additive.prove(votes, cover, method).margin) <= 0


def one_cell_each() -> Clipped:
    plan = {"widths": [2], "kernels": [1], "dilations": [1], "mixes": [0], "mean": [0.0], "std": [1.0]}
    made = config() | {"input_shape": [1, 1, 5], "classes": ["a", "b", "c"], "network": {"name": "region", "options": plan}}
    return Clipped.from_config(
        section("clipped", made | {"options": {"clip": UNIT.clip, "slope": UNIT.slope, "middle": UNIT.middle}})
    )


@pytest.mark.parametrize("clip", ["tanh", "linear"])
@pytest.mark.parametrize(("slope", "middle"), [(0.05, 20.0), (1.0, 0.0), (2.0, 0.5)])
def test_scores_are_clipped_to_the_nearest_step(clip: str, slope: float, middle: float) -> None:
    how = ClippedOptions(clip=clip, slope=slope, middle=middle)
    ends = thresholds(how)
    assert len(ends) == STEPS and all(low < high for low, high in pairwise(ends))
    defense = build(config(clip=clip, slope=slope, middle=middle))
    scores = middle + torch.linspace(-6, 6, 3001, dtype=torch.float64)[None, None, None] / slope
    away = slope * (scores - middle)
    wanted = STEPS * ((away.tanh() if clip == "tanh" else away.clamp(-1, 1)) + 1) / 2
    found = defense.count(scores).scores
    assert float((found - wanted).abs().max()) <= 0.501
    assert {int(found.min()), int(found.max())} == {0, STEPS}
    extremes = torch.tensor([-float("inf"), -1e300, 1e300, float("inf")], dtype=torch.float64)[None, None, None]
    assert defense.count(extremes).scores.flatten().tolist() == [0, 0, STEPS, STEPS]
    assert torch.allclose(defense.clipped(scores), (2 * wanted / STEPS - 1), atol=1e-6)


def test_a_score_at_a_threshold_counts_as_reaching_it() -> None:
    defense = build(config(clip="linear"))
    at = defense.thresholds[100]
    both = torch.stack([at, torch.nextafter(at, at - 1)])[None, None, None]
    assert defense.count(both).scores.flatten().tolist() == [101, 100]


def worst_margin(steps: Tensor, cover: CellCoverage) -> int:
    """The theorem in loops, for one image [K, N, M] of whole steps."""
    sums = steps.sum(dim=(1, 2)).tolist()
    y, margins = sums.index(max(sums)), []
    for rows in cover.rows.touched:
        for columns in cover.columns.touched:
            inside = steps[:, list(rows)][:, :, list(columns)]
            size, taken = inside[0].numel(), inside.sum(dim=(1, 2)).tolist()
            for j in range(len(sums)):
                margins += [(sums[y] - taken[y]) - (sums[j] - taken[j] + STEPS * size) + (y < j)] * (j != y)
    return int(min(margins))


def test_margins_ask_every_rival_at_every_location() -> None:
    certified = others = 0
    for seed in (3, 5, 7):
        defense, x = build(seed=seed, lean=0.5), images(30)
        certificate, steps = defense.certify(x, Patch(2, 1)), defense.count(defense.scores(x)).scores
        assert certificate.margin.tolist() == [worst_margin(image, defense.cover(Patch(2, 1))) for image in steps]
        certified += int(certificate.certified.sum())
        second = steps.sum(dim=(2, 3)).scatter(1, certificate.prediction[:, None], -1).argmax(dim=1)
        others += int((certificate.runner_up != second).sum())
    assert 0 < certified < 90
    assert others, "the clean runner-up was always the worst rival"


def test_batches_do_not_matter_and_several_pixels_are_certified() -> None:
    defense, x = build(), images(11)
    for threat in (Patch(2, 3), Sparse(2)):
        whole = defense.certify(x, threat)
        same(Certificate.cat([defense.certify(image[None], threat) for image in x]), whole)
    assert int(defense.certify(x, Sparse(2)).certified.sum()) > 0
    same(defense.certify(x, Patches(2, Patch(1, 1))), defense.certify(x, Sparse(2)))
    assert bool((defense.certify(x, Patches(2, Patch(2, 1))).margin <= defense.certify(x, Patch(2, 1)).margin).all())
    assert torch.equal(defense.predict(x), whole.prediction)
    defense.self_test()


def test_surrogates_follow_the_deployed_answer() -> None:
    defense, x = build(), images(30)
    first, second = defense.surrogates()
    defense.requires_grad_(False)
    assert float((first.whole(x) - defense.votes(x).sums()).abs().max()) <= first.tolerance
    boxes = torch.tensor([[2, 3, 2, 2]]).expand(30, 4)
    for surrogate in (first, second):
        parts = surrogate.near(x, boxes) + surrogate.rest(x, boxes[:, None])[:, 0]
        assert torch.allclose(parts, surrogate.whole(x), atol=1e-2)
    assert float((defense(x).argmax(dim=1) == defense.predict(x)).float().mean()) > 0.9


def test_the_loss_is_the_cross_entropy_of_mean_clipped_scores() -> None:
    defense, x, label = build(), images(5), torch.tensor([0, 1, 2, 3, 0])
    step = TrainingStep(Patch(3, 3), ClippedOptions(sharpness=3.0), 0.0, 10, torch.Generator())
    with torch.no_grad():
        found = float(defense.training_loss(x, label, step))
        wanted = F.cross_entropy(3 * defense.scorer(x).tanh().mean(dim=(2, 3)), label)
    assert found == pytest.approx(float(wanted), rel=1e-5)


def test_storage_changes_nothing(tmp_path: Path) -> None:
    given = config(clip="linear")
    defense, x = build(given), images(16)
    given = file_of("clipped", given)
    checkpoint.save_defense(tmp_path, defense, given)
    again, _ = checkpoint.load_defense(tmp_path)
    same(again.certify(x, Patch(2, 2)), defense.certify(x, Patch(2, 2)))
    with pytest.raises(IntegrityError, match="clipped cannot be built: slope is -1"):
        Clipped.from_config(section("clipped", config(slope=-1)))


TINY = Recipe(
    "patch:1x1",
    defense="clipped",
    network_options={"widths": [12, 24], "kernels": [3, 3], "dilations": [1, 1], "mixes": [0, 1], "places": True},
    epochs=4,
    batch_size=32,
    learning_rate=0.01,
    validation=150,
    options={"flip": False, "shift": 0},
)


def test_training_raises_certified_accuracy(tmp_path: Path) -> None:
    some = data.load("mnist", "test").limit(750, 0)
    made = loop.train(TINY, some, tmp_path / "run")
    assert made.validation.clean >= 60 and made.validation.certified >= 3
