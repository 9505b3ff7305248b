"""Frozen networks on the CPU, by the fastest way that gives the bits of the network itself: fewer passes, or integers.

A frozen network (:mod:`patchcert_cli.layers.fixed_point`) describes in :meth:`Planned.plan` its operations in whole numbers:
operations (:class:`patchcert_cli.layers.planes.Operation`) on numbered maps. A :class:`Program` computes them in float32, in
float64, or with 8-bit activations and planes of 7-bit weights; each of these is exact, by the theorems there. A :class:`Runner`
tests and times them for the network at hand on this machine, and takes the fastest of those that are equal to float64.

Shapes: n maps, C channels in, H x W positions.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from patchcert_cli.errors import IntegrityError, MachineError
from patchcert_cli.layers import fixed_point, integers, passes, precision
from patchcert_cli.layers.fixed_point import Affine, FrozenNetworkCache, ValueRange
from patchcert_cli.layers.integers import Trial
from patchcert_cli.layers.planes import BYTE, Maps, Operation, Work, as_bytes, in_integers

TRIED = 4  # images in a trial
TIMED = 64  # at most, since what a call costs by itself weighs more on fewer
ROUNDS, PATIENCE = 3, 0.25  # how often each backend is timed, and for how many seconds at least
WORTH = 48  # maps after which it pays to find the fastest backend; the bits are the same before and after
PIECE = 1 << 22  # activations of a layer that are computed at a time, per thread: what caches hold


def at_once(activations: int, device: torch.device, limit: int) -> int:
    """How many maps with ``activations`` in their largest layer to compute at a time: at most ``limit`` activations."""
    room = PIECE * torch.get_num_threads() if device.type == "cpu" else limit
    return max(1, min(room, limit) // activations)


class Planned(Protocol):
    """A part of a frozen network that can say what it does in whole numbers."""

    def plan(self, program: Program) -> None:
        """Add its operations."""
        ...


class Program:
    """A frozen network as operations on numbered maps of whole numbers; map 0 are the pixels in whole steps.

    Attributes:
        value_ranges: of each map, what its whole numbers stand for.
        before: what is done to pixels first.
        after: what is made of the last result.
        kind: the floating-point type of the frozen network.
    """

    def __init__(self, kind: torch.dtype) -> None:
        self.kind = kind
        self.value_ranges: list[ValueRange] = [fixed_point.PIXELS]
        self.operations: list[Operation] = []
        self.before: list[nn.Module] = []
        self.after: Callable[[Tensor], Tensor] = lambda v: v
        self._floats: dict[torch.dtype, list[Work]] = {}
        self._bytes: dict[tuple[int, ...], list[Work]] = {}

    @staticmethod
    def of(network: nn.Module) -> Program | None:
        """The program of a frozen network, or None for a network that has none."""
        kind = next((layer.weight.dtype for layer in network.modules() if isinstance(layer, Affine)), torch.float32)
        made = Program(kind)
        for part in network.children():
            if isinstance(part, Affine):
                made.add((made.last, part), to=None)
            elif hasattr(part, "plan"):
                cast(Planned, part).plan(made)
            else:
                return None
        try:
            made._in_floats(kind)
        except IntegrityError:
            return None
        return made if made.operations else None

    @property
    def last(self) -> int:
        """The number of the newest map."""
        return len(self.value_ranges) - 1

    def add(self, *terms: tuple[int, Affine], to: ValueRange | None, beside: int | None = None, gated: bool = False) -> int:
        """One more operation (:class:`Operation`); returns the number of its map."""
        given = [(at, self.value_ranges[at], layer) for at, layer in terms]
        self.operations.append(Operation(given, to, None if beside is None else (beside, self.value_ranges[beside]), gated))
        self.value_ranges.append(fixed_point.PIXELS if to is None else to)
        return self.last

    def backends(self) -> tuple[str, ...]:
        """What it can be computed with: names of :data:`patchcert_cli.layers.integers.BACKENDS`."""
        return integers.BACKENDS if self.kind == torch.float32 else ("float64",)

    @torch.no_grad()
    def run(self, steps: Tensor, backend: str, *, tested: bool = True) -> Tensor:
        """What the frozen network makes of pixels in whole steps [n, C, H, W], all 0 to 255 if the backend is int8.

        Args:
            steps: see above.
            backend: one of :meth:`backends`.
            tested: whether operations that integers do not compute exactly on this machine are left to floating point.

        Raises:
            MachineError: this machine has no such backend, or it is not for this network.
        """
        for module in self.before:
            steps = module(steps)
        if backend not in self.backends():
            raise MachineError(f"this network has no {backend} form.", hint=f"Allowed: {', '.join(self.backends())}.")
        if backend == "int8":
            return self.after(self._through(steps.to(torch.uint8), self._in_bytes(tuple(steps.shape[1:]), tested)))
        kind = torch.float32 if backend == "float32" else torch.float64
        return self.after(self._through(steps.to(kind), self._in_floats(kind)))

    def _in_floats(self, kind: torch.dtype) -> list[Work]:
        if kind not in self._floats:
            self._floats[kind] = [operation.in_floats(kind) for operation in self.operations]
        return self._floats[kind]

    def _in_bytes(self, shape: tuple[int, ...], tested: bool) -> list[Work]:
        """Each operation in integers, or around floating point where they are not exact.

        Raises:
            MachineError: none of them can be computed in integers.
        """
        key = (*shape, tested)
        if key not in self._bytes and any(operation.highest > BYTE for operation in self.operations):
            self._bytes[key] = []
        if key not in self._bytes:
            shapes = self._shapes(shape)
            found = [in_integers(operation, shapes, tested=tested) for operation in self.operations]
            floats = self._in_floats(torch.float32)
            around = [_around(operation, work) for operation, work in zip(self.operations, floats, strict=True)]
            self._bytes[key] = [one or other for one, other in zip(found, around, strict=True)] if any(found) else []
        if not self._bytes[key]:
            raise MachineError("this machine has no int8 convolutions for this network.", hint="Float32 works everywhere.")
        return self._bytes[key]

    def _shapes(self, shape: tuple[int, ...]) -> list[torch.Size]:
        """Of each map, for a few images of ``shape`` [C, H, W] after :attr:`before`."""
        maps: list[Tensor] = [torch.zeros(integers.TESTED, *shape)]
        for work in self._in_floats(torch.float32):
            maps.append(work(maps))
        return [made.shape for made in maps]

    def _through(self, pixels: Tensor, works: Sequence[Work]) -> Tensor:
        """The last map, each forgotten as soon as no operation needs it."""
        maps: list[Any] = [pixels.contiguous(memory_format=torch.channels_last)]
        with precision.exact_arithmetic():
            for work, needed in zip(works, self._needed, strict=True):
                maps.append(work(maps))
                maps = [given if at in needed else None for at, given in enumerate(maps)]
        return cast(Tensor, maps[-1])

    @cached_property
    def _needed(self) -> list[set[int]]:
        """The maps that are needed after each operation."""
        sources = [operation.sources for operation in self.operations]
        return [{number + 1}.union(*sources[number + 1 :]) for number in range(len(sources))]


def _around(operation: Operation, work: Work) -> Work:
    """An operation in float32 for maps that are uint8."""

    def done(maps: Maps) -> Tensor:
        given = [made.float() if at in operation.sources else made for at, made in enumerate(maps)]
        made = work(given)
        return as_bytes(made) if operation.top else made

    return done


class Runner:
    """Computes a deployed network, on the CPU with the fastest of its exact backends; the bits are those of the network itself.

    Attributes:
        deployed: gives the frozen network.
    """

    def __init__(self, deployed: FrozenNetworkCache) -> None:
        self.deployed = deployed
        self._program: tuple[nn.Module, Program | None] | None = None
        self._chosen: dict[tuple[int, ...], str] = {}
        self._seen = 0

    def __deepcopy__(self, memory: dict[int, Any]) -> Runner:
        return Runner(copy.deepcopy(self.deployed, memory))

    def __call__(self, steps: Tensor) -> Tensor:
        """The frozen network of pixels in whole steps [n, C, H, W], of any type that holds them."""
        found = self._computed(steps)
        passes.made(len(steps))
        return found

    def _computed(self, steps: Tensor) -> Tensor:
        network = self.deployed()
        program = self.program(network) if steps.device.type == "cpu" else None
        if program is None:
            kind = fixed_point.execution_type(network, steps.device)
            with precision.exact_sums(steps.device):
                return cast(Tensor, network(steps.to(kind).contiguous(memory_format=torch.channels_last)))
        forced = integers.forced()
        if forced is not None:
            return program.run(steps, forced, tested=False)
        backend = self.backend(program, steps)
        if backend == "int8" and not bool(((steps >= 0) & (steps <= 255)).all()):  # not an image, as in a self test with NaN
            backend = "float32"
        return program.run(steps, backend)

    def program(self, network: nn.Module) -> Program | None:
        """Of the frozen network, made once."""
        if self._program is None or self._program[0] is not network:
            self._program, self._chosen = (network, Program.of(network)), {}
        return self._program[1]

    def backend(self, program: Program, steps: Tensor) -> str:
        """The fastest exact one for images like these; before there are a few of them, floating point."""
        key = tuple(steps.shape[1:])
        self._seen += len(steps)
        if key not in self._chosen and self._seen >= WORTH:
            self._chosen[key] = integers.quickest(trials(program, key, min(len(steps), TIMED))) or "float64"
        return self._chosen.get(key, program.backends()[-1 if program.kind == torch.float64 else 1])


def trials(program: Program, shape: tuple[int, ...], count: int = TRIED) -> list[tuple[Trial, str]]:
    """Test the backends of a program but the reference on a few images of ``shape`` [C, H, W], and time them on ``count``.

    They take turns, so that what else the machine does slows all of them down, for a few rounds and at least :data:`PATIENCE`.
    """
    steps = integers.patterns(torch.ones(1, shape[0], 1, 1), (TRIED, *shape))[0].float()
    wanted, same, spent = program.run(steps, "float64").double(), {}, {}
    for backend in program.backends()[:-1]:
        with contextlib.suppress(MachineError):
            same[backend] = torch.equal(program.run(steps, backend).double(), wanted)
            spent[backend] = math.inf
    steps = steps[torch.arange(count) % TRIED]
    began, rounds = time.perf_counter(), 0
    while spent and (rounds < ROUNDS or time.perf_counter() - began < PATIENCE):
        for backend in spent:
            spent[backend] = min(spent[backend], integers.seconds(partial(program.run, steps, backend), times=1))
        rounds += 1
    return [(Trial(backend, same[backend], spent[backend]), backend) for backend in spent]
