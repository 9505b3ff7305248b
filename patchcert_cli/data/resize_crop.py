"""How an image of any size becomes one of H x W pixels: it is resized, then its middle is cropped.

As text, after the ``@`` of a data set's name:

==============================  ==========================================================================================
``64``, ``48x64``               an image of this size (height x width) is not changed; of any other, the shorter side is
                                resized to 256/224 of this size, then the middle is cropped
``64/72``                       of every image the shorter side is resized to 72, then the middle is cropped
``64/64,squash``                resized to 64x64, whatever its shape
``64/64,border-124-116-104``    resized until it fits inside, with a border of this colour around it
``64/56,pad``                   resized to less than 64, with black around it
``64/72,bilinear``              another interpolation than bicubic
==============================  ==========================================================================================

The arithmetic is that of torchvision's ``Resize`` and ``CenterCrop`` and of timm's transforms for evaluation, to the pixel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchcert_cli.errors import UsageError

RESIZE_RATIO = 256 / 224  # the usual length of the shorter side before cropping, as a multiple of the crop size
MAX_SIDE = 4096  # pixels
MODES = ("center", "squash", "border")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
TEXT = re.compile(r"(?P<size>\d{1,6}(x\d{1,6})?)(/(?P<resize_to>\d{1,6}(x\d{1,6})?))?(?P<options>(,[a-z]+(-\d{1,3}){0,3})*)")

Size = tuple[int, int]


@dataclass(frozen=True)
class ResizeCrop:
    """How an image is resized and cropped.

    Attributes:
        size: H and W of the result.
        resize_to: height and width that an image is resized to before its middle is cropped: it covers both of them (mode
            ``center``), has exactly these (``squash``), or fits into both (``border``). None: images of the right size are not
            changed, and the others are resized to :data:`RESIZE_RATIO` times ``size``.
        mode: one of :data:`MODES`.
        interpolation: one of :data:`INTERPOLATIONS`, as Pillow computes them.
        fill: the colour around an image that is resized to less than ``size``.
    """

    size: Size
    resize_to: Size | None = None
    mode: str = "center"
    interpolation: str = "bicubic"
    fill: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def square(cls, crop_size: int, resize_to: int | None = None) -> ResizeCrop:
        """The middle square of images whose shorter side is resized to ``resize_to``."""
        return cls((crop_size, crop_size), None if resize_to is None else (resize_to, resize_to))

    @classmethod
    def parse(cls, text: str) -> ResizeCrop:
        """The inverse of ``str``.

        Raises:
            UsageError: the text is invalid.
        """
        match = TEXT.fullmatch(text)
        parsed = None if match is None else cls._parsed(match["size"], match["resize_to"], match["options"].split(",")[1:])
        if parsed is None:
            raise UsageError(
                f"'@{text}' is not a valid size.",
                hint=f"Use NAME@SIZE or NAME@SIZE/RESIZE, 1 to {MAX_SIDE}, RESIZE at least SIZE (or SIZE/RESIZE,pad).",
            )
        return parsed

    @classmethod
    def _parsed(cls, size_text: str, resize_text: str | None, options: list[str]) -> ResizeCrop | None:
        """The value of a text in parts; None if it is invalid."""
        size, resize_to = _parse_size(size_text), None if resize_text is None else _parse_size(resize_text)
        mode, interpolation, fill = "center", "bicubic", (0, 0, 0)
        for option in options:
            word, *colour = option.split("-")
            if word in INTERPOLATIONS:
                interpolation = word
            elif word in MODES:
                mode = word
                fill = tuple(map(int, colour)) if word == "border" else fill  # type: ignore[assignment]  # checked below
            elif word != "pad":
                return None
        value = cls(size, resize_to, mode, interpolation, fill)
        sides = (*size, *(resize_to or ()))
        valid = min(sides) >= 1 and max(sides) <= MAX_SIDE and len(fill) == 3 and max(fill) <= 255
        valid = valid and value._padded == ("pad" in options) and (resize_to is not None or mode == "center")
        return value if valid else None

    @property
    def _padded(self) -> bool:
        """Whether every image ends up smaller than the result, so that the rest is black."""
        return (
            self.mode != "border"
            and self.resize_to is not None
            and any(a < b for a, b in zip(self.resize_to, self.size, strict=True))
        )

    def __str__(self) -> str:
        colour = "".join(f"-{value}" for value in self.fill) if self.mode == "border" else ""
        options = [] if self.mode == "center" else [self.mode + colour]
        options += ["pad"] * self._padded + ([] if self.interpolation == "bicubic" else [self.interpolation])
        resize = "" if self.resize_to is None else f"/{_size_text(self.resize_to)}"
        return ",".join([_size_text(self.size) + resize, *options])

    @property
    def target(self) -> Size:
        """What images of another size are resized to; see ``resize_to``."""
        return self.resize_to or (usual_resize(self.size[0]), usual_resize(self.size[1]))

    def resized(self, height: int, width: int) -> Size:
        """Height and width to which an image of this height and width is resized."""
        if self.resize_to is None and (height, width) == self.size:
            return self.size
        target_height, target_width = self.target
        if self.mode == "squash":
            return target_height, target_width
        if self.mode == "center" and target_height == target_width:
            shorter = target_height
            return (int(shorter * height / width), shorter) if width <= height else (shorter, int(shorter * width / height))
        ratios = height / target_height, width / target_width
        ratio = max(ratios) if self.mode == "border" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def corner(self, height: int, width: int) -> Size:
        """Top and left of the crop in a resized image of this height and width; below 0 if that is smaller than the crop."""
        top, left = (_crop_start(have, want) for have, want in zip((height, width), self.size, strict=True))
        return top, left

    @property
    def words(self) -> str:
        """What is done to images of another size, as the end of a sentence."""
        height, width = self.target
        if self.mode == "border":
            text = f"each is resized until it fits into {height}x{width}, with a border around it"
        elif self.mode == "squash":
            text = f"each is resized to {height}x{width}, whatever its shape"
        elif height == width:
            text = f"the shorter side is resized to {height}"
        else:
            text = f"each is resized until it covers {height}x{width}"
        uncropped = self.mode != "center" and (height, width) == self.size
        return f"{text} ({self.interpolation})" + ("" if uncropped else f", and the middle {written(self.size)} is cropped")


def written(size: Size) -> str:
    """``32x48``: height, then width, as patches are written."""
    return f"{size[0]}x{size[1]}"


def usual_resize(size: int) -> int:
    """The usual length of the shorter side before the middle ``size`` pixels are cropped."""
    return round(size * RESIZE_RATIO)


def _crop_start(have: int, want: int) -> int:
    """Where the middle ``want`` of ``have`` pixels begin. torchvision rounds halves to even, but pads more at the end."""
    return -((want - have) // 2) if want > have else round((have - want) / 2)


def _size_text(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else written(size)


def _parse_size(text: str) -> Size:
    height, _, width = text.partition("x")
    return int(height), int(width or height)
