"""Linear bounds that are wrong in one known way, each with threats against which that shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli.certifiers.bounds.linear import linear, relaxations
from patchcert_cli.certifiers.bounds.linear.linear import Engine, Query
from patchcert_cli.certifiers.bounds.linear.relaxations import Form
from patchcert_cli.threats import Patch, Sparse

Attack = Patch | Sparse
THREATS: list[Attack] = [Patch(1, 1), Patch(2, 2), Patch(1, 3), Sparse(1), Sparse(2), Sparse(2, "value")]
Break = Callable[[pytest.MonkeyPatch], None]


def intercept_sign_flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    original = relaxations._relu

    def flipped(bounds: Any, owner: Tensor, form: Form, slope: Any) -> Form:
        after = original(bounds, owner, form, slope)
        return Form(after.weight, 2 * form.offset - after.offset)

    monkeypatch.setattr(relaxations, "_relu", flipped)


def first_location_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The union is replaced by the box of each group's first location."""
    original = Engine._unions

    def first(self: Engine, query: Query, limit: int) -> Any:
        keep = torch.cat([query.group.new_ones(1), query.group.diff()]) > 0
        short = Query(query.image, query.group[keep], query.location[keep], query.owner, query.rival)
        return original(self, short, limit)

    monkeypatch.setattr(Engine, "_unions", first)


def intersection_for_union(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Engine._unions

    def narrowed(self: Engine, query: Query, limit: int) -> Any:
        found = original(self, query, limit)
        return {index: ((3 * low + high) / 4, (low + 3 * high) / 4) for index, (low, high) in found.items()}

    monkeypatch.setattr(Engine, "_unions", narrowed)


def window_one_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(self: linear.PatchSource, least: Tensor) -> Tensor:
        height, width = max(self.patch.height - 1, 1), self.patch.width
        rows = least.shape[2] - self.patch.height + height
        return linear.window_sums(least[:, :, :rows], Patch(height, width))

    monkeypatch.setattr(linear.PatchSource, "change", change)


def box_of_a_smaller_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = linear.PatchSource.boxes

    def boxes(self: linear.PatchSource, image: Tensor, location: Tensor) -> Any:
        low, high = original(self, image, location)
        middle = (low + high) / 2
        return (low + middle) / 2, (high + middle) / 2

    monkeypatch.setattr(linear.PatchSource, "boxes", boxes)


def one_pixel_less(monkeypatch: pytest.MonkeyPatch) -> None:
    original = linear.SparseSource.change

    def change(self: linear.SparseSource, least: Tensor) -> Tensor:
        return original(self, least) - original(self, least) / self.threat.k

    monkeypatch.setattr(linear.SparseSource, "change", change)


def values_for_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(self: linear.SparseSource, least: Tensor) -> Tensor:
        return least.flatten(1).topk(self.threat.k, dim=1, largest=False).values.sum(dim=1, keepdim=True)

    monkeypatch.setattr(linear.SparseSource, "change", change)


def lines_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    original = relaxations._relu

    def swapped(bounds: Any, owner: Tensor, form: Form, slope: Any) -> Form:
        after = original(bounds, owner, Form(-form.weight, -form.offset), slope)
        return Form(-after.weight, -after.offset)

    monkeypatch.setattr(relaxations, "_relu", swapped)


def dark_pixels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attacker is thought to switch pixels off only."""
    original = Engine._evaluate

    def evaluate(self: Engine, query: Query, boxes: Any, slope: Any) -> Tensor:
        change = self.source.change
        x = self.x[query.image[query.owner]]
        self.source.change = lambda least: change(least * (x > 0.5))  # type: ignore[method-assign]
        found = original(self, query, boxes, slope)
        self.source.change = change  # type: ignore[method-assign]
        return found

    monkeypatch.setattr(Engine, "_evaluate", evaluate)


BREAKS: dict[str, tuple[Break, list[Attack]]] = {
    "intercept sign flipped": (intercept_sign_flipped, THREATS),
    "first location for all": (first_location_for_all, [Patch(1, 1), Patch(2, 2)]),
    "boxes too narrow": (intersection_for_union, THREATS),
    "window one short": (window_one_short, [Patch(2, 2)]),
    "box of half the patch": (box_of_a_smaller_patch, [Patch(1, 1), Patch(2, 2)]),
    "one pixel less": (one_pixel_less, [Sparse(2)]),
    "values for pixels": (values_for_pixels, [Sparse(1), Sparse(2)]),
    "lines swapped": (lines_swapped, THREATS),
    "dark pixels only": (dark_pixels_only, THREATS),
}
