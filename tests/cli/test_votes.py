"""Votes on the command line: sweeps over sizes and shapes, the published conditions, one picture, and every bad input of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from refusals import check_refused

from patchcert_cli import checkpoint, data, defenses
from patchcert_cli.training.recipe import Recipe

SMALL = {"widths": [6, 6, 6], "mixes": [0, 0, 1]}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A random CIFAR-10 region scorer in ``runs/m``, which votes for class 2 nearly everywhere."""
    recipe = Recipe("patch:5x5", "cifar10", "bagcert", network_options=SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defense = defenses.build(recipe.config()["deployed"])
        with torch.no_grad():
            defense.scorer.head.bias.copy_(torch.tensor([-0.5, -0.5, 0.6, 0.0, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5]))
        defense.calibrate(torch.rand(8, 3, 32, 32))
        checkpoint.save_defense(tmp_path / "runs" / "m", defense, recipe.config())
    return "runs/m"


@pytest.fixture
def picture() -> str:
    """The first CIFAR-10 test image as a file."""
    pixels = data.load("cifar10", "test").pixels[0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save("cat.png")
    return "cat.png"


def test_every_size_comes_from_one_run(patchcert, model: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", model, "--patch", "1..10", "--limit", "40", "--json", "-", "--plot", "curve.png")
    found = json.loads(done.out)
    assert [claim["threat"] for claim in found["claims"]] == [f"patch:{n}x{n}" for n in range(1, 11)]
    counts = [claim["counts"]["certified"] for claim in found["claims"]]
    assert counts == sorted(counts, reverse=True)
    assert "the first 1000 of 10000" in done.err and found["full_split"] is False
    assert Path("curve.png").stat().st_size > 1000
    single = patchcert("certify", model, "--patch", "5", "--limit", "40", "--json", "-")
    assert json.loads(single.out)["claims"][0]["counts"]["certified"] == counts[4]
    table = patchcert("certify", model, "--patch", "1..10", "--limit", "40").out
    assert "patch:10x10" in table and "95 % interval" in table


def test_every_shape_of_an_area(patchcert, model: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", model, "--patch-area", "25", "--limit", "10", "--json", "-", "--plot", "shapes.png")
    threats = [claim["threat"] for claim in json.loads(done.out)["claims"]]
    assert threats == [f"patch:{s}" for s in ["1x25", "2x12", "3x8", "4x6", "5x5", "6x4", "8x3", "12x2", "25x1"]]
    assert Path("shapes.png").stat().st_size > 1000


def test_conditions_side_by_side(patchcert, model: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", model, "--patch", "5", "--condition", "all", "--limit", "60", "--json", "-")
    rows = {claim["method"]: claim["counts"]["certified"] for claim in json.loads(done.out)["claims"]}
    assert list(rows) == ["additive", "condition 3.1", "condition 3.2", "condition 3.3"]
    assert rows["additive"] >= rows["condition 3.2"] == rows["condition 3.1"] >= rows["condition 3.3"]


def test_a_patch_too_large_is_a_note_and_not_a_crash(patchcert, model: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", model, "--patch", "30", "--limit", "10", "--json", "-")
    assert done.code == 0 and json.loads(done.out)["claims"][0]["counts"]["certified"] == 0
    assert "no image can be certified" in done.err


def test_one_picture_with_its_map(patchcert, model: str, picture: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", model, "--image", picture, "--patch", "5", "--map", "map.png", "--json", "-")
    found = json.loads(done.out)
    assert found["class"] in data.open_dataset("cifar10").classes and found["locations"] == 784
    (claim,) = found["claims"]
    assert claim["certified"] is (found["weak_locations"] == 0) is (claim["margin"] > 0)
    assert Path("map.png").stat().st_size > 1000
    table = patchcert("certify", model, "--image", picture, "--patch", "1..3").out
    assert table.count("margin") == 3


def test_several_pictures_are_one_table(patchcert, model: str, picture: str) -> None:  # type: ignore[no-untyped-def]
    with Image.open(picture) as opened:
        opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("dog.png")
    words = ("certify", model, "--image", picture, "--image", "dog.png", "--patch", "2,5")
    found = json.loads(patchcert(*words, "--json", "-").out)
    alone = json.loads(patchcert("certify", model, "--image", "dog.png", "--patch", "2,5", "--json", "-").out)
    assert [one["image"] for one in found] == [picture, "dog.png"] and found[1] == alone
    done = patchcert(*words, "--image", "none.png")
    head, *rows = done.out.splitlines()
    assert head.split()[:4] == ["image", "prediction", "threat", "proof"]
    assert [row.split()[0] for row in rows] == [picture, picture, "dog.png", "dog.png"]
    assert done.code == 6 and done.err.count("error[6]: there is no image 'none.png'") == 1
    assert done.err.count("runs/m") == 1, "the model was loaded once"
    refused = patchcert(*words, "--map", "map.png")
    check_refused(refused.err, 2, "--map draws one image, and 2 are given")
    one = ("certify", model, "--image", picture, "--patch", "2,5", "--processes", "2")
    check_refused(patchcert(*one).err, 2, "--processes does not go with --image")


@pytest.mark.parametrize(
    ("make", "said", "code"),
    [
        (lambda p: p.convert("L"), "converted", 0),
        (lambda p: p.convert("RGBA"), "", 0),
        (lambda p: p.convert("P"), "", 0),
        (lambda p: p.convert("1"), "converted", 0),
        (lambda p: _clear(p), "'other.png' has transparent pixels: its alpha channel was dropped", 0),
        (lambda _: Image.fromarray(numpy.full((32, 32), 40_000, numpy.uint16)), "more than 8 bits per channel", 6),
        (lambda p: p.resize((64, 48)), "is 48x64 (height x width), but the model takes 32x32.", 6),
    ],
)
def test_pictures_of_other_modes(patchcert, model: str, picture: str, make, said: str, code: int) -> None:  # type: ignore[no-untyped-def]
    with Image.open(picture) as opened:
        make(opened).save("other.png")
    done = patchcert("certify", model, "--image", "other.png", "--patch", "5")
    assert done.code == code and said in done.err
    if code:
        model_line, refusal = done.err.split("\n", 1)
        check_refused(refusal, code)
        assert "error" not in model_line


def _clear(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    picture.putpixel((3, 3), (0, 0, 0, 0))
    return picture


def test_a_picture_is_resized_on_request_only(patchcert, model: str, picture: str) -> None:  # type: ignore[no-untyped-def]
    with Image.open(picture) as opened:
        opened.resize((100, 64)).save("wide.png")
    done = patchcert("certify", model, "--image", "wide.png", "--patch", "5", "--resize")
    assert done.code == 0 and "'wide.png' is 64x100 (height x width): the shorter side is resized to 32 (bicubic)" in done.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--patch 5..2", 2, "invalid range '5..2'."),
        ("--patch 1..40", 2, "patch 33x33 does not fit a 32x32 image"),
        ("--patch-area 0", 2, "--patch-area is 0."),
        ("--patch-area 25 --patch 5", 2, "--patch-area describes every shape itself"),
        ("--patch 5 --condition 4", 2, "no condition '4'."),
        ("--patch 5 --map m.png", 2, "--map draws one image."),
        ("--patch 5 --image none.png", 6, "there is no image 'none.png'"),
        ("--patch 5 --image text.png", 6, "is not an image that can be read"),
        ("--patch 5 --image cat.png --plot p.png", 2, "--plot does not go with --image"),
        ("--patch 5 --image cat.png --limit 4", 2, "--limit does not go with --image."),
        ("--patch 5 --image cat.png --fresh --out x", 2, "--out does not go with --image"),
        ("--patch 5 --resize", 2, "--resize goes with --image."),
        ("--patch 1..3 --image cat.png --map m.png", 2, "--map draws one patch"),
        ("--k 3 --image cat.png --map m.png", 2, "a map needs one patch, not sparse:3"),
        ("--patch 5 --plot p.gif", 2, ".png"),
        ("--threat sparse --k 2 --unit value", 2, "votes have no certificate against sparse:2:value"),
        ("--k 2 --condition 3.1", 2, "condition 3.1 is not for sparse:2"),
    ],
)
def test_bad_input_is_one_clear_line(patchcert, model: str, picture: str, words: str, code: int, said: str) -> None:  # type: ignore[no-untyped-def]
    Path("text.png").write_text("not a picture")
    done = patchcert("certify", model, *([] if "--image" in words else ["--limit", "4"]), *words.split())
    assert said in done.err, done.err
    assert done.code in (code, 2), done.err
    assert "Traceback" not in done.err


def test_a_map_says_what_its_margins_count(patchcert, model: str, picture: str) -> None:  # type: ignore[no-untyped-def]
    for name, unit in ((model, "votes"), ("mnist-masked-cnn", "of the logit scale")):
        done = patchcert("certify", name, "--image", picture, "--resize", "--patch", "5", "--map", "map.svg")
        assert done.code == 0, done.err
        assert f"<!-- margin, {unit} -->" in Path("map.svg").read_text(encoding="utf-8")


def test_intervals_have_no_conditions_and_no_map(patchcert, picture: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", "mnist-ibp-p5", "--patch", "5", "--condition", "3.3", "--limit", "4")
    assert done.code == 2 and "this defense has no proof '3.3'." in done.err
    done = patchcert("certify", "mnist-ibp-p5", "--patch", "5", "--image", picture, "--resize", "--map", "m.png")
    assert done.code == 2 and "--map is for models with votes or masks" in done.err


def test_a_receptive_field_larger_than_the_image_is_refused(patchcert) -> None:  # type: ignore[no-untyped-def]
    words = "train --defense bagcert --dataset mnist --patch 5 --network-option kernels=3,9,9 --network-option dilations=1,2,2"
    done = patchcert(*words.split(), "--data-dir", str(Path()))
    assert done.code != 0 and "larger than the 28x28 image" in done.err, done.err
