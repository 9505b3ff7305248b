"""Layers that pretend: each is refused, or the network that is deployed is the one that is proven."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from patchcert_cli.certifiers.bounds import intervals, rules
from patchcert_cli.certifiers.bounds.first_layer import Split
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import IntegrityError, UnsupportedThreat
from patchcert_cli.layers import precision, supported_layers
from patchcert_cli.threats import Patch

from .networks import images, rounding_error

SHAPE = (1, 5, 5)


def layers() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2, 1), nn.MaxPool2d(2)),
            *(nn.Dropout(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)),
        ]


CONV, NORM, RELU, AVERAGE, LARGEST, FLATTEN, LINEAR = 0, 1, 2, 3, 4, 6, 7


def defense(chain: list[nn.Module]) -> IntervalDefense:
    return IntervalDefense(nn.Sequential(*chain), input_shape=SHAPE, classes=("a", "b", "c")).eval()


class OtherConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return -super()._conv_forward(input, weight, bias)


class Alike(nn.Linear):
    pass


class Lying(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(super().__iter__()))


def _put(at: int, layer: nn.Module) -> Callable[[list[nn.Module]], None]:
    return lambda chain: chain.__setitem__(at, layer)


def _own(at: int, name: str) -> Callable[[list[nn.Module]], None]:
    def change(chain: list[nn.Module]) -> None:
        original = getattr(chain[at], name)
        object.__setattr__(chain[at], name, lambda *given: original(*given))

    return change


def _option(at: int, name: str, value: object) -> Callable[[list[nn.Module]], None]:
    return lambda chain: setattr(chain[at], name, value)


def _bound_method(chain: list[nn.Module]) -> None:
    chain[LINEAR].forward = types.MethodType(lambda self, v: -F.linear(v, self.weight, self.bias), chain[LINEAR])  # type: ignore[method-assign]


def _lying_weight(chain: list[nn.Module]) -> None:
    layer = cast(nn.Linear, chain[LINEAR])
    weight = layer.weight.detach().as_subclass(Lying)
    del layer.weight
    layer.weight = weight  # type: ignore[assignment]


PRETENDERS: dict[str, Callable[[list[nn.Module]], None]] = {
    "negative divisor": _option(AVERAGE, "divisor_override", -4),
    "divisor 0": _option(AVERAGE, "divisor_override", 0),
    "a subclass with another convolution": _put(CONV, OtherConvolution(1, 4, 3, padding=1)),
    "a subclass that changes nothing": _put(LINEAR, Alike(16, 6)),
    "forward of its own": _own(LINEAR, "forward"),
    "a bound forward of its own": _bound_method,
    "_conv_forward of its own": _own(CONV, "_conv_forward"),
    "_call_impl of its own": _own(RELU, "_call_impl"),
    "train of its own": _own(NORM, "train"),
    "a forward hook": lambda chain: chain[RELU].register_forward_hook(lambda layer, given, found: -found) and None,
    "a pre-forward hook": lambda chain: chain[RELU].register_forward_pre_hook(lambda layer, given: (-given[0],)) and None,
    "a parametrized weight": lambda chain: parametrizations.weight_norm(chain[LINEAR]) and None,
    "an old parametrized weight": lambda chain: spectral_norm(chain[LINEAR]) and None,
    "a compiled layer": lambda chain: chain[RELU].compile(),
    "a weight of another class": _lying_weight,
    "flattened images": _option(FLATTEN, "start_dim", 0),
    "two results": _option(LARGEST, "return_indices", True),
    "circular padding": _option(CONV, "padding_mode", "circular"),
    "a negative eps": _option(NORM, "eps", -1.0),
    "half a batch norm": _option(NORM, "bias", None),
    "a norm that says it has no weight": _option(NORM, "affine", False),
    "batch statistics": lambda chain: chain.__setitem__(NORM, nn.BatchNorm2d(4, track_running_stats=False)),
    "another Sequential": lambda chain: chain.__setitem__(slice(0, 2), [Backwards(*chain[:2])]),
    "pooling behind Flatten": lambda chain: chain.insert(FLATTEN + 1, nn.AvgPool2d(1)),
}


@pytest.mark.parametrize("name", PRETENDERS)
def test_a_layer_that_pretends_is_refused_in_one_line(name: str) -> None:
    chain = layers()
    PRETENDERS[name](chain)
    made, x = defense(chain), images(SHAPE, 3)
    for action in (lambda: made.certify(x, Patch(1, 1)), lambda: made.predict(x)):
        with pytest.raises(UnsupportedThreat) as caught:
            action()
        assert "\n" not in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("name", ["forward", "eval", "_call_impl"])
def test_classes_that_were_altered_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = defense(layers()), images(SHAPE, 3)
    monkeypatch.setattr(nn.ReLU, name, getattr(nn.GELU, name) if name == "forward" else lambda *given: given)
    with pytest.raises(UnsupportedThreat, match=f"ReLU.{name} is not torch's own"):
        made.certify(x, Patch(1, 1))


@pytest.mark.parametrize("name", ["conv2d", "linear", "relu", "max_pool2d"])
def test_functions_that_were_replaced_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = defense(layers()), images(SHAPE, 3)
    original = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *given, **more: -original(*given, **more))
    with pytest.raises(UnsupportedThreat, match=f"torch.nn.functional.{name} is not torch's own"):
        made.certify(x, Patch(1, 1))


def test_global_hooks_are_refused() -> None:
    made, x = defense(layers()), images(SHAPE, 3)
    hook = nn.modules.module.register_module_forward_hook(lambda layer, given, found: None)
    try:
        with pytest.raises(UnsupportedThreat, match="global forward hooks"):
            made.predict(x)
    finally:
        hook.remove()
    made.predict(x)


def test_what_does_not_alter_the_answer_is_taken() -> None:
    chain = layers()
    made, x = defense(chain), images(SHAPE, 8)
    before = made.certify(x, Patch(1, 1))
    chain[RELU].register_full_backward_hook(lambda layer, given, found: None)
    cast(nn.Linear, chain[LINEAR]).in_features = 1  # widths are those of the weight
    cast(nn.Conv2d, chain[CONV]).kernel_size = (1, 1)
    made.to(memory_format=torch.channels_last)
    again = made.certify(x.contiguous(memory_format=torch.channels_last), Patch(1, 1))
    assert torch.equal(before.margin, again.margin) and torch.equal(before.certified, again.certified)


def test_layers_in_place_change_neither_verdicts_nor_images() -> None:
    chain, x = layers(), images(SHAPE, 40)
    for first in ([], [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)]):
        plainly = defense([*([nn.ReLU(), nn.Dropout(0.5)] if first else []), *copy.deepcopy(chain)])
        in_place = defense([*first, *copy.deepcopy(chain)])
        for layer in in_place.network:
            if isinstance(layer, nn.ReLU):
                layer.inplace = True
        for kind in (torch.float32, torch.float64):
            pixels = x.to(kind)
            kept = pixels.clone()
            for method in ("interval", "linear"):
                one, other = plainly.certify(pixels, Patch(1, 1), method), in_place.certify(pixels, Patch(1, 1), method)
                assert torch.equal(one.certified, other.certified)
                assert torch.equal(one.margin, other.margin) and torch.equal(one.tolerance, other.tolerance)
            assert torch.equal(in_place.predict(pixels), plainly.predict(pixels))
            assert torch.equal(pixels, kept)
    assert int(one.certified.sum()) > 0


def test_the_rebuilt_network_shares_weights_and_leaves_the_generator_alone() -> None:
    made = defense(layers())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    again = supported_layers.rebuilt(made.network)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(weight.requires_grad for weight in again.parameters())
    assert cast(nn.Conv2d, again[0]).weight.data_ptr() == cast(nn.Conv2d, made.network[0]).weight.data_ptr()
    x = images(SHAPE, 3)
    assert torch.equal(again(x), made.network(x))
    assert supported_layers.rebuilt(made.network, torch.float64)(x.double()).dtype == torch.float64
    assert all(weight.dtype == torch.float32 for weight in made.parameters())


def test_scales_in_front_of_the_first_layer_are_folded_with_one_rounding() -> None:
    """Fifty batch norms whose scales were chosen so that every product in float32 is rounded upwards."""
    generator, product, norms = torch.Generator().manual_seed(0), torch.ones(1), []
    for _ in range(50):
        tried = 1 + torch.rand(400, generator=generator) * 0.01
        norm = nn.BatchNorm2d(1, eps=0.0)
        error = (tried * product).double() / (tried.double() * product.double()) - 1
        norm.weight.data.copy_(tried[error.argmax()].reshape(1))
        product = product * norm.weight.data
        norms.append(norm)
    net = nn.Sequential(*norms, nn.Flatten(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).eval().requires_grad_(False)
    wide = copy.deepcopy(net).double()
    exact = Split.of(wide, 1).dense_weight((1, 1, 1))
    found = Split.of(net, 1).dense_weight((1, 1, 1))
    assert float((found.double() / exact - 1).abs().max()) <= 2.0**-24 * (1 + 1e-6)
    assert float((product.double() / Split.of(wide, 1).scale - 1).abs()) > 20 * 2.0**-24, (
        "the test is about roundings that add up"
    )
    x, target = torch.rand(50, 1, 1, 1, generator=generator), torch.zeros(50, dtype=torch.int64)
    one = intervals.lower_margins(net, x, target, Patch(1, 1)).values.double()
    other = intervals.lower_margins(wide, x.double(), target, Patch(1, 1)).values
    assert bool(((one - other).abs().amax(dim=1) <= rounding_error(net, x, Patch(1, 1), torch.float32)).all())
    assert Split.of(wide, 1).folded == 49 + 6 * 50  # float64 counts them, as it has no finer type


def test_crossed_bounds_and_negative_errors_are_refused() -> None:
    low, high = torch.zeros(2, 3), torch.ones(2, 3)
    assert rules.ordered((low, high)) == (low, high)
    rules.ordered((low, high * float("nan")))
    with pytest.raises(IntegrityError, match="crossed"):
        rules.ordered((high, low))
    with pytest.raises(IntegrityError, match="negative"):
        rules.not_negative(-high)
    pool = nn.AvgPool2d(2, divisor_override=-4)
    with pytest.raises(IntegrityError, match="crossed"):
        rules.propagate([pool], (torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)))
    with pytest.raises(IntegrityError, match="negative"):
        rules.noise(pool, torch.ones(1, 1, 2, 2).double(), torch.ones(1, 1, 2, 2).double(), 2.0**-24)


def test_fast_convolutions_are_off_where_bounds_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    made, x = defense(layers()), images(SHAPE, 2)
    switches = [torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled]
    with precision.plain_sums():
        seen.append((torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled))
    assert seen == [(False, False)]
    assert [torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled] == switches

    def look(self: IntervalDefense, exact: nn.Module, x: Tensor) -> Tensor:
        seen.append((torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled))
        return torch.zeros(len(x), dtype=torch.int64)

    monkeypatch.setattr(IntervalDefense, "_predict", look)
    made.certify(x, Patch(1, 1))
    assert seen[1:] == [(False, False)]
