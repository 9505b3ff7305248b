"""Plain convolutional networks of Chiang et al. (ICLR 2020): 3x3 and 4x4 convolutions, then one hidden dense layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.models._stages import stages
from patchcert_cli.schema import Positive


def build(
    *,
    input_shape: Sequence[int],
    classes: int,
    channels: Sequence[Positive] = (16, 16, 32, 32),
    strides: Sequence[Positive] = (1, 2, 1, 2),
    hidden: Sequence[Positive] = (128,),
    mean: Sequence[float],
    std: Sequence[float],
    norm: bool = False,
) -> nn.Sequential:
    """Normalize, a convolution per entry of ``channels`` (3x3, or 4x4 where it strides), dense: [B, C, H, W] -> [B, classes].

    With ``norm`` there is a batch norm before each ReLU.
    """
    layers: list[nn.Module] = [Normalize(mean, std)]
    before = input_shape[0]
    for after, stride in stages(channels=channels, strides=strides) if channels or strides else ():
        layers += [nn.Conv2d(before, after, 3 if stride == 1 else 4, stride, 1)]
        layers += [*([nn.BatchNorm2d(after)] if norm else []), nn.ReLU()]
        before = after
    layers.append(nn.Flatten())
    front = nn.Sequential(*layers).eval()  # batch norm would take the zeros for data
    with torch.no_grad():
        width = int(front(torch.zeros(1, *input_shape)).shape[1])
    front.train()
    for after in hidden:
        layers += [nn.Linear(width, after), *([nn.BatchNorm1d(after)] if norm else []), nn.ReLU()]
        width = after
    return nn.Sequential(*layers, nn.Linear(width, classes))
