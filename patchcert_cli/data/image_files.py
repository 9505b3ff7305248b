"""From a picture file to pixels: one way for a single picture and for whole folders.

A picture is turned as its EXIF says. Colours are those that the file stores: an alpha channel is dropped, without a background
behind transparent pixels, as torchvision's loader does. Of several frames or pages the first one counts. More than 8 bits per
channel are refused. Then the picture is made to fit (:mod:`patchcert_cli.data.resize_crop`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli.data.resize_crop import ResizeCrop, Size, written
from patchcert_cli.errors import DataError

EXTENSIONS = (  # torchvision's, and other names and kinds of the same
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jpe", ".jfif", ".gif", ".pbm", ".pnm"),
)
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = {  # its values, and what makes such a picture upright, as Pillow calls it
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


@dataclass(frozen=True)
class DecodedImage:
    """An image that was made from a picture.

    Attributes:
        pixels: uint8 [C, H, W].
        size: height and width of the upright picture, before it was scaled.
        scaled: and after.
        turned: whether its EXIF said that it must be turned.
        clear: whether it has transparent pixels.
        grey: whether it stores no colours.
    """

    pixels: Tensor
    size: Size
    scaled: Size
    turned: bool
    clear: bool
    grey: bool


@dataclass(frozen=True)
class ImageChanges:
    """What was done to pictures to make them fit.

    Attributes:
        pictures: how many there are.
        scaled: how many of them were resampled, ``cut`` how many lost pixels at the border or got some.
        turned: how many were turned as their EXIF says.
        clear: how many had transparent pixels.
        least, most: height and width of the smallest and the largest one that was resampled or cut; (0, 0) if none was.
    """

    pictures: int = 0
    scaled: int = 0
    cut: int = 0
    turned: int = 0
    clear: int = 0
    least: Size = (0, 0)
    most: Size = (0, 0)

    @classmethod
    def of(cls, taken: DecodedImage) -> ImageChanges:
        """One picture."""
        size, last = taken.size, (taken.pixels.shape[1], taken.pixels.shape[2])
        scaled, cut = taken.scaled != size, taken.scaled != last
        odd = size if scaled or cut else (0, 0)
        return cls(1, scaled, cut, taken.turned, taken.clear, odd, odd)

    def __add__(self, other: ImageChanges) -> ImageChanges:
        odd = sorted((one for one in (self.least, self.most, other.least, other.most) if any(one)), key=math.prod) or [(0, 0)]
        counts = [mine + its for mine, its in zip(self.to_list()[:5], other.to_list()[:5], strict=True)]
        return ImageChanges.from_list([*counts, odd[0], odd[-1]])

    def to_list(self) -> list[Any]:
        """As a JSON keeps it."""
        return [self.pictures, self.scaled, self.cut, self.turned, self.clear, list(self.least), list(self.most)]

    @classmethod
    def from_list(cls, said: list[Any]) -> ImageChanges:
        """The inverse of :meth:`to_list`."""
        pictures, scaled, cut, turned, clear, least, most = said
        sizes = [(int(high), int(wide)) for high, wide in (least, most)]
        return cls(int(pictures), int(scaled), int(cut), int(turned), int(clear), sizes[0], sizes[1])

    def lines(self, resize_crop: ResizeCrop) -> list[str]:
        """What a user should know of it, a line each; of pictures that fit there is nothing to say."""
        said, both = [], self.least if self.least == self.most else None
        if self.scaled or self.cut:
            span = written(self.least) if both else f"{written(self.least)} to {written(self.most)}"
            also = f", {self.cut} cut" if self.cut > self.scaled else ""
            done = f"{self.scaled} of {self.pictures} pictures resampled{also}"
            said.append(f"{done}, from {span} pixels (height x width), to {written(resize_crop.size)}: {resize_crop.words}")
        if self.turned:
            said.append(f"{self.turned} of {self.pictures} pictures turned as their EXIF says")
        if self.clear:
            said.append(f"{self.clear} of {self.pictures} pictures have transparent pixels: alpha dropped, colours as stored")
        return said


def decode(path: Path, resize_crop: ResizeCrop, channels: int = 3) -> DecodedImage:
    """The image [C, H, W] that a picture file becomes; grey by luminance (ITU-R 601) if C is 1, else colours.

    Raises:
        DataError: it cannot be read, or has more than 8 bits.
    """
    import numpy
    from PIL import Image

    picture, turned, clear, grey = _opened(path)
    size = picture.height, picture.width
    high, wide = resize_crop.scaled(*size)
    if (high, wide) != size:
        picture = picture.resize((wide, high), Image.Resampling[resize_crop.interpolation.upper()])
    top, left = resize_crop.corner(high, wide)
    if (high, wide) != resize_crop.size:
        picture = _cut(picture, top, left, resize_crop)
    if channels == 1:
        picture = picture.convert("L")
    pixels = torch.from_numpy(numpy.array(picture))
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
    return DecodedImage(pixels, size, (high, wide), turned, clear, grey)


def read(path: Path, resize_crop: ResizeCrop, channels: int = 3, *, resize: bool = False) -> tuple[Tensor, list[str]]:
    """A picture as uint8 [C, H, W], and notes on what was done to it.

    With ``resize`` it is what the same picture in a folder becomes. Without, it must be of the right size, and is taken as it is.

    Raises:
        DataError: it is not a picture, has more than 8 bits, or is of another size.
    """
    size = size_of(path)
    if not resize and size != resize_crop.size:
        raise DataError(
            f"'{path}' is {written(size)} (height x width), but the model takes {written(resize_crop.size)}.",
            hint="--resize makes it fit as the pictures of a folder; the patch is then counted in the pixels of the result.",
        )
    with without_warnings():
        taken = decode(path, resize_crop if resize else ResizeCrop(resize_crop.size), channels)
    notes = [f"'{path}' was turned as its EXIF says"] if taken.turned else []
    if taken.clear:
        notes.append(f"'{path}' has transparent pixels: its alpha channel was dropped")
    if taken.grey != (channels == 1):
        kind, wanted = ("grey" if taken.grey else "in colour"), ("L" if channels == 1 else "RGB")
        notes.append(f"'{path}' is {kind}; the model takes {wanted}: converted")
    if resize and (taken.size, taken.scaled) != (resize_crop.size, resize_crop.size):
        notes.append(f"'{path}' is {written(size)} (height x width): {resize_crop.words}; the patch is meant in the result")
    if not resize and resize_crop.scaled(*size) != size:
        notes.append(f"'{path}' fits and is taken as it is; in a folder {resize_crop.words}, and --resize does the same")
    return taken.pixels, notes


def size_of(path: Path) -> Size:
    """Height and width of an upright picture, from as little of its file as possible.

    Raises:
        DataError: it is not a picture.
    """
    from PIL import Image

    try:
        with without_warnings(), Image.open(path) as opened:
            if opened.format == "TIFF":  # which some versions of Pillow make upright, and others do not
                opened.load()
            wide, high = opened.size
            turned = wide != high and _orientation(opened) >= 5
    except Exception as problem:  # damaged files raise nearly anything
        raise _unreadable(path, problem) from problem
    return (wide, high) if turned else (high, wide)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep Pillow's remarks about odd files from the user; for threads it has to be around them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opened(path: Path) -> tuple[Any, bool, bool, bool]:
    """A picture in colour, upright and whole in memory; whether it was turned, has transparent pixels, and is grey."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            orientation = _orientation(opened)
            opened.load()
            if opened.mode.startswith(("I", "F")):
                raise DataError(f"'{path}' has more than 8 bits per channel.", hint="Save it as 8-bit PNG or JPEG.")
            grey = opened.mode in ("1", "L", "LA", "La")
            alpha = opened.convert("RGBA") if opened.has_transparency_data else None
            picture: Any = (alpha or opened).convert("RGB")
            clear = alpha is not None and alpha.getchannel("A").histogram()[255] < alpha.width * alpha.height
            if _orientation(opened) != 1:  # it is, where loading has turned it already
                picture = picture.transpose(Image.Transpose[UPRIGHT[orientation]])
    except DataError:
        raise
    except Exception as problem:  # damaged files raise nearly anything
        raise _unreadable(path, problem) from problem
    return picture, orientation != 1, clear, grey


def _orientation(picture: Any) -> int:
    """How the picture is stored, 1 to 8 as EXIF counts; 1, upright, where nothing readable says otherwise."""
    try:
        found = int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF is anybody's bytes; the picture is none the worse
        return 1
    return found if 1 <= found <= 8 else 1


def _cut(picture: Any, top: int, left: int, resize_crop: ResizeCrop) -> Any:
    from PIL import Image

    high, wide = resize_crop.size
    if top >= 0 and left >= 0:
        return picture.crop((left, top, left + wide, top + high))
    whole = Image.new("RGB", (wide, high), resize_crop.fill)
    whole.paste(picture, (-left, -top))
    return whole


def _unreadable(path: Path, problem: Exception) -> DataError:
    if isinstance(problem, FileNotFoundError):
        return DataError(f"there is no picture '{path}'.")
    return DataError(f"'{path}' is not a picture that can be read ({type(problem).__name__}).", hint="Use PNG or JPEG.")
