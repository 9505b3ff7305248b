"""What is under evaluation: masks for several threats at once, their colour, and what a dry run measures of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import module, pictures
from PIL import Image

from patchcert_cli import data, defenses
from patchcert_cli.certifiers.masks import masked_predictions
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.classifiers import addresses
from patchcert_cli.data.images import Images
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.defenses import Claim
from patchcert_cli.errors import DataError, UsageError
from patchcert_cli.evaluation import estimate, models, task
from patchcert_cli.evaluation.models import DefenseRequest, WrappedClassifier
from patchcert_cli.evaluation.task import EvaluationTask
from patchcert_cli.threats import Patch, Sparse, parse_threat
from patchcert_cli.training import estimate as training_estimate
from patchcert_cli.training.recipe import Recipe
from tests.examples import tiny


@pytest.mark.parametrize(
    ("threats", "kept"),
    [
        (["patch:1x1", "patch:5x5", "patch:3x3"], ["patch:5x5"]),
        (["patch:5x2", "patch:2x5", "patch:2x2"], ["patch:5x2", "patch:2x5"]),
        (["patch:5x5", "patch:5x5"], ["patch:5x5"]),
        (["patch:4%", "patch:4x4", "patch:5x5"], ["patch:5x5"]),  # 4 % of 20x20 is 4x4
        (["patch:4x4", "patch:4%"], ["patch:4x4"]),
        (["sparse:2", "patch:1x1"], ["sparse:2", "patch:1x1"]),
    ],
)
def test_only_threats_that_hide_no_others_need_masks(threats: list[str], kept: list[str]) -> None:
    assert [str(one) for one in models.largest([parse_threat(text) for text in threats], (3, 20, 20))] == kept


@pytest.mark.parametrize("threats", [[Patch(1, 4), Patch(4, 1), Patch(2, 2)], [Patch(3, 3)], [Sparse(1)]])
@pytest.mark.parametrize("asked", [DefenseRequest(), DefenseRequest(masks=2), DefenseRequest(passes=200)])
def test_the_masks_cover_every_threat_that_was_asked_for(threats: list[Any], asked: DefenseRequest) -> None:
    masks = asked.plan(threats, (3, 9, 8)).masks(9, 8)
    assert all(bool(masks.cover(one).by.any(dim=1).all()) for one in threats)
    assert asked.passes is None or masks.passes <= asked.passes


@pytest.mark.parametrize(
    ("mean", "channels", "wanted"),
    [((0.1, 0.2, 0.3), 3, [0.1, 0.2, 0.3]), ((0.1, 0.2, 0.3), 1, [0.2]), (None, 2, [0.5, 0.5]), ((0.4,), 3, [0.5] * 3)],
)
def test_masks_have_the_mean_colour_or_grey(mean: tuple[float, ...] | None, channels: int, wanted: list[float]) -> None:
    network, masks = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16 * channels, 2)), MaskSpec(("patch:2x2",))
    defense: Any = models.put_around(network, "patchcleanser", (channels, 4, 4), ("a", "b"), masks, mean, "bfloat16")
    assert defense.fill.flatten().tolist() == pytest.approx(wanted) and defense.prediction_dtype == "bfloat16"
    assert not defense.training and defense.predict(torch.rand(2, channels, 4, 4)).shape == (2,)


@pytest.mark.parametrize(("per_axis", "side", "size"), [(6, 32, 24), (2, 32, 1000), (30, 64, 16)])
def test_a_batch_is_small_where_images_take_many_passes(per_axis: int, side: int, size: int) -> None:
    masks = MaskSpec(("patch:2x2",), per_axis=per_axis)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(side * side, 2))
    assert task.batch_size(models.put_around(network, "patchcleanser", (1, side, side), ("a", "b"), masks, None)) == size
    assert task.batch_size(tiny("ibp")) == task.BATCH_SIZE


def test_what_can_be_put_around_a_classifier() -> None:
    assert "patchcleanser" in defenses.around() and not {"ibp", "bagcert", "smoothing"} & set(defenses.around())
    with pytest.raises(UsageError, match=r"ibp cannot be put around a classifier. Allowed: .*patchcleanser"):
        defenses.wrapping("ibp")


def opened(folder: Path) -> models.WrappedClassifier:
    name = module(folder, f"mine_{folder.name}")
    return WrappedClassifier(addresses.open_(f"{name}:named", typed=True), DefenseRequest("patchcleanser", masks=2))


def test_a_network_owns_its_resize_and_masks_lie_on_what_comes_in(tmp_path: Path) -> None:
    candidate = opened(tmp_path)
    assert (candidate.resize_crop(), candidate.fitted(data.open_dataset("cifar10")).name) == (ResizeCrop((16, 16)), "cifar10")
    assert candidate.shape(data.open_dataset("cifar10")) == (3, 32, 32)
    model = candidate.evaluated((3, 32, 40), [Patch(3, 3)], "cpu")
    defense: Any = model.defense
    assert defense.input_shape == (3, 32, 40) and defense.masks.shape == (4, 32, 40)
    assert defense.network.size == (16, 16) and defense.classes == ("cat", "dog", "red fox")
    assert model.setting["input_shape"] == [3, 32, 40] and model.setting["fill"] == [0.5] * 3


def test_pictures_that_fit_a_model_of_the_zoo_are_not_touched(tmp_path: Path) -> None:
    """The model was trained on whole 32x32 images: these are not enlarged to cut something out of them."""
    images = data.load("cifar10", "test").take(torch.arange(6))
    for number, (pixels, label) in enumerate(zip(images.read(), images.labels.tolist(), strict=True)):
        (tmp_path / "val" / images.classes[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "val" / images.classes[label] / f"{number}.png")
    candidate = models.find("cifar-bagcert-rf7", None, DefenseRequest(), "cpu")
    name = candidate.fitted(data.open_dataset(f"imagefolder:{tmp_path}/val")).name
    found = data.load(name, "test")
    order = images.labels.argsort(stable=True)
    assert name.endswith("val@32/32") and torch.equal(found.read(), images.read(order)) and found.checked().remarks == ()
    Image.new("RGB", (50, 40)).save(tmp_path / "val" / images.classes[int(images.labels[0])] / "x.png")
    (remark,) = data.load(name, "test").checked().remarks
    assert remark.startswith("1 of 7 images resampled, from 40x50 pixels (height x width), to 32x32: the shorter side is resized")


def test_a_module_without_a_size_is_given_pictures_as_they_are(tmp_path: Path) -> None:
    name = module(tmp_path, f"mine_{tmp_path.name}")
    candidate = WrappedClassifier(addresses.open_(f"{name}:raw", typed=True), DefenseRequest("patchcleanser", masks=2))
    pixels = torch.randint(0, 256, (2, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, one in enumerate(pixels):
        (tmp_path / "own" / f"c{number}").mkdir(parents=True)
        Image.fromarray(one.permute(1, 2, 0).numpy()).save(tmp_path / "own" / f"c{number}" / "a.png")
    own = candidate.fitted(data.open_dataset(f"imagefolder:{tmp_path}/own"))
    assert own.name == f"imagefolder:{tmp_path}/own@20x24" and candidate.shape(own) == (3, 20, 24)
    assert torch.equal(own.load("test").read(), pixels)
    assert candidate.meant(None, tmp_path / "own" / "c0" / "a.png") == ResizeCrop((20, 24))
    Image.new("RGB", (24, 21)).save(tmp_path / "own" / "c1" / "b.png")
    with pytest.raises(
        DataError, match=r"'.*a.png' is 20x24, '.*b.png' is 21x24.* Use --data imagefolder:.*own@SIZE, or state it"
    ):
        candidate.fitted(data.open_dataset(f"imagefolder:{tmp_path}/own"))
    assert candidate.fitted(data.open_dataset(f"imagefolder:{tmp_path}/own@16")).name == f"imagefolder:{tmp_path}/own@16"


def test_a_dry_run_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once for each pass, the estimate is the number of passes."""
    model = opened(tmp_path).evaluated((3, 16, 16), [Patch(2, 2)], "cpu")
    pixels = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.zeros(30, dtype=torch.int64), torch.arange(30), "imagenet", "test", "x")
    meant = EvaluationTask(model, images, (Claim(Patch(2, 2)),), 30)
    asked, honest = [0], masked_predictions.logits_under_mask

    def counted(network: Any, x: torch.Tensor, *rest: Any) -> Any:
        asked[0] += len(x)
        return honest(network, x, *rest)

    monkeypatch.setattr(masked_predictions, "logits_under_mask", counted)
    value = estimate.evaluation(meant, Path("x"), None, 1000, clock=lambda: float(asked[0]))
    assert value["masks"] == "4 of 9x9 pixels"
    assert 4 <= value["passes_per_image"] <= 10 and value["passes"] == pytest.approx(1000 * value["passes_per_image"], rel=0.02)
    assert value["estimated_seconds"] == pytest.approx(value["passes"], rel=0.3)
    assert value["estimated_hours"] == pytest.approx(value["estimated_seconds"] / 3600, abs=0.01)
    assert 0 < value["disk_bytes"] < 400_000 and value["images"] == 1000


def test_a_dry_run_of_a_slow_network_measures_passes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(tmp_path).evaluated((3, 16, 16), [Patch(2, 2)], "cpu")
    pixels = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.zeros(30, dtype=torch.int64), torch.arange(30), "imagenet", "test", "x")
    asked, honest = [0.0], masked_predictions.logits_under_mask

    def slow(network: Any, x: torch.Tensor, *rest: Any) -> Any:
        asked[0] += 10.0 * len(x)  # seconds
        return honest(network, x, *rest)

    monkeypatch.setattr(masked_predictions, "logits_under_mask", slow)
    meant = EvaluationTask(model, images, (Claim(Patch(2, 2)),), 30)
    value = estimate.evaluation(meant, Path("x"), None, 1000, clock=lambda: asked[0])
    assert asked[0] <= 100 + 3 * 10  # nobody waits for a whole image
    assert value["passes_per_image_at_most"] == 10 and value["passes_at_most"] == 10_000
    assert "passes_per_image" not in value and "of an image that was not finished in" in value["measured_on"]
    assert value["estimated_seconds_at_most"] == pytest.approx(100_000, rel=0.1) and value["disk_bytes"] == 0


def test_what_training_takes_is_measured_where_there_are_images(tmp_path: Path) -> None:
    pictures(tmp_path / "own", 10)
    recipe = Recipe("patch:5x5", f"imagefolder:{tmp_path}/own@28", "ibp", network_options={"hidden": [8]}, batch_size=7)
    recipe = Recipe.from_dict(recipe.to_dict() | {"validation": 2, "epochs": 3})
    value = training_estimate.training(recipe)
    weights = (3 * 28 * 28 + 1) * 8 * 4 + 9 * 3 * 4
    assert value["steps"] == 3 * (28 // 7) and value["estimated_seconds"] >= 0
    assert 3 * weights < value["disk_bytes"] < 5 * weights  # the model, and with Adam's moments the state
    missing = training_estimate.training(Recipe("patch:5x5"), data_dir=tmp_path)
    assert list(missing) == ["not_measured"] and "no mnist train data" in missing["not_measured"]
