"""Networks without rounding error: the same bits in every precision, batch, layout and order of summation."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.errors import IntegrityError, MachineError
from patchcert_cli.layers import fixed_point
from patchcert_cli.layers.fixed_point import PIXELS, Affine, Quantizer, ValueRange, affine, freeze, quantize_, to_steps
from patchcert_cli.layers.precision import exact_arithmetic
from patchcert_cli.models.region import RegionScorer


@dataclass(frozen=True)
class Plan:
    shape: tuple[int, int, int]
    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    mixes: tuple[int, ...]


PLANS = {
    "small": Plan((1, 9, 8), (5, 7), (3, 2), (1, 1), (0, 1)),
    "dilated": Plan((3, 12, 12), (16, 24, 24), (3, 3, 2), (1, 1, 2), (1, 1, 2)),
    "wide": Plan((3, 10, 10), (64, 96), (3, 3), (1, 1), (1, 1)),
    "plain": Plan((2, 7, 7), (33,), (5,), (1,), (0,)),
}
KINDS = ["even", "uneven", "heavy"]


def scorer(plan: Plan, kind: str = "even", bits: int = 8, seed: int = 0) -> RegionScorer:
    """Random weights and batch norm statistics: alike in size, over many orders of magnitude, or a few giants."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        channels = plan.shape[0]
        options = {"widths": plan.widths, "kernels": plan.kernels, "dilations": plan.dilations, "mixes": plan.mixes}
        options |= {"mean": (0.4, 0.5, 0.45)[:channels], "std": (0.2, 0.25, 0.3)[:channels], "bits": bits}
        made: Any = models.build("region", {"input_shape": plan.shape, "classes": 4, **options})
        for layer in made.modules():
            if isinstance(layer, nn.Conv2d):
                if kind == "uneven":
                    layer.weight.mul_(torch.exp(2.0 * torch.randn_like(layer.weight)))
                elif kind == "heavy":
                    layer.weight.add_(5 * (torch.rand_like(layer.weight) < 0.02) * torch.randn_like(layer.weight))
            elif isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.3)
                layer.running_var.uniform_(0.05, 3.0)
                layer.weight.normal_(1, 0.5)
                layer.bias.normal_(0, 0.3)
                if kind == "uneven":
                    layer.weight.mul_(10.0 ** torch.randint(-3, 2, layer.weight.shape))
        made.eval()
        with fixed_point.observing(made):
            made(pictures(plan.shape, 16, seed + 1))
    return made


def pictures(shape: tuple[int, int, int], count: int, seed: int) -> Tensor:
    """8-bit images: noise, and hard black and white."""
    x = torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(seed)).float() / 255
    x[: count // 2] = x[: count // 2].round()
    return x


@torch.no_grad()
def run(network: nn.Module, steps: Tensor) -> Tensor:
    with exact_arithmetic():
        return network(steps)


def reversed_sum(layer: Affine, v: Tensor) -> Tensor:
    """The convolution by hand: float64, one product after another, from the last input to the first."""
    size = layer.weight.shape[2:]
    columns = F.unfold(v.double(), size, layer.dilation, layer.padding, layer.stride)  # [B, C * h * w, N]
    weight = layer.weight.double().flatten(1)
    out = torch.zeros(len(v), len(weight), columns.shape[2], dtype=torch.float64)
    for at in reversed(range(weight.shape[1])):
        out += weight[:, at, None] * columns[:, None, at]
    out += layer.bias.double()[:, None]
    height = (v.shape[2] + 2 * layer.padding[0] - layer.dilation[0] * (size[0] - 1) - 1) // layer.stride[0] + 1
    return out.unflatten(2, (height, -1))


def by_hand(network: nn.Module, v: Tensor, convolve: Callable[[Affine, Tensor], Tensor]) -> list[Tensor]:
    """All activations of a frozen scorer, with another convolution."""
    found, v = [], v.double()
    for step in network.children():
        if isinstance(step, Affine):
            v = convolve(step, v)
        else:
            out = convolve(step.layer, v).relu()
            out = out + v if step.residual else out
            unit = math.ldexp(1.0, step.value_range.exponent)
            v = torch.minimum((out / unit).round() * unit, torch.tensor(step.value_range.most, dtype=torch.float64))
        found.append(v)
    return found


@pytest.mark.parametrize("bits", [4, 7, 8, 10])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLANS)
def test_frozen_networks_are_the_same_to_the_bit(name: str, kind: str, bits: int) -> None:
    plan = PLANS[name]
    frozen = freeze(scorer(plan, kind, bits, seed=bits))
    dtype = next(frozen.buffers()).dtype
    steps = to_steps(pictures(plan.shape, 6, 2)).to(dtype)
    whole = run(frozen, steps)
    others = {
        "alone": torch.cat([run(frozen, image[None]) for image in steps]),
        "pairs": torch.cat([run(frozen, pair) for pair in steps.split(2)]),
        "channels last": run(frozen, steps.contiguous(memory_format=torch.channels_last)),
        "channels first weights": run(frozen.to(memory_format=torch.contiguous_format), steps),
        "reversed": by_hand(frozen, steps, reversed_sum)[-1],
    }
    if dtype == torch.float32:
        others["float64"] = run(frozen.double(), steps.double())
    for what, other in others.items():
        assert torch.equal(whole.double(), other.double()), what


@pytest.mark.parametrize("name", PLANS)
def test_a_changed_pixel_moves_only_what_sees_it(name: str) -> None:
    plan = PLANS[name]
    made = scorer(plan, "uneven")
    frozen, reach = freeze(made), made.receptive_field
    x = pictures(plan.shape, 4, 5)
    changed = x.clone()
    changed[:, :, 4, 3] = 1 - changed[:, :, 4, 3]
    dtype = next(frozen.buffers()).dtype
    before, after = run(frozen, to_steps(x).to(dtype)), run(frozen, to_steps(changed).to(dtype))
    moved = (before != after).any(dim=1).any(dim=0)
    rows, columns = moved.shape
    inside = torch.zeros_like(moved)
    inside[max(0, 4 - reach + 1) : min(rows, 5), max(0, 3 - reach + 1) : min(columns, 4)] = True
    assert bool(moved.any())
    assert bool((inside | ~moved).all())


@pytest.mark.parametrize("bits", [4, 8, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_lie_on_their_grids(kind: str, bits: int) -> None:
    """Whole numbers of steps, at most 2^bits - 1 of them; images far from what was observed saturate."""
    plan = PLANS["small"]
    frozen = freeze(scorer(plan, kind, bits))
    seen = []
    for step in frozen.children():
        if not isinstance(step, Affine):
            step.register_forward_hook(lambda step, _, out: seen.append((step.value_range, out)))
    run(frozen, (255 * pictures(plan.shape, 40, 9).round()).to(next(frozen.buffers()).dtype))
    assert len(seen) == 3
    for value_range, out in seen:
        units = out.double() / math.ldexp(1.0, value_range.exponent)
        assert torch.equal(units, units.round())
        assert 0 <= float(units.min()) <= float(units.max()) <= 2**bits - 1
        assert value_range.most == math.ldexp(2**bits - 1, value_range.exponent)


@pytest.mark.parametrize("name", PLANS)
def test_sums_stay_within_what_is_exact(name: str) -> None:
    """The theorem's condition, with every input at its largest magnitude and the sign of its weight, as exact integers."""
    for kind in KINDS:
        for precision in (torch.float32, torch.float64):
            frozen, _ = scorer(PLANS[name], kind).freeze(precision)
            value_range = PIXELS
            for step in frozen.children():
                layer, residual = (step, False) if isinstance(step, Affine) else (step.layer, step.residual)
                assert layer.weight.dtype == precision
                for weight, bias in zip(layer.weight.flatten(1).tolist(), layer.bias.tolist(), strict=True):
                    numbers = [abs(w) for w in weight if w]
                    unit = min((math.ldexp(1.0, _lowest(w)) for w in numbers), default=1.0)
                    unit *= math.ldexp(1.0, value_range.exponent)
                    unit = min(unit, math.ldexp(1.0, _lowest(bias))) if bias else unit
                    most = int(abs(bias) / unit) + sum(
                        int(w * math.ldexp(1.0, value_range.exponent) / unit) for w in numbers
                    ) * int(math.ldexp(value_range.most, -value_range.exponent))
                    most += int(value_range.most / unit) if residual else 0
                    assert most <= 2 ** fixed_point.BITS[precision]
                value_range = value_range if isinstance(step, Affine) else step.value_range


def _lowest(value: float) -> int:
    """The exponent of the lowest bit of a float."""
    numerator, denominator = abs(value).as_integer_ratio()
    return (numerator & -numerator).bit_length() - denominator.bit_length()


@pytest.mark.parametrize("name", PLANS)
def test_the_deployed_network_is_close_to_the_trained_one(name: str) -> None:
    plan = PLANS[name]
    errors = []
    for bits in (4, 8, 12):
        made = scorer(plan, bits=bits)
        frozen, x = freeze(made), pictures(plan.shape, 16, 1)  # what the grids were fitted to
        with torch.no_grad():
            wanted = made.double()(x.double())
        found = run(frozen, to_steps(x).to(next(frozen.buffers()).dtype)).double()
        errors.append(float((found - wanted).abs().mean() / wanted.std()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.05
    assert errors[2] < 0.005


def test_dead_and_constant_channels() -> None:
    """Channels of zeros cost nothing, in float32 and in float64."""
    convolution = nn.Conv2d(2, 3, 1)
    weight = torch.tensor([[0.5, -0.25], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)[:, :, None, None]
    bias = torch.tensor([0.0, 0.0, 3.25], dtype=torch.float64)
    v = torch.tensor([10.0, 200.0]).reshape(1, 2, 1, 1)
    for value_range in (PIXELS, ValueRange(-12, 4.0)):
        for precision, least in ((torch.float32, 8), (torch.float64, 37)):
            layer, bits = affine(weight, bias, convolution, value_range, precision)
            assert bits >= least
            assert run(layer, v.to(precision)).flatten().tolist() == [-45.0, 0.0, 3.25]


def test_too_few_bits_for_float32_mean_float64() -> None:
    """A weight that drowns beside others is no weight; a bias that dwarfs its weights takes float64."""
    plan = PLANS["small"]
    made = scorer(plan)
    with torch.no_grad():
        made.head.weight[1].mul_(1e-6)
        made.head.bias[1] = 50.0
    bits = made.freeze(torch.float32)[1]
    assert bits < fixed_point.ENOUGH <= made.freeze(torch.float64)[1]
    frozen = freeze(made)
    assert {buffer.dtype for buffer in frozen.buffers()} == {torch.float64}
    steps = to_steps(pictures(plan.shape, 6, 2)).double()
    whole = run(frozen, steps)
    assert torch.equal(whole, torch.cat([run(frozen, image[None]) for image in steps]))
    assert torch.equal(whole, by_hand(frozen, steps, reversed_sum)[-1])
    assert float(whole[:, 1].std()) > 0, "the small weights were lost"
    assert fixed_point.execution_type(frozen, torch.device("cpu")) == torch.float64


def test_float32_is_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    made = scorer(PLANS["dilated"])
    assert {buffer.dtype for buffer in freeze(made).buffers()} == {torch.float32}
    assert fixed_point.execution_type(freeze(made), torch.device("cpu")) == torch.float32
    monkeypatch.setattr(fixed_point, "ENOUGH", 20)
    assert {buffer.dtype for buffer in freeze(made).buffers()} == {torch.float64}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_impossible_weights_are_refused(bad: float, where: str) -> None:
    weight, bias = torch.ones(2, 3, 1, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    (weight if where == "weight" else bias).view(-1)[1] = bad
    with pytest.raises(IntegrityError, match="weights"):
        affine(weight, bias, nn.Conv2d(3, 2, 1), PIXELS, torch.float32)


def test_a_network_with_impossible_weights_is_refused() -> None:
    made = scorer(PLANS["small"])
    with torch.no_grad():
        made.stages[1].convolution.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(IntegrityError, match="Train the network again"):
        freeze(made)


def test_putting_values_on_a_grid() -> None:
    value_range = ValueRange(-2, 3.75)  # quarters, up to 15 of them
    given = torch.tensor([0.0, 0.124, 0.125, 0.126, 0.375, 1.0, 3.7, 3.9, 1e30])
    assert quantize_(given, value_range).tolist() == [0.0, 0.0, 0.0, 0.25, 0.5, 1.0, 3.75, 3.75, 3.75]
    grid = Quantizer(4)
    grid.exponent.fill_(-2)
    assert grid.value_range == value_range
    assert torch.equal(quantize_(given.double(), grid), quantize_(given, value_range).double())
    assert torch.equal(grid(given), given), "until it is frozen it changes nothing"


def test_grids_fit_what_they_observe() -> None:
    for peak in (1e-9, 0.03, 1.0, 15 / 16, 15.0, 15.01, 1e4):
        network = nn.Sequential(Quantizer(4), nn.Identity(), Quantizer(4))
        with fixed_point.observing(network):
            network(torch.tensor([0.0, peak / 2]))
            network(torch.tensor([peak]))
            network(torch.tensor([peak / 3]))
        for grid in (network[0], network[2]):
            assert isinstance(grid, Quantizer)
            assert not grid.observing
            assert grid.value_range.most >= peak
            if peak > 1e-5:
                assert grid.value_range.most < 2.2 * peak, "steps twice as fine would do"
    with fixed_point.observing(network):
        network(torch.tensor([1.0]))
    assert network[0].value_range.most < 2.2, "an earlier peak was kept"


def test_folding_equals_convolution_and_norm() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution, norm = nn.Conv2d(3, 4, 2).double(), nn.BatchNorm2d(4).double()
        x = torch.rand(50, 3, 5, 5, dtype=torch.float64)
        norm(convolution(x))  # moves the statistics
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    norm.eval()
    weight, bias = fixed_point.fold_batchnorm(convolution, norm)
    with torch.no_grad():
        assert torch.allclose(F.conv2d(x, weight, bias), norm(convolution(x)), atol=1e-12)
        assert torch.equal(F.conv2d(x, *fixed_point.fold_batchnorm(convolution, None)), convolution(x))
    scale, shift = torch.tensor([2.0, -1.0, 0.5]).double(), torch.tensor([0.1, 0.2, -3.0]).double()
    moved = x * scale[:, None, None] + shift[:, None, None]
    assert torch.allclose(
        F.conv2d(x, *fixed_point.fold_normalization(weight, bias, scale, shift)), F.conv2d(moved, weight, bias), atol=1e-12
    )


def test_eight_bit_images_become_whole_numbers() -> None:
    whole = torch.arange(256)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_steps(whole.to(dtype) / 255), whole.to(dtype))
    assert torch.equal(to_steps((whole / 255).half().float())[-20:], whole[-20:].float())  # even from half precision


def test_reduced_precision_around_a_frozen_network_changes_nothing() -> None:
    plan = PLANS["dilated"]
    frozen = freeze(scorer(plan))
    steps = to_steps(pictures(plan.shape, 3, 2))
    whole, before = run(frozen, steps), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(run(frozen, steps), whole)
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision_settings_are_restored() -> None:
    before, inside = torch.get_float32_matmul_precision(), []
    cudnn, nnpack = torch.backends.cudnn.allow_tf32, torch._C._get_nnpack_enabled()

    def work() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic():
            inside.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            inside.append((torch.is_autocast_enabled("cpu"), torch._C._get_nnpack_enabled()))
            raise ZeroDivisionError

    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        with pytest.raises(ZeroDivisionError):
            work()
        assert inside == [("highest", False), (False, False)]
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        assert torch._C._get_nnpack_enabled() == nnpack
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


def test_more_bits_than_are_exact_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparisons above find rounding where there is some."""
    monkeypatch.setitem(fixed_point.BITS, torch.float32, 32)
    differing = 0
    for name in ("small", "plain", "dilated"):
        frozen, _ = scorer(PLANS[name]).freeze(torch.float32)
        steps = to_steps(pictures(PLANS[name].shape, 6, 2))
        one = run(frozen, steps)
        differing += not torch.equal(one.double(), run(frozen.double(), steps.double()))
    assert differing == 3


@pytest.mark.parametrize("matmul", ["highest", "medium"])
def test_what_onednn_may_compute_in_is_cleared_and_restored(matmul: str) -> None:
    """In its own process, as some of these switches cannot be mixed with others afterwards."""
    code = f"""
import torch
from patchcert_cli.layers.precision import exact_arithmetic
backends = torch.backends
def state():
    return [owner.fp32_precision for owner in (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)]
torch.set_float32_matmul_precision("{matmul}")
for change in (
    lambda: setattr(backends.mkldnn.conv, "fp32_precision", "bf16"),
    lambda: setattr(backends.mkldnn.matmul, "fp32_precision", "tf32"),
    lambda: backends.mkldnn.set_flags(_fp32_precision="bf16"),
    lambda: setattr(backends, "fp32_precision", "tf32"),
):
    change()
    before = state()
    with exact_arithmetic():
        assert state() == ["ieee"] * 3, state()
        with exact_arithmetic():
            pass
        assert state() == ["ieee"] * 3, state()
    assert state() == before, (before, state())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_fast_math_by_environment_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "BF16")
    with pytest.raises(MachineError, match=f"{name}=BF16 lets .* less than float32. Start again without it"), exact_arithmetic():
        pass
    for value in ("STRICT", "strict", ""):
        monkeypatch.setenv(name, value)
        with exact_arithmetic():
            pass
