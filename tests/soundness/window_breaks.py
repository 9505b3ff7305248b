"""Windows that are wrong in one known way, to show that the soundness checks would see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from patchcert_cli.certifiers.bounds import margin_chunks
from patchcert_cli.certifiers.bounds.windows import patch_windows
from patchcert_cli.certifiers.bounds.windows.patch_windows import SlidingAxis, WindowBatch
from patchcert_cli.certifiers.bounds.windows.windows import DeviationBox, Windows

from .breaks import Break


def _touched(change: Callable[[SlidingAxis, int, int], tuple[int, int]]) -> Break:
    """Which outputs see a window is told wrongly."""
    original = SlidingAxis.touched

    def touched(self: SlidingAxis, start: int, side: int, *, clip: bool) -> tuple[int, int]:
        first, count = original(self, start, side, clip=clip)
        return change(self, first, count) if self.extent > 1 else (first, count)

    return lambda monkeypatch: monkeypatch.setattr(SlidingAxis, "touched", touched)


def padding_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are found as if no layer padded its input."""
    original = SlidingAxis.touched
    monkeypatch.setattr(SlidingAxis, "touched", lambda self, *args, clip: original(replace(self, padding=0), *args, clip=clip))


def borders_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last cell of each map is left out of every window."""
    original = SlidingAxis.touched

    def touched(self: SlidingAxis, start: int, side: int, *, clip: bool) -> tuple[int, int]:
        first, count = original(self, start, side, clip=clip)
        return first, max(0, min(count, self.size - 1 - first))

    monkeypatch.setattr(SlidingAxis, "touched", touched)


def other_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean activations are taken from the next row and column."""
    original = WindowBatch.cells
    monkeypatch.setattr(WindowBatch, "cells", lambda self, *args: original(replace(self, first=self.first + 1), *args))


def other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean activations are taken from another image."""
    original = Windows._gather
    monkeypatch.setattr(Windows, "_gather", lambda self, at, cells, name: original(self, at, cells.roll(1, dims=0), name))


def _pixels(change: Callable[[DeviationBox], DeviationBox]) -> Break:
    original = Windows._pixels
    return lambda monkeypatch: monkeypatch.setattr(Windows, "_pixels", lambda *args: change(original(*args)))


def phases_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All windows of a chunk are thought to lie like its first."""
    original = patch_windows.aligned_groups

    def first_only(offset: torch.Tensor) -> list[Any]:
        return [replace(original(offset)[0], pairs=slice(0, offset.shape[1]))]

    monkeypatch.setattr(patch_windows, "aligned_groups", first_only)
    monkeypatch.setattr(margin_chunks, "FEW", 10**9)


def signed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The radius is multiplied by the weight instead of its magnitude."""
    original = Windows._weights.func  # type: ignore[attr-defined]
    monkeypatch.setattr(Windows, "_weights", property(lambda self: {key: (w, w) for key, (w, _) in original(self).items()}))


def clean_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a ReLU the radius is that in front of it where the clean value is positive, as if no neuron changed sides."""
    original = Windows._rectify

    def rectify(self: Windows, field: DeviationBox, at: int, batch: WindowBatch, t: int) -> DeviationBox:
        alive = (self._gather(at, batch.cells(t), "alive") > 0).to(field.deviation.dtype)
        deviation, radius = field.deviation.clone(), field.radius.clone()
        original(self, field, at, batch, t)
        return DeviationBox(deviation * alive, radius * alive)

    monkeypatch.setattr(Windows, "_rectify", rectify)


def no_slack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is said to be nothing."""
    original = margin_chunks.errors
    monkeypatch.setattr(margin_chunks, "errors", lambda *args: replace(original(*args), single=0 * original(*args).single - 0.05))


WINDOW_BREAKS: dict[str, Break] = {
    "window one pixel short at its end": _touched(lambda slide, first, count: (first, max(count - 1, 0))),
    "window one pixel short at its beginning": _touched(lambda slide, first, count: (first + 1, max(count - 1, 0))),
    "window one pixel too far": _touched(lambda slide, first, count: (first + (first + count < slide.size), count)),
    "padding forgotten": padding_forgotten,
    "last cell of each map forgotten": borders_cut,
    "clean values of another image": other_images,
    "clean values of another cell": other_cells,
    "the patch keeps its brightness": _pixels(lambda field: replace(field, deviation=0 * field.deviation)),
    "phases of strides mixed up": phases_mixed,
    "radius with signed weights": signed_weights,
    "neurons stay on their side": clean_only,
    "rounding of the wrong sign": no_slack,
}
