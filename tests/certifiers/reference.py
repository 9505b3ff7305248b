"""Interval bounds the slow way: one boxed copy of the image per location, every layer as a matrix filled by loops.

Nothing of the package is called here. Numbers are float64 or exact fractions. Shapes: C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor, nn

Number = Callable[[float], Any]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Affine:
    """``matrix @ v + offset``; ``weighted`` tells a linear or convolutional layer from a scaling per channel."""

    matrix: Array
    offset: Array
    weighted: bool
    linear: bool = False


@dataclass(frozen=True)
class Relu:
    """The positive part of each entry."""


@dataclass(frozen=True)
class Largest:
    """The largest entry of each group of positions."""

    groups: list[list[int]]


Step = Affine | Relu | Largest


def _empty(rows: int, columns: int, number: Number) -> Array:
    return np.full((rows, columns), number(0.0), dtype=object if number is Fraction else np.float64)


def _vector(values: Tensor | None, length: int, number: Number) -> Array:
    entries = [0.0] * length if values is None else values.detach().flatten().double().tolist()
    return np.array([number(value) for value in entries], dtype=object if number is Fraction else np.float64)


def _per_channel(scale: Tensor, shift: Tensor, shape: tuple[int, ...], number: Number) -> Affine:
    each = int(np.prod(shape[1:], dtype=int))
    matrix, offset = _empty(shape[0] * each, shape[0] * each, number), _empty(shape[0] * each, 1, number)[:, 0]
    for channel, inner in product(range(shape[0]), range(each)):
        at = channel * each + inner
        matrix[at, at], offset[at] = number(float(scale[channel])), number(float(shift[channel]))
    return Affine(matrix, offset, weighted=False)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _windows(layer: Any, shape: tuple[int, int, int], dilation: tuple[int, int]) -> tuple[int, int, list[list[tuple[int, int]]]]:
    """Output rows and columns, and per output the taps ``(tap, position)`` that lie inside an H x W plane."""
    kernel, stride, padding = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding)
    rows, columns = ((shape[1 + a] + 2 * padding[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in range(2))
    seen = []
    for r, c in product(range(rows), range(columns)):
        taps = []
        for i, j in product(range(kernel[0]), range(kernel[1])):
            row, column = r * stride[0] - padding[0] + i * dilation[0], c * stride[1] - padding[1] + j * dilation[1]
            if 0 <= row < shape[1] and 0 <= column < shape[2]:
                taps.append((i * kernel[1] + j, row * shape[2] + column))
        seen.append(taps)
    return rows, columns, seen


def _convolution(layer: nn.Conv2d, shape: tuple[int, int, int], number: Number) -> tuple[Affine, tuple[int, ...]]:
    rows, columns, windows = _windows(layer, shape, _pair(layer.dilation))
    outs, plane, cells = layer.out_channels, shape[1] * shape[2], rows * columns
    each_in, each_out = shape[0] // layer.groups, outs // layer.groups
    matrix = _empty(outs * cells, shape[0] * plane, number)
    weight = layer.weight.detach().double().flatten(2).tolist()
    for out, (cell, taps) in product(range(outs), enumerate(windows)):
        for inner, (tap, position) in product(range(each_in), taps):
            channel = (out // each_out) * each_in + inner
            matrix[out * cells + cell, channel * plane + position] = number(weight[out][inner][tap])
    bias = _vector(layer.bias, outs, number)
    return Affine(matrix, np.repeat(bias, cells), weighted=True), (outs, rows, columns)


def _pool(layer: Any, shape: tuple[int, int, int], number: Number) -> tuple[Step, tuple[int, ...]]:
    rows, columns, windows = _windows(layer, shape, (1, 1))
    plane, cells = shape[1] * shape[2], rows * columns
    if isinstance(layer, nn.MaxPool2d):
        return Largest([[c * plane + p for _, p in taps] for c in range(shape[0]) for taps in windows]), (shape[0], rows, columns)
    kernel = _pair(layer.kernel_size)
    matrix = _empty(shape[0] * cells, shape[0] * plane, number)
    for channel, (cell, taps) in product(range(shape[0]), enumerate(windows)):
        for _, position in taps:
            matrix[channel * cells + cell, channel * plane + position] = number(1.0) / (kernel[0] * kernel[1])
    return Affine(matrix, _vector(None, shape[0] * cells, number), weighted=False), (shape[0], rows, columns)


def _step(layer: nn.Module, shape: tuple[int, ...], number: Number) -> tuple[Step | None, tuple[int, ...]]:
    size = int(np.prod(shape, dtype=int))
    if isinstance(layer, nn.Flatten):
        return None, (size,)
    if isinstance(layer, nn.Identity | nn.Dropout):
        return None, shape
    if isinstance(layer, nn.ReLU):
        return Relu(), shape
    if isinstance(layer, nn.Linear):
        matrix = _vector(layer.weight, 0, number).reshape(layer.out_features, layer.in_features)
        return Affine(matrix, _vector(layer.bias, layer.out_features, number), weighted=True, linear=True), (layer.out_features,)
    if isinstance(layer, nn.Conv2d):
        return _convolution(layer, (shape[0], shape[1], shape[2]), number)
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        layer = nn.AvgPool2d((shape[1], shape[2]))  # these tests only average whole planes
    if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
        return _pool(layer, (shape[0], shape[1], shape[2]), number)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        scale = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
        return _per_channel(scale, layer.bias.double() - layer.running_mean.double() * scale, shape, number), shape
    return _per_channel(layer.scale, layer.shift, shape, number), shape  # type: ignore[arg-type]


def steps(network: nn.Sequential, shape: tuple[int, int, int], number: Number = float) -> list[Step]:
    """The network on flattened values, layer by layer."""
    found: list[Step] = []
    now: tuple[int, ...] = shape
    for layer in network:
        step, now = _step(layer, now, number)
        found += [] if step is None else [step]
    return found


def numbers(x: Tensor, number: Number = float) -> Array:
    """One image as a flat array."""
    return _vector(x, 0, number)


def forward(path: list[Step], v: Array) -> Array:
    """Logits of one flat image."""
    return _through(path, v, v)[0]


def _through(path: list[Step], low: Array, high: Array) -> tuple[Array, Array]:
    for step in path:
        if isinstance(step, Affine):
            plus, minus = np.maximum(step.matrix, 0), np.minimum(step.matrix, 0)
            low, high = plus @ low + minus @ high + step.offset, plus @ high + minus @ low + step.offset
        elif isinstance(step, Relu):
            low, high = np.maximum(low, 0), np.maximum(high, 0)
        else:
            low, high = (np.array([max(v[i] for i in group) for group in step.groups]) for v in (low, high))
    return low, high


def margins_of_box(path: list[Step], low: Array, high: Array, target: int) -> list[Any]:
    """Lower bounds of ``f_target - f_c`` for every c on one box; a linear last layer is merged with the difference."""
    last = path[-1] if path else None
    if not isinstance(last, Affine) or not last.linear:
        low, high = _through(path, low, high)
        return [low[target] - high[c] if c != target else 0 for c in range(len(low))]
    low, high = _through(path[:-1], low, high)
    found = []
    for c in range(len(last.offset)):
        row = last.matrix[target] - last.matrix[c]
        found.append(np.maximum(row, 0) @ low + np.minimum(row, 0) @ high + last.offset[target] - last.offset[c])
    return found


def boxes(v: Array, shape: tuple[int, int, int], height: int, width: int, epsilon: Any = 1) -> Iterator[tuple[Array, Array]]:
    """One boxed copy of the image per patch location, row by row."""
    channels, rows, columns = shape
    for top, left in product(range(rows - height + 1), range(columns - width + 1)):
        low, high = v.copy(), v.copy()
        for channel, i, j in product(range(channels), range(height), range(width)):
            at = channel * rows * columns + (top + i) * columns + left + j
            low[at], high[at] = v[at] - epsilon * v[at], v[at] + epsilon * (1 - v[at])
        yield low, high


def patch_margins(
    path: list[Step], v: Array, shape: tuple[int, int, int], size: tuple[int, int], target: int, epsilon: Any = 1
) -> list[list[Any]]:
    """Per location the margins of every class."""
    return [margins_of_box(path, low, high, target) for low, high in boxes(v, shape, *size, epsilon)]


def sparse_margins(
    path: list[Step], v: Array, shape: tuple[int, int, int], k: int, unit: str, target: int, epsilon: Any = 1
) -> list[Any]:
    """Margins of every class when the k entries with the largest gains change, each neuron choosing its own."""
    matrix, offset, used = np.eye(len(v), dtype=v.dtype), 0 * v, 0
    for used, step in enumerate(path, 1):  # noqa: B007
        assert isinstance(step, Affine)
        matrix, offset = step.matrix @ matrix, step.matrix @ offset + step.offset
        if step.weighted:
            break
    plane = shape[1] * shape[2]
    low, high = [], []
    for row, shift in zip(matrix, offset, strict=True):
        up: dict[int, Any] = {}
        down: dict[int, Any] = {}
        for at, (w, value) in enumerate(zip(row, v, strict=True)):
            group = at % plane if unit == "pixel" else at
            up[group] = up.get(group, 0) + max(w * (1 - value), -w * value)
            down[group] = down.get(group, 0) + max(w * value, -w * (1 - value))
        clean = row @ v + shift
        low.append(clean - epsilon * sum(sorted(down.values(), reverse=True)[:k]))
        high.append(clean + epsilon * sum(sorted(up.values(), reverse=True)[:k]))
    return margins_of_box(path[used:], np.array(low), np.array(high), target)
