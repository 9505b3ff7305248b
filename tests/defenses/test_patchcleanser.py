"""PatchCleanser: around any network, with any masks, against an enemy that tries everything; and what its training does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli import checkpoint, models
from patchcert_cli.certifiers.masks import masked_predictions
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.certifiers.masks.masked_predictions import TOLERANCE
from patchcert_cli.defenses import Claim, MaskedOptions, TrainingStep
from patchcert_cli.defenses.minority import Minority
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.threats import Patch, Sparse, Threat, parse_threat
from tests.examples import file_of, section
from tests.soundness.arena import Arena, Attack, Score, check, draw_images

CLASSES = ("a", "b", "c")


def network(shape: tuple[int, int, int], seed: int, *, width: int = 6) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"input_shape": shape, "classes": 3, "hidden": (width,), "mean": (0.4,) * shape[0], "std": (0.5,) * shape[0]}
        return models.build("mlp", options).requires_grad_(False).eval()


def defense(
    shape: tuple[int, int, int] = (1, 4, 4), plan: MaskSpec | None = None, *, seed: int = 0, labels: str = "float32"
) -> PatchCleanser:
    plan = plan or MaskSpec(("patch:2x2",), per_axis=3)
    fill = tuple(0.3 + 0.1 * c for c in range(shape[0]))
    return PatchCleanser(
        network(shape, seed), input_shape=shape, classes=CLASSES, masks=plan, fill=fill, prediction_dtype=labels
    ).eval()


def images(shape: tuple[int, int, int] = (1, 4, 4), count: int = 12, seed: int = 0) -> Tensor:
    return draw_images(shape, count, seed)


PLANS: list[tuple[MaskSpec, list[Attack]]] = [
    (MaskSpec(("patch:2x2",), per_axis=2), [Patch(2, 2), Patch(1, 2), Patch(1, 1)]),
    (MaskSpec(("patch:1x2",), stride=1), [Patch(1, 2), Patch(1, 1)]),
    (MaskSpec(("patch:1x1",), stride=1, wider=1), [Patch(1, 1), Sparse(1), Sparse(1, "value")]),
    (MaskSpec(("patch:1x2", "patch:2x1"), per_axis=3), [Patch(1, 2), Patch(2, 1)]),
    (MaskSpec(("patch:1x2",), stride=1, shape="column"), [Patch(3, 1), Patch(2, 2), Patch(1, 1)]),
    (MaskSpec(("sparse:2",), per_axis=2), [Sparse(2), Sparse(1), Patch(1, 2)]),
]


def arenas(plan: MaskSpec, shape: tuple[int, int, int], count: int = 2) -> list[Arena]:
    return [Arena(f"{shape} {seed}", defense(shape, plan, seed=seed), images(shape, 6, seed)) for seed in range(count)]


@pytest.mark.parametrize(
    ("plan", "threats"), PLANS, ids=lambda value: "-".join(map(str, value.covers)) if isinstance(value, MaskSpec) else ""
)
def test_every_plan_is_certified_soundly(plan: MaskSpec, threats: list[Attack]) -> None:
    total = Score()
    for shape, method in (((1, 4, 4), "rows"), ((1, 3, 4), "rows"), ((1, 3, 3), "pairs")):
        score = check(arenas(plan, shape), threats, method=method)
        assert score.violations == [] and score.unsupported == 0
        total += score
    assert total.certified >= 10 and total.broken >= 10


def test_two_patches_of_two_channels_are_certified_soundly() -> None:
    score = check(arenas(MaskSpec(("patches:2:1x1",), per_axis=3), (2, 3, 3), 1), [Sparse(2)])
    assert score.violations == [] and score.unsupported == 0
    assert score.certified >= 2 and score.broken >= 2


def broken(made: list[Arena], threats: list[Attack]) -> int:
    found = check(made, threats).violations
    return sum("a change moves the answer" in text for text in found)


class Brightest(nn.Module):
    """Class b where anything bright is to be seen, else a."""

    def forward(self, x: Tensor) -> Tensor:
        most = x.flatten(1).amax(dim=1)
        return torch.stack([torch.full_like(most, 0.5), most, torch.zeros_like(most)], dim=1)


@pytest.mark.parametrize("how", ["as they should be", "one pixel short", "no mask at the border"])
def test_masks_other_than_the_proof_believes_in_are_caught(how: str) -> None:
    plan, shape = MaskSpec(("patch:2x2",), per_axis=2), (1, 4, 4)
    made = PatchCleanser(Brightest(), input_shape=shape, classes=CLASSES, masks=plan, fill=(0.3,)).eval()
    made.masks = made.masks.clone()  # what is laid over the images, but not what the proof goes by
    for (box,), occluded in zip(made.set.boxes, made.masks, strict=True):
        top, left, rows, columns = box
        if how == "one pixel short":
            occluded[top + rows - 1] = False
        elif how == "no mask at the border" and left + columns == 4:
            occluded[:] = made.masks[0]
    arena = Arena(how, made, 0.4 * images(count=4))
    assert bool(made.certify(arena.images, Patch(2, 2)).certified.all())
    assert (broken([arena], [Patch(2, 2)]) > 0) == (how != "as they should be")


def test_an_unmasked_prediction_that_is_trusted_is_caught() -> None:
    class Trusting(PatchCleanser):
        def predict(self, x: Tensor) -> Tensor:
            """Wrong: where round two would be needed, the whole image decides."""
            one = torch.stack([self.behind(x, mask.expand(len(x), -1, -1)).argmax(dim=1) for mask in self.masks])
            return torch.where((one == one[0]).all(dim=0), one[0], self(x).argmax(dim=1))

    made = []
    for seed in range(12):
        plan = MaskSpec(("patch:2x2",), per_axis=2)
        wrong = Trusting(network((1, 4, 4), seed), input_shape=(1, 4, 4), classes=CLASSES, masks=plan, fill=(0.3,)).eval()
        made.append(Arena(str(seed), wrong, images(count=10, seed=seed)))
    assert any(broken([one], [Patch(2, 2)]) > 0 for one in made)


class Told(nn.Module):
    """A network that wants to know what is occluded, and checks what it is given."""

    takes_mask = True

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * 16, 3)

    def forward(self, x: Tensor, occluded: Tensor) -> Tensor:
        assert occluded.dtype == torch.bool and occluded.shape == (len(x), 1, 4, 4)
        assert bool((x[occluded] == 0.25).all()), "hidden pixels have the colour of the masks"
        logits: Tensor = self.inner(torch.cat([x, occluded.to(x)], dim=1).flatten(1))
        return logits


def around(inner: nn.Module, **more: Any) -> PatchCleanser:
    plan = MaskSpec(("patch:2x2",), per_axis=3)
    return PatchCleanser(inner, input_shape=(1, 4, 4), classes=CLASSES, masks=plan, fill=(0.25,), **more).eval()


def test_any_module_serves_and_one_may_ask_what_is_hidden() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    for inner in (plain, Told()):
        made, x = around(inner), images()
        made.self_test()
        certificate = made.certify(x, Patch(2, 2))
        assert torch.equal(certificate.prediction, made.predict(x))
        assert made(x).shape == (12, 3)
        occluded = torch.zeros(12, 4, 4, dtype=torch.bool)
        occluded[:, 1:3, 2:] = True
        seen = torch.where(occluded[:, None], 0.25, x)
        expected = inner(seen, occluded[:, None]) if isinstance(inner, Told) else inner(seen)
        assert torch.equal(made.behind(x, occluded), expected)
        assert [loss.whole(x).shape for loss in made.surrogates()] == [(12, 3)] * 2


class Returns(nn.Module):
    """Whatever logits, from the pixels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).sum(dim=1, keepdim=True) * self.weight.to(x)
        rows = torch.cat([total, -total, 0.5 * total], dim=1)
        if self.kind == "nan":
            return rows * torch.nan
        if self.kind == "maps":
            return rows[:, :, None]
        if self.kind == "two":
            return rows[:, :2]
        if self.kind == "cancel":  # rounds away most of what it computes
            return (rows + 1e6) - 1e6
        if self.kind == "single" and x.dtype == torch.float64:
            raise RuntimeError("only float32")
        return rows


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "the network answers NaN or infinity. Its weights or its preprocessing are broken"),
        ("maps", r"the network returns \(6, 3, 1\) for 6 images. It must return logits \(6, 3\)"),
        ("two", r"the network returns \(6, 2\) for 6 images. It must return logits \(6, 3\)"),
    ],
)
def test_logits_that_are_none_are_refused(kind: str, said: str) -> None:
    made, x = around(Returns(kind)), images()
    with pytest.raises(IntegrityError, match=said):
        made.self_test()
    for ask in (made.predict, lambda x: made.certify(x, Patch(2, 2))):
        with pytest.raises(IntegrityError):
            ask(x)


def test_a_network_that_rounds_too_much_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(IntegrityError, match="in float32 logits are off by .* so sensitive to rounding cannot be certified"):
        around(Returns("cancel")).self_test()
    around(Returns("fine")).self_test()
    around(Returns("single")).self_test()


@pytest.mark.parametrize("kind", [PatchCleanser, Minority])
def test_a_defense_made_in_python_is_tested_once_at_its_first_use(
    kind: type[PatchCleanser], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network with batch statistics would be certified, and give other answers in another batch."""
    inner = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(64, 3)
    )
    plan, x = MaskSpec(("patch:2x2",), per_axis=3), images(count=2)
    for action in (lambda made: made.predict(x), lambda made: made.certify(x, Patch(2, 2))):
        with pytest.raises(IntegrityError, match="logits are off by"):
            action(kind(inner, input_shape=(1, 4, 4), classes=CLASSES, masks=plan, fill=(0.25,)).eval())
    tests = []
    original = kind.self_test
    monkeypatch.setattr(kind, "self_test", lambda self: tests.append(original(self)))
    made = kind(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), input_shape=(1, 4, 4), classes=CLASSES, masks=plan, fill=(0.25,)
    ).eval()
    for _ in range(2):
        made.predict(x)
        made.certify(x, Patch(2, 2))
    assert len(tests) == 1


class Jitter(nn.Module):
    """In float32 its logits depend on the batch as real ones do, but more; in float64 they do not."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.double().flatten(1).mean(dim=1)
        rows = torch.stack([torch.ones_like(bright), 1 + 1e-7 * (bright - 0.4), bright / 2], dim=1)
        if x.dtype == torch.float64:
            return rows
        rows[:, 1] += 1e-5 * (-1) ** len(x)
        return rows.float()


def test_labels_near_ties_do_not_depend_on_the_batch() -> None:
    made, x = around(Jitter()), images(count=9) * torch.linspace(0.5, 1, 9)[:, None, None, None]
    together, certificate = made.predict(x), made.certify(x, Patch(2, 2))
    assert int(certificate.certified.sum()) > 0, "what float64 can tell is certified"
    assert set(together.tolist()) == {0, 1}
    for at in range(9):
        one = made.certify(x[at : at + 1], Patch(2, 2))
        assert int(made.predict(x[at : at + 1])) == int(one.prediction) == int(together[at])
        assert bool(one.certified) == bool(certificate.certified[at])
        assert float(one.margin) == float(certificate.margin[at])


def test_ties_and_labels_that_nobody_can_tell_are_never_certified() -> None:
    class Tie(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([1.0, 2.0, 2.0]).to(x).expand(len(x), 3)

    class Close(Returns):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.tensor([0.0, 0, -0.01]).to(x) + torch.tensor([1.0, 1 + 1e-5, 0]).to(x)

    x = images()
    certificate = around(Tie()).certify(x, Patch(2, 2))
    assert certificate.prediction.tolist() == [1] * 12 and certificate.runner_up.tolist() == [2] * 12
    assert not bool(certificate.certified.any()) and float(certificate.margin.abs().max()) == 0
    assert bool(around(Close("fine")).certify(x, Patch(2, 2)).certified.all())
    assert not bool(around(Close("single")).certify(x, Patch(2, 2)).certified.any())


@pytest.mark.parametrize("seed", range(4))
def test_bfloat16_gives_the_answers_and_certificates_of_float32(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_predictions, "computes_in_bfloat16", lambda device: True)
    exact, quick, x = defense(seed=seed), defense(seed=seed, labels="bfloat16"), images(count=40, seed=seed)
    quick.self_test()
    a, b = exact.certify(x, Patch(2, 2)), quick.certify(x, Patch(2, 2))
    assert torch.equal(a.prediction, b.prediction) and torch.equal(a.certified, b.certified)
    assert torch.allclose(a.margin, b.margin, atol=2 * TOLERANCE["bfloat16"])


def test_results_do_not_depend_on_how_passes_and_images_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = defense(), images(count=30)
    whole = made.certify(x, Patch(2, 2))
    assert whole.passes is not None and len(made.set) == 9
    assert bool((whole.passes >= 9).all()) and bool((whole.passes <= 45).all()) and len(whole.passes.unique()) > 1
    monkeypatch.setattr(masked_predictions, "PASSES", 7)
    monkeypatch.setattr("patchcert_cli.defenses.patchcleanser.TABLE_ENTRIES", 200)
    parts = made.certify(x, Patch(2, 2))
    assert parts.passes is not None and torch.equal(parts.passes, whole.passes)
    for name in ("prediction", "certified", "worst", "runner_up"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    assert torch.allclose(whole.margin, parts.margin, atol=1e-6)
    assert torch.equal(made.predict(x), whole.prediction)


def test_rows_certify_no_less_than_pairs_and_more_where_masks_overlap() -> None:
    counts = {"rows": 0, "pairs": 0}
    for seed in range(12):
        made, x = defense(seed=seed), images(count=20, seed=seed)
        rows, pairs = made.certify_claims(x, [Claim(Patch(1, 1), "rows"), Claim(Patch(1, 1), "pairs")])
        assert bool((pairs.certified <= rows.certified).all())
        counts["rows"] += int(rows.certified.sum())
        counts["pairs"] += int(pairs.certified.sum())
    assert counts["rows"] > counts["pairs"] > 0


def test_threats_that_the_masks_do_not_cover_are_refused() -> None:
    made, x = defense(), images()
    for threat in (Patch(3, 3), Patch(1, 4), Sparse(2), parse_threat("patches:2:1x1")):
        with pytest.raises(UnsupportedThreat, match="masks of this model do not cover"):
            made.certify(x, threat)
    with pytest.raises(UsageError, match="does not fit"):
        made.certify(x, Patch(5, 5))
    assert "masks: 9 of 2x2" in made.note(Patch(2, 2)) and "45" in made.note(Patch(2, 2))
    with pytest.raises(UsageError, match="a colour of 2 channels does not fit images of 1"):
        PatchCleanser(network((1, 4, 4), 0), input_shape=(1, 4, 4), classes=CLASSES, masks=made.plan, fill=(0.1, 0.2))


@pytest.mark.parametrize("threat", [Patch(2, 2), Patch(1, 2), parse_threat("patch:7%")], ids=str)
def test_the_map_is_positive_everywhere_iff_the_image_is_certified(threat: Threat) -> None:
    seen = set()
    for seed in range(6):
        made, x = defense(seed=seed), images(count=10, seed=seed)
        found, certificate = made.margin_map(x, threat), made.certify(x, threat)
        rows = 5 - int(threat.locations(4, 4)[0, 2])
        assert found.shape == (10, rows, 5 - int(threat.locations(4, 4)[0, 3])) and found.dtype == torch.float64
        least = found.flatten(1).amin(dim=1)
        assert torch.equal(least > TOLERANCE["float64"], certificate.certified)
        assert bool((least[certificate.certified] >= certificate.margin[certificate.certified] - 1e-6).all())
        seen |= set(certificate.certified.tolist())
    assert seen == {True, False}
    with pytest.raises(UsageError, match="a map needs one patch"):
        defense().margin_map(images(), Sparse(1))


CONFIG: dict[str, Any] = {
    "format": 1,
    "defense": "patchcleanser",
    "dataset": "mnist",
    "threat": "patch:2x2",
    "input_shape": [1, 8, 8],
    "classes": list("abc"),
    "network": {"name": "masked", "options": {"stem": 4, "widths": [6, 8], "takes_mask": True, "mean": [0.3], "std": [0.4]}},
    "masks": {"covers": ["patch:2x2", "patch:1x4"], "per_axis": 3},
}


def test_a_folder_rebuilds_the_defense_with_its_masks(tmp_path: Path) -> None:
    for more in ({}, {"labels": "bfloat16"}, {"masks": {"covers": ["patch:3x3"], "stride": 2, "wider": 1}}, {"fill": [0.9]}):
        config = {**CONFIG, **more}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = PatchCleanser.from_config(section("patchcleanser", config)).eval()
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        checkpoint.save_defense(folder, made, file_of("patchcleanser", config))
        again, _ = checkpoint.load_defense(folder)
        assert isinstance(again, PatchCleanser)
        assert again.plan == made.plan == MaskSpec.read(config["masks"])
        assert again.prediction_dtype == config.get("labels", "float32")
        assert torch.equal(again.fill.flatten(), torch.tensor(config.get("fill", [0.3])))
        x = images((1, 8, 8), 8)
        assert torch.equal(again.certify(x, Patch(2, 2)).margin, made.certify(x, Patch(2, 2)).margin)
    masks = {"covers": ["patch:2x2"], "stride": 2, "per_axis": 2}
    with pytest.raises(IntegrityError, match="exclude each other"):
        PatchCleanser.from_config(section("patchcleanser", {**CONFIG, "masks": masks}))
    entries = PatchCleanser.deploy_config(Patch(2, 2), MaskedOptions(per_axis=4))
    assert entries == {"masks": {"covers": ["patch:2x2"], "per_axis": 4}, "prediction_dtype": "float32"}


def step(seed: int = 0, *, progress: float = 0.0, epochs: int = 10, **options: Any) -> TrainingStep:
    return TrainingStep(Patch(2, 2), MaskedOptions(**options), progress, epochs, torch.Generator().manual_seed(seed))


def test_without_masks_the_loss_is_that_of_the_whole_image() -> None:
    made, x = defense(), images()
    label = torch.arange(12) % 3
    loss = made.training_loss(x, label, step(masks=0, smoothing=0.2))
    assert float(loss) == pytest.approx(float(F.cross_entropy(made(x), label, label_smoothing=0.2)))
    assert float(made.training_loss(x, label, step(masks=2))) != pytest.approx(float(loss))


def test_random_masks_lie_anywhere_inside_and_are_drawn_from_the_generator_alone() -> None:
    made = defense((1, 4, 4), MaskSpec(("patch:1x2",), per_axis=3))
    assert {box[2:] for union in made.set.boxes for box in union} == {(2, 2)}
    x = images(count=400)
    for options, shapes in (({}, {(2, 2)}), ({"sides": (1, 3)}, {(1, 1), (3, 3)})):
        made_options = MaskedOptions(masks=1, **options)
        drawn = made._random(x, made_options, torch.Generator().manual_seed(0))
        assert torch.equal(drawn, made._random(1 - x, made_options, torch.Generator().manual_seed(0)))
        found = set()
        for one in drawn:
            at = one.nonzero()
            low, high = at.amin(dim=0), at.amax(dim=0)
            size = tuple((high - low + 1).tolist())
            assert int(one.sum()) == size[0] * size[1], "a rectangle"
            found.add((size, tuple(low.tolist())))
        assert {size for size, _ in found} == shapes
        assert len(found) == sum((5 - rows) * (5 - columns) for rows, columns in shapes), "every place"
    two = made._random(x, MaskedOptions(masks=2), torch.Generator().manual_seed(0)).flatten(1).sum(dim=1)
    assert set(two.tolist()) == {4, 6, 7, 8}


@pytest.mark.parametrize(("shape", "whole"), [("column", 0), ("row", 1)])
def test_random_strips_have_the_widths_of_the_options_and_lie_anywhere(shape: str, whole: int) -> None:
    made, x = defense((1, 6, 5), MaskSpec(("patch:1x2",), per_axis=2, shape=shape)), images((1, 6, 5), 400)
    deployed = {box[3 - whole] for union in made.set.boxes for box in union}
    for options, widths in (({}, deployed), ({"sides": (1, 3)}, {1, 3})):
        drawn = made._random(x, MaskedOptions(masks=1, **options), torch.Generator().manual_seed(0))
        assert bool((drawn.amin(dim=1 + whole) == drawn.amax(dim=1 + whole)).all()), "over the whole image"
        lines = drawn.amax(dim=1 + whole)  # [B, n]
        found = {(int(one.sum()), int(one.float().argmax())) for one in lines}
        assert found == {(width, start) for width in widths for start in range(lines.shape[1] - width + 1)}, "every offset"
    greedy = made._greedy(x[:12], torch.arange(12) % 3, MaskedOptions(), torch.Generator().manual_seed(0))
    pairs = (made.masks[:, None] | made.masks[None]).flatten(0, 1)
    assert bool((greedy[:, None] == pairs).flatten(2).all(dim=2).any(dim=1).all()), "two of the deployed strips"


def test_a_shape_chosen_for_a_budget_is_deployed_and_named_with_the_reason() -> None:
    made = defense((1, 6, 6), MaskSpec(("patch:2x2",), passes=15, shape="any"))
    assert made.plan == MaskSpec(("patch:2x2",), passes=15, shape="column")
    assert made.settings()["masks"] == {"covers": ["patch:2x2"], "passes": 15, "shape": "column"}
    assert "column 12 (5 masks), row 12 (5 masks), square 16 (4 masks); the fewest are taken" in made.note(Patch(2, 2))
    assert "fewest" not in defense((1, 6, 6), made.plan).note(Patch(2, 2))


def worst_pair(made: PatchCleanser, x: Tensor, label: Tensor) -> Tensor:
    """The worst mask, and the worst one with it in place, image by image: bool [B, H, W]."""
    found = []
    for image, one in zip(x, label, strict=True):
        occluded = torch.zeros(4, 4, dtype=torch.bool)
        for _ in range(2):
            losses = [F.cross_entropy(made.behind(image[None], (occluded | mask)[None]), one[None]) for mask in made.masks]
            occluded = occluded | made.masks[int(torch.stack(losses).argmax())]
        found.append(occluded)
    return torch.stack(found)


def test_greedy_cutout_takes_the_worst_masks() -> None:
    made, x = defense(), images()
    label = torch.arange(12) % 3
    occluded = worst_pair(made, x, label)
    greedy = made._greedy(x, label, MaskedOptions(), torch.Generator().manual_seed(0))
    loss = F.cross_entropy(made.behind(x, occluded), label, reduction="none")
    assert torch.allclose(F.cross_entropy(made.behind(x, greedy), label, reduction="none"), loss)
    expected = F.cross_entropy(made.behind(x, occluded), label, label_smoothing=0.1)
    options = {"greedy_share": 1.0, "greedy_from": 0.5}
    assert float(made.training_loss(x, label, step(progress=5.0, **options))) == pytest.approx(float(expected))
    assert float(made.training_loss(x, label, step(progress=4.9, **options))) != pytest.approx(float(expected))
    few = [made._greedy(x, label, MaskedOptions(candidates=2), torch.Generator().manual_seed(seed)) for seed in range(2)]
    assert not torch.equal(few[0], few[1])
    for some in few:
        assert bool((F.cross_entropy(made.behind(x, some), label, reduction="none").mean() <= loss.mean()).all())


def test_greedy_cutout_can_practise_with_larger_masks() -> None:
    made, x = PatchCleanser.from_config(section("patchcleanser", CONFIG)), images((1, 8, 8), 12)
    label, generator = torch.arange(12) % 3, torch.Generator().manual_seed(0)
    few = made._greedy(x, label, MaskedOptions(greedy_per_axis=2), generator).flatten(1).sum(dim=1)
    larger = made._harder(2)
    assert len(larger) < len(made.set) and int(larger[0].sum()) > int(made.masks[0].sum())
    assert bool((few >= larger.flatten(1).sum(dim=1).min()).all())
    assert torch.equal(made._harder(0), made.masks)


def test_a_greedy_sweep_leaves_no_trace_in_the_statistics() -> None:
    made = PatchCleanser.from_config(section("patchcleanser", CONFIG))
    x, label = images((1, 8, 8), 12), torch.arange(12) % 3
    with torch.no_grad():
        before = {name: value.clone() for name, value in made.state_dict().items()}
        made.train()._greedy(x, label, MaskedOptions(), torch.Generator().manual_seed(0))  # type: ignore[operator]
    assert made.training and made.network.training
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_options_are_kept_and_checked() -> None:
    options = MaskedOptions(average=0.9, flip=True, shift=3)
    assert options.ema_decay == 0.9 and MaskedOptions(average=0.0).ema_decay == 0.0
    assert (options.augment(0, 1).flip, options.augment(0, 1).shift) == (True, 3)
    assert replace(options, greedy_share=1.0).greedy_share == 1.0


def test_attacks_know_how_large_the_layers_are() -> None:
    made = PatchCleanser.from_config(section("patchcleanser", CONFIG))
    assert made.activations == min(12, len(made.set)) * 7 * 7 * 6
    assert defense().activations == 9 * 16 * 16
