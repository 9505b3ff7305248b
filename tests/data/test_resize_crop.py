"""Framings, held against torchvision's and timm's own transforms, and their text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchcert_cli.data import image_files
from patchcert_cli.data.resize_crop import ResizeCrop, usual_resize
from patchcert_cli.errors import UsageError

SHAPES = [(61, 97), (90, 43), (64, 64), (7, 5), (50, 201), (1, 3)]  # height x width


def noise(height: int, width: int, seed: int = 1) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def taken(picture: Image.Image, resize_crop: ResizeCrop, path: Path) -> np.ndarray[Any, Any]:
    picture.save(path)
    return image_files.decode(path, resize_crop).pixels.numpy()


TEXTS = [
    "64",
    "48x64",
    "64/72",
    "64/72,bilinear",
    "64/64,squash",
    "64/60,squash,pad,bilinear",
    "48x64/48x64,squash",
    "64/64,border-124-116-104",
    "48x64/50x70,border-1-2-3,lanczos",
    "64/56,pad",
    "48x64/80",
    "32,nearest",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_and_framing_are_inverse(text: str) -> None:
    assert str(ResizeCrop.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "",
        "a",
        "64/",
        "64/32",
        "64/72,pad",
        "64,squash",
        "9999",
        "64/72,red",
        "64/64,border",
        "64/64,border-1-2",
        "64/64,border-1-2-256",
    ],
)
def test_text_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"is not a valid size. Use NAME@SIZE or NAME@SIZE/RESIZE, 1 to 4096, RESIZE at least SIZE"
    ):
        ResizeCrop.parse(text)


@pytest.mark.parametrize("shape", [*SHAPES, (16, 16)], ids=str)
def test_pictures_that_fit_are_not_touched_and_others_are_made_as_torchvision_does(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    from torchvision import transforms  # type: ignore[import-untyped]

    picture = noise(*shape)
    bicubic = transforms.InterpolationMode.BICUBIC
    usual = transforms.Compose(
        [transforms.Resize(usual_resize(16), bicubic), transforms.CenterCrop(16), transforms.PILToTensor()]
    )
    wanted = np.asarray(picture).transpose(2, 0, 1) if shape == (16, 16) else usual(picture).numpy()
    assert np.array_equal(taken(picture, ResizeCrop.square(16), tmp_path / "a.png"), wanted)
    assert np.array_equal(taken(picture, ResizeCrop.square(16, usual_resize(16)), tmp_path / "a.png"), usual(picture).numpy())


def published() -> list[tuple[tuple[int, int, int], float, str, str, tuple[float, ...]]]:
    """Every distinct preprocessing of timm's published weights."""
    timm = pytest.importorskip("timm")
    from timm.data import resolve_data_config  # type: ignore[import-untyped]

    found: dict[Any, tuple[float, ...]] = {}
    for name in timm.list_models(pretrained=True):
        said = resolve_data_config({}, pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
        key = tuple(said["input_size"]), said["crop_pct"], said["crop_mode"], said["interpolation"]
        found.setdefault(key, tuple(said["mean"]))
    return [(*key, mean) for key, mean in sorted(found.items())]


def test_pixels_are_those_of_timms_own_transform_for_all_its_published_weights(tmp_path: Path) -> None:
    """Each combination of size, crop_pct, crop_mode and interpolation, on pictures of odd sizes; the large ones on one each."""
    combinations = published()
    from timm.data import create_transform

    from patchcert_cli.models import timm

    seen = set()
    for number, (size, crop_pct, mode, interpolation, mean) in enumerate(combinations):
        said = {"input_size": size, "crop_pct": crop_pct, "crop_mode": mode, "interpolation": interpolation, "mean": mean}
        resize_crop = timm.described("test_vit", said | {"num_classes": 2}).resize_crop
        assert ResizeCrop.parse(str(resize_crop)) == resize_crop
        own = create_transform(**said, normalize=False)
        shapes = SHAPES if (mode, interpolation) not in seen else [SHAPES[number % len(SHAPES)]]
        seen.add((mode, interpolation))
        for shape in shapes:
            wanted = own(noise(*shape)).numpy()
            assert np.array_equal(taken(noise(*shape), resize_crop, tmp_path / "a.bmp"), wanted), (resize_crop, shape)
    assert {mode for mode, _ in seen} == {"center", "squash", "border"} and len(combinations) > 100


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.9, 1.0, 1.15])
@pytest.mark.parametrize("size", [(3, 40, 40), (3, 41, 60), (3, 60, 41)], ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
def test_what_a_repository_may_say_is_done_as_timm_does(
    size: tuple[int, int, int], crop_pct: float, mode: str, interpolation: str, tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    from timm.data import create_transform

    from patchcert_cli.models import timm

    said = {"input_size": size, "crop_pct": crop_pct, "crop_mode": mode, "interpolation": interpolation, "mean": (0.1, 0.5, 0.7)}
    resize_crop = timm.described("test_vit", said | {"num_classes": 2}).resize_crop
    for shape in [(61, 97), (90, 43), (41, 60), (35, 35)]:
        wanted = create_transform(**said, normalize=False)(noise(*shape)).numpy()
        assert np.array_equal(taken(noise(*shape), resize_crop, tmp_path / "a.bmp"), wanted), shape


def test_a_squashed_picture_keeps_its_left_quarter(tmp_path: Path) -> None:
    picture = Image.new("RGB", (768, 384), "white")
    picture.paste("red", (0, 0, 192, 384))
    picture.save(tmp_path / "a.png")

    def red(text: str) -> float:
        pixels = image_files.decode(tmp_path / "a.png", ResizeCrop.parse(text)).pixels
        return float((pixels[1] < 128).float().mean())

    assert red("384/384") == 0 and red("384/384,squash") == pytest.approx(0.25, abs=0.002)
    assert red("392/392,border-0-255-0") == pytest.approx(0.125, abs=0.002)
