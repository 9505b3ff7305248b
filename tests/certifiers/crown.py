"""Linear bounds the slow way: one location after the other, every layer as a matrix, every ReLU by itself.

Nothing of the package is called here; layers become matrices in ``reference.py``. Shapes: C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import reference
from .reference import Affine, Array, Relu, Step

Slope = Callable[[float, float], float]
Ends = tuple[Array, Array]


def never(low: float, high: float) -> float:
    return 0.0


def larger_side(low: float, high: float) -> float:
    return 1.0 if high > -low else 0.0


SLOPES: tuple[Slope, ...] = (never, larger_side)


def trace(path: list[Step], low: Array, high: Array) -> list[Ends]:
    """What enters each layer."""
    found = []
    for step in path:
        found.append((low, high))
        low, high = reference._through([step], low, high)
    return found


def union(traces: list[list[Ends]]) -> list[Ends]:
    """For each layer the box that holds the boxes of all traces."""
    each = zip(*traces, strict=True)
    return [(np.min([low for low, _ in ends], axis=0), np.max([high for _, high in ends], axis=0)) for ends in each]


def pull(path: list[Step], boxes: list[Ends], row: Array, slope: Slope) -> tuple[Array, float]:
    """``<row, output> >= <A, input> + c`` on the boxes: A and c."""
    weight, constant = row, 0.0
    for step, (low, high) in reversed(list(zip(path, boxes, strict=True))):
        if isinstance(step, Affine):
            weight, constant = weight @ step.matrix, constant + weight @ step.offset
        elif isinstance(step, Relu):
            after = np.zeros(len(low))
            for n, w in enumerate(weight):
                if low[n] >= 0:
                    after[n] = w
                elif high[n] > 0:
                    if w >= 0:
                        after[n] = w * slope(low[n], high[n])
                    else:
                        chord = high[n] / (high[n] - low[n])
                        after[n], constant = w * chord, constant - w * chord * low[n]
            weight = after
        else:
            after = np.zeros(len(low))
            for w, group in zip(weight, step.groups, strict=True):
                if w >= 0:
                    after[max(group, key=lambda i: low[i])] += w
                else:
                    constant += w * max(high[i] for i in group)
            weight = after
    return weight, constant


def least(weight: Array, v: Array) -> Array:
    """The smallest change of each entry's product as the entry moves in [0, 1]."""
    return np.minimum(weight * (1 - v), -weight * v)


def patch_bounds(
    path: list[Step], v: Array, shape: tuple[int, int, int], size: tuple[int, int], target: int, side: int, slope: Slope
) -> Array:
    """Margins [A, K] at every location, with a relaxation for each tile of ``side`` x ``side`` locations (0: one for all)."""
    ends = list(reference.boxes(v, shape, *size))
    across = shape[2] - size[1] + 1
    groups: dict[tuple[int, int], list[int]] = {}
    for index in range(len(ends)):
        key = (index // across // side, index % across // side) if side else (0, 0)
        groups.setdefault(key, []).append(index)
    classes = len(reference.forward(path, v))
    found = np.full((len(ends), classes), np.inf)
    for members in groups.values():
        boxes = union([trace(path, *ends[index]) for index in members])
        for rival in range(classes):
            if rival != target:
                weight, constant = pull(path, boxes, np.eye(classes)[target] - np.eye(classes)[rival], slope)
                for index in members:
                    moved = ends[index][0] != ends[index][1]
                    found[index, rival] = weight @ v + constant + least(weight, v)[moved].sum()
    return found


def sparse_bounds(path: list[Step], v: Array, shape: tuple[int, int, int], k: int, unit: str, target: int, slope: Slope) -> Array:
    """Margins [K] if k pixels or values change."""
    plane = shape[1] * shape[2]
    used = next(number for number, step in enumerate(path, 1) if isinstance(step, Affine) and step.weighted)
    matrix, offset = np.eye(len(v)), 0 * v
    for step in path[:used]:
        assert isinstance(step, Affine)
        matrix, offset = step.matrix @ matrix, step.matrix @ offset + step.offset

    def lowest(weight: Array) -> float:
        change = least(weight, v)
        if unit == "pixel":
            change = change.reshape(shape[0], plane).sum(axis=0)
        return float(np.sort(change)[:k].sum())

    low = np.array([row @ v + shift + lowest(row) for row, shift in zip(matrix, offset, strict=True)])
    high = np.array([row @ v + shift - lowest(-row) for row, shift in zip(matrix, offset, strict=True)])
    boxes = [(v, v)] * used + trace(path[used:], low, high)
    classes = len(reference.forward(path, v))
    found = np.full(classes, np.inf)
    for rival in range(classes):
        if rival != target:
            weight, constant = pull(path, boxes, np.eye(classes)[target] - np.eye(classes)[rival], slope)
            found[rival] = weight @ v + constant + lowest(weight)
    return found
