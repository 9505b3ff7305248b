"""Pictures: what is drawn is what the rows and margins say; equal input gives equal bytes; clear errors before any work.

Texts are looked for in SVG files, where each is named in a comment; positions are read from the figure as it is saved.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from patchcert_cli.certificate import clopper_pearson
from patchcert_cli.errors import MachineError, PatchcertError, UsageError
from patchcert_cli.reporting import figure_style, margin_maps, plots
from patchcert_cli.threats import Patch

Row = dict[str, Any]
interval = cache(clopper_pearson)


def row(threat: str, method: str, certified: int, *, images: int = 1000, clean: int = 850) -> Row:
    return {
        "threat": threat,
        "method": method,
        "images": images,
        "clean": clean,
        "certified": certified,
        "certified_interval": list(interval(certified, images)),
    }


SQUARE = [
    row(f"patch:{side}x{side}", method, 800 - loss * side)
    for side in (1, 3, 5)
    for method, loss in (("condition 3.2", 60), ("additive", 80))
]
OBLONG = [row(f"patch:{side}", "additive", 500 - 10 * i) for i, side in enumerate(("5x5", "12x2", "1x25", "2x12", "25x1", "3x8"))]


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure, as it is saved."""
    figures: list[Figure] = []
    original = Figure.savefig

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        original(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def texts(path: Path) -> list[str]:
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def pixels(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[H, W, 3], 0 to 255."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert not {"Software", "Creation Time", "date"} & set(image.info)
        return np.asarray(image.convert("RGB")).astype(np.int64)


def drawn(path: Path) -> None:
    """A picture of a sensible size: white around the edge, something but not too much in between."""
    found = pixels(path)
    assert 300 <= found.shape[0] <= 2400 and 1000 <= found.shape[1] <= 3000
    assert all((edge == 255).all() for edge in (found[0], found[-1], found[:, 0], found[:, -1]))
    assert 0.01 < (found != 255).any(axis=2).mean() < 0.8


@pytest.mark.parametrize(
    "rows",
    [
        SQUARE,
        OBLONG,
        SQUARE[:1],
        OBLONG[1:2],
        [row(f"patch:{side}x{side}", method, 0) for side in (2, 4) for method in "ab"],
        [row("patch:2x2", "additive", 850), row("patch:4x4", "additive", 1000, clean=1000)],
        [row("patch:5x5", "additive", 0, images=1, clean=0)],
        [row(f"patch:{side}x{side}", f"method {i}", 700 - 5 * i * side) for side in range(1, 14, 2) for i in range(8)],
        [row(f"patch:{side}x{50 - side}", f"m{i}", 300) for side in range(1, 50, 2) for i in range(2)],
        [row(f"sparse:{k}", "gains", 800 - 9 * k) for k in (1, 10, 50)],
    ],
    ids=["square", "oblong", "one square", "one oblong", "zero", "clean varies", "one image", "legend", "many shapes", "sparse"],
)
def test_charts_are_valid_pngs(tmp_path: Path, rows: list[Row]) -> None:
    plots.plot(rows, tmp_path / "new" / "plot.png", title="cifar10-bagcert-p5: certified accuracy\ncifar10 test")
    drawn(tmp_path / "new" / "plot.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plot.png"]


def test_a_curve_shows_sides_counts_and_intervals(tmp_path: Path, saved: list[Figure]) -> None:
    plots.plot(SQUARE[::-1], tmp_path / "curve.svg", title="costs $5 and $6\ncifar10 test")
    found = texts(tmp_path / "curve.svg")
    assert {"costs $5 and $6", "cifar10 test", "patch side, pixels", "accuracy, %"} <= set(found)
    assert any("one square patch" in text and "n = 1,000 images" in text and "95 %" in text for text in found)
    assert {"clean, 85.0 %", "certified, condition 3.2", "certified, additive"} <= set(found)
    (axes,) = saved[0].axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert set(lines["clean, 85.0 %"].get_ydata()) == {85.0}
    for method, collection in zip(("additive", "condition 3.2"), axes.collections, strict=True):
        mine = [entry for entry in SQUARE if entry["method"] == method]
        assert lines[f"certified, {method}"].get_xydata().tolist() == [
            [side, pytest.approx(entry["certified"] / 10)] for side, entry in zip((1, 3, 5), mine, strict=True)
        ]
        ends = {(side, end) for side, entry in zip((1, 3, 5), mine, strict=True) for end in entry["certified_interval"]}
        corners = {(x, round(y, 6)) for x, y in collection.get_paths()[0].vertices.tolist()}
        assert {(side, round(100 * end, 6)) for side, end in ends} <= corners


def test_shapes_go_from_wide_to_tall_with_exact_bars(tmp_path: Path, saved: list[Figure]) -> None:
    plots.plot(OBLONG, tmp_path / "shapes.svg", title="aspect ratios")
    found = texts(tmp_path / "shapes.svg")
    assert [text for text in found if re.fullmatch(r"\d+x\d+", text)] == ["1x25", "2x12", "3x8", "5x5", "12x2", "25x1"]
    assert any("one patch of 24 to 25 pixels" in text for text in found)
    (axes,) = saved[0].axes
    (bars,) = (collection for collection in axes.collections if isinstance(collection, LineCollection))
    order = [2, 3, 5, 0, 1, 4]
    for place, (segment, i) in enumerate(zip(bars.get_segments(), order, strict=True)):
        assert [place, place] == segment[:, 0].tolist()
        assert sorted(segment[:, 1]) == pytest.approx([100 * end for end in OBLONG[i]["certified_interval"]])


def test_methods_stand_beside_each_other_over_a_shape(tmp_path: Path, saved: list[Figure]) -> None:
    plots.shapes([row("patch:2x3", method, 400) for method in "ab"], tmp_path / "shapes.png", title="two")
    (axes,) = saved[0].axes
    places = [float(line.get_xdata()[0]) for line in axes.lines if str(line.get_label()).startswith("certified")]
    assert places == sorted(places) and 0 < places[1] - places[0] < 0.5 and sum(places) == pytest.approx(0)


def test_texts_lie_inside_the_plot_and_a_single_line_has_its_values(tmp_path: Path, saved: list[Figure]) -> None:
    rows = [row(f"patch:{side}x{side}", f"a long name of a method {i}", 10 * i) for side in (1, 2, 3) for i in range(7)]
    plots.curve(rows, tmp_path / "curve.png", title="long " * 40)
    plots.curve(SQUARE[1::2], tmp_path / "curve.png", title="one method")
    for figure in saved:
        legend = figure.axes[0].get_legend()
        assert legend is not None
        boxes = [Text.get_window_extent(text) for text in (*figure.axes[0].texts, *figure.texts, *legend.get_texts())]
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height for box in boxes)
    assert [text.get_text() for text in saved[1].axes[0].texts] == ["72.0", "56.0", "40.0"] and not saved[0].axes[0].texts


def test_sixty_looks_differ() -> None:
    looks = {(look.color, look.marker) for look in map(figure_style.Look, range(60))}
    assert len(looks) == 60 and len({figure_style.Look(i).color for i in range(10)}) == 10


@pytest.mark.parametrize(
    ("draw", "rows", "message"),
    [
        (plots.plot, [], "no result"),
        (plots.curve, [], "no result"),
        (plots.shapes, [], "no result"),
        (plots.curve, OBLONG, "no side"),
        (plots.curve, [row("patch:2x2", "a", 1), row("sparse:3", "a", 1)], "different kinds"),
        (plots.curve, [row("sparse:2:value", "a", 1), row("sparse:3", "a", 1)], "different kinds"),
        (plots.shapes, [row("sparse:3", "a", 1)], "aspect ratio"),
        (plots.shapes, [row("patch:2%", "a", 1)], "aspect ratio"),
    ],
)
def test_rows_that_make_no_chart(tmp_path: Path, draw: Callable[..., None], rows: list[Row], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(rows, tmp_path / "plot.png", title="none")
    assert list(tmp_path.iterdir()) == []


def margins(shift: float, height: int = 24, width: int = 24) -> Tensor:
    """float64 [height, width]: a bowl from ``shift`` at its bottom up to some 30 more."""
    top, left = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((top - 9) ** 2 + (left - 13) ** 2).double().div(10).floor().clamp(max=30) + shift


def shades(path: Path) -> tuple[int, int]:
    """How many pixels are blue and how many red (the orange frame is neither)."""
    red, green, blue = pixels(path).transpose(2, 0, 1)
    return int((blue - red > 60).sum()), int(((red - green > 60) & (abs(green - blue) < 55)).sum())


@pytest.mark.parametrize(("shift", "blue", "red", "edges"), [(5, True, False, 0), (-40, False, True, 0), (-20, True, True, 1)])
def test_a_map_is_blue_where_the_patch_is_harmless(
    tmp_path: Path, saved: list[Figure], shift: float, blue: bool, red: bool, edges: int
) -> None:
    image, values = torch.full((1, 28, 28), 90, dtype=torch.uint8), margins(shift)
    margin_maps.margin_map(image, values, tmp_path / "map.png", title="image 3", box=(9, 13, 5, 5), patch=Patch(5, 5))
    drawn(tmp_path / "map.png")
    assert tuple(count > 1000 for count in shades(tmp_path / "map.png")) == (blue, red)
    picture, chart, scale = saved[0].axes
    low, high = scale.get_ylim()
    assert (low, high) == (min(0, float(values.min())), max(0, float(values.max())))
    assert chart.images[0].get_clim() == (-float(values.abs().max()), float(values.abs().max()))
    (border,) = (collection for collection in chart.collections if isinstance(collection, LineCollection))
    safe = values > 0
    wanted = int((safe[1:] != safe[:-1]).sum() + (safe[:, 1:] != safe[:, :-1]).sum())
    assert len(border.get_segments()) == wanted and (wanted > 0) == bool(edges)
    for segment in border.get_segments():  # between one location above 0 and one that is not
        (x0, y0), (x1, y1) = segment.tolist()
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        sides = [(y, x - 0.5), (y, x + 0.5)] if x0 == x1 else [(y - 0.5, x), (y + 0.5, x)]
        assert {bool(safe[int(i), int(j)]) for i, j in sides} == {False, True}
    assert {tuple(line.get_xydata()[0]) for line in chart.lines} == {(13, 9)}
    (frame,) = picture.patches
    assert frame.get_extents().bounds == pytest.approx(picture.transData.transform_bbox(frame_box(9, 13, 5, 5)).bounds)
    assert picture.bbox.bounds[2:] == pytest.approx(chart.bbox.bounds[2:])
    assert (picture.get_xlim(), picture.get_ylim()) == (chart.get_xlim(), chart.get_ylim()) == ((-0.5, 27.5), (27.5, -0.5))


def frame_box(top: int, left: int, height: int, width: int) -> Bbox:
    return Bbox([[left - 0.5, top + height - 0.5], [left + width - 0.5, top - 0.5]])


def test_a_map_says_how_many_locations_are_harmless(tmp_path: Path) -> None:
    values = margins(-20)
    image = torch.zeros(3, 28, 28, dtype=torch.uint8)
    margin_maps.margin_map(image, values, tmp_path / "map.svg", title="x", box=(9, 13, 5, 5), patch=Patch(5, 5), unit="logits")
    found = " ".join(texts(tmp_path / "map.svg"))
    assert f"{int((values > 0).sum())} of 576 locations" in found
    assert "smallest margin \N{MINUS SIGN}20 logits, at row 9, column 13" in found and "margin, logits" in found


def test_pixels_stay_crisp_and_in_their_place(tmp_path: Path, saved: list[Figure]) -> None:
    image = torch.randint(256, (3, 12, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    margin_maps.margin_map(image, margins(1, 9, 16), tmp_path / "map.png", title="x", box=(8, 13, 4, 5), patch=Patch(4, 5))
    found, box = pixels(tmp_path / "map.png"), saved[0].axes[0].bbox
    side = int(3.6 * figure_style.DPI) // 20
    left, top = round(box.x0), round(len(found) - box.y1)
    assert (round(box.width), round(box.height)) == (20 * side, 12 * side)
    block = found[top : top + 12 * side, left : left + 20 * side].reshape(12, side, 20, side, 3)[:7]  # above the frame
    inner = block[1:, 3:-3, 1:-1, 3:-3]
    assert (inner == image.permute(1, 2, 0).numpy()[1:7, None, 1:-1, None]).all()


@pytest.mark.parametrize(
    ("shape", "patch", "values"),
    [
        ((1, 8, 40), Patch(3, 3), None),
        ((3, 40, 8), Patch(3, 3), None),
        ((3, 224, 224), Patch(32, 32), None),
        ((1, 28, 28), Patch(28, 28), None),
        ((1, 1, 1), Patch(1, 1), None),
        ((1, 28, 28), Patch(5, 5), 0.0),
        ((1, 28, 28), Patch(5, 5), float("inf")),
        ((1, 28, 28), Patch(5, 5), float("nan")),
    ],
    ids=str,
)
def test_maps_of_all_sizes_and_values(tmp_path: Path, shape: tuple[int, int, int], patch: Patch, values: float | None) -> None:
    rows, columns = shape[1] - patch.height + 1, shape[2] - patch.width + 1
    field = margins(-3, rows, columns) if values is None else torch.full((rows, columns), values)
    image = torch.full(shape, 200, dtype=torch.uint8)
    box = (rows - 1, columns - 1, patch.height, patch.width)
    margin_maps.margin_map(image, field, tmp_path / "map.png", title="image 3", box=box, patch=patch)
    drawn(tmp_path / "map.png")


@pytest.mark.parametrize(("shape", "side"), [((1, 28, 28), 4), ((2, 28, 28), 5), ((1, 28, 29), 5)])
def test_a_map_that_does_not_fit_is_refused(tmp_path: Path, shape: tuple[int, int, int], side: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        margin_maps.margin_map(
            torch.zeros(shape, dtype=torch.uint8),
            margins(1),
            tmp_path / "map.png",
            title="x",
            box=(0, 0, side, side),
            patch=Patch(side, side),
        )


@pytest.mark.parametrize("ending", [".PNG", ".pdf", ".svg"])
def test_equal_input_gives_equal_bytes_whatever_the_settings(tmp_path: Path, ending: str) -> None:
    image, values = torch.full((1, 28, 28), 90, dtype=torch.uint8), margins(-20)
    for name in "ab":
        with matplotlib.rc_context({"font.size": 10 + 10 * (name == "b"), "savefig.transparent": name == "b"}):
            before = dict(matplotlib.rcParams)
            plots.plot(SQUARE, tmp_path / f"curve-{name}{ending}", title="curve")
            margin_maps.margin_map(
                image, values, tmp_path / f"map-{name}{ending}", title="map", box=(9, 13, 5, 5), patch=Patch(5, 5)
            )
            assert dict(matplotlib.rcParams) == before
    for kind in ("curve", "map"):
        first, second = ((tmp_path / f"{kind}-{name}{ending}").read_bytes() for name in "ab")
        assert first == second
        assert not re.search(rb"20\d\d-\d\d-\d\d|CreationDate|Software", first)


def test_another_process_draws_the_same_without_pyplot_or_torch(tmp_path: Path) -> None:
    plots.plot(OBLONG, tmp_path / "here.pdf", title="shapes")
    program = (
        "import sys, pathlib; from patchcert_cli.reporting import plots; early = set(sys.modules)\n"
        f"plots.plot({OBLONG!r}, pathlib.Path('there.pdf'), title='shapes')\n"
        "print({'matplotlib', 'torch'} & early, {'matplotlib.pyplot', 'torch'} & set(sys.modules))"
    )
    environment = {
        "PYTHONHASHSEED": "7",
        "MPLCONFIGDIR": matplotlib.get_configdir(),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set() set()\n", "")
    assert len({hashlib.sha256((tmp_path / f"{name}.pdf").read_bytes()).digest() for name in ("here", "there")}) == 1


def one_line(problem: PatchcertError) -> str:
    assert "\n" not in str(problem) and problem.code == 2
    return str(problem)


def test_without_matplotlib_the_hint_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots.require()
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for draw in (plots.require, lambda: plots.plot(SQUARE, tmp_path / "plot.png", title="none")):
        with pytest.raises(MachineError) as raised:
            draw()
        assert (
            raised.value.code == 7 and "matplotlib" in str(raised.value) and "pip install 'patchcert[plots]'" in raised.value.hint
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["plot.jpg", "plot", "plot.png.txt", ".png", "plot.gif"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as raised:
        plots.check_path(tmp_path / name)
    assert all(ending in one_line(raised.value) for ending in (".png", ".pdf", ".svg"))
    with pytest.raises(UsageError, match="must end in"):
        plots.plot(SQUARE, tmp_path / name, title="none")


def test_places_that_cannot_be_written_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path, message in ((tmp_path / "file" / "plot.png", "is a file"), (tmp_path / "folder.png", "is a folder")):
        with pytest.raises(UsageError, match=message) as raised:
            plots.check_path(path)
        one_line(raised.value)
    plots.check_path(tmp_path / "a" / "b" / "plot.SVG")
    monkeypatch.chdir(tmp_path)
    plots.check_path(Path("plot.pdf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
    with pytest.raises(MachineError, match="nothing can be written into"):
        plots.check_path(Path("/proc/plot.png"))


LEVELS = [
    {"threshold": at, "threat": "patch:32x32", "images": 20, "alarms": alarms, "clean": 19 - alarms, "certified": certified}
    for at, alarms, certified in ((0.0, 11, 8), (0.5, 4, 7), (0.9, 1, 4), (0.999, 0, 0))
]


def test_thresholds_are_drawn_as_the_rows_say(tmp_path: Path, saved: list[Figure]) -> None:
    plots.thresholds(LEVELS[::-1], tmp_path / "t.svg", title="net\nfolder")
    lines = {str(line.get_label()): line for line in saved[0].axes[0].lines}
    for name, key in (("alarms, unattacked", "alarms"), ("right, no alarm", "clean"), ("certified", "certified")):
        assert list(np.asarray(lines[name].get_xdata())) == [row["threshold"] for row in LEVELS]
        assert list(np.asarray(lines[name].get_ydata())) == pytest.approx([5.0 * row[key] for row in LEVELS])
    said = " ".join(texts(tmp_path / "t.svg"))
    for words in ("patch:32x32", "n = 20 images", "alarms, unattacked", "certified", "of all images, %"):
        assert words in said
    published = "published metric\n(incl. clean alerts)"
    assert published not in lines, "older results do not have it"
    plots.thresholds([{**row, "or_alarm": 8 + at} for at, row in enumerate(LEVELS)], tmp_path / "t.png", title="net\nfolder")
    drawn(tmp_path / "t.png")
    (line,) = (line for line in saved[-1].axes[0].lines if line.get_label() == published)
    assert list(np.asarray(line.get_ydata())) == pytest.approx([40, 45, 50, 55])


def test_thresholds_of_nothing_or_of_several_threats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no result to draw"):
        plots.thresholds([], tmp_path / "t.png", title="x")
    with pytest.raises(UsageError, match="different threats"):
        plots.thresholds([*LEVELS, {**LEVELS[0], "threat": "patch:5x5"}], tmp_path / "t.png", title="x")
