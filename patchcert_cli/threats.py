"""Threat models, what an attacker may change: a list of boxes ("locations") and a budget; and what is guaranteed against them.

One patch: the locations are all its placements wholly inside the image, the budget is 1; several patches have a larger budget. A
sparse attack: the locations are single pixels, the budget is k. ``parse_threat(str(threat)) == threat`` for every threat.

Shapes: B images, C channels, H x W pixels, A locations. Locations are rows ``top, left, height, width`` in pixels.
torch is imported where it is needed, so that parsing a threat costs nothing.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Integral
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from patchcert_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


ALERT = -1  # in place of a class: the answer of a defense that raises an alarm


class Guarantee(enum.StrEnum):
    """What the certificates of a defense promise; no two are mixed in one table. With ``none`` there are no certificates."""

    RECOVERY = "recovery"
    DETECTION = "detection"
    NONE = "none"

    @property
    def proves(self) -> bool:
        """Whether there are certificates."""
        return self is not Guarantee.NONE

    @property
    def phrase(self) -> str:
        """What holds for a certified image, as text."""
        return PHRASES[self]

    def kept(self, before: Tensor, after: Tensor) -> Tensor:
        """Whether answers int64 [B] after a change are as good as those before it: bool [B]."""
        same = before == after
        return same | (after == ALERT) if self is Guarantee.DETECTION else same


PHRASES = {
    Guarantee.RECOVERY: "the answer stays right",
    Guarantee.DETECTION: "the answer stays right, or an alarm is raised",
    Guarantee.NONE: "nothing is proven: a stronger attack may find more",
}


@runtime_checkable
class Threat(Protocol):
    """A frozen, hashable description of an attacker; it knows neither model nor device."""

    kind: ClassVar[str]

    @property
    def budget(self) -> int:
        """How many locations the attacker may pick."""
        ...

    def check(self, height: int, width: int, channels: int = 1) -> None:
        """Raise :class:`UsageError` if the threat does not fit an image of this size."""
        ...

    def count(self, height: int, width: int) -> int:
        """The number of locations A on an image of this size."""
        ...

    def locations(self, height: int, width: int) -> Tensor:
        """All locations, int64 [A, 4]: top, left, height, width."""
        ...

    def contains(self, changed: Tensor) -> Tensor:
        """Whether a change is allowed: bool [B, C, H, W] (entry changed?) -> bool [B]."""
        ...


def _positive(value: object) -> bool:
    """Whether a value is a whole number of 1 or more."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


@dataclass(frozen=True)
class Patch:
    """One rectangle of ``height`` x ``width`` pixels, anywhere inside the image, any content in [0, 1].

    It includes every smaller rectangle: what that can change, this patch can change too.
    """

    height: int
    width: int
    kind: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        if not (_positive(self.height) and _positive(self.width)):
            raise UsageError(
                f"invalid patch {self.height!r}x{self.width!r}.", hint="Both sides must be whole numbers, 1 or more."
            )

    @property
    def budget(self) -> int:
        return 1

    def resolve(self, height: int, width: int) -> Patch:
        """The patch in pixels on an ``height`` x ``width`` image: itself."""
        self.check(height, width)
        return self

    def check(self, height: int, width: int, channels: int = 1) -> None:
        if self.height > height or self.width > width:
            said = f"patch {self.height}x{self.width} does not fit a {height}x{width} image."
            raise UsageError(said, hint=f"The largest patch is {height}x{width}.")

    def count(self, height: int, width: int) -> int:
        return (height - self.height + 1) * (width - self.width + 1)

    def locations(self, height: int, width: int) -> Tensor:
        import torch

        self.check(height, width)
        top, left = torch.meshgrid(torch.arange(height - self.height + 1), torch.arange(width - self.width + 1), indexing="ij")
        sides = torch.tensor([self.height, self.width]).expand(top.numel(), 2)
        return torch.cat([top.reshape(-1, 1), left.reshape(-1, 1), sides], dim=1)

    def contains(self, changed: Tensor) -> Tensor:
        touched = changed.any(dim=1)  # [B, H, W]
        return (_extent(touched.any(dim=2)) <= self.height) & (_extent(touched.any(dim=1)) <= self.width)

    def __str__(self) -> str:
        return f"patch:{self.height}x{self.width}"


@dataclass(frozen=True)
class PatchPercent:
    """The smallest square patch that covers at least ``percent`` % of the image's pixels.

    2 % of 224x224 is 32x32, the published reading of that figure.
    """

    percent: Fraction
    kind: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        if not (isinstance(self.percent, Fraction | int) and 0 < self.percent <= 100):
            raise UsageError(f"invalid share {self.percent!r}.", hint="Give a Fraction above 0, at most 100, in percent.")

    @property
    def budget(self) -> int:
        return 1

    def resolve(self, height: int, width: int) -> Patch:
        """The square patch in pixels that this percentage means on an ``height`` x ``width`` image."""
        area = math.ceil(self.percent * height * width / 100)
        side = math.isqrt(area - 1) + 1
        patch = Patch(side, side)
        patch.check(height, width)
        return patch

    def check(self, height: int, width: int, channels: int = 1) -> None:
        self.resolve(height, width)

    def count(self, height: int, width: int) -> int:
        return self.resolve(height, width).count(height, width)

    def locations(self, height: int, width: int) -> Tensor:
        return self.resolve(height, width).locations(height, width)

    def contains(self, changed: Tensor) -> Tensor:
        return self.resolve(int(changed.shape[-2]), int(changed.shape[-1])).contains(changed)

    def __str__(self) -> str:
        return f"patch:{Decimal(self.percent.numerator) / Decimal(self.percent.denominator):f}%"


@dataclass(frozen=True)
class Sparse:
    """At most ``k`` changed entries anywhere: whole pixels with all their channels, or single channel values.

    ``unit="value"`` is what the CIFAR-10 numbers of Chiang et al. (ICLR 2020) count; with one channel both are the same.
    """

    k: int
    unit: str = "pixel"
    kind: ClassVar[str] = "sparse"

    def __post_init__(self) -> None:
        if not _positive(self.k) or self.unit not in UNITS:
            raise UsageError(f"invalid sparse budget {self.k!r} {self.unit}.", hint=f"Use 1 or more of {' or '.join(UNITS)}.")

    @property
    def budget(self) -> int:
        return self.k

    def check(self, height: int, width: int, channels: int = 1) -> None:
        most = height * width * (channels if self.unit == "value" else 1)
        if self.k > most:
            said = f"--k {self.k} exceeds the {most} {self.unit}s of a {height}x{width} image."
            raise UsageError(said, hint=f"Allowed: 1 to {most}.")

    def count(self, height: int, width: int) -> int:
        return height * width

    def locations(self, height: int, width: int) -> Tensor:
        return Patch(1, 1).locations(height, width)

    def contains(self, changed: Tensor) -> Tensor:
        entries = changed if self.unit == "value" else changed.any(dim=1)
        return entries.flatten(1).sum(dim=1) <= self.k

    def __str__(self) -> str:
        return f"sparse:{self.k}:value" if self.unit == "value" else f"sparse:{self.k}"


@dataclass(frozen=True)
class Patches:
    """``number`` patches of one shape, each anywhere inside the image; they may overlap."""

    number: int
    each: Patch | PatchPercent
    kind: ClassVar[str] = "patches"

    def __post_init__(self) -> None:
        if not (_positive(self.number) and self.number > 1 and isinstance(self.each, Patch | PatchPercent)):
            raise UsageError(
                f"invalid patches: {self.number!r} of {self.each!r}.", hint="Use 2 or more of a Patch; one patch is patch:5x5."
            )

    @property
    def budget(self) -> int:
        return self.number

    def check(self, height: int, width: int, channels: int = 1) -> None:
        self.each.check(height, width, channels)

    def count(self, height: int, width: int) -> int:
        return self.each.count(height, width)

    def locations(self, height: int, width: int) -> Tensor:
        return self.each.locations(height, width)

    def contains(self, changed: Tensor) -> Tensor:
        patch = self.each.resolve(int(changed.shape[-2]), int(changed.shape[-1]))
        return _within(changed.any(dim=1), patch, self.number)

    def __str__(self) -> str:
        return f"patches:{self.number}:{str(self.each).removeprefix('patch:')}"


def _within(touched: Tensor, patch: Patch, number: int) -> Tensor:
    """Whether ``number`` patches can hide all touched pixels: bool [B, H, W] -> bool [B].

    Some patch hides the first touched pixel in reading order. Nothing above that pixel is touched, so this patch may start in its
    row, or as low as it fits. For each of its possible columns, the other patches must hide what is left.
    """
    import torch

    if number == 1:
        return patch.contains(touched[:, None])
    batch, height, width = touched.shape
    first = touched.flatten(1).int().argmax(dim=1)  # 0 if none is
    top = (first // width).clamp(max=height - patch.height)[:, None]
    row, column = torch.arange(height, device=touched.device), torch.arange(width, device=touched.device)
    rows = (row >= top) & (row < top + patch.height)
    found = torch.zeros(batch, dtype=torch.bool, device=touched.device)
    for back in range(patch.width):
        left = (first % width - back).clamp(min=0, max=width - patch.width)[:, None]
        columns = (column >= left) & (column < left + patch.width)
        found |= _within(touched & ~(rows[:, :, None] & columns[:, None, :]), patch, number - 1)
    return found


def _extent(line: Tensor) -> Tensor:
    """Length of the shortest interval that holds all True entries: bool [B, n] -> int64 [B], 0 if none."""
    import torch

    position = torch.arange(line.shape[1], device=line.device)
    last = torch.where(line, position, -1).amax(dim=1)
    first = torch.where(line, position, len(position)).amin(dim=1)
    return (last - first + 1).clamp(min=0)


def parse_patch(text: str) -> Patch | PatchPercent:
    """Read ``5``, ``3x7`` or ``2%``."""
    sides = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text)
    percent = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%", text)
    if percent and 0 < Fraction(percent[1]) <= 100:
        return PatchPercent(Fraction(percent[1]))
    if sides and int(sides[1]) and int(sides[2] or sides[1]):
        return Patch(int(sides[1]), int(sides[2] or sides[1]))
    raise UsageError(f"invalid patch '{text}'.", hint="Use N, HxW or P% up to 100%, for example 5, 3x7 or 2%.")


def parse_patches(text: str) -> list[Patch | PatchPercent]:
    """Read patches between commas, each as :func:`parse_patch` reads it or a range of squares: ``1..10``, ``2x5,5x2``."""
    parts = [(part, _range(part)) for part in text.split(",")]
    return [one for part, sides in parts for one in ([parse_patch(part)] if sides is None else [Patch(n, n) for n in sides])]


def parse_budgets(text: str, unit: str) -> list[Sparse]:
    """Read numbers of changed pixels or values between commas, or ranges of them: ``1..10``, ``1,2,4``."""
    found: list[Sparse] = []
    for part in text.split(","):
        budgets = _range(part)
        if ":" in part:
            raise UsageError(f"invalid sparse budget '{part}'.", hint="Give the unit with --unit.")
        found += [Sparse(k, unit) for k in budgets or [parse_sparse(part).k]]
    return found


def _range(text: str) -> range | None:
    """The numbers of ``FIRST..LAST``; None if the text is something else."""
    match = re.fullmatch(r"(\d{1,4})\.\.(\d{1,4})", text)
    if not match:
        return None
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last:
        raise UsageError(f"invalid range '{text}'.", hint="Use FIRST..LAST, both 1 or more, for example 1..10.")
    return range(first, last + 1)


def patches_of_area(area: int, height: int, width: int) -> list[Patch]:
    """The largest patches of at most ``area`` pixels, one of every height, that fit an ``height`` x ``width`` image.

    A shape that fits inside another one of them is left out: what it can change, the other can change too.
    """
    if area < 1:
        raise UsageError(f"--patch-area is {area}.", hint="Allowed: 1 or more.")
    shapes = [Patch(side, min(area // side, width)) for side in range(1, min(area, height) + 1)]
    return [one for one in shapes if not any(one.width <= other.width and one.height < other.height for other in shapes)]


def parse_several(text: str) -> Patches:
    """Read ``2:5``, ``2:3x7`` or ``2:2%``: how many patches, and the shape of each."""
    match = re.fullmatch(r"(\d{1,2}):(.*)", text)
    if not match:
        raise UsageError(f"invalid patches '{text}'.", hint="Use a number and a shape, for example 2:5 or 2:3x7.")
    return Patches(int(match[1]), parse_patch(match[2]))


def parse_sparse(text: str) -> Sparse:
    """Read ``10``, ``10:pixel`` or ``10:value``."""
    match = re.fullmatch(r"(\d{1,9})(?::([a-z]+))?", text)
    if not match or int(match[1]) < 1:
        raise UsageError(f"invalid sparse budget '{text}'.", hint="Use K, K:pixel or K:value, with K from 1 to 999999999.")
    if match[2] not in (None, *UNITS):
        raise UsageError(f"invalid unit '{match[2]}'.", hint=f"Use one of {', '.join(UNITS)}.")
    return Sparse(int(match[1]), match[2] or "pixel")


UNITS = ("pixel", "value")
KINDS: dict[str, Callable[[str], Threat]] = {"patch": parse_patch, "sparse": parse_sparse, "patches": parse_several}


def parse_threat(text: str) -> Threat:
    """Read a threat model: ``patch:5x5``, ``patch:5``, ``patch:3x7``, ``patch:2%``, ``patches:2:5x5``, ``sparse:10:value``."""
    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        hint = "Use patch:HxW, patch:P%, patches:N:HxW, sparse:K or sparse:K:value, for example patch:5x5."
        raise UsageError(f"invalid threat '{text}'.", hint=hint)
    return KINDS[kind](rest)


def as_options(threat: Threat) -> str:
    """``threat`` as options of a command: ``--patch 5``, ``--patch 3x7``, ``--patch 2%``, ``--threat sparse --k 10``."""
    if isinstance(threat, Sparse):
        return f"--threat sparse --k {threat.k}" + (" --unit value" if threat.unit == "value" else "")
    if isinstance(threat, Patch) and threat.height == threat.width:
        return f"--patch {threat.height}"
    return f"--patch {str(threat).removeprefix('patch:')}" if threat.kind == "patch" else f"--threat {threat}"
