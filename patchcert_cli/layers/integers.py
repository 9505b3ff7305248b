"""Convolutions of whole numbers: 8-bit activations times 7-bit weights, exact on every machine, in integers where that is faster.

A map holds whole numbers q from 0 to 255 (uint8). A layer multiplies them with whole weights W of at most :data:`LARGEST`, adds a
whole bias B and returns ``min(max(round((sum W q + B) / 2^k), 0), 255)`` with ties to even, k per output channel.

**Theorem.** If ``|B| + 255 R <= 2^24``, where R is the larger of the sum of a channel's positive weights and that of its negative
ones without their sign, then each of these computations returns that value, whatever the order of its sums: float32 and float64
with or without fused multiply-add; 32-bit integers; 16-bit integers that add two products with saturation and are then added in
32 bits (vpmaddubsw and vpmaddwd of processors without VNNI).
Proof. Every partial sum of products is a whole number of magnitude at most 2^24 (:mod:`patchcert_cli.layers.fixed_point`), so
float32, float64 and int32 hold it exactly. Two products have a sum between -2 * 255 * 64 = -32,640 and 32,640, within the 16 bits
from
-32,768 to 32,767, so nothing saturates. Dividing by 2^k is exact, so the one rounding is of an exact number, and IEEE 754 defines
it. QED.

Weights of more bits are computed in several planes of such weights: :mod:`patchcert_cli.layers.planes`.

oneDNN's integer convolution (``torch.ops.onednn``) is not a stable interface. It is looked for, compared with float64 on
random and extreme inputs for each layer and each size of map on this machine, and used where it is equal and measured faster;
else float32 serves. The bits are the same either way.

Shapes: n maps, C channels in, O out, H x W positions, k x k kernels.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import IntegrityError, MachineError
from patchcert_cli.layers.fixed_point import power
from patchcert_cli.layers.precision import exact_sums

LARGEST = 64  # of a weight: two products with 255 fit 16 bits
ROOM = 1 << 24  # whole numbers that float32 holds
TESTED = 2  # maps in a test of a backend
BACKENDS = ("int8", "float32", "float64")

Run = Callable[[Tensor], Tensor]


class Whole(nn.Module):
    """A valid convolution of whole numbers with stride 1: uint8 [n, C, H, W] -> uint8 [n, O, H - k + 1, W - k + 1].

    Attributes:
        weight: int8 [O, C, k, k], at most :data:`LARGEST` in magnitude.
        bias: float64 [O], whole.
        down: int64 [O], k of the theorem, 0 or more.
    """

    weight: Tensor
    bias: Tensor
    down: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, down: Tensor) -> None:
        """Check the theorem's conditions and keep the numbers.

        Raises:
            IntegrityError: a condition does not hold.
        """
        super().__init__()
        reach = reached(weight.double())
        whole = bool((weight == weight.round()).all()) and bool((bias == bias.round()).all())
        within = bool((bias.abs() + 255 * reach <= ROOM).all()) and float(weight.abs().max()) <= LARGEST
        if not (whole and within and bool(((down >= 0) & (down < 100)).all())):
            raise IntegrityError("weights that whole numbers cannot compute with exactly.", hint="Train the network again.")
        self.register_buffer("weight", weight.to(torch.int8))
        self.register_buffer("bias", bias.double())
        self.register_buffer("down", down.long())
        self._runs: dict[tuple[Any, ...], Run] = {}

    def forward(self, q: Tensor) -> Tensor:
        return self.run(q)(q)

    def run(self, q: Tensor) -> Run:
        """The fastest exact way on this machine for maps like ``q``, tested once for each size of map."""
        if _forced:
            return _required(self, tuple(q.shape))
        if q.device.type != "cpu":
            return lambda v: reference(self, v)
        key = (*q.shape[1:], self.weight.data_ptr(), self.weight._version if not self.weight.is_inference() else -1)
        if key not in self._runs:
            self._runs[key] = fastest(self, (TESTED, *q.shape[1:]))
        return self._runs[key]


_forced: list[str] = []


@contextlib.contextmanager
def only(backend: str) -> Iterator[None]:
    """Compute with one of :data:`BACKENDS` alone, whether it is exact here or not: for tests and comparisons."""
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def _required(layer: Whole, shape: tuple[int, ...]) -> Run:
    run = prepared(layer, _forced[-1], shape)
    if run is None:
        raise MachineError(f"this machine has no {_forced[-1]} convolutions.", hint="Float32 works everywhere.")
    return run


def reached(weight: Tensor) -> Tensor:
    """R of the theorem for each channel of weights [O, C, k, k], float64 [O]."""
    flat = weight.double().flatten(1)
    return torch.maximum(flat.clamp(min=0).sum(dim=1), -flat.clamp(max=0).sum(dim=1))


def reference(layer: Whole, q: Tensor) -> Tensor:
    """By definition, in float64."""
    return _in_floats(layer, torch.float64)(q)


def _in_floats(layer: Whole, kind: torch.dtype) -> Run:
    weight = layer.weight.to(kind).contiguous(memory_format=torch.channels_last)
    bias, scale = layer.bias.to(kind), power(-layer.down).to(kind)[:, None, None].to(layer.bias.device)

    def run(q: Tensor) -> Tensor:
        with exact_sums(q.device):
            return F.conv2d(q.to(kind), weight, bias).mul_(scale).round_().clamp_(0, 255).to(torch.uint8)

    return run


Convolution = Callable[..., Tensor]
Geometry = tuple[list[int], list[int], list[int]]
VALID: Geometry = ([1, 1], [0, 0], [1, 1])  # stride, padding and dilation


def convolution(
    weight: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry, shape: Sequence[int], attribute: str = "none"
) -> Convolution:
    """oneDNN's convolution of uint8 maps of ``shape`` [n, C, H, W] with whole weights, in one pass: ``scale * sum W q + bias``.

    Args:
        weight: whole numbers of at most :data:`LARGEST`, [O, C, h, w].
        scale: [O], powers of two.
        bias: [O], or None.
        geometry: stride, padding with zeros, and dilation.
        shape: see above; n may differ.
        attribute: ``relu`` for sums below 0 to be 0.

    Returns: a function of the maps, the type of the result (float32, or uint8 for the nearest step from 0 to 255), and maybe a
    map of that type that is added, in place, and by what it is multiplied.

    Raises:
        Exception: whatever torch raises where it has no such operator.
    """
    operators: Any = torch.ops.onednn
    scales, zero = scale.float(), torch.zeros(len(scale), dtype=torch.int64)
    offset = None if bias is None else bias.float()
    packed = operators.qconv_prepack(weight.to(torch.int8).contiguous(), scales, 1.0, 0, *geometry, 1, list(shape))
    common = (packed, scales, zero)

    def run(q: Tensor, kind: torch.dtype, beside: Tensor | None = None, ratio: float = 1.0) -> Tensor:
        made: Tensor
        if beside is None:
            made = operators.qconv2d_pointwise(q, 1.0, 0, *common, offset, *geometry, 1, 1.0, 0, kind, attribute, [], "")
        else:
            rest: tuple[Any, ...] = (ratio, 0, "sum", 1.0, attribute, [], "")
            made = operators.qconv2d_pointwise.binary(q, 1.0, 0, *common, beside, offset, *geometry, 1, 1.0, 0, kind, *rest)
        return made

    return run


def _in_integers(layer: Whole, shape: tuple[int, ...]) -> Run:
    """With bias, scale, rounding and limits in the same pass.

    Raises:
        Exception: whatever torch raises where it has no such operator.
    """
    scale = power(-layer.down)
    convolve = convolution(layer.weight, scale, layer.bias * scale, VALID, shape)
    return lambda q: convolve(q, torch.uint8)


def prepared(layer: Whole, backend: str, shape: tuple[int, ...]) -> Run | None:
    """A backend for maps of ``shape`` [n, C, H, W], or None where this torch or this machine has none."""
    if backend != "int8":
        return _in_floats(layer, torch.float32 if backend == "float32" else torch.float64)
    try:
        run = _in_integers(layer, shape)
        run(torch.zeros(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last))
    except Exception:  # an operator that is not promised: whatever goes wrong, the others serve
        return None
    return run


def probes(layer: Whole, shape: tuple[int, ...]) -> list[Tensor]:
    """Inputs that a wrong kernel shows itself by, uint8 [n, C, H, W]: random ones, and extreme ones of some channels."""
    return patterns(layer.weight, shape)


def patterns(weight: Tensor, shape: Sequence[int], dilation: Sequence[int] = (1, 1)) -> list[Tensor]:
    """:func:`probes` of weights [O, C, h, w]."""
    generator = torch.Generator().manual_seed(0)
    maps, _, height, width = shape
    made = [torch.randint(0, 256, tuple(shape), generator=generator, dtype=torch.uint8)]
    made.append(torch.full(tuple(shape), 255, dtype=torch.uint8))
    made[1][1::2, ::2] = 0  # every other channel, in every other map
    for sign in (1, -1):  # the largest and the smallest sum that a few output channels can have
        peaks = (sign * weight[torch.arange(maps) % len(weight)].sign() > 0).to(torch.uint8) * 255
        for axis, apart in zip((2, 3), dilation, strict=True):
            peaks = peaks.repeat_interleave(apart, dim=axis)
        tiles = (1, 1, -(-height // peaks.shape[2]), -(-width // peaks.shape[3]))
        made.append(peaks.repeat(tiles)[:, :, :height, :width])
    return [q.contiguous(memory_format=torch.channels_last) for q in made]


def agrees(layer: Whole, run: Run, shape: tuple[int, ...]) -> bool:
    """Whether a backend returns float64's numbers on every probe, bit for bit."""
    return all(torch.equal(run(q), reference(layer, q)) for q in probes(layer, shape))


def extremes(like: Whole) -> list[Whole]:
    """Layers of the same shape whose weights are as large as they may be: all positive, and of alternating signs."""
    bias, down = torch.full((len(like.weight),), float(ROOM // 256)), torch.full((len(like.weight),), 17)
    return [Whole(weight, bias, down) for weight in saturated(like.weight.shape)]


def saturated(shape: torch.Size) -> list[Tensor]:
    """Weights of ``shape`` [O, C, h, w] that are as large as they may be, in as many channels as the theorem leaves room for."""
    channels, made = max(1, min(shape[1], ROOM // (256 * LARGEST * shape[2] * shape[3]))), []
    sign = 1 - 2 * (torch.arange(channels) % 4 // 2)
    for pattern in (torch.ones(channels), -torch.ones(channels), sign.float(), 1.0 - 2 * (torch.arange(channels) % 2)):
        weight = torch.zeros(shape)
        weight[:, :channels] = LARGEST * pattern[:, None, None]
        made.append(weight)
    return made


@dataclass(frozen=True)
class Trial:
    """What a backend was found to be for a layer and a size of map: whether it is exact, and seconds of the test's maps."""

    backend: str
    exact: bool
    seconds: float


def trials(layer: Whole, shape: tuple[int, ...]) -> list[tuple[Trial, Run]]:
    """Test and time the backends of this machine but the reference, on maps of ``shape`` [n, C, H, W]."""
    made = []
    for backend in BACKENDS[:2]:
        run = prepared(layer, backend, shape)
        if run is None:
            continue
        same = agrees(layer, run, shape) and (backend != "int8" or _extremes_agree(layer))
        made.append((Trial(backend, same, _seconds(run, shape)), run))
    return made


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """How long something takes, the best of a few times."""
    spent = math.inf
    for _ in range(times):
        began = time.perf_counter()
        work()
        spent = min(spent, time.perf_counter() - began)
    return spent


def forced() -> str | None:
    """The backend of :func:`only`, if there is one now."""
    return _forced[-1] if _forced else None


_known: dict[tuple[int, ...], bool] = {}  # shapes of weights whose extremes were compared before


def _extremes_agree(layer: Whole) -> bool:
    key = tuple(layer.weight.shape)
    if key not in _known:
        shape = (TESTED, key[1], key[2] + 1, key[3] + 1)
        runs = [(one, prepared(one, "int8", shape)) for one in extremes(layer)]
        _known[key] = all(run is not None and agrees(one, run, shape) for one, run in runs)
    return _known[key]


def _seconds(run: Run, shape: tuple[int, ...]) -> float:
    q = torch.zeros(shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return seconds(lambda: run(q))


def fastest(layer: Whole, shape: tuple[int, ...]) -> Run:
    """The fastest exact backend for maps of ``shape``; float64 if no other is exact."""
    return quickest(trials(layer, shape)) or _in_floats(layer, torch.float64)


Kind = TypeVar("Kind")


def quickest(found: Sequence[tuple[Trial, Kind]]) -> Kind | None:
    """What belongs to the fastest exact trial, if one is exact."""
    exact = [(trial.seconds, number) for number, (trial, _) in enumerate(found) if trial.exact]
    return found[min(exact)[1]][1] if exact else None


def serving() -> str:
    """Which backend serves an ordinary layer on this machine, for ``doctor``: its name, and why not int8 where it is not."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-LARGEST // 4, LARGEST // 4 + 1, (32, 32, 3, 3), generator=generator).double()
    layer, shape = Whole(weight, torch.zeros(32), torch.full((32,), 8)), (TESTED, 32, 9, 9)
    found = {trial.backend: trial for trial, _ in trials(layer, shape)}
    if "int8" not in found:
        return "float32 (torch has no integer convolutions here)"
    if not found["int8"].exact:
        return "float32 (integer convolutions are not exact on this processor)"
    ratio = found["float32"].seconds / found["int8"].seconds
    return f"int8, exact, {ratio:.1f} times as fast as float32" if ratio > 1 else "float32 (integer convolutions are not faster)"
