"""EfficientNet-Lite (Tan & Le, EfficientNet, ICML 2019; its Lite variants of 2020): inverted residual blocks for small devices.

A 3x3 stem of stride 2, seven stages of blocks that widen a map, filter each channel by itself and narrow it again (Sandler et
al., MobileNetV2, CVPR 2018), a 1x1 convolution, the mean over all positions, a linear head. The Lite variants have no
squeeze-and-excitation, ReLU6 throughout, and a stem and head of one width. Convolutions are padded as TensorFlow does it: an odd
row or column of zeros goes below or right.

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.errors import UsageError
from patchcert_cli.layers.preprocessing import WithPreprocessing

STEM, HEAD = 32, 1280
# of each stage: blocks, width, kernel, stride of the first block, how many times a block widens
STAGES = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)
VARIANTS = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))  # times as wide and as deep
NORM_EPS = 1e-3


class Convolution(nn.Conv2d):
    """A convolution whose output has the size of its input divided by the stride and rounded up."""

    def forward(self, x: Tensor) -> Tensor:
        more = [
            max((-(-length // stride) - 1) * stride + kernel - length, 0)
            for length, stride, kernel in zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        ]
        if more[0] % 2 == 0 and more[1] % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, self.stride, (more[0] // 2, more[1] // 2), 1, self.groups)
        x = F.pad(x, (more[1] // 2, more[1] - more[1] // 2, more[0] // 2, more[0] - more[0] // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, 1, self.groups)


def convolved(before: int, after: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, norm: bool) -> list[nn.Module]:
    """A convolution, and a batch norm after it or a bias in it."""
    convolution = Convolution(before, after, kernel, stride, groups=groups, bias=not norm)
    return [convolution, nn.BatchNorm2d(after, eps=NORM_EPS)] if norm else [convolution]


class Block(nn.Module):
    """``narrow(relu6(filter(relu6(widen(v)))))``, plus ``v`` where that has its shape."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, widen: int, norm: bool) -> None:
        super().__init__()
        wide = before * widen
        layers = [] if widen == 1 else [*convolved(before, wide, norm=norm), nn.ReLU6()]
        layers += [*convolved(wide, wide, kernel, stride, groups=wide, norm=norm), nn.ReLU6()]
        self.body = nn.Sequential(*layers, *convolved(wide, after, norm=norm))
        self.residual = stride == 1 and before == after

    def forward(self, v: Tensor) -> Tensor:
        changed: Tensor = self.body(v)
        return v + changed if self.residual else changed


def build(
    *,
    input_shape: Sequence[int],
    classes: int,
    variant: int = 0,
    size: Sequence[int] = (),
    mean: Sequence[float],
    std: Sequence[float],
    norm: bool = True,
) -> WithPreprocessing:
    """EfficientNet-Lite after its preprocessing: images [B, C, H, W] in [0, 1] -> logits [B, classes].

    Args:
        input_shape: C, H and W of the images.
        classes: K.
        variant: 0 to 4, from small to large.
        size: what images are resized to, by default ``input_shape``; one number for a square.
        mean: per channel, of what the network takes.
        std: per channel.
        norm: whether there are batch norms after the convolutions; without, these have biases.
    """
    if not 0 <= variant < len(VARIANTS):
        raise UsageError(f"variant {variant} is not an EfficientNet-Lite.", hint=f"Allowed: 0 to {len(VARIANTS) - 1}.")
    sides = tuple(size) * (2 if len(size) == 1 else 1) or tuple(input_shape[1:])
    if len(sides) != 2 or min(sides) < 1:
        raise UsageError(f"size {list(size)} is not an image size.", hint="Give one number, or height and width.")
    layers: list[nn.Module] = [*convolved(len(mean), STEM, 3, 2, norm=norm), nn.ReLU6()]
    before = STEM
    for number, (blocks, width, kernel, stride, widen) in enumerate(STAGES):
        after, deep = rounded(width * VARIANTS[variant][0]), VARIANTS[variant][1]
        fixed = number in (0, len(STAGES) - 1)  # as deep in each variant
        for at in range(blocks if fixed else -int(-blocks * deep // 1)):
            layers.append(Block(before, after, kernel, stride if at == 0 else 1, widen, norm))
            before = after
    layers += [*convolved(before, HEAD, norm=norm), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(HEAD, classes)]
    summary = f"EfficientNet-Lite{variant} at {sides[0]}x{sides[1]}"
    return WithPreprocessing(nn.Sequential(*layers), size=sides, mean=mean, std=std, channels=len(mean), summary=summary)


def rounded(width: float) -> int:
    """The nearest multiple of 8 that is not less than nine tenths of ``width``."""
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near
