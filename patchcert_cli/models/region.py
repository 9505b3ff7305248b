"""Region scorers (Metzen & Yatsura, Efficient Certified Defenses Against Patch Attacks, ICLR 2021): one score per class and cell.

Valid convolutions without pooling, and residual 1x1 convolutions between them, so that a cell sees a square of exactly
``receptive_field`` pixels and there is one cell for every place of that square in the image, or with a ``stride`` for every
``stride``-th place along both axes: the same scores as without, at a fraction of the cost.

Shapes: B images, C channels, H x W pixels, K classes, N x M cells, N = (H - receptive_field) // stride + 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import UsageError
from patchcert_cli.layers import fixed_point
from patchcert_cli.layers.fixed_point import Quantizer
from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.models._region_layers import Framed, Placed, WholeStep, coordinates
from patchcert_cli.models._stages import stages
from patchcert_cli.schema import Bits, Count, Positive

LEAST_BITS, MOST_BITS = 4, 16  # of limited weights; with 7 one plane of integers holds them (:mod:`patchcert_cli.layers.planes`)
SHORTHANDS = {"rf": "kernels"}  # options that are not of `build`, and what follows from them
LARGEST_FIELD = 1 << 12  # pixels; more than the side of any image here
WHITE = 1e-2  # added to the variances that whitening divides by; normalized pixels have a variance of 1


def normed(norm: nn.BatchNorm2d, v: Tensor) -> Tensor:
    """Batch norm of maps [B, C, N, M] or of single cells [n, C]."""
    if v.ndim == 4:
        return cast(Tensor, norm(v))
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return F.batch_norm(
        v, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum or 0.1, norm.eps
    )


class Mix(nn.Module):
    """``v + relu(norm(conv1x1(v)))``."""

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.convolution, self.norm, self.grid = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), Quantizer(bits)

    def forward(self, v: Tensor) -> Tensor:
        weight = self.convolution.weight
        mixed = F.conv2d(v, weight) if v.ndim == 4 else F.linear(v, weight.flatten(1))
        return cast(Tensor, self.grid(v + F.relu(normed(self.norm, mixed))))


class Stage(nn.Module):
    """A valid convolution with norm and ReLU, then ``mixes`` of :class:`Mix`.

    Attributes:
        whitening: [I, I] with I = C k k, what is done to a window before the weights meet it; None for nothing.
    """

    whitening: Tensor | None

    def __init__(
        self, before: int, width: int, kernel: int, stride: int, dilation: int, mixes: int, bits: int, whiten: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("whitening", torch.eye(before * kernel**2) if whiten else None)
        self.convolution = nn.Conv2d(before, width, kernel, stride, dilation=dilation, bias=False)
        self.norm, self.grid = nn.BatchNorm2d(width), Quantizer(bits)
        self.mixes = nn.Sequential(*(Mix(width, bits) for _ in range(mixes)))

    @property
    def weight(self) -> Tensor:
        """Of the convolution, [O, C, k, k], whitening included."""
        weight = self.convolution.weight
        return weight if self.whitening is None else (weight.flatten(1) @ self.whitening).reshape(weight.shape)

    def forward(self, v: Tensor, stride: int, dilation: int) -> Tensor:
        return self.after(F.conv2d(v, self.weight, None, stride, 0, dilation))

    def after(self, v: Tensor) -> Tensor:
        """All that follows the convolution, of maps [B, O, N, M] or of single cells [n, O]."""
        return cast(Tensor, self.mixes(self.grid(F.relu(normed(self.norm, v)))))


class RegionScorer(nn.Module):
    """[B, C, H, W] in [0, 1] -> scores [B, K, N, M]; a cell votes for a class where its score is positive.

    Attributes:
        mirrored: whether scores, except in training, are the mean of those of the image and of the mirrored one, put back.
            Mirroring moves a cell's window onto that of the cell on the other side, so it depends on its own window alone.
    """

    places: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        plan: Sequence[tuple[int, int, int, int]],
        normalize: Normalize,
        bits: int,
        *,
        places: bool = False,
        stride: int = 1,
        whiten: bool = False,
        weight_bits: int = 0,
        mirrored: bool = False,
        padding: int = 0,
    ) -> None:
        super().__init__()
        if weight_bits and not LEAST_BITS <= weight_bits <= MOST_BITS:
            raise UsageError(
                f"weights of {weight_bits} bits are not for this network.", hint=f"Allowed: {LEAST_BITS} to {MOST_BITS}, or 0."
            )
        self.largest = 1 << (weight_bits - 1) if weight_bits else 0
        self.normalize, self.padding = normalize, padding
        self.dilations = [dilation for _, _, dilation, _ in plan]
        self.receptive_field = 1 + sum((kernel - 1) * dilation for _, kernel, dilation, _ in plan)
        if self.receptive_field > min(shape[1:]):
            raise UsageError(
                f"a receptive field of {self.receptive_field} is larger than the {shape[1]}x{shape[2]} image.",
                hint=f"Allowed: up to {min(shape[1:])}.",
            )
        if padding >= self.receptive_field:
            raise UsageError(
                f"padding {padding} leaves cells that see no pixel of the image.",
                hint=f"Allowed: 0 to {self.receptive_field - 1}; {self.receptive_field // 2} gives a cell for each pixel.",
            )
        height, width = (side + 2 * padding for side in shape[1:])
        self.register_buffer("places", coordinates(height, width) if places else None, persistent=False)
        if mirrored and (places or (width - self.receptive_field) % stride):
            why = "cells that know where they are" if places else "a stride that leaves columns at the edge"
            raise UsageError(f"mirrored does not go with {why}.", hint="Leave one of them out.")
        self.stride, self.mirrored = stride, mirrored
        widths = [shape[0] + (2 if places else 0), *(width for width, *_ in plan)]
        self.stages = nn.ModuleList(
            Stage(before, after, kernel, step, apart, mixes, bits, whiten and at == 0)
            for at, ((before, after), (_, kernel, _, mixes), (step, apart)) in enumerate(
                zip(pairwise(widths), plan, self._steps(1), strict=True)
            )
        )
        self.one_window = self.receptive_field == plan[0][1] and plan[0][2] == 1  # all but the first convolution are 1x1
        self.head = nn.Conv2d(widths[-1], classes, 1)
        framed = height * width / (shape[1] * shape[2])
        self.widest = math.ceil(max(self._per_pixel(widths, classes)) * framed)

    def _steps(self, every: int) -> list[tuple[int, int]]:
        """Stride and dilation of each stage's convolution, if only every ``stride``-th cell along both axes is wanted."""
        steps, spacing = [], 1
        for at, dilation in enumerate(self.dilations):
            apart = math.gcd(every * self.stride, *self.dilations[at + 1 :])  # later layers look at multiples of this alone
            steps.append((apart // spacing, dilation // spacing))
            spacing = apart
        return steps

    def _per_pixel(self, widths: Sequence[int], classes: int) -> list[int]:
        """How many numbers each layer holds, per pixel of the image."""
        counts, apart = [widths[0]], 1
        for width, (step, _) in zip(widths[1:], self._steps(1), strict=True):
            apart *= step
            counts.append(-(-width // apart**2))
        return [*counts, -(-classes // apart**2)]

    def cells(self, length: int) -> int:
        """How many cells there are along an axis of ``length`` pixels."""
        return (length + 2 * self.padding - self.receptive_field) // self.stride + 1

    @property
    def summary(self) -> str:
        """Kind and widths, for cards."""
        widths = "-".join(str(cast(Stage, stage).norm.num_features) for stage in self.stages)
        more = {"stride": self.stride if self.stride > 1 else 0, "padding": self.padding}
        return f"region scorer {widths}, receptive field {self.receptive_field}" + "".join(
            f", {name} {number}" for name, number in more.items() if number
        )

    def forward(self, x: Tensor, every: int = 1) -> Tensor:
        """Scores of all cells, or only of each ``every``-th along both axes, at a fraction of the cost."""
        return self.score(self.prepare(x), every)

    def prepare(self, x: Tensor) -> Tensor:
        """What the first convolution sees, pixel by pixel, [B, C, H + 2 P, W + 2 P]: normalized, with ``places`` coordinates from
        -1 to 1, and around the image the colour that the normalization makes 0, up to rounding to whole steps."""
        v: Tensor = F.pad(self.normalize(x), (self.padding,) * 4)
        return v if self.places is None else torch.cat([v, (self.places / 127.5 - 1).to(v).expand(len(v), -1, -1, -1)], dim=1)

    def score(self, v: Tensor, every: int = 1) -> Tensor:
        """Scores of the cells of a prepared image, or of any part of one that begins with a cell's first pixel and ends with a
        cell's last one."""
        if not self.mirrored or self.training or every > 1:
            return self._score(v, every)
        return (self._score(v) + self._score(v.flip(3)).flip(3)) / 2

    def _score(self, v: Tensor, every: int = 1) -> Tensor:
        if self.one_window and every * self.stride > self.receptive_field // 2:
            return self._cells(v, every * self.stride)
        for stage, (step, apart) in zip(self.stages, self._steps(every), strict=True):
            v = stage(v, step, apart)
        return cast(Tensor, self.head(v))

    def _cells(self, v: Tensor, step: int) -> Tensor:
        """The same where few cells are wanted and each sees one window: matrix products alone, [B, C, H, W] -> [B, K, N, M]."""
        side = self.receptive_field
        windows = v.unfold(2, side, step).unfold(3, side, step).permute(0, 2, 3, 1, 4, 5)  # [B, N, M, C, k, k]
        first, *later = cast(list[Stage], list(self.stages))
        cells = first.after(F.linear(windows.flatten(3).flatten(0, 2), first.weight.flatten(1)))
        for stage in later:
            cells = stage.after(F.linear(cells, stage.weight.flatten(1)))
        scores = F.linear(cells, self.head.weight.flatten(1), self.head.bias)
        return scores.reshape(*windows.shape[:3], -1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def whiten(self, x: Tensor, *, keep: bool = False) -> None:
        """Fit the whitening of the first convolution, if it has one, to windows of images [B, C, H, W].

        With U the eigenvectors and s the eigenvalues of the windows' covariance it is ``diag(1 / sqrt(s + WHITE)) U^T``. With
        ``keep`` the weights that meet the whitened windows are those of the same function as before.
        """
        stage = cast(Stage, self.stages[0])
        if stage.whitening is None:
            return
        side, apart = stage.convolution.kernel_size[0], stage.convolution.dilation[0]
        windows = F.unfold(self.prepare(x), side, dilation=apart).transpose(1, 2).flatten(0, 1).double()  # [n, C k k]
        windows = windows - windows.mean(dim=0)
        value, direction = torch.linalg.eigh(windows.T @ windows / len(windows))
        deviation = (value.clamp(min=0) + WHITE).sqrt()
        if keep:
            weight = stage.weight.flatten(1).double() @ (direction * deviation)  # times the inverse of the new whitening
            stage.convolution.weight.copy_(weight.reshape(stage.convolution.weight.shape))
        stage.whitening.copy_((direction / deviation).T)

    @torch.no_grad()
    def fuse(self) -> None:
        """Multiply the whitening into the weights, so that every machine freezes the same network."""
        stage = cast(Stage, self.stages[0])
        if stage.whitening is not None:
            stage.convolution.weight.copy_(stage.weight)
            stage.whitening.copy_(torch.eye(len(stage.whitening)))

    def freeze(self, precision: torch.dtype) -> tuple[nn.Module, int]:
        """The deployed network of whole steps (:mod:`patchcert_cli.layers.fixed_point`), and the fewest bits of a channel's
        largest weight."""
        layers: list[nn.Module] = []
        fewest, value_range = 53, fixed_point.PIXELS
        scale, shift = self.normalize.scale.double().cpu() / 255, self.normalize.shift.double().cpu()
        if self.padding:
            layers.append(Framed(-shift / scale, self.padding))
        if self.places is not None:
            layers.append(Placed(self.places))
            scale, shift = torch.cat([scale, scale.new_full((2,), 1 / 127.5)]), torch.cat([shift, shift.new_full((2,), -1.0)])
        for at, stage in enumerate(cast(list[Stage], list(self.stages))):
            weight, bias = fixed_point.fold_batchnorm(stage.convolution, stage.norm)
            if stage.whitening is not None:
                weight = (weight.flatten(1) @ stage.whitening.double().cpu()).reshape(weight.shape)
            weight, bias = fixed_point.fold_normalization(weight, bias, scale, shift) if at == 0 else (weight, bias)
            layer, bits = fixed_point.affine(weight, bias, stage.convolution, value_range, precision, largest=self.largest)
            fewest, value_range = min(fewest, bits), stage.grid.value_range
            layers.append(WholeStep(layer, value_range, residual=False))
            for mix in cast(list[Mix], list(stage.mixes)):
                layer, bits = fixed_point.affine(
                    *fixed_point.fold_batchnorm(mix.convolution, mix.norm),
                    mix.convolution,
                    value_range,
                    precision,
                    beside=value_range.most,
                    largest=self.largest,
                )
                fewest, value_range = min(fewest, bits), mix.grid.value_range
                layers.append(WholeStep(layer, value_range, residual=True))
        layer, bits = fixed_point.affine(
            *fixed_point.fold_batchnorm(self.head, None), self.head, value_range, precision, largest=self.largest
        )
        return nn.Sequential(*layers, layer), min(fewest, bits)


def expanded(every: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with ``rf``, a receptive field in pixels, replaced by the most even kernels that give it.

    Kernels grow in turn, the first ones first, while the field that they give is not larger than ``rf``.

    Args:
        every: all options, defaults included; widths and dilations are taken from here.
        options: those that were given; ``kernels`` among them must give the same field.

    Raises:
        UsageError: no kernels give this field, or those that were given give another one.
    """
    field, dilations = options["rf"], list(every["dilations"])
    if type(field) is not int or not 1 <= field <= LARGEST_FIELD:
        raise UsageError(f"rf is {field!r}.", hint=f"Give a whole number of pixels from 1 to {LARGEST_FIELD}.")
    others = {name: value for name, value in options.items() if name != "rf"}
    numbers = [*dilations, *options.get("kernels", ())]
    if not all(type(number) is int and number >= 1 for number in numbers):  # which the types of the options refuse
        return others
    if "kernels" in options:
        given = list(options["kernels"])
        actual = 1 + sum((kernel - 1) * dilation for kernel, dilation in zip(given, dilations, strict=False))
        if actual != field:
            raise UsageError(f"rf is {field}, but the kernels {given} see {actual} pixels.", hint="Leave one of them out.")
        return others
    kernels, left = [1] * len(dilations), field - 1
    while left:
        fitting = [stage for stage, dilation in enumerate(dilations) if dilation <= left]
        if not fitting:
            raise UsageError(f"no kernels give rf {field} with the dilations {dilations}.", hint="Give kernels and dilations.")
        smallest = min(fitting, key=lambda stage: kernels[stage])
        kernels[smallest] += 1
        left -= dilations[smallest]
    return {**others, "kernels": kernels}


def build(
    *,
    input_shape: Sequence[int],
    classes: int,
    widths: Sequence[Positive] = (64, 128, 256),
    kernels: Sequence[Positive] = (3, 3, 2),
    dilations: Sequence[Positive] = (1, 1, 2),
    mixes: Sequence[Count] = (1, 1, 2),
    places: bool = False,
    stride: Positive = 1,
    whiten: bool = False,
    bits: Bits = 8,
    weight_bits: Count = 0,
    mirrored: bool = False,
    padding: Count = 0,
    mean: Sequence[float],
    std: Sequence[float],
) -> Any:
    """A :class:`RegionScorer`; each stage has a width, a kernel, a dilation and a number of residual 1x1 convolutions.

    The receptive field is ``1 + sum((kernel - 1) * dilation)``. With ``places`` a cell knows where it is, which no attacker can
    change: good where objects are centred. ``stride`` is how far cells are apart, in pixels; the earlier layers are computed as
    sparsely as the dilations of the later ones allow. With ``whiten`` the first convolution sees whitened windows while it is
    trained. Activations of the deployed network have ``bits`` bits, and its weights as many as exact sums allow, or at most
    ``weight_bits``, sign included, if that is not 0: 7 is about twice as fast where integers are faster than floating point.
    With ``mirrored`` the deployed network looks at each image twice, for twice the time. ``padding`` is the width of a constant
    frame around the image; half the receptive field gives one cell for each pixel.
    """
    plan = cast(list[tuple[int, int, int, int]], stages(widths=widths, kernels=kernels, dilations=dilations, mixes=mixes))
    return RegionScorer(
        input_shape,
        classes,
        plan,
        Normalize(mean, std),
        bits,
        places=places,
        stride=stride,
        whiten=whiten,
        weight_bits=weight_bits,
        mirrored=mirrored,
        padding=padding,
    )
