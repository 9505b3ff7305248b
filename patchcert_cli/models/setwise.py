"""One multilayer perceptron for every set of pixels: it is given the values of a set and the number of the set, nothing else.

Sets are places of a map, so the network is a stack of 1x1 convolutions with residual blocks. An embedding of the set's number is
added to what the first layer makes of the values; the frozen network reads it as one-hot maps beside the pixels.

Shapes: B images, D values of a set, N x M sets, V views (one set of one image each), K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.layers import fixed_point
from patchcert_cli.layers.fixed_point import Quantizer
from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.models._region_layers import Placed
from patchcert_cli.models.region import normed
from patchcert_cli.models.resnet import Block, ExactStem
from patchcert_cli.schema import Bits, Positive

GENTLE = 0.3  # a block's gain at the start, so that it begins near the identity
SPREAD = 0.1  # standard deviation of fresh embeddings
HOT = 255  # of a set's own map, in whole steps


class Setwise(nn.Module):
    """[B, D, N, M] in [0, 1] -> logits [B, K, N, M]; the logits of a set depend on its own values alone.

    Attributes:
        widest: activations of the largest layer for one set.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, width: int, blocks: Sequence[int], scale: Normalize, bits: int
    ) -> None:
        super().__init__()
        values, self.places = shape[0], (shape[1], shape[2])
        self.normalize = scale
        self.stem = nn.Conv2d(values, width, 1, bias=False)
        self.embedding = nn.Parameter(SPREAD * torch.randn(shape[1] * shape[2], width))
        self.norm, self.grid = nn.BatchNorm2d(width), Quantizer(bits)
        self.blocks = nn.Sequential(*(Block(width, width, (1, 1), 1, bits, inner) for inner in blocks))
        for block in self.blocks:
            nn.init.constant_(cast(Tensor, cast(Block, block).second_norm.weight), GENTLE)
        self.head = nn.Conv2d(width, classes, 1)
        self.widest = max(values + len(self.embedding), width, *blocks)

    @property
    def summary(self) -> str:
        """Kind and widths, for cards."""
        inner = "-".join(str(cast(Block, block).first_norm.num_features) for block in self.blocks)
        return f"MLP of {len(self.embedding)} sets, width {self.norm.num_features}, blocks {inner or 'none'}"

    def forward(self, x: Tensor) -> Tensor:
        """All sets of each image."""
        number = torch.arange(len(self.embedding), device=x.device).repeat(len(x))
        logits = self.of_sets(x.permute(0, 2, 3, 1).flatten(0, 2), number)
        return logits.reshape(len(x), *self.places, -1).permute(0, 3, 1, 2)

    def of_sets(self, values: Tensor, number: Tensor) -> Tensor:
        """Sets alone: values [V, D] in [0, 1] and numbers int64 [V] -> logits [V, K]; matrix products only."""
        v = values * self.normalize.scale + self.normalize.shift
        v = self.grid(F.relu(normed(self.norm, F.linear(v, self.stem.weight.flatten(1)) + self.embedding[number])))
        for block in cast(list[Block], list(self.blocks)):
            inner = F.relu(normed(block.first_norm, F.linear(v, block.first.weight.flatten(1))))
            out = normed(block.second_norm, F.linear(block.first_grid(inner), block.second.weight.flatten(1)))
            v = block.grid(F.relu(out + v))
        return F.linear(v, self.head.weight.flatten(1), self.head.bias)

    def freeze(self, precision: torch.dtype) -> tuple[nn.Module, int]:
        """The deployed network of whole steps 0 to 255 (:mod:`patchcert_cli.layers.fixed_point`), and the fewest bits of a
        channel's largest weight.

        One of the one-hot maps is :data:`HOT` where its set is, so the embedding is a part of the first layer's weights.
        """
        both = nn.Conv2d(self.stem.in_channels + len(self.embedding), self.stem.out_channels, 1, bias=False)
        with torch.no_grad():
            both.weight.copy_(torch.cat([self.stem.weight.cpu(), self.embedding.t()[:, :, None, None].cpu()], dim=1))
        scale, shift = (
            torch.cat([part.double().cpu(), part.new_full((len(self.embedding),), rest).double().cpu()])
            for part, rest in ((self.normalize.scale, 1.0), (self.normalize.shift, 0.0))
        )
        weight, bias = fixed_point.fold_normalization(*fixed_point.fold_batchnorm(both, self.norm), scale / 255, shift)
        stem, fewest = fixed_point.affine(weight, bias, both, fixed_point.PIXELS, precision)
        value_range = self.grid.value_range
        layers: list[nn.Module] = [Placed(one_hot(*self.places)), ExactStem(stem, value_range)]
        for block in cast(list[Block], list(self.blocks)):
            layer, bits = block.freeze(value_range, precision)
            layers.append(layer)
            fewest, value_range = min(fewest, bits), block.grid.value_range
        head, bits = fixed_point.affine(*fixed_point.fold_batchnorm(self.head, None), self.head, value_range, precision)
        return nn.Sequential(*layers, head), min(fewest, bits)


def one_hot(rows: int, columns: int) -> Tensor:
    """For each set a map that is :data:`HOT` at its place and 0 elsewhere, [1, N * M, N, M]."""
    return HOT * torch.eye(rows * columns).reshape(1, -1, rows, columns)


def build(
    *,
    input_shape: Sequence[int],
    classes: int,
    width: Positive = 384,
    blocks: Sequence[Positive] = (768, 768),
    bits: Bits = 8,
    mean: Sequence[float],
    std: Sequence[float],
) -> Any:
    """A :class:`Setwise`: ``width`` of the residual stream, and the inner width of each block.

    ``input_shape`` is D, N and M; ``mean`` and ``std`` are those of the image's channels, each of D / C values in turn.
    Activations of the deployed network have ``bits`` bits.
    """
    each = input_shape[0] // len(mean)
    spread = Normalize(*([value for value in part for _ in range(each)] for part in (mean, std)))
    return Setwise(input_shape, classes, width, tuple(blocks), spread, bits)
