"""Planes of weights: they add up, the condition is what the theorem says, and planes that are wrong by one are caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.layers import fixed_point, integers, planes
from patchcert_cli.layers.fixed_point import PIXELS, Affine, ValueRange
from patchcert_cli.layers.integers import LARGEST, ROOM
from patchcert_cli.layers.planes import Operation, as_bytes, digits, lowest
from patchcert_cli.layers.programs import Program
from tests.layers.test_fixed_point import PLANS, scorer


def has_integers() -> bool:
    """Whether this machine has an 8-bit convolution at all."""
    layer = integers.Whole(torch.ones(8, 8, 1, 1), torch.zeros(8), torch.zeros(8))
    return integers.prepared(layer, "int8", (2, 8, 4, 4)) is not None


NEEDS_INTEGERS = pytest.mark.skipif(not has_integers(), reason="torch has no integer convolutions here")


def program_of(frozen: nn.Module) -> Program:
    made = Program.of(frozen)
    assert made is not None
    return made


@NEEDS_INTEGERS
@pytest.mark.parametrize("off", ["digit", "base", "forgotten", "bias"])
def test_a_plane_that_is_wrong_by_one_is_caught(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(fixed_point.freeze(scorer(PLANS["dilated"])))
    operation, shapes = program.operations[0], program._shapes(PLANS["dilated"].shape)
    assert planes.in_integers(operation, shapes, tested=True) is not None
    honest = Operation.fits

    def wrong(self: Operation) -> list[list[Tensor]] | None:
        found = honest(self)
        if self is operation and found is not None:
            if off == "digit":
                found[0][1][3, 1, 0, 2] += 1
            elif off == "forgotten":
                found[0].pop()
        return found

    monkeypatch.setattr(Operation, "fits", wrong)
    if off == "base":
        monkeypatch.setattr(planes, "BASE", 127)
        monkeypatch.setattr(planes, "digits", lambda weight: digits_of(weight, 128))
    if off == "bias":
        real = integers.convolution

        def shifted(weight: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> integers.Convolution:
            return real(weight, scale, None if bias is None else bias + scale, *rest)

        monkeypatch.setattr(integers, "convolution", shifted)
    assert planes.in_integers(operation, shapes, tested=True) is None, "the network would have changed"
    if off != "base":
        assert planes.in_integers(operation, shapes, tested=False) is not None, "without the test it would have served"


def digits_of(weight: Tensor, base: int) -> list[Tensor]:
    """By hand: the digits of each whole number, from -64 to 63, until the rest is small."""
    rest, made = [int(w) for w in weight.flatten()], []
    while max(abs(w) for w in rest) > LARGEST:
        low = [(w + base // 2) % base - base // 2 for w in rest]
        made.append(torch.tensor(low).reshape(weight.shape).double())
        rest = [(w - digit) // base for w, digit in zip(rest, low, strict=True)]
    return [*made, torch.tensor(rest).reshape(weight.shape).double()]


@pytest.mark.parametrize(("most", "count"), [(1, 1), (64, 1), (65, 2), (8255, 2), (8257, 3), (1 << 20, 3)])
def test_planes_add_up_to_the_weights(most: int, count: int) -> None:
    weight = torch.cat([torch.arange(-most, most + 1, max(1, most // 500)), torch.tensor([most, -most, 0])]).double()[:, None]
    made = digits(weight)
    assert len(made) == count
    assert all(float(plane.abs().max()) <= LARGEST for plane in made)
    assert torch.equal(sum(plane * 128.0**power for power, plane in enumerate(made)), weight)
    assert all(torch.equal(mine, other) for mine, other in zip(made, digits_of(weight, 128), strict=True))


def layer(weight: Tensor, bias: Tensor) -> Affine:
    return Affine(weight.float(), bias.float(), nn.Conv2d(weight.shape[1], len(weight), (weight.shape[2], weight.shape[3])))


@pytest.mark.parametrize(
    ("weight", "bias", "fits"),
    [
        ([64.0] * 1028, 0.0, True),
        ([64.0] * 1029, 0.0, False),  # the sum itself
        ([1000.0, -1000.0] * 32, 0.0, True),
        ([1000.0, -1000.0] * 32, 2.0**24 - 255 * 32000, True),
        ([1000.0, -1000.0] * 32, 2.0**24 - 255 * 32000 + 1, False),
        ([64.0, -64.0] * 1000, 2.0**24 - 255 * 64000, True),
        ([64.0] * 100 + [-192.0] * 100 + [63.0] * 40, 0.0, True),
        ([128.0 - 64, 64.0 - 128] * 1020 + [65.0], 0.0, False),  # the first plane alone: 2041 times -64 with 65 = 128 - 63
    ],
)
def test_the_condition_is_what_the_theorem_says(weight: list[float], bias: float, fits: bool) -> None:
    given = torch.tensor(weight)[None, :, None, None]
    operation = Operation([(0, PIXELS, layer(given, torch.tensor([bias])))], ValueRange(3, 255 * 8.0), None, False)
    found = operation.fits()
    unit = 2.0 ** float(operation._units()[0])
    numbers = [[int(w) for w in (plane.flatten())] for plane in digits(operation.terms[0].weight / unit)]
    whole, holds = [0] * len(weight), True
    for power, plane in enumerate(numbers):  # by hand, in Python's integers
        whole = [w + 128**power * digit for w, digit in zip(whole, plane, strict=True)]
        for part, offset in ((plane, 0), (whole, int(abs(bias) / 8 / unit))):
            reach = max(sum(w for w in part if w > 0), -sum(w for w in part if w < 0))
            holds &= offset + 255 * reach <= ROOM
    assert (found is not None) == holds
    if fits:
        assert found is not None


def test_the_lowest_bit() -> None:
    given = torch.tensor([1.0, 3.0, 6.0, -0.75, 2.0**-40, 0.0, 5 * 2.0**30, 2.0**24 - 1]).double()
    assert lowest(given).tolist() == [0.0, 0.0, 1.0, -2.0, -40.0, float("inf"), 30.0, 0.0]


@pytest.mark.parametrize("older", [False, True])
def test_bytes_are_rounded_to_even_and_limited(older: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if older:
        monkeypatch.delattr(torch, "quantize_per_tensor")
    v = torch.cat([torch.arange(-600, 1200) / 4, torch.tensor([0.49999997, 254.5, 255.5, 1e9, -1e9, 2.0**24])])
    wanted = [min(max(round(float(value)), 0), 255) for value in v]  # Python rounds to even, too
    assert as_bytes(v).tolist() == wanted
    maps = v[:1800].reshape(2, 9, 10, 10).contiguous(memory_format=torch.channels_last)
    assert as_bytes(maps).dtype == torch.uint8 and as_bytes(maps).stride() == maps.stride()
    assert torch.equal(as_bytes(maps).double(), maps.double().round().clamp(0, 255))
