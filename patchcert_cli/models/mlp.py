"""Fully connected networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.schema import Positive


def build(
    *,
    input_shape: Sequence[int],
    classes: int,
    hidden: Sequence[Positive] = (255,),
    mean: Sequence[float],
    std: Sequence[float],
    norm: bool = False,
) -> nn.Sequential:
    """Normalize, flatten, then ``hidden`` ReLU layers and one linear layer: [B, C, H, W] -> [B, classes].

    With ``norm`` there is a batch norm before each ReLU.
    """
    widths = [math.prod(input_shape), *hidden]
    layers: list[nn.Module] = [Normalize(mean, std), nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))
