"""Convolutional networks that compute without rounding error.

Votes are decided by signs and by which of two numbers is larger. If the numbers carried rounding errors, a pixel far from a
cell could flip it: fast convolutions mix neighbours, and batch sizes change the order of sums. So a network is *frozen* before
it is deployed: weights and activations become multiples of powers of two, few enough bits that no sum is ever rounded.

**Theorem.** Let every input v_i of a sum ``b + sum_i w_i v_i`` be an integer multiple of 2^e in [0, V], every w_i one of 2^a, b
one of 2^(a+e), and let ``|b| + W V <= 2^p * 2^(a+e)``. Here W is the larger of the sum of the positive w_i and that of the
negative ones without their sign, and p is the number of significant bits of the floating-point type (24 or 53). Then
floating-point evaluation in any order, with or without fused multiply-add, gives the exact value.
Proof: each product and each partial sum is an integer multiple of 2^(a+e). A partial sum lies between -|b| - W V and |b| + W V,
since its positive products sum to at most W V, and so do its negative ones. All such numbers are representable, and an operation
whose exact result is representable is not rounded (IEEE 754).

So the deployed function is the same on every device, in every batch, and a cell that sees no changed pixel does not change.

Shapes: B images, C channels, H x W positions, O output channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import IntegrityError

BITS = {torch.float32: 24, torch.float64: 53}  # integers up to 2^p are exact
FAR = {torch.float32: 100, torch.float64: 900}  # exponents of weights, up or down, that leave products normal numbers
ENOUGH = 6  # bits that a channel's largest weight needs, sign aside, for float32 to be chosen


@dataclass(frozen=True)
class ValueRange:
    """What is known of the values on a connection: multiples of ``2**exponent`` with magnitudes up to ``most``."""

    exponent: int
    most: float


PIXELS = ValueRange(0, 255.0)  # pixels in [0, 1] become whole numbers 0 to 255; see :func:`to_steps`


def to_steps(x: Tensor) -> Tensor:
    """[0, 1] -> whole numbers 0 to 255, exact for 8-bit images; the deployed network sees nothing else."""
    return (x * 255).round()


class Quantizer(nn.Module):
    """Where activations are put on a grid: steps of ``2**exponent``, at most ``2**bits - 1`` of them.

    Until the network is frozen it lets values pass unchanged; :func:`observing` records how large they become.
    The grid begins at ``-below``, and it reaches ``share`` of the largest value seen: what is beyond is cut.
    """

    exponent: Tensor
    peak: Tensor

    def __init__(self, bits: int, *, below: float = 0.0, share: float = 1.0) -> None:
        super().__init__()
        self.bits, self.below, self.share = bits, below, share
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int64))
        self.register_buffer("peak", torch.zeros(()), persistent=False)
        self.observing = False

    def forward(self, v: Tensor) -> Tensor:
        if self.observing:
            seen = v.detach().amax() if self.below else v.detach().abs().amax()
            self.peak.copy_(torch.maximum(self.peak, seen.to(self.peak)))
        return v

    def calibrate(self) -> None:
        """The finest step that reaches what was observed."""
        reached = self.below + self.share * max(float(self.peak), 2.0**-20)
        self.exponent.fill_(math.ceil(math.log2(reached / (2**self.bits - 1))))

    @property
    def value_range(self) -> ValueRange:
        """What leaves the grid."""
        step = int(self.exponent)
        return ValueRange(step, math.ldexp(2**self.bits - 1, step))


@contextlib.contextmanager
def observing(network: nn.Module) -> Iterator[None]:
    """Let every :class:`Quantizer` of a network see what passes, then fit its steps to it."""
    grids = [layer for layer in network.modules() if isinstance(layer, Quantizer)]
    for grid in grids:
        grid.peak.zero_()
        grid.observing = True
    try:
        yield
    finally:
        for grid in grids:
            grid.observing = False
    for grid in grids:
        grid.calibrate()


def fold_batchnorm(convolution: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight [O, C, h, w] and bias [O], float64 on the CPU, of a convolution followed by a frozen batch norm."""
    weight = convolution.weight.detach().double().cpu()
    bias = weight.new_zeros(len(weight)) if convolution.bias is None else convolution.bias.detach().double().cpu()
    if norm is None:
        return weight, bias
    mean, variance, gain, offset = (
        cast(Tensor, part).detach().double().cpu() for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    scale = gain / torch.sqrt(variance + norm.eps)  # these operations are rounded alike on every machine
    return weight * scale[:, None, None, None], (bias - mean) * scale + offset


def fold_normalization(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a valid convolution of ``scale * v + shift`` (each [C]) as a convolution of v."""
    moved = total((weight * shift[:, None, None]).flatten(1))
    return weight * scale[:, None, None], bias + moved


def total(terms: Tensor) -> Tensor:
    """The correctly rounded sum of each row, float64 [O, n] -> [O], which no order of the terms alters."""
    return torch.tensor([math.fsum(row) for row in terms.tolist()], dtype=torch.float64)


def power(exponents: Tensor) -> Tensor:
    """2 to the power of whole numbers, float64, exact on every machine."""
    made = [math.ldexp(1.0, int(e)) for e in exponents.flatten().tolist()]
    return torch.tensor(made, dtype=torch.float64).reshape(exponents.shape)


def binary_order(values: Tensor) -> Tensor:
    """The least whole e with ``value <= 2^e`` for each positive value, float64, exact on every machine."""
    mantissa, exponent = torch.frexp(values.double())
    return exponent.double() - (mantissa == 0.5).double()


class Affine(nn.Module):
    """An exact convolution, made by :func:`affine`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, like: nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.dilation = like.stride, like.padding, like.dilation

    def forward(self, v: Tensor) -> Tensor:
        # channels of at most 24 bits: the bias is part of the exact sum
        return F.conv2d(v, self.weight, self.bias, self.stride, self.padding, self.dilation)


def affine(
    weight: Tensor,
    bias: Tensor,
    like: nn.Conv2d,
    value_range: ValueRange,
    dtype: torch.dtype,
    *,
    beside: float = 0.0,
    largest: int = 0,
) -> tuple[Affine, int]:
    """The nearest exact convolution, each output channel with as many bits as the theorem allows.

    Args:
        weight, bias: float64 [O, C, h, w] and [O].
        like: stride, padding (zeros) and dilation.
        value_range: what comes in.
        dtype: float32 or float64.
        beside: largest magnitude of what will be added to the result before it is put on a grid.
        largest: the largest weight in steps; steps are made coarser for that, but never coarser than what is added to the
            result; 0 for as many as the theorem allows.

    Returns: the layer and the fewest bits, sign aside, that the largest weight of a channel got, or would without ``largest``.
    """
    room = math.ldexp(1.0, BITS[dtype] - 1)  # half of what is exact: quantized weights may be larger than their originals
    most = sum_bound(weight) * value_range.most + bias.abs() + beside  # [O]
    down = -binary_order(most.clamp(min=2.0**-60) / room)  # the sum in units of 2^-down stays below the room
    if beside > 0:  # what is added is in steps of the value_range, which must be whole units too
        down = down.clamp(min=-value_range.exponent)
    exponent = -(down + value_range.exponent)  # of the weights: products are multiples of 2^-down
    fine = power(exponent)
    peak = weight.abs().flatten(1).amax(dim=1)
    most_steps = (torch.round(peak / fine)).clamp(min=1)
    if largest:
        exponent = torch.maximum(exponent, binary_order(peak.clamp(min=2.0**-60) / largest))
        if beside > 0:
            exponent = exponent.clamp(max=0)
        fine, down = power(exponent), -(exponent + value_range.exponent)
    quantized = torch.round(weight / fine[:, None, None, None]) * fine[:, None, None, None]
    shifted = torch.round(bias * power(down)) * power(-down)
    spent = (sum_bound(quantized) * value_range.most + shifted.abs() + beside) * power(down)
    if not bool((spent <= 2 * room).all()) or float(exponent.abs().max()) > FAR[dtype]:
        raise IntegrityError("weights too far apart in size to compute with exactly.", hint="Train the network again.")
    useful = torch.where(weight.flatten(1).abs().sum(dim=1) > 0, torch.log2(most_steps), torch.inf)
    return Affine(quantized.to(dtype), shifted.to(dtype), like), int(min(float(useful.min()), 53.0))


def sum_bound(weight: Tensor) -> Tensor:
    """W of the theorem for each channel of weights [O, C, h, w]: how far a sum over inputs in [0, 1] can be from zero."""
    flat = weight.flatten(1)
    return torch.maximum(flat.clamp(min=0).sum(dim=1), flat.clamp(max=0).sum(dim=1).abs())


class Freezable(Protocol):
    """A network that can say what it is in whole steps."""

    def freeze(self, precision: torch.dtype) -> tuple[nn.Module, int]:
        """The exact network whose sums fit ``precision``, and the fewest bits that the largest weight of a channel got."""
        ...


def freeze(network: Freezable) -> nn.Module:
    """The deployed form of a network: in float32 if that leaves its weights bits enough, else in float64.

    Which of the two depends on the weights alone, so that the same function is deployed everywhere.
    """
    frozen, bits = network.freeze(torch.float32)
    if bits < ENOUGH:
        frozen, _ = network.freeze(torch.float64)
    return frozen.eval().to(memory_format=torch.channels_last)


def state_of(network: nn.Module) -> tuple[tuple[int, int | None], ...]:
    """What differs once weights have changed, except through ``.data``."""
    tensors = network.state_dict(keep_vars=True).values()
    return tuple((tensor.data_ptr(), None if tensor.is_inference() else tensor._version) for tensor in tensors)


class FrozenNetworkCache:
    """The frozen form of a network, made again when its weights have changed (changes through ``.data`` go unnoticed)."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.made: tuple[object, nn.Module] | None = None

    def __call__(self) -> nn.Module:
        """The network to predict and certify with, on the device of the weights."""
        state = state_of(self.network)
        if self.made is None or self.made[0] != state:
            device = next(iter(self.network.parameters())).device
            self.made = (state, freeze(cast(Freezable, self.network)).to(device))
        return self.made[1]


def execution_type(frozen: nn.Module, device: torch.device) -> torch.dtype:
    """What to compute a frozen network in: off the CPU float64, in which all sums fit."""
    weight = next(layer.weight for layer in frozen.modules() if isinstance(layer, Affine))
    if device.type != "cpu" and weight.dtype != torch.float64:
        frozen.double()
        return torch.float64
    return weight.dtype


def quantize_(v: Tensor, grid: Quantizer | ValueRange) -> Tensor:
    """Put non-negative values on a grid, in place: the nearest step (ties to even), at most the highest."""
    value_range = grid.value_range if isinstance(grid, Quantizer) else grid
    step = math.ldexp(1.0, value_range.exponent)
    return v.mul_(1 / step).round_().clamp_(max=value_range.most / step).mul_(step)
