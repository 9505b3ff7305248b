"""How a picture of any size becomes an image of H x W pixels: it is scaled, then its middle is cut out.

As text, behind the ``@`` of a data set's name:

==============================  ==========================================================================================
``64``, ``48x64``               a picture of this size (height x width) is left alone; of any other, the shorter side is
                                scaled to 256/224 of the image's, then the middle is cut out
``64/72``                       of every picture the shorter side is scaled to 72, then the middle is cut out
``64/64,squash``                scaled to 64x64, whatever its shape
``64/64,border-124-116-104``    scaled until it fits inside, with a border of this colour around it
``64/56,pad``                   scaled to less than the image, with black around it
``64/72,bilinear``              another interpolation than bicubic
==============================  ==========================================================================================

The arithmetic is that of torchvision's ``Resize`` and ``CenterCrop`` and of timm's transforms for evaluation, to the pixel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from patchcert_cli.errors import UsageError

USUAL = 256 / 224  # what the shorter side of a picture is scaled to, as a multiple of the image's
LARGEST = 4096  # pixels of a side
MODES = ("center", "squash", "border")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
TEXT = re.compile(r"(?P<size>\d{1,6}(x\d{1,6})?)(/(?P<scale>\d{1,6}(x\d{1,6})?))?(?P<marks>(,[a-z]+(-\d{1,3}){0,3})*)")

Size = tuple[int, int]


@dataclass(frozen=True)
class ResizeCrop:
    """How a picture becomes an image.

    Attributes:
        size: H and W of the image.
        scale: height and width that a picture is scaled to before the middle is cut out: as large as one of them asks (mode
            ``center``), exactly (``squash``), or as large as both allow (``border``). None: pictures of the right size are left
            alone, and the others are scaled to :data:`USUAL`.
        mode: one of :data:`MODES`.
        interpolation: one of :data:`INTERPOLATIONS`, as Pillow computes them.
        fill: the colour around a picture that is scaled to less than the image.
    """

    size: Size
    scale: Size | None = None
    mode: str = "center"
    interpolation: str = "bicubic"
    fill: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def square(cls, side: int, short: int | None = None) -> ResizeCrop:
        """The middle of pictures whose shorter side is scaled to ``short``; without it, of those that do not fit as they are."""
        return cls((side, side), None if short is None else (short, short))

    @classmethod
    def parse(cls, text: str) -> ResizeCrop:
        """The inverse of ``str``.

        Raises:
            UsageError: it cannot be meant.
        """
        match = TEXT.fullmatch(text)
        made = None if match is None else cls._read(match["size"], match["scale"], match["marks"].split(",")[1:])
        if made is None:
            raise UsageError(
                f"'@{text}' cannot be meant.",
                hint=f"Give NAME@SIDE or NAME@SIDE/SHORT, 1 to {LARGEST}, SHORT at least SIDE (or SIDE/SHORT,pad).",
            )
        return made

    @classmethod
    def _read(cls, size: str, scale: str | None, marks: list[str]) -> ResizeCrop | None:
        sides, scaled = _sides(size), None if scale is None else _sides(scale)
        mode, interpolation, fill = "center", "bicubic", (0, 0, 0)
        for mark in marks:
            word, *colour = mark.split("-")
            if word in INTERPOLATIONS:
                interpolation = word
            elif word in MODES:
                mode = word
                fill = tuple(map(int, colour)) if word == "border" else fill  # type: ignore[assignment]  # checked below
            elif word != "pad":
                return None
        made = cls(sides, scaled, mode, interpolation, fill)
        numbers = (*sides, *(scaled or ()))
        good = min(numbers) >= 1 and max(numbers) <= LARGEST and len(fill) == 3 and max(fill) <= 255
        good = good and made._padded == ("pad" in marks) and (scaled is not None or mode == "center")
        return made if good else None

    @property
    def _padded(self) -> bool:
        """Whether every picture ends up smaller than the image, so that the rest is black."""
        return self.mode != "border" and self.scale is not None and any(a < b for a, b in zip(self.scale, self.size, strict=True))

    def __str__(self) -> str:
        colour = "".join(f"-{value}" for value in self.fill) if self.mode == "border" else ""
        marks = [] if self.mode == "center" else [self.mode + colour]
        marks += ["pad"] * self._padded + ([] if self.interpolation == "bicubic" else [self.interpolation])
        return ",".join([_side(self.size) + ("" if self.scale is None else f"/{_side(self.scale)}"), *marks])

    @property
    def target(self) -> Size:
        """What pictures that do not fit are scaled to; see ``scale``."""
        return self.scale or (shorter(self.size[0]), shorter(self.size[1]))

    def scaled(self, height: int, width: int) -> Size:
        """Height and width to which a picture of this height and width is scaled."""
        if self.scale is None and (height, width) == self.size:
            return self.size
        high, wide = self.target
        if self.mode == "squash":
            return high, wide
        if self.mode == "center" and high == wide:
            return (int(high * height / width), wide) if width <= height else (high, int(wide * width / height))
        ratios = height / high, width / wide
        ratio = max(ratios) if self.mode == "border" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def corner(self, height: int, width: int) -> Size:
        """Top and left of what is cut out of a scaled picture of this height and width; below 0 where it is smaller."""
        top, left = (_begin(have, want) for have, want in zip((height, width), self.size, strict=True))
        return top, left

    @property
    def words(self) -> str:
        """What is done to pictures that do not fit, as the end of a sentence."""
        high, wide = self.target
        if self.mode == "border":
            done = f"each is scaled until it fits into {high}x{wide}, with a border around it"
        elif self.mode == "squash":
            done = f"each is scaled to {high}x{wide}, whatever its shape"
        elif high == wide:
            done = f"the shorter side is scaled to {high}"
        else:
            done = f"each is scaled until it covers {high}x{wide}"
        whole = self.mode != "center" and (high, wide) == self.size
        return f"{done} ({self.interpolation})" + ("" if whole else f", and the middle {written(self.size)} is taken")


def written(size: Size) -> str:
    """``32x48``: height, then width, as patches are written."""
    return f"{size[0]}x{size[1]}"


def shorter(size: int) -> int:
    """The usual length of a picture's shorter side before ``size`` pixels of it are cut out of its middle."""
    return round(size * USUAL)


def _begin(have: int, want: int) -> int:
    """Where the middle ``want`` of ``have`` pixels begin: torchvision rounds halves to even, but pads rather at the end."""
    return -((want - have) // 2) if want > have else round((have - want) / 2)


def _side(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else written(size)


def _sides(text: str) -> Size:
    high, _, wide = text.partition("x")
    return int(high), int(wide or high)
