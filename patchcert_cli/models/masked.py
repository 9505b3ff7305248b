"""Small convolutional networks that learn fast, for images with parts hidden by masks.

A stem of small kernels that begins as the whitening of the training images, stages of two 3x3 convolutions of which the second is
residual, GELU, and the largest value over all positions, so that evidence counts wherever it is left. Batch norm has no gains,
and its biases learn 64 times faster than the weights (Jordan, 94 % on CIFAR-10 in 3.29 seconds on a single GPU, 2024, whose
findings on what makes short training efficient are used here).

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import fixed_point, levels
from patchcert_cli.layers.fixed_point import Quantizer
from patchcert_cli.layers.levels import Level
from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.schema import Positive

QUICK = 8.0  # a bias is this times its parameter, which squares in the step: 64 times the learning rate
WHITE = 5e-4  # added to the variances that whitening divides by
SHARE = 0.5  # of the largest activation seen, where grids end: finer steps for the others are worth more than the few beyond
HEAD = 9.0  # the largest values over positions are large; logits are to begin small


class Norm(nn.BatchNorm2d):
    """Batch norm without gains, its bias ``QUICK`` times a parameter."""

    one: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)
        self.quick = nn.Parameter(torch.zeros(width))
        self.register_buffer("one", torch.ones(width), persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            v, self.running_mean, self.running_var, self.one, self.quick * QUICK, self.training, self.momentum or 0.1, self.eps
        )


class Gelu(nn.Module):
    """GELU, after the quantizer of what goes in, if the network is to be frozen."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.grid = Quantizer(bits, below=levels.LOWEST, share=SHARE) if bits else None

    def forward(self, v: Tensor) -> Tensor:
        return F.gelu(v if self.grid is None else self.grid(v))


class Stage(nn.Module):
    """``u = gelu(norm(pool(conv(v))))``, then ``u + gelu(norm(conv(u)))``: [B, before, h, w] -> [B, width, h // 2, w // 2]."""

    def __init__(self, before: int, width: int, bits: int = 0) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(before, width, 3, padding=1, bias=False), Norm(width)
        self.second, self.second_norm = nn.Conv2d(width, width, 3, padding=1, bias=False), Norm(width)
        self.first_gelu, self.second_gelu = Gelu(bits), Gelu(bits)
        self.grid = Quantizer(bits, below=2 * levels.DIP, share=SHARE) if bits else None

    def forward(self, v: Tensor) -> Tensor:
        u = self.first_gelu(self.first_norm(F.max_pool2d(self._convolve(v, self.first, self.first_norm), 2)))
        out = u + self.second_gelu(self.second_norm(self._convolve(u, self.second, self.second_norm)))
        return out if self.grid is None else cast(Tensor, self.grid(out))

    def _convolve(self, v: Tensor, layer: nn.Conv2d, norm: Norm) -> Tensor:
        """The convolution; while a network learns that is to be frozen, with weights rounded as they will be then."""
        if self.grid is None or not self.training:
            return cast(Tensor, layer(v))
        gain = 1 / torch.sqrt(cast(Tensor, norm.running_var) + norm.eps)
        return F.conv2d(v, levels.stepped(layer.weight, gain[:, None, None, None]), padding=1)


class MaskedNetwork(nn.Module):
    """[B, C, H, W] in [0, 1], its hidden pixels already filled, -> logits [B, K].

    Attributes:
        takes_mask: whether it also gets which pixels are occluded, bool [B, 1, H, W], as a second argument.
        mirrored: whether its logits, except in training, are the mean of those of the image and of the mirrored image.
        most: activations of its largest layer per image.
    """

    def __init__(
        self,
        normalize: Normalize,
        shape: Sequence[int],
        classes: int,
        stem: int,
        kernel: int,
        widths: Sequence[int],
        takes_mask: bool,
        mirrored: bool,
        bits: int = 0,
    ) -> None:
        super().__init__()
        self.takes_mask, self.mirrored, self.normalize, self.channels = takes_mask, mirrored, normalize, shape[0]
        self.bits = bits
        self.stem = nn.Conv2d(shape[0] + takes_mask, stem, kernel, padding=(kernel - 1) // 2)
        sides = [length + 2 * ((kernel - 1) // 2) - kernel + 1 for length in shape[1:]]
        self.most = max(
            stem * math.prod(sides), *(width * math.prod(side >> at for side in sides) for at, width in enumerate(widths))
        )
        self.stages = nn.Sequential(*(Stage(before, width, bits) for before, width in pairwise([stem, *widths])))
        self.gelu = Gelu(bits)
        self.grid = Quantizer(bits, below=levels.DIP, share=SHARE) if bits else None
        self.head = nn.Linear(widths[-1], classes)
        with torch.no_grad():
            for stage in cast(list[Stage], list(self.stages)):  # the first channels begin as copies of what comes in
                for layer in (stage.first, stage.second):
                    nn.init.dirac_(layer.weight[: layer.in_channels])

    @property
    def summary(self) -> str:
        """Kind and widths, for cards."""
        widths = [self.stem.out_channels, *(stage.first.out_channels for stage in cast(list[Stage], list(self.stages)))]
        return f"masked CNN {'-'.join(map(str, widths))}"

    def forward(self, x: Tensor, occluded: Tensor | None = None) -> Tensor:
        logits = self._logits(x, occluded)
        if not self.mirrored or self.training:
            return logits
        return (logits + self._logits(x.flip(3), None if occluded is None else occluded.flip(3))) / 2

    def _logits(self, x: Tensor, occluded: Tensor | None) -> Tensor:
        v = self.normalize(x).contiguous(memory_format=torch.channels_last)
        if self.takes_mask:
            assert occluded is not None, "this network needs to know which pixels are occluded"
            v = torch.cat([v, occluded.to(v)], dim=1)
        v = self.gelu(self.stem(v))
        v = self.stages(v if self.grid is None else self.grid(v))
        return cast(Tensor, self.head(v.amax(dim=(2, 3)) / HEAD))

    @property
    def freezable(self) -> bool:
        """Whether the network that is deployed computes in whole numbers."""
        return self.bits > 0

    def freeze(self, precision: torch.dtype) -> tuple[nn.Module, int]:
        """The deployed network (:mod:`patchcert_cli.layers.levels`); the bits of its weights do not depend on ``precision``."""
        if not self.freezable or self.grid is None:
            raise IntegrityError("this network has no grid to compute exactly on.", hint="Its network options say bits: 0.")
        weight, bias = fixed_point.fold_batchnorm(self.stem, None)
        scale, shift = self.normalize.scale.double().cpu() / 255, self.normalize.shift.double().cpu()
        around = (-shift / scale).round().clamp(0, 255)  # a normalized 0
        if self.takes_mask:  # 255 where hidden stands for 1
            scale, shift, around = (
                F.pad(one, (0, 1), value=value) for one, value in ((scale, 1 / 255), (shift, 0.0), (around, 0.0))
            )
        weight, bias = fixed_point.fold_normalization(weight, bias, scale, shift)
        out = int(self.grid.exponent)
        zero = levels.dip(out)
        weight, around = levels.padded(weight), F.pad(around, (0, -len(around) % 4))
        padding, unmoved = cast(tuple[int, int], self.stem.padding)[0], torch.zeros_like(around)
        made = [self._level(weight, bias, self.gelu, 0, unmoved, out, zero, around, padding=padding)]
        for stage in cast(list[Stage], list(self.stages)):
            before, scale_in, out = zero, out, int(cast(Quantizer, stage.grid).exponent)
            zero = levels.dip(out)
            first, second = _folded(stage.first, stage.first_norm), _folded(stage.second, stage.second_norm)
            full = torch.full((stage.first.in_channels,), float(before), dtype=torch.float64)
            made.append(self._level(*first, stage.first_gelu, scale_in, full, out, zero, full, padding=1, pool=True))
            full = torch.full((stage.second.in_channels,), float(zero), dtype=torch.float64)
            made.append(self._level(*second, stage.second_gelu, out, full, out, zero, full, padding=1, residual=True))
            zero = 2 * zero
        copies = 1 + self.mirrored
        weight, bias = (one.detach().double().cpu() for one in (self.head.weight, self.head.bias))
        last = levels.head(weight / HEAD, bias, scale=out, zero=zero, copies=copies)
        return levels.Levels(made, last, takes_mask=self.takes_mask, mirrored=self.mirrored), 53

    @staticmethod
    def _level(
        weight: Tensor,
        bias: Tensor,
        gelu: Gelu,
        scale: int,
        moved: Tensor,
        out: int,
        zero: int,
        around: Tensor,
        *,
        padding: int,
        pool: bool = False,
        residual: bool = False,
    ) -> Level:
        """A level of real weights whose inputs are whole numbers less ``moved`` [C], in steps of 2^scale."""
        whole, step = levels.whole(weight, bias, scale=scale, zero=moved, step=int(cast(Quantizer, gelu.grid).exponent))
        table = levels.gelu_table(step, out, zero)
        after = 2 * zero if residual else zero
        return Level(whole, table, before=around, zero=after, padding=padding, pool=pool, residual=residual)

    @torch.no_grad()
    def whiten(self, x: Tensor) -> None:
        """Begin with a stem that whitens the windows of these images: each direction of its pixels once, and once negated.

        With u the eigenvectors and s the eigenvalues of the windows' covariance, the kernels are u / sqrt(s), those of the
        largest s first, as many as the stem has; what is left over stays random.
        """
        size, weight = self.stem.kernel_size[0], self.stem.weight
        windows = F.unfold(self.normalize(x), size).transpose(1, 2).flatten(0, 1).double()  # [n, C k k]
        value, direction = torch.linalg.eigh(windows.T @ windows / len(windows))
        kernels = (direction / (value + WHITE).sqrt()).flip(1).T.reshape(-1, self.channels, size, size)
        count = min(len(kernels), len(weight) // 2)
        for at, sign in ((0, 1), (count, -1)):
            weight[at : at + count, : self.channels] = (sign * kernels[:count]).to(weight)
            weight[at : at + count, self.channels :] = 0


def _folded(convolution: nn.Conv2d, norm: Norm) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64 on the CPU, of a convolution and the norm after it."""
    weight, _ = fixed_point.fold_batchnorm(convolution, None)
    mean, variance = (cast(Tensor, one).detach().double().cpu() for one in (norm.running_mean, norm.running_var))
    scale = 1 / torch.sqrt(variance + norm.eps)  # these operations are rounded alike on every machine
    return weight * scale[:, None, None, None], norm.quick.detach().double().cpu() * QUICK - mean * scale


def build(
    *,
    input_shape: Sequence[int],
    classes: int,
    stem: Positive = 24,
    kernel: Positive = 2,
    widths: Sequence[Positive] = (64, 256, 256),
    takes_mask: bool = False,
    mirrored: bool = False,
    bits: int = 0,
    mean: Sequence[float],
    std: Sequence[float],
) -> Any:
    """A :class:`MaskedNetwork`: a stem of ``stem`` kernels of side ``kernel``, then a stage per entry of ``widths``.

    Every stage halves the sides of the map, so there are at most as many as the image allows. With ``takes_mask`` the network
    sees which pixels are hidden as one more channel. With ``mirrored`` it looks at each image twice, for twice the time.
    With ``bits`` (8) the network that is deployed computes in whole numbers, without rounding error; with 0 in floating point.
    """
    if bits not in (0, 8):
        raise ValueError(f"bits is {bits}; allowed: 8 for whole numbers, 0 for floating point")
    if not widths:
        raise ValueError("there are no stages; give widths one entry per stage")
    if min(input_shape[1:]) >> len(widths) < 2:
        raise ValueError(f"{len(widths)} stages are too many for images of {input_shape[1]}x{input_shape[2]}")
    network = MaskedNetwork(Normalize(mean, std), input_shape, classes, stem, kernel, widths, takes_mask, mirrored, bits)
    return network.to(memory_format=torch.channels_last)  # pooling and bfloat16 convolutions are up to three times as fast so
