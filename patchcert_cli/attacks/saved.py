"""Pasting image files: patches that were made elsewhere, printed or optimized, at random locations of each image.

It does not search. Each patch is pasted ``places`` times on each image, and each pasting is judged by itself. The counts measure
the effect of these patches on the deployed answer, and on the classifier inside, evaluated without a mask.

Shapes: B images, C channels, H x W pixels; a patch has h x w pixels, the box around it when rotated h' x w'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.attacks._base import Attack, require
from patchcert_cli.attacks._target import Target
from patchcert_cli.data import image_files
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import DataError, UsageError
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, PatchPercent, Threat


@dataclass(frozen=True)
class Picture:
    """An image file to paste.

    Attributes:
        pixels: float32 [C, h, w] in [0, 1].
        sha256: of its file.
    """

    name: str
    pixels: Tensor
    sha256: str


def read(folder: Path, channels: int) -> tuple[Picture, ...]:
    """The image files in ``folder``, by name, with ``channels`` channels.

    Raises:
        DataError: there is no such folder, no image file in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'.", hint="Give a folder of image files to paste: --saved ./patches")
    paths = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in image_files.EXTENSIONS and not path.name.startswith(".")
    )
    if not paths:
        raise DataError(f"'{folder}' has no image files.", hint="Put the patches into it, one per file, such as patch.png.")
    return tuple(Picture(path.name, _pixels(path, channels), files.sha256(path)) for path in paths)


def _pixels(path: Path, channels: int) -> Tensor:
    """An image file of any size, float32 [C, h, w]."""
    pixels, _ = image_files.read(path, ResizeCrop(image_files.size_of(path)), channels)
    return pixels.float() / 255


@dataclass(frozen=True, kw_only=True)
class SavedPatches(Attack):
    """Paste each image file at random locations.

    Attributes:
        seed: source of all randomness, together with each image's number.
        pictures: what is pasted.
        places: how often each of them is pasted on an image.
        turn: the largest angle, in degrees to either side, by which a pasting is rotated at random; 0 for none. A rotated
            patch that exceeds the threat is made smaller until it fits.
        shrink: each pasting is scaled by a factor drawn between this and 1.
    """

    pictures: tuple[Picture, ...] = ()
    places: int = 1
    turn: float = 0.0
    shrink: float = 1.0
    kinds: ClassVar[tuple[str, ...]] = ("patch",)
    judges_each: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require("places", self.places, 1)
        require("turn", self.turn, 0, 180)
        require("shrink", self.shrink, 0.05, 1)

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Paste one image file after the other on all images.

        Raises:
            UsageError: there is nothing to paste, or an image file is larger than the threat or has other channels.
        """
        assert isinstance(threat, Patch | PatchPercent)
        most = threat.resolve(int(x.shape[2]), int(x.shape[3]))
        self.check(most, int(x.shape[1]))
        everyone = torch.arange(len(x), device=x.device)
        for number, picture in enumerate(self.pictures):
            content = picture.pixels.to(x)
            for place in range(self.places):
                lots = self.draw(index, number * self.places + place, 4).double().tolist()
                rows = torch.stack([self._pasted(one, content, most, lot) for one, lot in zip(x, lots, strict=True)])
                target.judge(rows, everyone)
        return target.best

    def check(self, most: Patch, channels: int) -> None:
        """Raise :class:`UsageError` unless there are image files and each of them fits inside the patch ``most``."""
        if not self.pictures:
            raise UsageError("there are no image files to paste.", hint="Name their folder: --saved FOLDER.")
        for picture in self.pictures:
            depth, height, width = picture.pixels.shape
            if height > most.height or width > most.width:
                raise UsageError(
                    f"{picture.name} is {height}x{width}, larger than {most}.",
                    hint=f"Save it with at most {most.height}x{most.width} pixels, or allow a larger patch with --patch.",
                )
            if depth != channels:
                raise UsageError(
                    f"{picture.name} has {depth} channels, the images have {channels}.", hint=f"Save it with {channels} channels."
                )

    def _pasted(self, image: Tensor, picture: Tensor, most: Patch, lots: list[float]) -> Tensor:
        """An image [C, H, W] with the patch on it; location, angle and scale follow from four numbers in [0, 1)."""
        angle, scale = (2 * lots[2] - 1) * math.radians(self.turn), self.shrink + (1 - self.shrink) * lots[3]
        content, inside = turned(picture, angle, scale, most)
        height, width = inside.shape
        top, left = int(lots[0] * (image.shape[1] - height + 1)), int(lots[1] * (image.shape[2] - width + 1))
        found = image.clone()
        box = found[:, top : top + height, left : left + width]
        box.copy_(torch.where(inside, content, box))
        return found


def turned(picture: Tensor, angle: float, scale: float, most: Patch) -> tuple[Tensor, Tensor]:
    """A patch rotated about its centre and scaled, in the box around it, which is at most ``most``.

    Args:
        picture: [C, h, w].
        angle: in radians, anticlockwise.
        scale: of its sides; less where the rotated patch would not fit.
        most: the largest box.

    Returns:
        [C, h', w'] in [0, 1], and bool [h', w'], where it covers what lies below.
    """
    height, width = picture.shape[1:]
    if angle == 0 and scale == 1:
        return picture, torch.ones(height, width, dtype=torch.bool, device=picture.device)
    cos, sin = math.cos(angle), math.sin(angle)
    high, wide = height * abs(cos) + width * abs(sin), height * abs(sin) + width * abs(cos)
    scale = min(scale, most.height / high, most.width / wide)
    rows, columns = (max(1, math.ceil(scale * side - 1e-9)) for side in (high, wide))
    down = torch.arange(rows, dtype=torch.float64, device=picture.device)[:, None] - (rows - 1) / 2
    right = torch.arange(columns, dtype=torch.float64, device=picture.device)[None] - (columns - 1) / 2
    # where a pixel of the box lies in the patch, from its centre, in halves of its sides
    at = torch.stack([(cos * right - sin * down) / (scale * width / 2), (sin * right + cos * down) / (scale * height / 2)], dim=2)
    grid = at[None].to(picture.dtype)
    seen = F.grid_sample(picture[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]
    return seen.clamp(0, 1), (at.abs() <= 1).all(dim=2)
