"""One picture from a file, made to fit a model or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli.errors import DataError


def read(path: Path, shape: tuple[int, int, int], *, resize: bool = False) -> tuple[Tensor, list[str]]:
    """A picture as uint8 [C, H, W] of a model's input ``shape``, and notes on what was done to it.

    Grey becomes colour by repetition, colour becomes grey by luminance (ITU-R 601), an opaque alpha channel is dropped. With
    ``resize`` the middle square is scaled to the model's size; patches are then counted in pixels of the scaled picture.

    Raises:
        DataError: it is not a picture, has transparent pixels or more than 8 bits, or is of another size.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            opened.load()
            picture: Any = opened.copy()
    except FileNotFoundError as problem:
        raise DataError(f"there is no picture '{path}'.") from problem
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise DataError(
            f"'{path}' is not a picture that can be read ({type(problem).__name__}).", hint="Use PNG or JPEG."
        ) from problem
    notes: list[str] = []
    picture = _eight_bits(picture, path, notes)
    channels, height, width = shape
    if picture.size != (width, height):
        picture = _resized(picture, path, (width, height), resize, notes)
    wanted = "L" if channels == 1 else "RGB"
    if picture.mode != wanted:
        notes.append(f"'{path}' is {'grey' if picture.mode == 'L' else 'in colour'}; the model takes {wanted}: converted")
        picture = picture.convert(wanted)
    import numpy

    pixels = torch.from_numpy(numpy.array(picture))
    return (pixels[None] if channels == 1 else pixels.permute(2, 0, 1)).contiguous(), notes


def _eight_bits(picture: Any, path: Path, notes: list[str]) -> Any:
    """The picture as 8-bit grey or RGB without alpha."""
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"'{path}' has more than 8 bits per channel (mode {picture.mode});", hint="save it as 8-bit PNG.")
    if picture.mode in ("P", "1", "CMYK", "YCbCr", "LAB", "HSV"):
        see_through = "transparency" in picture.info
        picture = picture.convert("RGBA" if see_through else "L" if picture.mode == "1" else "RGB")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        if picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise DataError(f"'{path}' has transparent pixels;", hint="flatten it onto a background first.")
        notes.append(f"'{path}' has an alpha channel, opaque everywhere: dropped")
        picture = picture.convert("L" if picture.mode in ("LA", "La") else "RGB")
    if picture.mode not in ("L", "RGB"):
        raise DataError(f"'{path}' is of mode {picture.mode};", hint="save it as 8-bit grey or RGB.")
    return picture


def _resized(picture: Any, path: Path, size: tuple[int, int], resize: bool, notes: list[str]) -> Any:
    from PIL import Image

    if not resize:
        raise DataError(
            f"'{path}' is {picture.width}x{picture.height}, but the model takes {size[0]}x{size[1]};",
            hint="--resize scales its middle square; the patch is then counted in pixels of the scaled picture.",
        )
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    notes.append(
        f"the middle {side}x{side} of '{path}' was scaled to {size[0]}x{size[1]}; the patch is meant in the scaled picture"
    )
    return picture.crop((left, top, left + side, top + side)).resize(size, Image.Resampling.BICUBIC)
