"""Networks of whole numbers, level by level, any part of a map computed from the part of the map before that it sees.

A level is an exact convolution (:mod:`patchcert_cli.layers.integers`) onto a grid of pre-activations, with ``pool`` the largest
of every 2x2 of them, a table of 256 whole numbers for the activation, and with ``residual`` plus what came in, cut at 255. Zero
is the whole number ``zero`` of a map, which is also what surrounds it. So every value is a function of whole numbers alone, the
same in any batch, in any order, on any machine, and the same whether a map is computed at once or in parts.

Shapes: n maps or parts, C channels in, O out, H x W positions, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import fixed_point, integers, precision
from patchcert_cli.layers.integers import LARGEST, ROOM, Whole

LOWEST = 4.0  # pre-activations below -4 count as -4, where GELU is 0 within a tenth of a step
HIGHEST = 5.0  # from here on GELU is the identity, within 2e-6
DIP = 0.17  # GELU is never below -0.17


class Level(nn.Module):
    """One level, uint8 [n, C, H, W] -> uint8 [n, O, H', W'], of maps whose surroundings are part of what is given.

    Attributes:
        whole: the convolution.
        table: uint8 [256], the activation of each pre-activation.
        before: what surrounds a map that comes in, uint8 [C].
        zero: what surrounds a map that goes out.
        padding: how far a map reaches into its surroundings.
    """

    table: Tensor
    before: Tensor

    def __init__(
        self, whole: Whole, table: Tensor, *, before: Tensor, zero: int, padding: int, pool: bool, residual: bool
    ) -> None:
        super().__init__()
        self.whole, self.zero, self.padding, self.pool, self.residual = whole, zero, padding, pool, residual
        self.register_buffer("table", table.to(torch.uint8))
        self.register_buffer("before", before.to(torch.uint8))

    @property
    def kernel(self) -> int:
        """k."""
        return self.whole.weight.shape[2]

    @property
    def step(self) -> int:
        """How many positions of the convolution make one that goes out, along each axis."""
        return 2 if self.pool else 1

    def size(self, length: int) -> int:
        """How long a map is that goes out, of how long a one comes in."""
        return (length + 2 * self.padding - self.kernel + 1) // self.step

    def span(self, first: int, count: int) -> tuple[int, int]:
        """The positions that ``count`` positions from ``first`` on see: the first and how many; some may lie around the map."""
        return first * self.step - self.padding, count * self.step + self.kernel - 1

    def forward(self, q: Tensor) -> Tensor:
        """The outputs of a part whose whole receptive field is given."""
        found = self.whole(q)
        if self.pool:
            found = torch.maximum(found[:, :, 0::2], found[:, :, 1::2])
            found = torch.maximum(found[..., 0::2], found[..., 1::2])
        flat = found.permute(0, 2, 3, 1)
        made = torch.index_select(self.table, 0, flat.reshape(-1).int()).reshape(flat.shape).permute(0, 3, 1, 2)
        if not self.residual:
            return made
        at = self.padding
        middle = q[:, :, at : q.shape[2] - at, at : q.shape[3] - at]
        return torch.minimum(made, 255 - middle).add_(middle)  # made + middle, at most 255

    def everything(self, q: Tensor) -> Tensor:
        """A whole map from a whole map."""
        n, channels, height, width = q.shape
        (_, tall), (_, wide) = self.span(0, self.size(height)), self.span(0, self.size(width))
        at = self.padding
        around = self.before[:, None, None].expand(channels, tall, wide)
        given = around.permute(1, 2, 0).expand(n, tall, wide, channels).contiguous().permute(0, 3, 1, 2)
        rows, columns = min(height, tall - at), min(width, wide - at)
        given[:, :, at : at + rows, at : at + columns] = q[:, :, :rows, :columns]
        return cast(Tensor, self(given))


class Levels(nn.Module):
    """A frozen classifier: pixels in whole steps, uint8 [n, C, H, W], to float64 logits [n, K].

    Attributes:
        levels: one after the other.
        head: exact, in float64, of the largest values over all positions.
        channels: of what the first level is given; hidden pixels may be one of them.
        takes_mask: whether the last of the image's channels marks occluded pixels with 255.
        mirrored: whether logits are those of the image and of the mirrored image together.
    """

    def __init__(self, levels: Sequence[Level], head: fixed_point.Affine, *, takes_mask: bool, mirrored: bool) -> None:
        super().__init__()
        self.levels, self.head = nn.ModuleList(levels), head
        self.channels, self.takes_mask, self.mirrored = levels[0].whole.weight.shape[1], takes_mask, mirrored

    @property
    def each(self) -> list[Level]:
        """The levels."""
        return cast(list[Level], list(self.levels))

    def pixels(self, steps: Tensor, occluded: Tensor | None = None) -> Tensor:
        """What the first level is given: uint8 [n, C, H, W], channels last, spare channels 0.

        Args:
            steps: whole numbers 0 to 255 of any type, [n, C', H, W], hidden pixels already filled.
            occluded: bool [n, H, W].
        """
        n, own, height, width = steps.shape
        made = torch.zeros(n, height, width, self.channels, dtype=torch.uint8, device=steps.device)
        made[..., :own] = steps.to(torch.uint8).permute(0, 2, 3, 1)
        if self.takes_mask and occluded is not None:
            made[..., own] = occluded.to(torch.uint8) * 255
        return made.permute(0, 3, 1, 2)

    def forward(self, steps: Tensor, occluded: Tensor | None = None) -> Tensor:
        features = self.features(self.pixels(steps, occluded))
        if self.mirrored:
            features = features + self.features(self.pixels(steps.flip(3), None if occluded is None else occluded.flip(2)))
        return self.logits(features)

    def features(self, q: Tensor, since: int = 0) -> Tensor:
        """The largest value of each channel of the last map, int64 [n, O], of maps that go into level ``since``."""
        for level in self.each[since:]:
            q = level.everything(q)
        return q.amax(dim=(2, 3)).long()

    def logits(self, features: Tensor) -> Tensor:
        """float64 [n, K], of features, or of the sum of those of an image and its mirrored one."""
        with precision.exact_sums(features.device):
            return cast(Tensor, self.head(features.double()[:, :, None, None])).flatten(1)


def gelu_table(step: int, out: int, zero: int) -> Tensor:
    """GELU of pre-activations ``(p - LOWEST / 2^step) * 2^step`` in whole steps of 2^out, counted from ``zero``: int64 [256].

    From :data:`HIGHEST` on it is the identity. An entry so near to a half that another machine's erf might round it otherwise
    is refused.

    Raises:
        IntegrityError: there is such an entry.
    """
    made = []
    for p in range(256):
        x = (p - offset(step)) * 2.0**step
        inside = 0 < abs(x) < HIGHEST
        ideal = (0.5 * x * (1 + math.erf(x / math.sqrt(2))) if inside else max(x, 0.0)) * 2.0**-out + zero
        if inside and abs(ideal % 1 - 0.5) < 1e-9:
            raise IntegrityError("an activation is too close to a half to be rounded alike everywhere.", hint="Train it again.")
        made.append(min(max(round(ideal), 0), 255))
    return torch.tensor(made)


def offset(step: int) -> int:
    """The whole number that represents a pre-activation of 0."""
    return int(LOWEST * 2.0**-step)


def whole(weight: Tensor, bias: Tensor, *, scale: int, zero: Tensor, step: int) -> tuple[Whole, int]:
    """The convolution of whole numbers nearest to a real one, after which pre-activations are in steps of 2^step or coarser.

    Args:
        weight: float64 [O, C, k, k], of real inputs ``(q - zero) * 2^scale``.
        bias: float64 [O].
        scale: see ``weight``.
        zero: int64 [C].
        step: the wanted step.

    Returns: the layer, and the step that it has: coarser than wanted only where its weights are too large for that.
    """
    fine = _fine(weight)
    step = max(step, int(fine.max()) + scale)
    while True:
        down = step - scale - fine
        made = _rounded(weight, fine)
        moved = (made.sum(dim=(2, 3)) * zero.double()).sum(dim=1)
        shift = torch.round((bias * 2.0**-step + offset(step)) * fixed_point.power(down)) - moved
        tight = shift.abs() + 255 * integers.reached(made) > ROOM
        if not bool(tight.any()):
            return Whole(made, shift, down.long()), step
        if bool((down[tight] < 1).any()):
            step += 1
        fine = torch.where(tight, fine + 1, fine)


def stepped(weight: Tensor, gain: Tensor) -> Tensor:
    """Weights as whole numbers will have them, for training; their gradients are those of the weights themselves.

    Args:
        weight: [O, C, k, k].
        gain: what they are multiplied by before they are rounded, a shape that fits theirs, never 0.
    """
    real = (weight.detach() * gain).double()
    fine = _fine(real)
    made = _rounded(real, fine) * fixed_point.power(fine)[:, None, None, None]
    return weight + ((made / gain).to(weight) - weight).detach()


def _fine(weight: Tensor) -> Tensor:
    """Steps 2^fine [O] on which whole weights are nearest to these."""
    return _closer(weight, fixed_point.binary_order(weight.flatten(1).abs().amax(dim=1).clamp(min=2.0**-60) / LARGEST))


def _rounded(weight: Tensor, fine: Tensor) -> Tensor:
    """Whole weights in steps of 2^fine [O], at most LARGEST."""
    return torch.round(weight * fixed_point.power(-fine)[:, None, None, None]).clamp(-LARGEST, LARGEST)


def _closer(weight: Tensor, fine: Tensor) -> Tensor:
    """Half the steps for the channels where they are nearer to the weights though the largest ones are cut."""
    units, errors = weight * fixed_point.power(-fine)[:, None, None, None], []
    for at in (fine, fine - 1):
        off = _rounded(weight, at) * fixed_point.power(at - fine)[:, None, None, None] - units
        errors.append((off.square() * 2.0**30).round().long().flatten(1).sum(dim=1))  # whole numbers, added alike everywhere
    return torch.where(errors[1] < errors[0], fine - 1, fine)


def head(weight: Tensor, bias: Tensor, *, scale: int, zero: int, copies: int) -> fixed_point.Affine:
    """The exact linear layer [K, C] of features ``(q - zero) * 2^scale``, the mean of ``copies`` whose sum it is given."""
    like = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    real, shifted = weight * 2.0**scale / copies, bias - fixed_point.total(weight * 2.0**scale * zero)
    layer, _ = fixed_point.affine(real[:, :, None, None], shifted, like, fixed_point.ValueRange(0, 255.0 * copies), torch.float64)
    return layer


def dip(step: int) -> int:
    """How many steps of 2^step reach below the lowest value of GELU."""
    return math.ceil(DIP * 2.0**-step)


def padded(weight: Tensor, multiple: int = 4) -> Tensor:
    """Weights [O, C, k, k] with spare channels of zeros, so that pixels lie at whole words."""
    return F.pad(weight, (0, 0, 0, 0, 0, -weight.shape[1] % multiple))
