"""Frozen networks by the fastest exact way: the bits of the network itself in every backend, and of limited weights, too."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.errors import IntegrityError, MachineError, UsageError
from patchcert_cli.layers import fixed_point, integers, planes, precision, programs
from patchcert_cli.layers.fixed_point import PIXELS
from patchcert_cli.layers.integers import LARGEST, Trial
from patchcert_cli.layers.planes import Operation, lowest
from patchcert_cli.layers.programs import Program, Runner
from tests.layers.test_fixed_point import KINDS, PLANS, by_hand, pictures, reversed_sum, scorer
from tests.layers.test_planes import NEEDS_INTEGERS, has_integers, program_of

BLOCKS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "band": ((6, 16, 4), {"widths": [8, 12, 16], "blocks": [1, 2, 1], "strides": [1, 2, 2]}),
    "square": ((2, 9, 7), {"widths": [8, 8], "blocks": [2, 1], "strides": [1, 2]}),
}


def resnet(name: str, seed: int = 0, bits: int = 8) -> Any:
    shape, plan = BLOCKS[name]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        options = {**plan, "bits": bits, "mean": (0.5,) * shape[0], "std": (0.3,) * shape[0]}
        made: Any = models.build("resnet", {"input_shape": shape, "classes": 4, **options})
        for layer in made.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.3, 3.0)
                layer.weight.normal_(1, 0.3)
        made.eval()
        with fixed_point.observing(made):
            made(pictures(shape, 16, seed + 1))
    return made


@pytest.mark.parametrize("bits", [4, 8, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLANS)
def test_region_scorers_have_the_same_bits_in_every_backend(name: str, kind: str, bits: int) -> None:
    frozen = fixed_point.freeze(scorer(PLANS[name], kind, bits, seed=bits))
    steps = fixed_point.to_steps(pictures(PLANS[name].shape, 6, 2))
    program = program_of(frozen)
    wanted = by_hand(frozen, steps, reversed_sum)[-1]
    served = 0
    for backend, tested in itertools.product(program.backends(), (True, False)):
        try:
            found = program.run(steps, backend, tested=tested)
        except MachineError:
            continue
        assert found.dtype == (torch.float64 if backend == "float64" else torch.float32)
        assert torch.equal(found.double(), wanted), (backend, tested)
        served += 1
    assert served >= 2
    if bits == 8 and program.kind == torch.float32 and has_integers():
        assert served == 6


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", BLOCKS)
def test_residual_networks_have_the_same_bits_in_every_backend(name: str, seed: int) -> None:
    frozen = fixed_point.freeze(resnet(name, seed))
    steps = fixed_point.to_steps(pictures(BLOCKS[name][0], 7, 2))
    program = program_of(frozen)
    with torch.no_grad(), precision.exact_arithmetic():
        wanted = copy.deepcopy(frozen).double()(steps.double())
    for backend in program.backends():
        if backend == "int8" and not has_integers():
            continue
        assert torch.equal(program.run(steps, backend, tested=False), wanted), backend
        assert torch.equal(program.run(steps[2:3], backend), wanted[2:3]), "alone"
    assert wanted.std() > 0


@NEEDS_INTEGERS
@pytest.mark.parametrize("make", [lambda: scorer(PLANS["dilated"]), lambda: resnet("band")])
def test_every_operation_of_ordinary_networks_is_served_by_integers(make: Callable[[], Any]) -> None:
    program = program_of(fixed_point.freeze(make()))
    shapes = program._shapes(PLANS["dilated"].shape if len(program.operations) == 8 else BLOCKS["band"][0])
    for operation in program.operations:
        assert planes.in_integers(operation, shapes, tested=True) is not None


def test_other_grids_are_left_to_floats() -> None:
    for bits in (4, 10):
        program = program_of(fixed_point.freeze(scorer(PLANS["small"], bits=bits)))
        assert not any(operation.fits() is not None for operation in program.operations[:-1])
        assert [operation.highest for operation in program.operations[1:]] == [2**bits - 1] * 3
    assert program.operations[-1].fits() is None, "numbers up to 1023 do not fit a byte"
    with pytest.raises(MachineError, match="no int8 convolutions for this network"):
        program.run(torch.zeros(2, *PLANS["small"].shape), "int8", tested=False)


def test_a_runner_takes_the_fastest_exact_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scorer(PLANS["dilated"])
    steps = fixed_point.to_steps(pictures(PLANS["dilated"].shape, 60, 2))
    used: list[str] = []
    real = Program.run

    def noted(self: Program, given: Tensor, backend: str, *, tested: bool = True) -> Tensor:
        used.append(backend)
        return real(self, given, backend if has_integers() else "float32", tested=tested)

    monkeypatch.setattr(Program, "run", noted)
    for found, wanted in (
        ([Trial("int8", True, 1.0), Trial("float32", True, 2.0)], "int8"),
        ([Trial("int8", True, 2.0), Trial("float32", True, 1.0)], "float32"),
        ([Trial("int8", False, 1.0), Trial("float32", True, 2.0)], "float32"),
        ([Trial("int8", False, 1.0), Trial("float32", False, 2.0)], "float64"),
    ):
        monkeypatch.setattr(
            programs, "trials", lambda program, shape, count, found=found: [(trial, trial.backend) for trial in found]
        )
        runner = Runner(fixed_point.FrozenNetworkCache(made))
        alone = runner(steps[:1])
        assert used[-1] == "float32", "one image is not worth a trial"
        together = runner(steps)
        assert used[-1] == wanted
        assert torch.equal(alone, together[:1])
        strange = steps.clone()
        strange[0, 0, 4, 4] = float("nan")
        assert bool(runner(strange)[0].isnan().any())
        assert used[-1] == ("float32" if wanted == "int8" else wanted), "what is no picture is left to floats"
        with torch.no_grad():
            made.head.bias[0] += 1
        assert not torch.equal(runner(steps), together), "new weights, new program"


def test_trials_are_real() -> None:
    program = program_of(fixed_point.freeze(scorer(PLANS["dilated"])))
    found = {trial.backend: trial for trial, _ in programs.trials(program, PLANS["dilated"].shape)}
    assert found["float32"].exact and found["float32"].seconds > 0
    if has_integers():
        assert found["int8"].exact
    program.operations[2].terms[0].weight[0, 0, 0, 0] += 0.5 * program.operations[2].terms[0].weight.abs().max()
    program._floats.pop(torch.float64, None)  # the reference is made of the changed weight, float32 was made before
    assert not {trial.backend: trial for trial, _ in programs.trials(program, PLANS["dilated"].shape)}["float32"].exact


def test_backends_that_are_not_there_are_named() -> None:
    double, _ = scorer(PLANS["small"]).freeze(torch.float64)
    program, steps = program_of(double), fixed_point.to_steps(pictures(PLANS["small"].shape, 2, 2))
    with pytest.raises(MachineError, match="this network has no float32 form. Allowed: float64"):
        program.run(steps, "float32")
    assert Program.of(nn.Sequential(nn.ReLU())) is None
    runner = Runner(fixed_point.FrozenNetworkCache(scorer(PLANS["small"])))
    with integers.only("int8"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operation, "fits", lambda self: None)
        with pytest.raises(MachineError, match="no int8 convolutions for this network"):
            runner(steps)
    assert isinstance(copy.deepcopy(runner), Runner)


@pytest.mark.parametrize("name", PLANS)
def test_limited_weights_are_one_plane(name: str) -> None:
    free, limited = scorer(PLANS[name]), scorer(PLANS[name])
    limited.largest = LARGEST
    before, after = program_of(fixed_point.freeze(free)), program_of(fixed_point.freeze(limited))
    assert max(len(part) for operation in before.operations for part in operation.fits() or []) > 1
    for operation in after.operations:
        found = operation.fits()
        assert found is not None and [len(part) for part in found] == [1]
        whole = operation.terms[0].weight * fixed_point.power(-operation._units())[:, None, None, None]
        assert torch.equal(whole, whole.round()) and float(whole.abs().max()) <= LARGEST
    assert after.kind == torch.float32
    steps = fixed_point.to_steps(pictures(PLANS[name].shape, 6, 2))
    wanted = by_hand(fixed_point.freeze(limited), steps, reversed_sum)[-1]
    for backend in after.backends():
        if backend != "int8" or has_integers():
            assert torch.equal(after.run(steps, backend, tested=False).double(), wanted)
    scores = before.run(steps, "float64")
    assert float((wanted - scores).abs().mean() / scores.std()) < 0.1, "nearly the same network"


@pytest.mark.parametrize("beside", [0.0, 255.0])
@pytest.mark.parametrize("largest", [8, 64, 1 << 12])
def test_limits_of_weights(largest: int, beside: float) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 5, 2, 2, generator=generator).double() * fixed_point.power(torch.arange(6) - 3.0)[:, None, None, None]
    bias, like = torch.randn(6, generator=generator).double(), nn.Conv2d(5, 6, 2)
    free, bits = fixed_point.affine(weight, bias, like, PIXELS, torch.float32, beside=beside)
    same, _ = fixed_point.affine(weight, bias, like, PIXELS, torch.float32, beside=beside, largest=1 << 23)
    assert torch.equal(free.weight, same.weight) and torch.equal(free.bias, same.bias)
    made, still = fixed_point.affine(weight, bias, like, PIXELS, torch.float32, beside=beside, largest=largest)
    assert still == bits, "what the theorem leaves room for"
    unit = fixed_point.power(lowest(made.weight).flatten(1).amin(dim=1))
    whole = made.weight.double() / unit[:, None, None, None]
    assert float(whole.abs().max()) <= largest
    assert bool((whole.flatten(1).abs().amax(dim=1) >= min(largest / 4, 100)).all()), "no more bits are lost than need be"
    assert float((made.weight - weight).abs().max()) <= float(weight.abs().max()) / largest
    v = torch.randint(0, 256, (3, 5, 6, 6), generator=generator).double()
    with precision.exact_arithmetic():
        assert torch.equal(F.conv2d(v, made.weight.double(), made.bias.double()), made(v.float()).double())


@pytest.mark.parametrize("bits", [1, 3, 17])
def test_impossible_bits_of_weights_are_refused(bits: int) -> None:
    base = {"input_shape": (3, 8, 8), "classes": 3, "mean": [0.5] * 3, "std": [0.5] * 3, "widths": [4]}
    plan = {"kernels": [3], "dilations": [1], "mixes": [0]}
    with pytest.raises((UsageError, IntegrityError), match="bits are not for this network. Allowed: 4 to 16, or 0"):
        models.build("region", {**base, **plan, "weight_bits": bits})
    with pytest.raises(IntegrityError, match="weight_bits is -7, not 0 or more"):
        models.build("region", {**base, **plan, "weight_bits": -7})
    made: Any = models.build("region", {**base, **plan, "weight_bits": 7})
    assert made.largest == LARGEST
    plain: Any = models.build("region", {**base, **plan})
    assert plain.largest == 0
