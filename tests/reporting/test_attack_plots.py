"""Plots of attacks: accuracy over queries, and one attacked image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from patchcert_cli.errors import UsageError
from patchcert_cli.reporting import attack_plots, figure_style

pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure that is made."""
    found, real = [], figure_style.blank_figure

    @contextmanager
    def recorded(*size: float, **settings: Any) -> Iterator[Any]:
        with real(*size, **settings) as figure:
            found.append(figure)
            yield figure

    monkeypatch.setattr(figure_style, "blank_figure", recorded)
    return found


def result(name: str, curve: list[list[int]] | None, **more: Any) -> dict[str, Any]:
    about = {
        "model": "m",
        "dataset": "mnist",
        "split": "test",
        "images": 10,
        "threat": "patch:5x5",
        "records": "runs/x/records.jsonl",
    }
    claims = [{"certified_accuracy": 0.2}]
    counted = {} if curve is None else {"curve": curve}
    return {**about, "counts": {"clean": 9}, "attack": {"name": name}, "claims": claims, **counted, **more}


def test_a_line_falls_where_images_are_flipped(tmp_path: Path, drawn: list[Any]) -> None:
    runs = [result("a,b", [[4, 1], [90, 3], [500, 3]]), result("c", [[7, 0]], claims=[])]
    attack_plots.queries(runs, tmp_path / "q.png")
    (axes,) = drawn[0].axes
    first, second, floor = axes.get_lines()[-3:]
    assert list(first.get_xdata()) == [1, 4, 90, 500] and first.get_ydata() == pytest.approx([90, 80, 60, 60])
    assert second.get_ydata() == pytest.approx([90, 90]) and first.get_drawstyle() == "steps-post"
    assert [line.get_label() for line in (first, second, floor)] == ["a + b", "c", "certified, 20.0 %"]
    again = (tmp_path / "q.png").read_bytes()
    attack_plots.queries(runs, tmp_path / "q.png")
    assert (tmp_path / "q.png").read_bytes() == again


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (result("b", [[1, 0]], threat="patch:2x2"), "different threats"),
        (result("b", [[1, 0]], images=11), "different images"),
        (result("b", None), r"'runs/x' do not say at which query"),
    ],
)
def test_runs_that_make_no_plot_are_refused(tmp_path: Path, other: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        attack_plots.queries([result("a", [[1, 0]]), other], tmp_path / "q.png")
    assert not (tmp_path / "q.png").exists()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flipped", [True, False])
def test_an_image_its_change_and_their_difference(tmp_path: Path, drawn: list[Any], channels: int, flipped: bool) -> None:
    clean = torch.full((channels, 8, 6), 0.4)
    adversarial = clean.clone()
    adversarial[:, 2:4, 1:3] = 1.0
    values = {
        "image": "x/one.png",
        "class": "cat",
        "model": "m",
        "threat": "patch:2x2",
        "attack": {"name": "PatchPGD"},
        "claims": [],
    }
    values |= {"flipped": flipped, "attacked_class": "dog", "flipped_at": 7, "queries": 9, "changed": [2, 1, 2, 2]}
    attack_plots.attacked_image(values, clean, adversarial if flipped else clean, tmp_path / "map.png")
    panels = drawn[0].axes
    titles = [axes.get_title() for axes in panels]
    assert titles == [
        "clean: cat",
        *(["adversarial: dog", "difference, at most 0.6"] if flipped else ["no flip found", "difference, at most 0"]),
    ]
    difference = panels[2].images[0].get_array()
    assert int(difference[0, 0].max()) == 128 and (int(difference[2, 1].max()) == 204) is flipped
    assert len(panels[1].patches) == flipped
    with pytest.raises(UsageError, match="2 channels cannot be drawn"):
        attack_plots.attacked_image(values, clean[:1].repeat(2, 1, 1), clean[:1].repeat(2, 1, 1), tmp_path / "map.png")
