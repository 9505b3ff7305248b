"""From a file to pixels: EXIF, transparency and odd files, against torchvision's loader; a picture alone and in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchcert_cli import data
from patchcert_cli.data import image_files
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import DataError

UPRIGHT = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
STORED = {  # by EXIF's number, what a camera stores: where rows and columns of the upright picture begin
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: UPRIGHT.transpose(1, 0, 2)[::-1],
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],
}


def as_is(path: Path) -> torch.Tensor:
    return image_files.decode(path, ResizeCrop(image_files.size_of(path))).pixels


def loaded(path: Path) -> np.ndarray[Any, Any]:
    """The pixels that torchvision's ImageFolder gives, [3, H, W]."""
    from torchvision.datasets.folder import default_loader  # type: ignore[import-untyped]

    with image_files.without_warnings():
        return np.asarray(default_loader(str(path))).transpose(2, 0, 1)


@pytest.mark.parametrize("ending", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("number", STORED)
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, number: int, ending: str) -> None:
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = number
    more = {"lossless": True} if ending == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(STORED[number])).save(tmp_path / f"a{ending}", exif=exif, **more)
    assert image_files.size_of(tmp_path / f"a{ending}") == (20, 30)
    assert np.array_equal(as_is(tmp_path / f"a{ending}"), UPRIGHT.transpose(2, 0, 1))
    assert image_files.decode(tmp_path / f"a{ending}", ResizeCrop((20, 30))).rotated == (number != 1)


def test_a_photograph_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = 6
    sideways = Image.fromarray(np.ascontiguousarray(STORED[6]))
    sideways.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    sideways.save(tmp_path / "plain.jpg", quality=95)
    assert torch.equal(as_is(tmp_path / "turned.jpg"), as_is(tmp_path / "plain.jpg").rot90(-1, (1, 2)))
    for number in (0, 9, 77):  # no such orientation
        exif[image_files.ORIENTATION] = number
        sideways.save(tmp_path / "odd.jpg", exif=exif, quality=95)
        assert torch.equal(as_is(tmp_path / "odd.jpg"), as_is(tmp_path / "plain.jpg"))


def test_broken_exif_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF at all")
    assert image_files.size_of(tmp_path / "a.jpg") == (20, 30) and np.array_equal(
        as_is(tmp_path / "a.jpg"), loaded(tmp_path / "a.jpg")
    )


MODES = {
    ".png": ("RGB", "L", "1", "LA", "RGBA", "P", "clear"),
    ".jpg": ("RGB", "L", "CMYK"),
    ".jfif": ("RGB",),
    ".webp": ("RGB", "RGBA"),
    ".bmp": ("RGB", "L", "1", "P"),
    ".gif": ("P", "L"),
    ".tif": ("RGB", "L", "1", "P", "RGBA", "CMYK", "LA", "YCbCr"),
    ".tiff": ("RGB",),
    ".ppm": ("RGB",),
    ".pgm": ("L",),
    ".pbm": ("1",),
    ".pnm": ("RGB",),
}


@pytest.mark.parametrize(("ending", "mode"), [(ending, mode) for ending, modes in MODES.items() for mode in modes])
def test_pixels_are_those_of_torchvisions_loader(tmp_path: Path, ending: str, mode: str) -> None:
    picture = Image.fromarray(UPRIGHT).convert("P" if mode == "clear" else mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(UPRIGHT[:, :, 0]))
    more: dict[str, Any] = {"transparency": bytes(range(200))} if mode == "clear" else {}
    more |= {"format": "JPEG"} if ending == ".jfif" else {}
    path = tmp_path / f"a{ending}"
    picture.save(path, **more)
    taken = image_files.decode(path, ResizeCrop(image_files.size_of(path)))
    assert np.array_equal(taken.pixels, loaded(path)) and taken.pixels.float().std() > 1
    assert taken.transparent == (mode in ("RGBA", "LA", "clear")) and taken.grey == (
        mode in ("L", "1", "LA") and ending != ".gif"
    )


def test_an_opaque_alpha_channel_is_nothing_to_speak_of(tmp_path: Path) -> None:
    Image.fromarray(UPRIGHT).convert("RGBA").save(tmp_path / "a.png")
    pixels, notes = image_files.read(tmp_path / "a.png", ResizeCrop((20, 30)))
    assert np.array_equal(pixels, UPRIGHT.transpose(2, 0, 1)) and notes == []


def test_grey_is_luminance_and_grey_stays_as_it_is(tmp_path: Path) -> None:
    grey = Image.fromarray(UPRIGHT).convert("L")
    grey.save(tmp_path / "grey.png")
    Image.fromarray(UPRIGHT).save(tmp_path / "colour.png")
    for name in ("grey.png", "colour.png"):
        pixels, notes = image_files.read(tmp_path / name, ResizeCrop((20, 30)), 1)
        assert np.array_equal(pixels[0], np.asarray(grey)) and bool(notes) == (name == "colour.png")


@pytest.mark.parametrize("text", ["16", "16/18", "16/16,squash,bilinear", "16/16,border-9-8-7", "20x30"])
def test_a_picture_alone_is_what_it_is_in_a_folder(tmp_path: Path, text: str) -> None:
    """One function makes both: 32 pictures of all shapes, some turned, some transparent, some that fit."""
    resize_crop, draw = ResizeCrop.parse(text), np.random.default_rng(3)
    (tmp_path / "d" / "a").mkdir(parents=True)
    for number in range(32):
        high, wide = [(16, 16), (20, 30)][number % 2] if number < 4 else draw.integers(9, 50, 2)
        picture = Image.fromarray(draw.integers(0, 256, (high, wide, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[image_files.ORIENTATION] = number % 9
        picture.convert("RGBA" if number % 5 == 0 else "RGB").save(tmp_path / "d" / "a" / f"{number:02}.png", exif=exif)
    folder = data.load(f"imagefolder:{tmp_path / 'd'}@{resize_crop}", "test").read()
    for number, row in enumerate(folder):
        pixels, _ = image_files.read(tmp_path / "d" / "a" / f"{number:02}.png", resize_crop, resize=True)
        assert torch.equal(row, pixels), number


def test_what_was_done_to_a_picture_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(UPRIGHT).save(path)
    with pytest.raises(DataError, match=r"is 20x30 \(height x width\), but the model takes 16x16. --resize makes it fit"):
        image_files.read(path, ResizeCrop.square(16))
    _, notes = image_files.read(path, ResizeCrop.square(16), resize=True)
    assert notes == [
        f"'{path}' is 20x30 (height x width): the shorter side is resized to 18 (bicubic), and the middle 16x16 is cropped;"
        " patch sizes are those in the result"
    ]
    fits = ResizeCrop((20, 30), (25, 35))
    assert "is not resized; in a folder each is resized until it covers 25x35" in image_files.read(path, fits)[1][0]
    assert np.array_equal(image_files.read(path, fits)[0], UPRIGHT.transpose(2, 0, 1))
    assert image_files.read(path, fits, resize=True)[0].shape == (3, 20, 30)


@pytest.mark.parametrize("how", ["truncated", "page", "empty", "deep", "missing"])
def test_files_that_are_no_pictures_are_refused_in_one_line(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((20, 20), 40_000, np.uint16) if how == "deep" else UPRIGHT).save(path)
    said = {"deep": "has more than 8 bits per channel", "missing": "there is no image"}.get(how, "is not an image that can be")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:400])
    elif how != "deep":
        path.write_bytes(b"<html>" if how == "page" else b"")
    if how == "missing":
        path.unlink()
    with pytest.raises(DataError, match=said) as caught:
        image_files.decode(path, ResizeCrop.square(16))
    assert "\n" not in str(caught.value) and caught.value.code == 6
