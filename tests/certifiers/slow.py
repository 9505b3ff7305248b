"""Interval arithmetic written slowly from the definitions of the layers, one output after another, in float64.

A layer is what each of its outputs sees: either terms (input, weight) and an offset, or the inputs of which it is the largest.
Nothing here uses torch's layers to compute, or anything of the package.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor, nn

from patchcert_cli.layers.preprocessing import Normalize

Array = np.ndarray[Any, np.dtype[np.float64]]
Shape = tuple[int, ...]


@dataclass
class Sum:
    """Outputs ``matrix v + offset``."""

    matrix: Array
    offset: Array
    last: bool = False  # a linear layer, which margins may be merged with

    def box(self, low: Array, high: Array) -> tuple[Array, Array]:
        up, down = np.where(self.matrix > 0, self.matrix, 0), np.where(self.matrix < 0, self.matrix, 0)
        return up @ low + down @ high + self.offset, up @ high + down @ low + self.offset


@dataclass
class Largest:
    """Each output is the largest of some inputs."""

    seen: list[list[int]]

    def box(self, low: Array, high: Array) -> tuple[Array, Array]:
        return np.array([low[one].max() for one in self.seen]), np.array([high[one].max() for one in self.seen])


class Positive:
    def box(self, low: Array, high: Array) -> tuple[Array, Array]:
        return np.where(low > 0, low, 0), np.where(high > 0, high, 0)


Step = Sum | Largest | Positive


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _count(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """How many windows there are along an axis."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (math.ceil(room / stride) if ceil else room // stride) + 1
    return count - 1 if ceil and (count - 1) * stride >= size + padding else count


def _windows(shape: Shape, layer: Any) -> tuple[Shape, Iterator[tuple[int, int, list[tuple[int, int, int, int]]]]]:
    """Rows and columns of outputs; for each its place and what it sees: place in the kernel and in the map, maybe outside."""
    kernel, stride, padding = _two(layer.kernel_size), _two(layer.stride), _two(layer.padding)
    dilation, ceil = _two(getattr(layer, "dilation", 1)), getattr(layer, "ceil_mode", False)
    rows, columns = (_count(shape[a + 1], kernel[a], stride[a], padding[a], dilation[a], ceil) for a in (0, 1))

    def each() -> Iterator[tuple[int, int, list[tuple[int, int, int, int]]]]:
        for i, j in product(range(rows), range(columns)):
            taps = [
                (a, b, i * stride[0] - padding[0] + a * dilation[0], j * stride[1] - padding[1] + b * dilation[1])
                for a, b in product(range(kernel[0]), range(kernel[1]))
            ]
            yield i, j, taps

    return (rows, columns), each()


def _numbers(tensor: Any) -> Array:
    found: Array = tensor.detach().double().numpy()
    return found


def _convolution(layer: nn.Conv2d, shape: Shape) -> tuple[Step, Shape]:
    weight, (rows, columns) = _numbers(layer.weight), _windows(shape, layer)[0]
    outputs, inputs = weight.shape[:2]
    matrix = np.zeros((outputs, rows, columns, *shape))
    offset = np.zeros((outputs, rows, columns))
    for o in range(outputs):
        first = o // (outputs // layer.groups) * inputs
        for i, j, taps in _windows(shape, layer)[1]:
            offset[o, i, j] = 0 if layer.bias is None else float(layer.bias[o].detach())
            for c, (a, b, row, column) in product(range(inputs), taps):
                if 0 <= row < shape[1] and 0 <= column < shape[2]:
                    matrix[o, i, j, first + c, row, column] += weight[o, c, a, b]
    return Sum(matrix.reshape(-1, math.prod(shape)), offset.reshape(-1)), (outputs, rows, columns)


def _average(layer: nn.AvgPool2d, shape: Shape) -> tuple[Step, Shape]:
    (rows, columns), _ = _windows(shape, layer)
    padding, matrix = _two(layer.padding), np.zeros((shape[0], rows, columns, *shape))
    for c in range(shape[0]):
        for i, j, taps in _windows(shape, layer)[1]:
            inside = [(row, column) for _, _, row, column in taps if 0 <= row < shape[1] and 0 <= column < shape[2]]
            padded = [1 for _, _, row, column in taps if row < shape[1] + padding[0] and column < shape[2] + padding[1]]
            divisor = layer.divisor_override or (len(padded) if layer.count_include_pad else len(inside))
            for row, column in inside:
                matrix[c, i, j, c, row, column] += 1 / divisor
    return Sum(matrix.reshape(-1, math.prod(shape)), np.zeros(shape[0] * rows * columns)), (shape[0], rows, columns)


def _adaptive(layer: nn.AdaptiveAvgPool2d, shape: Shape) -> tuple[Step, Shape]:
    wanted: Any = layer.output_size
    sides = [side or shape[a + 1] for a, side in enumerate(wanted if isinstance(wanted, tuple) else (wanted, wanted))]
    matrix = np.zeros((shape[0], *sides, *shape))
    for c, i, j in product(range(shape[0]), range(sides[0]), range(sides[1])):
        spans = [
            range(at * length // side, -(-(at + 1) * length // side))
            for at, side, length in zip((i, j), sides, shape[1:], strict=True)
        ]
        for row, column in product(*spans):
            matrix[c, i, j, c, row, column] = 1 / (len(spans[0]) * len(spans[1]))
    return Sum(matrix.reshape(-1, math.prod(shape)), np.zeros(shape[0] * sides[0] * sides[1])), (shape[0], *sides)


def _largest(layer: nn.MaxPool2d, shape: Shape) -> tuple[Step, Shape]:
    (rows, columns), _ = _windows(shape, layer)
    seen = []
    for c in range(shape[0]):
        for _, _, taps in _windows(shape, layer)[1]:
            inside = [(row, column) for _, _, row, column in taps if 0 <= row < shape[1] and 0 <= column < shape[2]]
            seen.append([(c * shape[1] + row) * shape[2] + column for row, column in inside])
    return Largest(seen), (shape[0], rows, columns)


def _channels(scale: Array, shift: Array, shape: Shape) -> Step:
    each = math.prod(shape[1:])
    return Sum(np.diag(np.repeat(scale, each)), np.repeat(shift, each))


def step(layer: Any, shape: Shape) -> tuple[Step | None, Shape]:
    """A layer on flat values of ``shape``, and the shape behind it."""
    if isinstance(layer, nn.Conv2d):
        return _convolution(layer, shape)
    if isinstance(layer, nn.AvgPool2d):
        return _average(layer, shape)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return _adaptive(layer, shape)
    if isinstance(layer, nn.MaxPool2d):
        return _largest(layer, shape)
    if isinstance(layer, nn.ReLU):
        return Positive(), shape
    if isinstance(layer, nn.Flatten):
        return None, (math.prod(shape),)
    if isinstance(layer, nn.Linear):
        offset = np.zeros(len(layer.weight)) if layer.bias is None else _numbers(layer.bias)
        return Sum(_numbers(layer.weight), offset, last=True), (len(layer.weight),)
    if isinstance(layer, Normalize):
        return _channels(_numbers(layer.scale), _numbers(layer.shift), shape), shape
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        scale = 1 / np.sqrt(_numbers(layer.running_var) + layer.eps)
        scale = scale * _numbers(layer.weight) if layer.affine else scale
        shift = -_numbers(layer.running_mean) * scale
        return _channels(scale, shift + _numbers(layer.bias) if layer.affine else shift, shape), shape
    assert isinstance(layer, nn.Identity | nn.Dropout | nn.Dropout2d)
    return None, shape


def steps(layers: list[nn.Module], shape: Shape) -> list[Step]:
    found: list[Step] = []
    for layer in layers:
        one, shape = step(layer, shape)
        found += [] if one is None else [one]
    return found


def logits(path: list[Step], image: Tensor) -> Array:
    """[K] of one image."""
    low = high = _numbers(image).reshape(-1)
    for one in path:
        low, high = one.box(low, high)
    return low


def margins(path: list[Step], image: Tensor, height: int, width: int, target: int) -> Array:
    """The interval lower bounds of ``f_target - f_class`` over all locations of a patch, [K]; infinite for the target."""
    pixels, found = _numbers(image), []
    for top, left in product(range(pixels.shape[1] - height + 1), range(pixels.shape[2] - width + 1)):
        low, high = pixels.copy(), pixels.copy()
        low[:, top : top + height, left : left + width], high[:, top : top + height, left : left + width] = 0, 1
        found.append(_of_box(path, low.reshape(-1), high.reshape(-1), target))
    least: Array = np.min(found, axis=0)
    return least


def _of_box(path: list[Step], low: Array, high: Array, target: int) -> Array:
    final = path[-1]
    merged = isinstance(final, Sum) and final.last
    for one in path[:-1] if merged else path:
        low, high = one.box(low, high)
    if isinstance(final, Sum) and merged:
        contrast = Sum(final.matrix[target] - final.matrix, final.offset[target] - final.offset)
        found = contrast.box(low, high)[0]
    else:
        found = low[target] - high
    found[target] = np.inf
    return found
