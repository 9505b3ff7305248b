"""What tables and titles say."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from patchcert_cli import defenses
from patchcert_cli.reporting import plots, text


def result(**changes: Any) -> dict[str, Any]:
    row = {
        "threat": "patch:5x5",
        "method": "rows",
        "guarantee": "recovery",
        "arithmetic": "exact",
        "certified_accuracy": 0.4,
        "certified_interval": [0.1, 0.9],
        "counts": {"clean": 6, "certified": 4},
    }
    same = {
        "model": "m",
        "model_sha256": "0" * 64,
        "model_source": "folder",
        "defense": "patchcleanser",
        "dataset": "mnist",
        "split": "test",
        "data_source": "bundled",
        "images": 10,
        "full_split": True,
        "clean_accuracy": 0.6,
        "seconds": 24.0,
        "images_per_second": 10 / 24,
        "device": "cpu",
        "records": "runs/x/records.jsonl",
    }
    claim = row | {name: value for name, value in changes.items() if name in row}
    return {**same, "counts": {"clean": 6}, "threat": row["threat"], "claims": [claim], **changes}


@pytest.mark.parametrize(
    ("pace", "words"),
    [
        (0.0, ""),
        (0.004, "250 s an image"),
        (10 / 24, "2.4 s an image"),
        (1.0, "1.0 images/s"),
        (9.9, "9.9 images/s"),
        (10.4, "10 images/s"),
    ],
)
def test_below_one_image_a_second_it_is_seconds_an_image(pace: float, words: str) -> None:
    assert text.speed(pace) == words
    said = dict(text.certify_rows(result(images_per_second=pace)))["time"]
    assert said == (f"24.0 s, {words} on cpu" if words else "24.0 s on cpu")


@pytest.mark.parametrize("kind", defenses.names())
def test_every_proof_has_plain_words(kind: str) -> None:
    for method in defenses.by_name(kind).methods:
        said = dict(text.certify_rows(result(method=method)))["guarantee"]
        assert said == f"recovery, proof: {text.PROOFS[method]}" and "rows bounds" not in said


def test_titles_name_no_folder_and_no_count(tmp_path: Path) -> None:
    own = {"dataset": f"imagefolder:{tmp_path}/val@32", "data_source": str(tmp_path / "val"), "split": "all"}
    title = text.plot_title(result(model=str(tmp_path / "runs" / "mine"), **own))
    assert title == "mine\nimagefolder:val@32 all"
    assert text.plot_title(result(full_split=False, model="runs/p5")) == "runs/p5\nmnist test, a part of it"


def test_letters_that_the_font_lacks_warn_nobody(tmp_path: Path) -> None:
    rows = text.claim_list(result())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot(rows, tmp_path / "a.png", title="模型\n猫")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_shapes_say_the_area_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = []
    made = plots.Heading.of
    monkeypatch.setattr(plots.Heading, "of", lambda title, note, width: notes.append(note) or made(title, note, width))
    claims = [{**text.claim_list(result())[0], "threat": threat} for threat in ("patch:1x25", "patch:3x8", "patch:5x5")]
    plots.plot(claims, tmp_path / "a.png", title="x", area=25)
    plots.plot(claims, tmp_path / "a.png", title="x")
    assert [note.split(", anywhere")[0] for note in notes] == [
        "one patch of at most 25 (24 to 25) pixels",
        "one patch of 24 to 25 pixels",
    ]
    several = {
        "claims": [{**result()["claims"][0], "threat": threat} for threat in ("patch:1x25", "patch:3x8")],
        "patch_area": 25,
    }
    assert dict(text.certify_rows(result(**several)))["shapes"] == "the largest of at most 25 pixels, one of each height"


def test_an_attack_says_what_it_left() -> None:
    attacked = {"attacked_accuracy": 0.5, "queries": 70, "broken": [], "left": 30}
    assert (
        dict(text.attack_rows(result(**attacked)))["left"]
        == "30 of 40 images: the time was up; the same command goes on with them"
    )
    assert dict(text.attack_rows(result(**attacked)))["right under attack"].startswith("50.00 %")
    resumed = {**attacked, "resumed": 4, "images": 40, "seconds": 83.1, "images_per_second": 36 / 83.1}
    assert dict(text.attack_rows(result(**resumed)))["time"].startswith("83.1 s for 36 images, 2.3 s an image")
    assert "left" not in dict(text.attack_rows(result(**attacked | {"left": 0})))
