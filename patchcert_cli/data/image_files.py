"""From an image file to pixels: one way for a single file and for folders.

An image is rotated by its EXIF orientation. Colours are those that the file stores: an alpha channel is dropped, and transparent
pixels get no background, as in torchvision's loader. Of several frames or pages the first one is used. More than 8 bits per
channel are refused. Then the image is resized and cropped (:mod:`patchcert_cli.data.resize_crop`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchcert_cli.data.resize_crop import ResizeCrop, Size, written
from patchcert_cli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

EXTENSIONS = (  # torchvision's, and other formats that Pillow reads
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jpe", ".jfif", ".gif", ".pbm", ".pnm"),
)
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = {  # its values, and Pillow's name of the operation that makes such an image upright
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
    """An image from a file, resized and cropped.

    Attributes:
        pixels: uint8 [C, H, W].
        size: height and width of the upright image, before it was resized.
        resized: height and width after resizing, before cropping.
        rotated: whether its EXIF orientation was not upright.
        transparent: whether it has transparent pixels.
        grey: whether it stores no colours.
    """

    pixels: Tensor
    size: Size
    resized: Size
    rotated: bool
    transparent: bool
    grey: bool


@dataclass(frozen=True)
class ImageChanges:
    """How many images were changed to make them fit.

    Attributes:
        images: how many there are.
        resized: how many of them were resampled.
        cropped: how many lost pixels at the border, or got some.
        rotated: how many were rotated by their EXIF orientation.
        transparent: how many had transparent pixels.
        smallest, largest: height and width of the smallest and the largest image that was resampled or cropped; (0, 0) if none.
    """

    images: int = 0
    resized: int = 0
    cropped: int = 0
    rotated: int = 0
    transparent: int = 0
    smallest: Size = (0, 0)
    largest: Size = (0, 0)

    @classmethod
    def of(cls, image: DecodedImage) -> ImageChanges:
        """One image."""
        final = image.pixels.shape[1], image.pixels.shape[2]
        resized, cropped = image.resized != image.size, image.resized != final
        size = image.size if resized or cropped else (0, 0)
        return cls(1, resized, cropped, image.rotated, image.transparent, size, size)

    def __add__(self, other: ImageChanges) -> ImageChanges:
        sizes = [size for size in (self.smallest, self.largest, other.smallest, other.largest) if any(size)]
        sizes = sorted(sizes, key=math.prod) or [(0, 0)]
        counts = [mine + its for mine, its in zip(self.to_list()[:5], other.to_list()[:5], strict=True)]
        return ImageChanges.from_list([*counts, sizes[0], sizes[-1]])

    def to_list(self) -> list[Any]:
        """As plain values for JSON."""
        counts = [self.images, self.resized, self.cropped, self.rotated, self.transparent]
        return [*counts, list(self.smallest), list(self.largest)]

    @classmethod
    def from_list(cls, values: list[Any]) -> ImageChanges:
        """The inverse of :meth:`to_list`."""
        images, resized, cropped, rotated, transparent = map(int, values[:5])
        smallest, largest = ((int(height), int(width)) for height, width in values[5:])
        return cls(images, resized, cropped, rotated, transparent, smallest, largest)

    def lines(self, resize_crop: ResizeCrop) -> list[str]:
        """What a user should know of it, a line each; none if all images fit."""
        lines = []
        if self.resized or self.cropped:
            span = written(self.smallest) + ("" if self.smallest == self.largest else f" to {written(self.largest)}")
            cropped = f", {self.cropped} cropped" if self.cropped > self.resized else ""
            counts = f"{self.resized} of {self.images} images resampled{cropped}"
            lines.append(f"{counts}, from {span} pixels (height x width), to {written(resize_crop.size)}: {resize_crop.words}")
        if self.rotated:
            lines.append(f"{self.rotated} of {self.images} images rotated by their EXIF orientation")
        if self.transparent:
            lines.append(f"{self.transparent} of {self.images} images have transparent pixels: alpha dropped, colours as stored")
        return lines


def decode(path: Path, resize_crop: ResizeCrop, channels: int = 3) -> DecodedImage:
    """The image [C, H, W] of a file, resized and cropped; grey by luminance (ITU-R 601) if C is 1, else in colour.

    Raises:
        DataError: it cannot be read, or has more than 8 bits.
    """
    import numpy
    from PIL import Image

    image, rotated, transparent, grey = _opened(path)
    size = image.height, image.width
    resized = resize_crop.resized(*size)
    if resized != size:
        image = image.resize(resized[::-1], Image.Resampling[resize_crop.interpolation.upper()])
    if resized != resize_crop.size:
        image = _crop(image, *resize_crop.corner(*resized), resize_crop)
    if channels == 1:
        image = image.convert("L")
    import torch

    pixels = torch.from_numpy(numpy.array(image))
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
    return DecodedImage(pixels, size, resized, rotated, transparent, grey)


def read(path: Path, resize_crop: ResizeCrop, channels: int = 3, *, resize: bool = False) -> tuple[Tensor, list[str]]:
    """A single image file as uint8 [C, H, W], and notes on what was done to it.

    With ``resize`` the result is the same as for an image of a folder. Without, the image must have the right size.

    Raises:
        DataError: it is not an image, has more than 8 bits per channel, or another size.
    """
    size = size_of(path)
    if not resize and size != resize_crop.size:
        raise DataError(
            f"'{path}' is {written(size)} (height x width), but the model takes {written(resize_crop.size)}.",
            hint="--resize makes it fit, as images of a folder; the patch is then counted in pixels of the result.",
        )
    with without_warnings():
        image = decode(path, resize_crop if resize else ResizeCrop(resize_crop.size), channels)
    notes = [f"'{path}' was rotated by its EXIF orientation"] if image.rotated else []
    if image.transparent:
        notes.append(f"'{path}' has transparent pixels: its alpha channel was dropped")
    if image.grey != (channels == 1):
        kind, wanted = ("grey" if image.grey else "in colour"), ("L" if channels == 1 else "RGB")
        notes.append(f"'{path}' is {kind}; the model takes {wanted}: converted")
    if resize and (image.size, image.resized) != (resize_crop.size, resize_crop.size):
        notes.append(f"'{path}' is {written(size)} (height x width): {resize_crop.words}; patch sizes are those in the result")
    if not resize and resize_crop.resized(*size) != size:
        notes.append(f"'{path}' has the right size and is not resized; in a folder {resize_crop.words}; --resize does the same")
    return image.pixels, notes


def size_of(path: Path) -> Size:
    """Height and width of an upright image, from as little of its file as possible.

    Raises:
        DataError: it is not an image.
    """
    from PIL import Image

    try:
        with without_warnings(), Image.open(path) as opened:
            if opened.format == "TIFF":  # which some versions of Pillow make upright, and others do not
                opened.load()
            width, height = opened.size
            rotated = width != height and _orientation(opened) >= 5
    except Exception as problem:  # damaged files raise nearly anything
        raise _unreadable(path, problem) from problem
    return (width, height) if rotated else (height, width)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Hide Pillow's warnings about odd files; for threads it has to be around them, not in them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opened(path: Path) -> tuple[Any, bool, bool, bool]:
    """An image in colour, upright and in memory; whether it was rotated, has transparent pixels, and is grey."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            orientation = _orientation(opened)
            opened.load()
            if opened.mode.startswith(("I", "F")):
                raise DataError(f"'{path}' has more than 8 bits per channel.", hint="Save it as 8-bit PNG or JPEG.")
            grey = opened.mode in ("1", "L", "LA", "La")
            alpha = opened.convert("RGBA") if opened.has_transparency_data else None
            image: Any = (alpha or opened).convert("RGB")
            transparent = alpha is not None and alpha.getchannel("A").histogram()[255] < alpha.width * alpha.height
            if _orientation(opened) != 1:  # it is, where loading has turned it already
                image = image.transpose(Image.Transpose[UPRIGHT[orientation]])
    except DataError:
        raise
    except Exception as problem:  # damaged files raise nearly anything
        raise _unreadable(path, problem) from problem
    return image, orientation != 1, transparent, grey


def _orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8; 1, upright, if there is none or it cannot be read."""
    try:
        found = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF may be any bytes; the pixels are not affected
        return 1
    return found if 1 <= found <= 8 else 1


def _crop(image: Any, top: int, left: int, resize_crop: ResizeCrop) -> Any:
    from PIL import Image

    height, width = resize_crop.size
    if top >= 0 and left >= 0:
        return image.crop((left, top, left + width, top + height))
    padded = Image.new("RGB", (width, height), resize_crop.fill)
    padded.paste(image, (-left, -top))
    return padded


def _unreadable(path: Path, problem: Exception) -> DataError:
    if isinstance(problem, FileNotFoundError):
        return DataError(f"there is no image '{path}'.", hint="Check the path.")
    return DataError(f"'{path}' is not an image that can be read ({type(problem).__name__}).", hint="Use PNG or JPEG.")
