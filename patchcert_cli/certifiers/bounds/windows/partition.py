"""Which layers of a network are bounded in windows, and what happens after them.

A layer is bounded in windows if its outputs have windows (:mod:`patch_windows`) and its weights are the same everywhere. The
first dense layer takes its columns under the window. Any other layer gets whole maps, filled in for each location, which is
always right and costs what a boxed copy of the image costs from there on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.rules import channel_affine
from patchcert_cli.certifiers.bounds.windows.patch_windows import SlidingAxis, pair, slides
from patchcert_cli.layers.supported_layers import IDENTITY, layers_of


def _flattens(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1)


def _stays_in_windows(layer: nn.Module) -> bool:
    """Whether the layer's outputs have windows, with a rule in this file."""
    if isinstance(layer, nn.AvgPool2d):  # its weights must be the same everywhere
        return not layer.ceil_mode and (layer.count_include_pad or pair(layer.padding) == (0, 0))
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return layer.output_size in (1, (1, 1))
    return isinstance(layer, (*IDENTITY, nn.ReLU, nn.Conv2d, nn.MaxPool2d)) or channel_affine(layer) is not None


@dataclass(frozen=True)
class Partition:
    """How a network is bounded.

    Attributes:
        layers: all of them.
        inner: the first layers, bounded in windows.
        dense_entry: the dense layer after them, if that comes next.
        tail: all further layers, bounded as a whole for each location.
        path: rows and columns of each sliding layer of ``inner``.
        shape: C, H, W after ``inner``.
    """

    layers: list[nn.Module]
    inner: list[nn.Module]
    dense_entry: nn.Linear | None
    tail: list[nn.Module]
    path: list[tuple[SlidingAxis, SlidingAxis]]
    shape: tuple[int, int, int]

    @classmethod
    @torch.no_grad()
    def of(cls, layers: list[nn.Module], image: Tensor) -> Partition:
        """The partition of images like ``image`` [1, C, H, W]."""
        path, at = [], 0
        while at < len(layers) and _stays_in_windows(layers[at]):
            after = layers[at](image)
            slide = slides(layers[at], image.shape[2:], after.shape[2:])
            path += [slide] if slide else []
            image, at = after, at + 1
        shape = cast(tuple[int, int, int], tuple(image.shape[1:]))
        dense = next((i for i in range(at, len(layers)) if isinstance(layers[i], nn.Linear)), at)
        between = layers[at:dense]
        dense_entry = layers[dense] if any(map(_flattens, between)) else None
        if isinstance(dense_entry, nn.Linear) and all(_flattens(layer) or isinstance(layer, IDENTITY) for layer in between):
            return cls(layers, layers[:at], dense_entry, layers[dense + 1 :], path, shape)
        return cls(layers, layers[:at], None, layers[at:], path, shape)


def first_global_layer(network: nn.Module, shape: tuple[int, int, int]) -> str | None:
    """The layer before which windows end although no dense layer takes them up, for images [C, H, W]; None if there is none.

    Raises:
        UnsupportedThreat: a layer has no rule; the message says which, and what to use instead.
    """
    partition = _partition_of(network, shape)
    first = next((layer for layer in partition.tail if not (_flattens(layer) or isinstance(layer, IDENTITY))), None)
    return None if partition.dense_entry is not None or first is None else type(first).__name__


def _partition_of(network: nn.Module, shape: tuple[int, int, int]) -> Partition:
    parameter = next(iter(network.parameters()), torch.zeros(()))
    return Partition.of(layers_of(network), torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device))
