"""Convolutions of whole numbers: every backend gives float64's bits, and a backend that does not is not used.

The reference is a sum of Python's whole numbers, written out.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli.errors import IntegrityError, MachineError
from patchcert_cli.layers import integers
from patchcert_cli.layers.integers import LARGEST, ROOM, Whole


def layer(channels: int = 5, out: int = 7, side: int = 3, seed: int = 0, largest: int = LARGEST) -> Whole:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-largest, largest + 1, (out, channels, side, side), generator=generator)
    bias = torch.randint(-5000, 90000, (out,), generator=generator)
    return Whole(weight.double(), bias.double(), torch.randint(4, 11, (out,), generator=generator))


def pixels(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return made.contiguous(memory_format=torch.channels_last)


def by_definition(one: Whole, q: Tensor) -> Tensor:
    """Position by position, in whole numbers and fractions."""
    n, channels, height, width = q.shape
    out, _, side, _ = one.weight.shape
    made = torch.zeros(n, out, height - side + 1, width - side + 1, dtype=torch.uint8)
    weight, values = one.weight.tolist(), q.tolist()
    for image in range(n):
        for o in range(out):
            for row in range(height - side + 1):
                for column in range(width - side + 1):
                    total = int(one.bias[o])
                    for c in range(channels):
                        for i in range(side):
                            for j in range(side):
                                total += weight[o][c][i][j] * values[image][c][row + i][column + j]
                    value = Fraction(total, 2 ** int(one.down[o]))
                    made[image, o, row, column] = min(max(round(value), 0), 255)  # Python rounds ties to even
    return made


@pytest.mark.parametrize("backend", integers.BACKENDS)
@pytest.mark.parametrize("side", [1, 2, 3])
def test_every_backend_is_the_definition(backend: str, side: int) -> None:
    one, q = layer(side=side), pixels(2, 5, 5, 6)
    run = integers.prepared(one, backend, tuple(q.shape))
    if run is None:
        pytest.skip("no integer convolutions in this torch")
    if backend == "int8" and not integers.agrees(one, run, tuple(q.shape)):
        pytest.skip("integer convolutions are not exact on this processor, so they are not used")
    assert torch.equal(run(q), by_definition(one, q))


def test_ties_go_to_even() -> None:
    one = Whole(torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1), torch.ones(1))  # q / 2
    q = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    expected = torch.tensor([round(Fraction(value, 2)) for value in range(256)], dtype=torch.uint8)
    for backend in integers.BACKENDS:
        with integers.only(backend):
            try:
                found = one(q.contiguous(memory_format=torch.channels_last))
            except MachineError:
                continue
        assert torch.equal(found.flatten(), expected), backend


def test_the_largest_weights_times_the_largest_values_do_not_saturate() -> None:
    for one in integers.extremes(layer(channels=64)):
        shape = (2, 64, 4, 4)
        for backend in integers.BACKENDS:
            run = integers.prepared(one, backend, shape)
            if run is not None and backend != "int8":
                assert integers.agrees(one, run, shape)
            elif run is not None:
                assert torch.equal(run(pixels(*shape)), integers.reference(one, pixels(*shape)))


@pytest.mark.parametrize(
    ("weight", "bias", "down"),
    [
        (torch.full((1, 1, 1, 1), LARGEST + 1.0), 0.0, 0),  # two products could saturate
        (torch.full((1, 1, 1, 1), 0.5), 0.0, 0),
        (torch.ones(1, 1, 1, 1), 0.5, 0),
        (torch.ones(1, 1, 1, 1), 0.0, -1),
        (torch.ones(1, 1, 1, 1), float(ROOM - 254), 0),  # |B| + 255 R is one too many
        (torch.full((1, 1100, 1, 1), float(LARGEST)), 0.0, 0),
        (torch.full((1, 1, 1, 1), torch.nan), 0.0, 0),
        (torch.ones(1, 1, 1, 1), torch.nan, 0),
    ],
)
def test_what_the_theorem_does_not_cover_is_refused(weight: Tensor, bias: float, down: int) -> None:
    with pytest.raises(IntegrityError, match="whole numbers"):
        Whole(weight, torch.tensor([bias]), torch.tensor([down]))


def test_the_last_number_that_the_theorem_covers_is_taken() -> None:
    one = Whole(torch.ones(1, 1, 1, 1), torch.tensor([float(ROOM - 255)]), torch.tensor([17]))
    assert torch.equal(one(pixels(1, 1, 3, 3)), by_definition(one, pixels(1, 1, 3, 3)))


def saturating(one: Whole, shape: tuple[int, ...]) -> integers.Run:
    """A processor that adds two products in 15 bits."""

    def run(q: Tensor) -> Tensor:
        made = integers.reference(one, q)
        return torch.where(q.double().mean() > 200, made - 1, made)

    return run


def test_a_backend_that_saturates_is_found_out_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = integers.prepared

    def prepared(one: Whole, backend: str, shape: tuple[int, ...]) -> Any:
        return saturating(one, shape) if backend == "int8" else real(one, backend, shape)

    monkeypatch.setattr(integers, "prepared", prepared)
    monkeypatch.setattr(integers, "_seconds", lambda run, shape: 0.0 if run.__qualname__.startswith("saturating") else 1.0)
    monkeypatch.setattr(integers, "_known", {})
    one, q = layer(), torch.full((2, 5, 6, 6), 255, dtype=torch.uint8)
    found = {trial.backend: trial.exact for trial, _ in integers.trials(one, (2, 5, 6, 6))}
    assert found == {"int8": False, "float32": True}
    assert torch.equal(one(q), integers.reference(one, q))
    assert integers.serving() == "float32 (integer convolutions are not exact on this processor)"


def test_a_torch_without_integer_convolutions_is_served_by_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(one: Whole, shape: tuple[int, ...]) -> integers.Run:
        raise AttributeError("no such operator")

    monkeypatch.setattr(integers, "_in_integers", missing)
    one, q = layer(), pixels(3, 5, 6, 6)
    assert torch.equal(one(q), by_definition(one, q))
    assert integers.serving() == "float32 (torch has no integer convolutions here)"
    with integers.only("int8"), pytest.raises(MachineError, match="no int8"):
        one(q)


def test_a_map_has_the_same_bits_in_any_batch() -> None:
    one, q = layer(channels=16, out=24), pixels(9, 16, 8, 8)
    together = one(q)
    for at in range(len(q)):
        assert torch.equal(one(q[at : at + 1]), together[at : at + 1])
