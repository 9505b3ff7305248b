"""Small convolutional networks that learn fast, for images with parts hidden behind masks.

A stem of small kernels that begins as the whitening of the training images, stages of two 3x3 convolutions of which the second is
residual, GELU, and the largest value over all positions, so that evidence counts wherever it is left. Batch norm has no gains,
and its biases learn 64 times faster than the weights (Jordan, 94 % on CIFAR-10 in 3.29 seconds on a single GPU, 2024, whose
findings on what makes short training efficient are used here).

Shapes: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.layers import Normalize

QUICK = 8.0  # a bias is this times its parameter, which squares in the step: 64 times the learning rate
WHITE = 5e-4  # added to the variances that whitening divides by
HEAD = 9.0  # the largest values over positions are large; logits are to begin small


class Norm(nn.BatchNorm2d):
    """Batch norm without gains, its bias ``QUICK`` times a parameter."""

    one: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width, affine=False)
        self.quick = nn.Parameter(torch.zeros(width))
        self.register_buffer("one", torch.ones(width), persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            v, self.running_mean, self.running_var, self.one, self.quick * QUICK, self.training, self.momentum or 0.1, self.eps
        )


class Stage(nn.Module):
    """``u = gelu(norm(pool(conv(v))))``, then ``u + gelu(norm(conv(u)))``: [B, before, h, w] -> [B, width, h // 2, w // 2]."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(before, width, 3, padding=1, bias=False), Norm(width)
        self.second, self.second_norm = nn.Conv2d(width, width, 3, padding=1, bias=False), Norm(width)

    def forward(self, v: Tensor) -> Tensor:
        u = F.gelu(self.first_norm(F.max_pool2d(self.first(v), 2)))
        return u + F.gelu(self.second_norm(self.second(u)))


class MaskedNetwork(nn.Module):
    """[B, C, H, W] in [0, 1], its hidden pixels already filled, -> logits [B, K].

    Attributes:
        takes_mask: whether it is also told which pixels are hidden, bool [B, 1, H, W], as a second argument.
        mirrored: whether its logits, except in training, are the mean of those of the image and of the mirrored image.
        most: activations of its largest layer per image.
    """

    def __init__(
        self,
        normalize: Normalize,
        shape: Sequence[int],
        classes: int,
        stem: int,
        kernel: int,
        widths: Sequence[int],
        takes_mask: bool,
        mirrored: bool,
    ) -> None:
        super().__init__()
        self.takes_mask, self.mirrored, self.normalize, self.channels = takes_mask, mirrored, normalize, shape[0]
        self.stem = nn.Conv2d(shape[0] + takes_mask, stem, kernel, padding=(kernel - 1) // 2)
        sides = [length + 2 * ((kernel - 1) // 2) - kernel + 1 for length in shape[1:]]
        self.most = max(
            stem * math.prod(sides), *(width * math.prod(side >> at for side in sides) for at, width in enumerate(widths))
        )
        self.stages = nn.Sequential(*(Stage(before, width) for before, width in pairwise([stem, *widths])))
        self.head = nn.Linear(widths[-1], classes)
        with torch.no_grad():
            for stage in cast(list[Stage], list(self.stages)):  # the first channels begin as copies of what comes in
                for layer in (stage.first, stage.second):
                    nn.init.dirac_(layer.weight[: layer.in_channels])

    @property
    def summary(self) -> str:
        """Kind and widths, for cards."""
        widths = [self.stem.out_channels, *(stage.first.out_channels for stage in cast(list[Stage], list(self.stages)))]
        return f"masked CNN {'-'.join(map(str, widths))}"

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        logits = self._logits(x, hidden)
        if not self.mirrored or self.training:
            return logits
        return (logits + self._logits(x.flip(3), None if hidden is None else hidden.flip(3))) / 2

    def _logits(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        v = self.normalize(x).contiguous(memory_format=torch.channels_last)
        if self.takes_mask:
            assert hidden is not None, "this network is to be told what is hidden"
            v = torch.cat([v, hidden.to(v)], dim=1)
        v = self.stages(F.gelu(self.stem(v)))
        return cast(Tensor, self.head(v.amax(dim=(2, 3)) / HEAD))

    @torch.no_grad()
    def whiten(self, x: Tensor) -> None:
        """Begin with a stem that whitens the windows of these images: each direction of its pixels once, and once negated.

        With u the eigenvectors and s the eigenvalues of the windows' covariance, the kernels are u / sqrt(s), those of the
        largest s first, as many as the stem has; what is left over stays random.
        """
        size, weight = self.stem.kernel_size[0], self.stem.weight
        windows = F.unfold(self.normalize(x), size).transpose(1, 2).flatten(0, 1).double()  # [n, C k k]
        value, direction = torch.linalg.eigh(windows.T @ windows / len(windows))
        kernels = (direction / (value + WHITE).sqrt()).flip(1).T.reshape(-1, self.channels, size, size)
        count = min(len(kernels), len(weight) // 2)
        for at, sign in ((0, 1), (count, -1)):
            weight[at : at + count, : self.channels] = (sign * kernels[:count]).to(weight)
            weight[at : at + count, self.channels :] = 0


def build(
    *,
    input_shape: Sequence[int],
    classes: int,
    stem: int = 24,
    kernel: int = 2,
    widths: Sequence[int] = (64, 256, 256),
    takes_mask: bool = False,
    mirrored: bool = False,
    mean: Sequence[float],
    std: Sequence[float],
) -> Any:
    """A :class:`MaskedNetwork`: a stem of ``stem`` kernels of side ``kernel``, then a stage per entry of ``widths``.

    Every stage halves the sides of the map, so there are at most as many as the image allows. With ``takes_mask`` the network
    sees which pixels are hidden as one more channel. With ``mirrored`` it looks at each image twice, for twice the time.
    """
    if not widths or min(stem, kernel, *widths) < 1:
        raise ValueError("stem, kernel and every width must be 1 or more")
    if min(input_shape[1:]) >> len(widths) < 2:
        raise ValueError(f"{len(widths)} stages are too many for images of {input_shape[1]}x{input_shape[2]}")
    network = MaskedNetwork(Normalize(mean, std), input_shape, classes, stem, kernel, widths, takes_mask, mirrored)
    return network.to(memory_format=torch.channels_last)  # pooling and bfloat16 convolutions are up to three times as fast so
