"""The page about a user's own runs: what it counts, whose images it draws, and which folders it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from refusals import check_refused
from site_cards import HOSTILE

from patchcert_cli import checkpoint, data, defenses
from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certificate import Guarantee, Tally
from patchcert_cli.cli import main
from patchcert_cli.errors import IntegrityError, UsageError
from patchcert_cli.reporting.site import runs, weakest
from patchcert_cli.reporting.site.claimed import Claimed, management, nothing
from patchcert_cli.threats import parse_threat
from patchcert_cli.training.recipe import Recipe
from reporting.test_site import parsed, rows, text

SMALL = {"widths": [6, 6, 6], "mixes": [0, 0, 1]}


def claim(threat: str = "patch:5x5", images: int = 40, clean: int = 32, certified: int = 13, **changes: Any) -> Claimed:
    made = Claimed(
        0, parse_threat(threat), "m", None, Arithmetic.EXACT, Guarantee.RECOVERY, 1, Tally(images, clean, certified), None
    )
    return replace(made, **changes)


def write_run(folder: Path, margins: list[float], *, images: int | None = None, **changes: Any) -> Path:
    """A run of two claims with one image for each margin; certified under the first where it is above 0, never under the second.

    The last image is answered wrong.
    """
    verdict = {"worst": [1, 2, 3, 3], "runner_up": 4, "method": "additive", "arithmetic": "exact"}
    manifest: dict[str, Any] = {"kind": "certify", "model": "mine", "model_sha256": "a" * 64, "defense": "bagcert"}
    manifest |= {"dataset": "cifar10", "split": "test", "data_sha256": "b" * 64, "images": images or len(margins)}
    manifest |= {"claims": [["patch:3x3", None], ["patch:4x4", None]], "subset_seed": 0, "format": 2, "started": "2026-01-31"}
    manifest |= {"command": "patchcert certify", "versions": {"patchcert": "0.1.0"}, **changes}
    lines = []
    for i, margin in enumerate(margins):
        both = [{"certified": margin > 0, "margin": margin, **verdict}, {"certified": False, "margin": margin - 50, **verdict}]
        lines.append({"index": 10 * i, "label": 1, "prediction": 0 if i == len(margins) - 1 else 1, "claims": both})
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            claim(),
            "Of 40 images, 13 are classified right and no 5x5 sticker anywhere can change that; 19 more are classified right,"
            " without such a proof; 8 are classified wrong.",
        ),
        (
            claim("sparse:4", 1000, 778, 349, arithmetic=Arithmetic.MEASURED),
            "Of every 100 images, about 34 are classified right and no change of any 4 pixels can change that (that rounding in"
            " the computer cannot change it either was measured, not proven); 43 more are classified right, without such a proof;"
            " 23 are classified wrong.",
        ),
        (
            claim("patch:2%", guarantee=Guarantee.DETECTION, alarms=3),
            "Of 40 images, 13 are classified right and no square sticker of 2 % of the image anywhere can change that without an"
            " alarm; 19 more are classified right, without such a proof; 8 are classified wrong or raise an alarm.",
        ),
        (
            claim("patch:5x5", 40, 13, 13),
            "Of 40 images, 13 are classified right and no 5x5 sticker anywhere can change that; not one more is classified right,"
            " without such a proof; 27 are classified wrong.",
        ),
        (
            claim("sparse:2:value", top=3),
            "Of 40 images, 13 have the right class among the first 3 and no change of any 2 colour values can change that;"
            " 19 more have the right class among the first 3, without such a proof; 8 do not have it.",
        ),
    ],
)
def test_one_line_for_management(made: Claimed, said: str) -> None:
    assert management(made) == said


def test_the_line_of_a_run_of_several_threats_counts_all_of_them() -> None:
    """Read alone, the line about the smallest patch would be taken for the result."""
    first, middle, last = (claim(f"patch:{side}x{side}", 40, 32, count) for side, count in ((1, 30), (5, 13), (10, 0)))
    assert (
        management(first, [first, middle, last])
        == management(first) + " Certified under other threats, of 40: 13 (5x5), 0 (10x10)."
    )
    many = [claim("sparse:2", 1000, 900, 600), claim("sparse:4", 1000, 900, 349)]
    assert management(many[0], many).endswith(" Certified under other threats, of 100: 34 (sparse:4).")


@pytest.mark.parametrize(("images", "clean", "certified"), [(101, 101, 101), (999, 998, 997), (10_000, 9243, 6284), (3000, 1, 1)])
def test_rounding_never_certifies_and_the_counts_add_up(images: int, clean: int, certified: int) -> None:
    said = management(claim("patch:1x1", images, clean, certified)).replace("fewer than one more is", "0 more are")
    about, rest, wrong = map(int, re.findall(r"(?:about|;) (\d+)", said))
    assert about + rest + wrong == 100
    assert about * images <= 100 * certified and (about + rest) * images <= 100 * clean


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ("elsewhere", "'elsewhere' is neither a run folder", "Give folders of patchcert certify"),
        ("one/records.jsonl", "'one/records.jsonl' is a file of a run.", "Give its folder: one"),
    ],
)
def test_what_is_no_run_folder_is_refused_with_what_was_meant(
    given: str, message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "one", [3, -1])
    with pytest.raises(UsageError) as caught:
        runs.read([Path(given)])
    assert caught.value.message.startswith(message) and str(caught.value.hint).startswith(hint)


def test_several_patches_as_text() -> None:
    assert nothing(parse_threat("patches:2:5x5")) == "no 2 stickers, each 5x5 sticker anywhere,"


def test_every_number_is_counted_from_the_records(tmp_path: Path) -> None:
    (run,) = runs.read([write_run(tmp_path / "one", [3, -1, 5, 9])])
    tree = parsed(runs.render([run]))
    (table,) = tree.iter("table")
    interval = Tally(4, 3, 2).certified_interval
    ends = f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}"
    assert [row[1:] for row in rows(table)] == [
        ["patch:3x3", "75.00 3/4", f"50.00 2/4 {ends}", "additive", "exact"],
        ["patch:4x4", "75.00 3/4", "0.00 0/4 0.00 to 60.24", "additive", "exact"],
    ]
    assert [one.get("class") for one in tree.iter("figure")] == ["curve"]
    said = text(tree)
    assert "Of 4 images, 2 are classified right and no 3x3 sticker anywhere" in said and "unfinished" not in said
    assert "a" * 64 in said and "patchcert certify" in said
    chosen = runs.read([tmp_path / "one"], parse_threat("patch:4x4"))
    assert "Of 4 images, 0 are classified right and no 4x4 sticker" in runs.render(chosen)
    assert "Certified under other threats, of 4: " in runs.render(chosen)


def test_an_unfinished_run_says_what_is_missing_and_stays_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", [3, 4, 5], images=9)
    (folder / "records-1.jsonl").write_text(
        (folder / "records.jsonl").read_text().splitlines()[2].replace(": 20,", ": 80,") + "\n"
    )
    with (folder / "records.jsonl").open("a") as stream:
        stream.write('{"index": 7, "lab')
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (run,) = runs.read([folder])
    assert (len(run.records), run.missing) == (4, 5)
    assert "mine is unfinished: 5 of 9 images are missing, and these figures are about the other 4." in text(
        parsed(runs.render([run]))
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_runs_of_one_model_have_names_and_colours_of_their_own(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [3, 4, 5]) for name in ("one", "two")]
    found = runs.read([*folders, folders[0]])
    assert [run.label for run in found] == ["mine (one)", "mine (two)"]
    (curve,) = runs.curves(found)
    looks = runs.looks(found)
    assert [(line.name, line.look) for line in curve.lines] == list(looks.items())
    assert len({look.color for look in looks.values()}) == 2


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [1, 2])
    other = write_run(tmp_path / "other", [1, 2], data_sha256="c" * 64)
    with pytest.raises(UsageError, match=r"'.*one' \(CIFAR-10|cifar10, 2 images\) and .* are about different images"):
        runs.read([one, other])
    with pytest.raises(UsageError, match="has no certificates for patch:9x9") as refused:
        runs.read([one], parse_threat("patch:9x9"))
    assert refused.value.hint == "It has some for patch:3x3, patch:4x4."
    with pytest.raises(UsageError, match="is neither a run folder"):
        runs.read([tmp_path / "nothing"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match=r"it has no manifest\.json"):
        runs.read([tmp_path / "bare"])
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UsageError, match="holds weights, and no run that evaluates them") as refused:
        runs.read([tmp_path / "bare"])
    assert refused.value.hint == f"Type: patchcert certify {tmp_path / 'bare'}"
    with pytest.raises(UsageError, match="is not a run of patchcert certify"):
        runs.read([write_run(tmp_path / "strange", [1, 2], kind="train")])
    (other / "records.jsonl").write_text("")
    with pytest.raises(UsageError, match="has no finished image yet"):
        runs.read([other])
    (other / "records.jsonl").write_text("{}\n")
    with pytest.raises(IntegrityError, match="damaged"):
        runs.read([other])
    (one / "records.jsonl").write_text('{"index": 1, "claims": [{}, {}]}\n')
    with pytest.raises(IntegrityError, match="not the folder of an intact run"):
        runs.read([one])


def test_detection_has_a_table_of_its_own(tmp_path: Path) -> None:
    found = runs.read([write_run(tmp_path / "one", [1, 2]), write_run(tmp_path / "two", [1, 2], defense="minority")])
    tables = list(parsed(runs.render(found)).iter("table"))
    assert ["Guarantee recovery" in text(table) for table in tables] == [True, False]
    assert [len(row) for table in tables for row in rows(table)] == [6, 6, 7, 7]
    crossed = write_run(tmp_path / "three", [1, 2], defense="ensemble", setting={"rule": "cross"})
    assert runs.read([crossed])[0].guarantee is Guarantee.DETECTION


def test_nothing_in_a_run_folder_can_become_markup(tmp_path: Path) -> None:
    changes = {"model": HOSTILE, "command": HOSTILE, "dataset": HOSTILE, "split": HOSTILE, "started": HOSTILE}
    found = runs.read([write_run(tmp_path / "one", [1, 2], **changes)])
    image = weakest.WeakImage(HOSTILE, HOSTILE, HOSTILE, 1.0, True, (0, 0, 1, 1), "data:image/png;base64,AA==")
    page = runs.render(found, [(found[0], weakest.Weakest(found[0].main, (image,), HOSTILE))])
    tree = parsed(re.sub(r"(<img[^>]*)>", r"\1/>", page))
    names = {name for one in tree.iter() for name in one.attrib}
    assert not [name for name in names if name.startswith("on") or name == "style"]
    assert page.count("<script") == 0 and [one.get("src") for one in tree.iter("img")] == ["data:image/png;base64,AA=="]
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "script-src" not in policy and "img-src data:" in policy and policy.startswith("default-src &#39;none&#39;;")
    assert not re.search(r"https?://", re.sub(r"http://www\.w3\.org/\S*", "", page))


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def patchcert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["patchcert", *words])
        with pytest.raises(SystemExit) as stop:
            main.run()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


def save_model(folder: Path, seed: int = 0) -> None:
    """A random CIFAR-10 region scorer."""
    recipe = Recipe("patch:5x5", "cifar10", "bagcert", network_options=SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        defense = defenses.build(recipe.config()["deployed"])
        defense.calibrate(torch.rand(8, 3, 32, 32))
        checkpoint.save_defense(folder, defense, recipe.config())


def test_the_weakest_images_are_drawn_if_they_are_those_of_the_run(patchcert: Call, tmp_path: Path) -> None:
    save_model(Path("runs/m"))
    assert patchcert("certify", "runs/m", "--patch", "2,5", "--limit", "30", "--out", "runs/c", "-q")[0] == 0
    assert patchcert("report", "--weakest", "2", "runs/m", "--patch", "2")[:2] == (0, "page/index.html\n")
    (run,) = runs.read([Path("runs/c")])
    tree = parsed(re.sub(r"(<img[^>]*)>", r"\1/>", Path("page/index.html").read_text()))
    drawn = [one.attrib["src"].removeprefix("data:image/png;base64,") for one in tree.iter("img")]
    right = sorted((one["claims"][0]["margin"], one["index"]) for one in run.records if one["prediction"] == one["label"])[:2]
    assert len(drawn) == len(right) == 2
    assert all(min(Image.open(io.BytesIO(base64.b64decode(one))).size) > 300 for one in drawn)
    captions = [text(one) for one in tree.iter("figcaption") if text(one).startswith("image ")]
    assert [(int(one.split()[1].rstrip(",")), float(one.split("margin ")[1].split(";")[0])) for one in captions] == [
        (index, margin) for margin, index in right
    ]
    label = data.load("cifar10", "test").labels[right[0][1]]
    assert data.open_dataset("cifar10").classes[label] in captions[0]
    save_model(Path("runs/m"), seed=1)
    found = weakest.weakest(run, 2)
    assert found.why == "runs/m has other weights now than in the run" and [one.png for one in found.images] == ["", ""]
    line = "Not all of them could be drawn: runs/m has other weights now than in the run."
    assert line in text(parsed(runs.render([run], [(run, found)])))


def test_another_image_or_margin_than_the_records_is_not_drawn(patchcert: Call) -> None:
    save_model(Path("runs/m"))
    assert patchcert("certify", "runs/m", "--patch", "5", "--limit", "20", "--out", "runs/c", "-q")[0] == 0
    (run,) = runs.read([Path("runs/c")])
    for changed, said in (({"margin": -1e9}, "differs from its record"), ({"worst": [0, 0, 1, 1]}, "differs from its record")):
        records = [{**one, "claims": [{**one["claims"][0], **changed}]} for one in run.records]
        found = weakest.weakest(replace(run, records=records), 1)
        assert said in found.why and [one.png for one in found.images] == [""]
    found = weakest.weakest(replace(run, records=[{**one, "index": 5000 + one["index"]} for one in run.records]), 1)
    assert "is not among the 1000 images here" in found.why and found.images[0].png == ""
    found = weakest.weakest(replace(run, manifest={**run.manifest, "model": "timm:resnet18"}), 1)
    assert found.why.startswith("the plain classifier timm:resnet18 is not loaded") and found.images[0].label.startswith("class ")


def test_a_defense_without_a_map_has_its_image_drawn(patchcert: Call) -> None:
    assert patchcert("certify", "mnist-ibp-p5", "--patch", "5", "--limit", "3", "--out", "runs/c", "-q")[0] == 0
    assert patchcert("report", "runs/c", "--weakest", "1", "-q")[0] == 0
    assert Path("page/index.html").read_text().count("data:image/png") == 1


def test_runs_of_attack_are_in_a_table_of_their_own(patchcert: Call) -> None:
    words = ("mnist-ibp-p5", "--patch", "2", "--limit", "3")
    weak = ("--steps", "1", "--restarts", "0", "--locations", "1")
    assert patchcert("attack", *words, *weak, "--out", "runs/a", "-q")[0] == 0
    assert patchcert("certify", *words, "--out", "runs/c", "-q")[0] == 0
    code, out, _ = patchcert("report", "runs/a", "runs/c", "--weakest", "0", "--json", "-")
    attacked = next(one for one in json.loads(out)["runs"] if one["run"] == "runs/a")
    result = json.loads(Path("runs/a/result.json").read_text())
    assert code == 0 and attacked["survived"] == round(3 * result["attacked_accuracy"]) and attacked["broken"] == 0
    tables = list(parsed(Path("page/index.html").read_text()).iter("table"))
    assert ["not proven" in text(table) for table in tables] == [False, True]
    assert rows(tables[1])[0][1:3] == ["PatchPGD", "patch:2x2"]


def test_commands_come_before_folders_and_pages_of_others_are_kept(patchcert: Call, tmp_path: Path) -> None:
    write_run(tmp_path / "attacks", [1, 2])
    assert patchcert("report", "./attacks", "--weakest", "0", "--out", "new")[:2] == (0, "new/index.html\n")
    assert "attacks" in (tmp_path / "new" / "index.html").read_text()
    code, _, err = patchcert("report", "attacks", "attacks")
    check_refused(err, code, "'attacks/result.json' is missing")
    code, _, err = patchcert("report", "attcks")
    check_refused(err, 2, "report has no 'attcks'", "Did you mean attacks?")
    assert code == 2
    Path("page").mkdir()
    Path("page/index.html").write_text('<meta name="generator" content="patchcert report zoo 1">')
    code, _, err = patchcert("report", "./attacks", "--weakest", "0")
    check_refused(err, 2, "was not written by this command", "--force")
    assert patchcert("report", "./attacks", "--weakest", "0", "--force")[0] == 0
    assert patchcert("report", "./attacks", "--weakest", "0")[0] == 0
    code, out, _ = patchcert("report", "--help")
    assert code == 0 and all(word in out for word in ("zoo", "attacks", "runs", "./zoo"))


def test_of_a_folder_of_weights_the_runs_about_most_images_are_shown(patchcert: Call) -> None:
    save_model(Path("runs/m"))
    for limit in ("3", "4"):
        assert patchcert("certify", "runs/m", "--patch", "5", "--limit", limit, "--out", f"runs/c{limit}", "-q")[0] == 0
    code, out, err = patchcert("report", "runs/m", "--weakest", "0", "--json", "-")
    assert code == 0 and [one["run"] for one in json.loads(out)["runs"]] == ["runs/c4"]
    assert err == "left out, as they are about other images: runs/c3\n"


def test_margins_that_were_rounded_in_another_batch_are_those_of_the_run(patchcert: Call) -> None:
    """Margins of interval models depend in their last digits on how many images are computed at a time; pages compute one."""
    assert patchcert("certify", "mnist-ibp-p5", "--patch", "1,5", "--limit", "40", "--out", "runs/c", "-q")[0] == 0
    (run,) = runs.read([Path("runs/c")])
    found = weakest.weakest(run, 4)
    assert not found.why and all(one.png for one in found.images)
    at = found.claim.at

    def altered(change: Callable[[dict[str, Any]], dict[str, Any]]) -> weakest.Weakest:
        records = [
            {**one, "claims": [{**own, **change(own)} if place == at else own for place, own in enumerate(one["claims"])]}
            for one in run.records
        ]
        return weakest.weakest(replace(run, records=records), 3)

    assert all(one.png for one in altered(lambda own: {"margin": own["margin"] + 1e-6}).images), "a rounding error"
    moved = altered(lambda own: {"margin": own["margin"] - 0.5})
    assert moved.why.endswith("differs from its record: other images or weights; 2 more likewise")
    assert not any(one.png for one in moved.images)
    assert not any(one.png for one in altered(lambda own: {"certified": not own["certified"]}).images)
