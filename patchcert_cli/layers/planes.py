"""Operations of frozen networks in whole numbers: in floating point, or in integers, with planes of 7-bit weights.

The values on every connection of a frozen network (:mod:`patchcert_cli.layers.fixed_point`) are whole numbers times a power of
two. An :class:`Operation` keeps the whole numbers alone and moves the powers of two into the weights, so that an activation is
put on its grid by rounding and a limit. It is computed in floating point, or with 8-bit activations and planes of 7-bit weights.

**Theorem.** Let q_i be whole numbers from 0 to 255, W_i = sum_p 128^p D_pi whole weights in planes D_p of magnitude at most 64,
and B a whole number. Write R(W) for the larger of the sum of the positive W_i and that of the negative ones without their sign.
If ``255 R(D_p) <= 2^24`` for every plane, and ``|B| + 255 R(S) <= 2^24`` for the sum S of the first planes 128^p D_p, however
many are taken, then adding up the planes one after the other in float32, B with the first, each plane computed in 32-bit
integers, gives ``B + sum W_i q_i`` exactly. Times a power of two that keeps numbers normal, it gives that power of two times
the sum.
Proof. The sum of a plane is a whole number of magnitude at most 2^24, which float32 holds; so it holds 128^p times it. After
each addition the exact value is a whole number of magnitude at most 2^24 by the second condition, so it is not rounded. The
16-bit sums of processors without VNNI do not saturate (:mod:`patchcert_cli.layers.integers`). Scaling by a power of two commutes
with all of it. QED.

A map that is added beside them, in whole numbers of r units, is one more plane with the weight r. Several convolutions that are
added up are one over the channels of all of them.

The condition is checked for the weights at hand. Where it does not hold, or where a backend is found to differ from float64 or to
be slower, floating point serves.

Shapes: n maps, C channels in, O out, H x W positions.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import fixed_point, integers
from patchcert_cli.layers.fixed_point import Affine, ValueRange
from patchcert_cli.layers.integers import LARGEST, ROOM

BASE = 128  # of planes
BYTE = 255  # the largest whole number of a map in integers
FAR = 100  # exponents of float32 that are sure to be normal


def most(value_range: ValueRange) -> int:
    """The largest whole number on a connection."""
    return round(math.ldexp(value_range.most, -value_range.exponent))


def lowest(values: Tensor) -> Tensor:
    """The exponent of the lowest bit of each number, float64; that of 0 is infinite."""
    mantissa, exponent = torch.frexp(values.double())
    whole = (mantissa * 2.0**53).long()
    return torch.where(values == 0, torch.inf, fixed_point.binary_order((whole & -whole).clamp(min=1)) + exponent - 53)


def digits(weight: Tensor) -> list[Tensor]:
    """Planes D_p of whole weights, the lowest first: float64 of the same shape, at most 64 in magnitude."""
    made = []
    while float(weight.abs().max()) > LARGEST:
        above = torch.floor((weight + LARGEST) / BASE)
        made.append(weight - BASE * above)
        weight = above
    return [*made, weight]


@dataclass(frozen=True)
class Term:
    """A convolution of a map, float64 [O, C, h, w], in steps of what it is added to.

    Attributes:
        source: the number of the map.
        layer: its stride, padding and dilation.
        weight: see above; its product with a whole number of the map.
    """

    source: int
    layer: Affine
    weight: Tensor

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation, along both axes."""
        stride, padding, dilation = (list(cast(tuple[int, int], part)) for part in _geometry(self.layer))
        return stride, padding, dilation


def _geometry(layer: Affine) -> tuple[Any, Any, Any]:
    return layer.stride, layer.padding, layer.dilation


Maps = Sequence[Tensor]
Work = Callable[[Maps], Tensor]


class Operation:
    """One map from others: convolutions and a bias, all added up, then another map, then the nearest step from 0 to ``top``.

    Attributes:
        terms: the convolutions.
        bias: float64 [O], in steps of the result.
        beside: number of a map that is added, or None.
        ratio: its step, in steps of the result.
        gated: whether sums below 0 count as 0 before that; irrelevant where nothing is added.
        highest: of the whole numbers of the maps that are read.
        top: the highest step; 0 to return the sums as they are.
    """

    def __init__(
        self,
        terms: Sequence[tuple[int, ValueRange, Affine]],
        value_range: ValueRange | None,
        beside: tuple[int, ValueRange] | None,
        gated: bool,
    ) -> None:
        out = 0 if value_range is None else value_range.exponent
        self.terms = [Term(at, layer, layer.weight.double().cpu() * 2.0 ** (given.exponent - out)) for at, given, layer in terms]
        self.bias = torch.stack([layer.bias.double().cpu() for _, _, layer in terms]).sum(dim=0) * 2.0**-out
        self.beside, self.gated = None if beside is None else beside[0], gated and beside is not None
        self.ratio = 0.0 if beside is None else 2.0 ** (beside[1].exponent - out)
        self.top = 0 if value_range is None else most(value_range)
        self.highest = max(most(given) for given in (*(given for _, given, _ in terms), *([] if beside is None else [beside[1]])))

    @property
    def sources(self) -> list[int]:
        """Numbers of the maps that are read."""
        return [*(term.source for term in self.terms), *([] if self.beside is None else [self.beside])]

    def in_floats(self, kind: torch.dtype) -> Work:
        """In floating point; maps are of that type, too.

        Raises:
            IntegrityError: the weights in these steps are not normal numbers of the type.
        """
        weights, bias = [term.weight.to(kind) for term in self.terms], self.bias.to(kind)
        for given, made in ((self.bias, bias), *zip((term.weight for term in self.terms), weights, strict=True)):
            size = given.abs()[given != 0]
            normal = not len(size) or (float(size.min()) >= 2.0**-FAR and float(size.max()) <= 2.0**FAR)
            if not (normal and torch.equal(made.double(), given)):
                raise IntegrityError("weights too far apart in size to compute with exactly.", hint="Train the network again.")
        laid = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]

        def work(maps: Maps) -> Tensor:
            made: Tensor | None = None
            for term, weight in zip(self.terms, laid, strict=True):
                more = F.conv2d(maps[term.source], weight, bias if made is None else None, *term.geometry)
                made = more if made is None else made.add_(more)
            assert made is not None
            if self.gated:
                made = made.clamp_(min=0)
            return self._settled(self._with_beside(made, maps))

        return work

    def _with_beside(self, sums: Tensor, maps: Maps) -> Tensor:
        """Sums with the map beside them, in place."""
        if self.beside is None:
            return sums
        return sums.add_(maps[self.beside].to(sums.dtype), alpha=self.ratio)

    def _settled(self, sums: Tensor) -> Tensor:
        """The nearest steps, in place."""
        return sums.round_().clamp_(0, self.top) if self.top else sums

    def fits(self) -> list[list[Tensor]] | None:
        """The planes of each term if the theorem holds for them in this order, the last of each term first, else None."""
        if self.top not in (0, BYTE) or self.highest > BYTE:
            return None
        unit = self._units()
        if float(unit.abs().max()) > FAR:
            return None
        fine = fixed_point.power(-unit)[:, None, None, None]
        planes = [digits(term.weight * fine) for term in self.terms]
        base = self.bias.abs() * fine.flatten() + BYTE * self.ratio * fine.flatten()
        added: list[Tensor] = []
        for index, term in enumerate(self.terms):
            so_far = torch.zeros_like(term.weight)
            for power, plane in enumerate(planes[index]):
                so_far = so_far + plane * float(BASE**power)
                first = torch.cat([part.flatten(1) for part in (*added, so_far)], dim=1)
                alone = bool((BYTE * integers.reached(plane) <= ROOM).all())
                if not (alone and bool((base + BYTE * integers.reached(first) <= ROOM).all())):
                    return None
            added.append(so_far)
        return planes

    def _units(self) -> Tensor:
        """The exponent of the unit that all that is added in a channel is a multiple of, float64 [O]."""
        found = [lowest(term.weight).flatten(1).amin(dim=1) for term in self.terms] + [lowest(self.bias)]
        if self.beside is not None:
            found.append(torch.full_like(self.bias, math.log2(self.ratio)))
        unit = torch.stack(found).amin(dim=0)
        return torch.where(unit.isinf(), 0.0, unit)

    def in_integers(self, shapes: Sequence[torch.Size]) -> Work | None:
        """In planes of integers for maps of these shapes, which are uint8; None where the theorem does not cover it.

        Raises:
            Exception: whatever torch raises where it has no such operator.
        """
        planes = self.fits()
        if planes is None:
            return None
        scale = fixed_point.power(self._units())
        pairs = [(term, power, plane) for term, each in zip(self.terms, planes, strict=True) for power, plane in enumerate(each)]
        parts = []
        for number, (term, power, plane) in enumerate(pairs):
            attribute = "relu" if self.gated and number == len(pairs) - 1 else "none"
            bias = self.bias if number == 0 else None
            scales = scale * float(BASE**power)
            made = integers.convolution(plane, scales, bias, term.geometry, shapes[term.source], attribute)
            parts.append((term.source, made))
        (source, first), *more = parts
        beside = self.beside
        if not more and self.top and beside is None:
            return lambda maps: first(maps[source], torch.uint8)
        if not more and self.top and beside is not None and not self.gated:
            return lambda maps: first(maps[source], torch.uint8, maps[beside].clone(), self.ratio)

        def work(maps: Maps) -> Tensor:
            sums = first(maps[source], torch.float32)
            for at, part in more:
                sums = part(maps[at], torch.float32, sums)
            sums = self._with_beside(sums, maps)
            return as_bytes(sums) if self.top else sums

        return work


def as_bytes(v: Tensor) -> Tensor:
    """``min(max(round(v), 0), 255)`` with ties to even, float32 -> uint8 of the same layout, in one pass where torch has one."""
    if not hasattr(torch, "quantize_per_tensor"):
        return v.round().clamp_(0, 255).to(torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        made = torch.quantize_per_tensor(v, 1.0, 0, torch.quint8)
    return torch.empty(0, dtype=torch.uint8).set_(made.untyped_storage(), 0, made.size(), made.stride())


def in_integers(operation: Operation, shapes: Sequence[torch.Size], *, tested: bool) -> Work | None:
    """An operation in integers; None where it has no such form, or with ``tested`` where it is not exact on this machine."""
    try:
        work = operation.in_integers(shapes)
        for other in [operation, bare(operation), *saturations(operation)] if tested and work is not None else []:
            made = other.in_integers(shapes)
            if made is not None and not agrees(other, made, shapes):
                return None
    except Exception:  # an operator that is not promised: whatever goes wrong, floating point serves
        return None
    return work


def agrees(operation: Operation, work: Work, shapes: Sequence[torch.Size]) -> bool:
    """Whether it returns float64's numbers for maps that a wrong kernel shows itself by, bit for bit."""
    reference = operation.in_floats(torch.float64)
    given: dict[int, list[Tensor]] = {}
    if operation.beside is not None:
        given[operation.beside] = integers.patterns(torch.ones(1, shapes[operation.beside][1], 1, 1), shapes[operation.beside])
    for term in operation.terms:
        given[term.source] = integers.patterns(term.weight, shapes[term.source], term.geometry[2])
    for number in range(len(next(iter(given.values())))):
        maps: list[Any] = [given[at][number] if at in given else None for at in range(len(shapes))]
        wanted = reference([None if q is None else q.double() for q in maps])  # type: ignore[misc]
        if not torch.equal(work(maps).double(), wanted):
            return False
    return True


def bare(operation: Operation) -> Operation:
    """The same without rounding at its end, which would hide small errors."""
    made = copy.copy(operation)
    made.top = 0
    return made


def saturations(operation: Operation) -> list[Operation]:
    """The same with weights of one plane that are as large as they may be."""
    made = []
    for weights in zip(*(integers.saturated(term.weight.shape) for term in operation.terms), strict=True):
        other = copy.copy(operation)
        other.bias = torch.zeros_like(operation.bias)
        small = 2.0**-17 if operation.top else 1.0
        other.terms = [
            Term(term.source, term.layer, weight.double() * small) for term, weight in zip(operation.terms, weights, strict=True)
        ]
        made.append(other)
    return made
