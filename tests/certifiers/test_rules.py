"""One layer at a time, compared with dense sampling of the box and with ``W+ lo + W- hi`` (``reference.py``)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import rules
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.layers import supported_layers
from patchcert_cli.layers.preprocessing import Normalize

from . import reference

SHAPE = (2, 5, 4)


def frozen_norm(seed: int = 0) -> nn.BatchNorm2d:
    norm, generator = nn.BatchNorm2d(2).eval(), torch.Generator().manual_seed(seed)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.2, 3, generator=generator)
    norm.weight.data.normal_(generator=generator)
    norm.bias.data.normal_(generator=generator)
    return norm


LAYERS: dict[str, nn.Module] = {
    "linear": nn.Sequential(nn.Flatten(), nn.Linear(40, 6)),
    "conv": nn.Conv2d(2, 3, 3, 2, 1),
    "conv-dilated": nn.Conv2d(2, 4, (2, 3), 1, (2, 0), (2, 1), groups=2, bias=False),
    "relu": nn.ReLU(),
    "max-pool": nn.MaxPool2d(3, 2, 1),
    "average-pool": nn.AvgPool2d(2, 1, 1),
    "global-pool": nn.AdaptiveAvgPool2d(1),
    "norm": frozen_norm(),
    "normalize": Normalize((0.4, 0.6), (0.2, 0.3)),
    "identity": nn.Identity(),
    "dropout": nn.Dropout(0.5).eval(),
}


def layers(name: str) -> list[nn.Module]:
    return supported_layers.layers_of(LAYERS[name].double().eval())


def random_box(seed: int) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.minimum(a, b), torch.maximum(a, b)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_box_equals_the_reference_and_holds_every_sample(name: str) -> None:
    chain = layers(name)
    low, high = random_box(1)
    found_low, found_high = rules.propagate(chain, (low, high))
    path = reference.steps(nn.Sequential(*chain), SHAPE)
    for i in range(len(low)):
        expected = reference._through(path, reference.numbers(low[i]), reference.numbers(high[i]))
        assert torch.allclose(found_low[i].flatten(), torch.from_numpy(expected[0]), rtol=0, atol=1e-12)
        assert torch.allclose(found_high[i].flatten(), torch.from_numpy(expected[1]), rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(2)
    for draw in range(200):
        share = torch.rand(low.shape, dtype=torch.float64, generator=generator)
        value = low + (share.round() if draw % 2 else share) * (high - low)
        for layer in chain:
            value = layer(value)
        assert bool((value >= found_low - 1e-12).all())
        assert bool((value <= found_high + 1e-12).all())


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_noise_bounds_size_and_error_of_a_float32_layer(name: str) -> None:
    chain = layers(name)
    size, error = torch.full((1, *SHAPE), 3.0, dtype=torch.float64), torch.full((1, *SHAPE), 1e-5, dtype=torch.float64)
    out_size, out_error = size, error
    for layer in chain:
        out_size, out_error = rules.noise(layer, out_size, out_error, 2.0**-24)
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        exact = 6 * torch.rand(1, *SHAPE, dtype=torch.float64, generator=generator) - 3
        off = (exact + 1e-5 * (2 * torch.rand(exact.shape, dtype=torch.float64, generator=generator) - 1)).clamp(-3, 3)
        shaky = (off * (1 - 2.0**-23)).float()
        for layer in chain:
            exact = layer(exact)
        for layer in layers_in_float32(name):
            shaky = layer(shaky)
        assert bool((exact.abs() <= out_size).all())
        assert bool(((shaky.double() - exact).abs() <= out_error + 6 * 2.0**-23).all())
    LAYERS[name].double()


def layers_in_float32(name: str) -> list[nn.Module]:
    import copy

    return supported_layers.layers_of(copy.deepcopy(LAYERS[name]).float().eval())


def test_gamma_is_highams_bound_and_refuses_hopeless_sums() -> None:
    n, unit = 100 + rules.ROUNDINGS, 2.0**-24
    assert rules.gamma(100, unit) == pytest.approx(n * unit / (1 - n * unit), rel=1e-15)
    assert rules.gamma(100, unit) > 100 * unit
    with pytest.raises(UnsupportedThreat, match="rounding bound"):
        rules.gamma(2**23, unit)


def test_frozen_norm_as_scale_and_shift() -> None:
    norm = frozen_norm(4).double()
    found = rules.channel_affine(norm)
    assert found is not None
    v = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        by_parts = v * rules.per_channel(found[0], v) + rules.per_channel(found[1], v)
        assert torch.allclose(by_parts, norm(v), rtol=0, atol=1e-12)
    assert rules.channel_affine(nn.ReLU()) is None


@pytest.mark.parametrize("options", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}], ids=str)
def test_other_paddings_are_refused(options: dict[str, object]) -> None:
    layer = nn.Conv2d(2, 2, 3, **options).double()  # type: ignore[arg-type]
    with pytest.raises(UnsupportedThreat, match="zero padding"):
        rules.box(layer, random_box(0))


def test_unknown_layers_are_refused_by_both_rules() -> None:
    low, high = random_box(0)
    for layer in (nn.GELU(), nn.InstanceNorm2d(2), nn.Softmax(dim=1), nn.ReLU6()):
        with pytest.raises(UnsupportedThreat, match=type(layer).__name__):
            rules.box(layer, (low, high))
        with pytest.raises(UnsupportedThreat, match=type(layer).__name__):
            rules.noise(layer, low.abs(), low.abs(), 2.0**-24)


def test_nested_sequentials_are_flattened_in_order() -> None:
    inner = [nn.ReLU(), nn.Linear(2, 2), nn.Identity()]
    assert supported_layers.layers_of(nn.Sequential(inner[0], nn.Sequential(inner[1], nn.Sequential(inner[2])))) == inner
