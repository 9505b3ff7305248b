"""The benchmark for a GPU, at a tiny size on the CPU: it keeps its time, and says what it did not measure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from patchcert_cli.errors import UsageError


def given(folder: Path, **options: Any) -> argparse.Namespace:
    asked = {"minutes": 0.05, "device": "cpu", "data_dir": None, "images": 4, "out": folder, "only": "", "small": True}
    return argparse.Namespace(**{**asked, **options})


def test_every_line_is_measured_at_a_tiny_size(tmp_path: Path) -> None:
    text = gpu.run(given(tmp_path, minutes=10.0))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (tmp_path / "gpu.md").read_text() == text
    assert all(row["count"] > 0 and row["seconds"] > 0 for row in found["rows"]), found["rows"]
    published = {row["what"]: row["published"] for row in found["rows"] if row["published"] is not None}
    assert list(published.values()) == [39.0, 40.6, 43.2, 45.9, 48.5, 28.0, 788.0]
    assert len(found["rows"]) == len(list(gpu.lines(small=True))) == text.count("\n| ") - 2


def test_as_many_images_as_fit_are_measured_and_memory_halves_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, clock, sizes = gpu.Bench(torch.zeros(100, 1), torch.device("cpu"), small=True, ends=10.0), [0.0], []
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])

    def work(x: torch.Tensor) -> None:
        if len(x) > 8:
            raise torch.OutOfMemoryError
        sizes.append(len(x))
        clock[0] += 0.1 * len(x)

    count, seconds = bench.over(work, bench.x)
    assert sizes[:5] == [2, 1, 2, 4, 8] and max(sizes) == 8  # the first is not timed
    assert count == sum(sizes[1:]) < 100 and seconds == pytest.approx(0.1 * count)
    assert 8.0 < clock[0] <= 10.0, clock
    bench.ends = 1e9
    assert bench.over(work, bench.x)[0] == 100


def test_what_no_time_is_left_for_and_what_fails_is_a_line_without_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bench: gpu.Bench) -> gpu.Row:
        raise torch.OutOfMemoryError("out of memory | of the GPU")

    clock = iter([0.0, 0.0, 0.0, *[1e6] * 9])
    monkeypatch.setattr(gpu, "lines", lambda small: iter([("one", fails), ("two", fails)]))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    lines = gpu.run(given(tmp_path)).splitlines()
    assert lines[4] == "| one | 0 images | 0 | - | - | out of memory / of the GPU |"
    assert lines[5] == "| two | 0 images | 0 | - | - | no time left |"


@pytest.mark.parametrize("options", [{"images": 0}, {"minutes": 0.0}, {"only": "nothing"}])
def test_bad_use_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        gpu.run(given(tmp_path, **options))
