"""Small random networks of every supported layout, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals, rounding
from patchcert_cli.certifiers.bounds.first_layer import Split
from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.threats import Threat

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """How to build one network, and the images it takes."""

    build: Callable[[], list[nn.Module]]
    shape: Shape
    sparse: bool = True  # begins with a linear or convolutional layer


def _dense(widths: list[int], *, bias: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), nn.ReLU()]
    return layers[:-1]


def _rgb() -> Normalize:
    return Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


LAYOUTS = {
    "mlp2": Layout(lambda: [Normalize((0.3,), (0.4,)), *_dense([20, 7, 3])], (1, 4, 5)),
    "mlp3": Layout(lambda: _dense([20, 6, 5, 4]), (1, 5, 4)),
    "mlp4-no-bias": Layout(lambda: _dense([16, 5, 5, 4, 3], bias=False), (1, 4, 4)),
    "mlp-rgb": Layout(lambda: [_rgb(), *_dense([60, 6, 3])], (3, 4, 5)),
    "mlp-no-relu": Layout(lambda: [nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3)], (1, 3, 4)),
    "mlp-norm-first": Layout(lambda: [nn.BatchNorm2d(3), _rgb(), *_dense([36, 5, 3])], (3, 3, 4)),
    "mlp-norm-inside": Layout(
        lambda: [nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 3)], (1, 3, 4)
    ),
    "relu-last": Layout(lambda: [*_dense([12, 5, 3]), nn.ReLU()], (1, 4, 3)),
    "conv-stride": Layout(
        lambda: [
            _rgb(),
            nn.Conv2d(3, 3, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(3, 2, 2, 1, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 3),
        ],
        (3, 6, 5),
    ),
    "conv-dilated": Layout(
        lambda: [nn.Conv2d(1, 2, 3, 1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(60, 4), nn.ReLU(), nn.Linear(4, 3)], (1, 5, 6)
    ),
    "conv-uneven": Layout(
        lambda: [nn.Conv2d(2, 3, (2, 3), (3, 2), (0, 1), (2, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)], (2, 6, 5)
    ),
    "conv-gaps": Layout(lambda: [nn.Conv2d(1, 3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)], (1, 6, 6)),
    "conv-max-pool": Layout(
        lambda: [nn.Conv2d(1, 3, 3, 1, 1), nn.MaxPool2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)], (1, 5, 6)
    ),
    "conv-average-pool": Layout(
        lambda: [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(2, 1, 1), nn.Flatten(), nn.Linear(60, 3)], (1, 5, 6)
    ),
    "conv-norm": Layout(
        lambda: [
            *(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 4, 3, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
        ],
        (2, 4, 5),
    ),
    "conv-last": Layout(lambda: [nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Conv2d(2, 3, (3, 4)), nn.Flatten()], (1, 4, 5)),
    "conv-alone": Layout(lambda: [_rgb(), nn.Conv2d(3, 4, (4, 3)), nn.Flatten()], (3, 4, 3)),
    "pool-last": Layout(lambda: [nn.Conv2d(1, 3, 2, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()], (1, 4, 4)),
    "average-pool-first": Layout(lambda: [nn.AvgPool2d(2, 1), *_dense([12, 5, 3])], (1, 4, 5), sparse=False),
    "max-pool-first": Layout(
        lambda: [nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)], (2, 6, 7), sparse=False
    ),
    "relu-first": Layout(lambda: [nn.ReLU(), *_dense([12, 4, 3])], (1, 3, 4), sparse=False),
}


def network(name: str, seed: int = 0, *, scale: float = 1.0) -> nn.Sequential:
    """A network of layout ``name`` in float32 and eval mode; ``scale`` multiplies every weight."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        built = nn.Sequential(*LAYOUTS[name].build()).eval()
        for layer in built:
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.2, 2)
                layer.weight.normal_()
                layer.bias.normal_()
        for weight in built.parameters():
            weight.mul_(scale)
    return built.requires_grad_(False)


def images(shape: Shape, count: int, seed: int = 0) -> Tensor:
    """Random images whose entries are 0, 1 or between: float32 [B, C, H, W]."""
    draw = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.3
    return draw.clamp(0, 1)


def rounding_error(net: nn.Module, x: Tensor, threat: Threat, dtype: torch.dtype) -> Tensor:
    """The claimed bound of the rounding error of the margins of ``net`` in ``dtype``: float64 [B]."""
    channels, height, width = x.shape[1:]
    resolved = intervals.resolve(threat, height, width, channels)
    return rounding.bound_error(Split.of(net, channels), x.to(dtype), resolved)
