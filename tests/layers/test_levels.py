"""Networks of whole numbers: near the network that was trained, exact, and the same in parts.

The reference computes every level with convolutions, pooling and tables of its own, in float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli import models
from patchcert_cli.errors import IntegrityError
from patchcert_cli.layers import fixed_point, integers, levels
from patchcert_cli.layers.levels import Level, Levels
from patchcert_cli.models.masked import HEAD, MaskedNetwork


def network(seed: int = 0, **options: Any) -> MaskedNetwork:
    """A frozen-to-be network with statistics and grids fitted to random images."""
    shape = options.pop("input_shape", (3, 16, 16))
    given = {"widths": [6, 8], "stem": 5, "bits": 8, **options}
    given |= {"input_shape": shape, "classes": 5, "mean": [0.4] * shape[0], "std": [0.25] * shape[0]}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Any = models.build("masked", given)
        x = images(shape, 64)
        occluded = (torch.rand(64, *shape[1:]) < 0.2)[:, None]
        made.train()
        for _ in range(30):
            made(x, occluded) if made.takes_mask else made(x)
        made.eval()
        with fixed_point.observing(made), torch.no_grad():
            made(x, occluded) if made.takes_mask else made(x)
    assert isinstance(made, MaskedNetwork)
    return made


def images(shape: tuple[int, int, int], count: int) -> Tensor:
    coarse = torch.rand(count, shape[0], 4, 4, generator=torch.Generator().manual_seed(1))
    fine = torch.rand(count, *shape, generator=torch.Generator().manual_seed(2))
    return ((0.8 * F.interpolate(coarse, shape[1:], mode="bilinear") + 0.2 * fine) * 255).round() / 255


def slowly(frozen: Levels, steps: Tensor, occluded: Tensor | None = None) -> Tensor:
    """Logits by the definition of every level, float64, with operations of its own."""
    if frozen.mirrored:
        other = None if occluded is None else occluded.flip(2)
        return frozen.logits(_features(frozen, steps, occluded) + _features(frozen, steps.flip(3), other))
    return frozen.logits(_features(frozen, steps, occluded))


def _features(frozen: Levels, steps: Tensor, occluded: Tensor | None) -> Tensor:
    q = steps.double()
    if frozen.takes_mask:
        assert occluded is not None
        q = torch.cat([q, occluded[:, None].double() * 255], dim=1)
    q = F.pad(q, (0, 0, 0, 0, 0, frozen.channels - q.shape[1]))
    for level in frozen.each:
        whole, at = level.whole, level.padding
        around = level.before.double()[None, :, None, None]
        padded = F.pad(q - around, (at, at, at, at)) + around
        value = (F.conv2d(padded, whole.weight.double()) + whole.bias[:, None, None]) / 2.0 ** whole.down.double()[:, None, None]
        if level.pool:
            value = F.max_pool2d(value, 2)  # before rounding, which keeps the order
        made = level.table.double()[value.round().clamp(0, 255).long()]
        q = (made + q).clamp(max=255) if level.residual else made
    return q.flatten(2).amax(dim=2).long()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"takes_mask": True},
    {"mirrored": True},
    {"kernel": 3},
    {"kernel": 1, "widths": [4]},
    {"input_shape": (1, 15, 13), "widths": [4, 4], "takes_mask": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_frozen_network_is_what_its_levels_say(options: dict[str, Any]) -> None:
    made = network(**options)
    frozen: Any = fixed_point.freeze(made)
    shape = options.get("input_shape", (3, 16, 16))
    x = images(shape, 6)
    occluded = torch.rand(6, *shape[1:], generator=torch.Generator().manual_seed(3)) < 0.3
    steps = fixed_point.to_steps(x)
    found, expected = frozen(steps, occluded), slowly(frozen, steps, occluded)
    assert found.dtype == torch.float64 and torch.equal(found, expected)
    for backend in ("float32", "float64"):
        with integers.only(backend):
            assert torch.equal(frozen(steps, occluded), expected)
    assert torch.equal(frozen(steps[2:3], occluded[2:3]), expected[2:3])


@pytest.mark.parametrize("options", OPTIONS)
def test_a_frozen_network_is_near_the_trained_one(options: dict[str, Any]) -> None:
    """With grids that reach every value seen, what is left is rounding to steps."""
    made = network(**options)
    shape = options.get("input_shape", (3, 16, 16))
    x, occluded = images(shape, 64), torch.zeros(64, *shape[1:], dtype=torch.bool)
    for layer in made.modules():
        if isinstance(layer, fixed_point.Quantizer):
            layer.share = 1.05
    with fixed_point.observing(made), torch.no_grad():
        right = made(x, occluded[:, None]) if made.takes_mask else made(x)
    frozen: Any = fixed_point.freeze(made)
    found = frozen(fixed_point.to_steps(x), occluded)
    assert float((found - right).norm() / (right - right.mean(dim=0)).norm()) < 0.2


def test_any_part_of_a_map_is_that_part_of_the_whole() -> None:
    frozen: Any = fixed_point.freeze(network())
    q = frozen.pixels(fixed_point.to_steps(images((3, 16, 16), 3)))
    generator = torch.Generator().manual_seed(4)
    checked = 0
    for level in frozen.each:
        whole = level.everything(q)
        for _ in range(6):
            height, width = (int(torch.randint(1, side + 1, (), generator=generator)) for side in whole.shape[2:])
            row = int(torch.randint(whole.shape[2] - height + 1, (), generator=generator))
            column = int(torch.randint(whole.shape[3] - width + 1, (), generator=generator))
            (top, tall), (left, wide) = level.span(row, height), level.span(column, width)
            around = level.before[None, :, None, None].expand(len(q), -1, q.shape[2] + 8, q.shape[3] + 8).clone()
            around[:, :, 4:-4, 4:-4] = q
            part = around[:, :, top + 4 : top + 4 + tall, left + 4 : left + 4 + wide]
            found = level(part.contiguous(memory_format=torch.channels_last))
            assert torch.equal(found, whole[:, :, row : row + height, column : column + width])
            checked += 1
        q = whole
    assert checked == 6 * 5


@pytest.mark.parametrize("step", [-2, -4, -5])
@pytest.mark.parametrize("out", [-3, -5, -7])
def test_tables_are_gelu(step: int, out: int) -> None:
    zero = levels.dip(out)
    table = levels.gelu_table(step, out, zero)
    p = (torch.arange(256).double() - levels.offset(step)) * 2.0**step
    ideal = (F.gelu(p) * 2.0**-out + zero).clamp(0, 255)
    assert float((table - ideal).abs().max()) <= 0.5 + 1e-4
    assert int(table[levels.offset(step)]) == zero and int(table.min()) >= 0
    assert zero >= 0.17 * 2.0**-out > zero - 1


def test_whole_weights_are_the_nearest_that_the_theorem_allows() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, 3, 3, generator=generator, dtype=torch.float64) * 10.0 ** torch.arange(-4, 5)[:, None, None, None]
    weight[4] = 0  # a channel that is constant
    bias, zero = torch.randn(9, generator=generator, dtype=torch.float64), torch.tensor([3, 0, 7, 1])
    made, step = levels.whole(weight, bias, scale=-5, zero=zero, step=-4)
    assert step >= -4
    fine = (step + 5 - made.down).double()  # the exponent of each channel's weights
    back = made.weight.double() * torch.exp2(fine)[:, None, None, None]
    assert float(((back - weight).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1).clamp(min=1e-9)).max()) < 0.03
    q = torch.randint(0, 256, (2, 4, 5, 5), generator=generator)
    real = F.conv2d((q - zero[:, None, None]).double() * 2.0**-5, back) + bias[:, None, None]
    expected = (real * 2.0**-step + levels.offset(step)).clamp(0, 255)
    assert float((made(q.to(torch.uint8)).double() - expected).abs().max()) <= 1.0


def test_a_step_becomes_coarser_where_weights_are_too_large() -> None:
    made, step = levels.whole(
        torch.full((1, 1, 1, 1), 1e6).double(), torch.zeros(1).double(), scale=0, zero=torch.zeros(1), step=-4
    )
    assert step > -4 and int(made.down.min()) >= 0


def test_the_residual_sum_stops_at_255() -> None:
    one = integers.Whole(torch.zeros(1, 1, 3, 3), torch.tensor([200.0]), torch.zeros(1))
    table = torch.arange(256)
    level = Level(one, table, before=torch.zeros(1), zero=0, padding=1, pool=False, residual=True)
    q = torch.tensor([0, 54, 55, 56, 255], dtype=torch.uint8).reshape(1, 1, 1, 5).expand(1, 1, 3, 5).contiguous()
    assert level.everything(q)[0, 0, 0].tolist() == [200, 254, 255, 255, 255]


def test_the_head_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*size, generator=generator, dtype=torch.float64) / HEAD for size in ((5, 8), (5,)))
    layer = levels.head(weight, bias, scale=-4, zero=6, copies=2)
    features = torch.randint(0, 511, (7, 8), generator=generator)
    expected = (features.double() / 2 - 6) * 2.0**-4 @ weight.T + bias
    found = layer(features.double()[:, :, None, None]).flatten(1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    order = torch.randperm(8, generator=generator)
    shuffled = sum(layer.weight[:, at, 0, 0] * features[:, at : at + 1] for at in order.tolist()) + layer.bias
    assert torch.equal(shuffled, found)


def test_bits_are_eight_or_none() -> None:
    with pytest.raises(IntegrityError, match="bits is 4"):
        network(bits=4)
    made = network(bits=0)
    assert not made.freezable
    with pytest.raises(IntegrityError, match="no grid"):
        fixed_point.freeze(made)


def test_powers_and_orders_are_exact() -> None:
    exponents = torch.tensor([-70.0, -1, 0, 1, 52])
    assert fixed_point.power(exponents).tolist() == [math.ldexp(1.0, e) for e in (-70, -1, 0, 1, 52)]
    assert fixed_point.binary_order(torch.tensor([0.5, 0.75, 1.0, 1.0000001, 64.0, 65.0])).tolist() == [-1, 0, 0, 1, 6, 7]
    terms = torch.tensor([[1e16, 1.0, -1e16], [1.0, 1e16, -1e16]], dtype=torch.float64)
    assert fixed_point.total(terms).tolist() == [1.0, 1.0]
