"""Small defenses to attack."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from tests.examples import tiny

Shape = tuple[int, int, int]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in range(count))


@pytest.fixture
def linear() -> Callable[[Tensor, Tensor], IntervalDefense]:
    """A linear model from weights [K, C, H, W] and biases [K]."""

    def build(weight: Tensor, bias: Tensor) -> IntervalDefense:
        layer = nn.Linear(weight[0].numel(), len(weight))
        with torch.no_grad():
            layer.weight.copy_(weight.flatten(1))
            layer.bias.copy_(bias)
        shape: Shape = (weight.shape[1], weight.shape[2], weight.shape[3])
        return IntervalDefense(nn.Sequential(nn.Flatten(), layer), input_shape=shape, classes=names(len(weight))).eval()

    return build


@pytest.fixture
def cnn() -> Callable[[int], IntervalDefense]:
    """A random convolutional network on 3x6x6 images with 4 classes."""

    def build(seed: int) -> IntervalDefense:
        shape = (3, 6, 6)
        options = {"input_shape": shape, "classes": 4, "mean": (0.5, 0.4, 0.3), "std": (0.3, 0.3, 0.2)}
        torch.manual_seed(seed)
        network = models.build("cnn", {**options, "channels": (4,), "strides": (1,), "hidden": (8,)})
        return IntervalDefense(network, input_shape=shape, classes=names(4)).eval()

    return build


@pytest.fixture
def mlp() -> Callable[[int], IntervalDefense]:
    """The tiny member of the interval family, 1x4x4 images and 3 classes."""

    def build(seed: int) -> IntervalDefense:
        made = tiny("ibp", seed)
        assert isinstance(made, IntervalDefense)
        return made

    return build
