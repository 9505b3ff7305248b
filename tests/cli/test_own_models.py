"""Own models and own pictures on the command line: from an address and a folder to certificates, and all their bad input."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import COLOURS, lines, module, pictures
from refusals import check_refused

from patchcert_cli import cards, checkpoint, models
from patchcert_cli.catalog import bundled
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.errors import HubError, IntegrityError
from patchcert_cli.evaluation.run_folder import Run
from patchcert_cli.hub import client
from patchcert_cli.reporting import text
from patchcert_cli.storage import files

DEFENSE = ["--defense", "patchcleanser", "--masks", "3", "--patch", "3", "--device", "cpu"]
VAL = ["--data", "imagefolder:./val"]
CLASSES = ["--classes", "names.txt"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = "test_resnet.r160_in1k"


@pytest.fixture(autouse=True)
def brought(tmp_path: Path) -> None:
    """What a user has: a module, pictures, names in the order of the module's outputs."""
    module(tmp_path, "mine")
    pictures(tmp_path / "val")
    lines(tmp_path / "names.txt", "cat", "dog", "red fox")
    lines(tmp_path / "wrong.txt", "cat", "dog", "fox")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the Hub."""
    pytest.importorskip("timm")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    monkeypatch.setattr(client, "fetch_unlisted", lambda repo, revision, names, *, hint="": (COMMIT, folder))
    return folder


def weights(path: Path, classes: int = 1000) -> None:
    """Random weights of timm's smallest network."""
    pytest.importorskip("timm")
    from patchcert_cli.models import timm

    with torch.random.fork_rng():
        torch.manual_seed(1)
        made: Any = models.build("timm", {**timm.facts(TINY).options(), "input_shape": (3, 160, 160), "classes": classes})
    files.write_atomically(path, checkpoint.pack(made.model.state_dict(), {}))


def records(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(found["records"]).read_text().splitlines()]


def test_an_own_model_on_own_pictures(patchcert) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", "mine:build", *DEFENSE, *VAL, *CLASSES)
    assert done.code == 0, done.err
    for word in ("mine:build (patchcleanser, code", "12 images (whole split", "patch:3x3", "100.00 % (12/12)"):
        assert word in done.out
    assert "3 classes matched by name: cat is output 0, dog is output 1, red_fox is output 2" in done.err
    assert "12 images in 3 class folders from 'val'\n" in done.err
    assert (
        "12 of 12 images resampled, from 24x30 to 27x27 pixels (height x width), to 16x16:"
        " the shorter side is resized to 18 (bicubic), and the middle 16x16 is cropped"
    ) in done.err
    again = patchcert("certify", "mine:build", *DEFENSE, *VAL, *CLASSES)
    assert "is complete" in again.err and again.out == done.out
    found = json.loads(patchcert("certify", "mine:build", *DEFENSE, *VAL, *CLASSES, "--json", "-").out)
    assert found["claims"][0]["counts"]["certified"] > 0 and found["split"] == "folder" and found["model_source"] == "code"
    rows = records(found)
    assert [row["picture"] for row in rows[:5]] == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/3.png", "dog/0.png"]
    assert [row["label"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4 == [row["prediction"] for row in rows]
    manifest = json.loads((Path(found["records"]).parent / "manifest.json").read_text())
    assert manifest["setting"]["masks"] == {"covers": ["patch:3x3"], "per_axis": 3}
    assert manifest["setting"]["preprocessing"]["mean"] == [0.5, 0.5, 0.5] and manifest["setting"]["code_sha256"]


def test_labels_follow_names_and_not_positions(patchcert) -> None:  # type: ignore[no-untyped-def]
    """A model that says that its first output is the dog is wrong about cats and dogs, wherever their folders stand."""
    done = patchcert("certify", "mine:turned", *DEFENSE, *VAL, "--json", "-")
    found = json.loads(done.out)
    assert [row["label"] for row in records(found)] == [1] * 4 + [0] * 4 + [2] * 4
    assert found["counts"]["clean"] == 4 and "cat is output 1, dog is output 0" in done.err
    shutil.rmtree("val/dog")
    done = patchcert("certify", "mine:named", *DEFENSE, *VAL, "--json", "-")
    assert [row["label"] for row in records(json.loads(done.out))] == [0] * 4 + [2] * 4


def test_masks_and_weights_make_another_run(patchcert) -> None:  # type: ignore[no-untyped-def]
    files.write_atomically(Path("w.safetensors"), checkpoint.pack({"centre": torch.tensor([0.1, 0.5, 0.9])}, {}))
    said = ["certify", "mine:build", "--defense", "patchcleanser", "--patch", "3", *VAL, *CLASSES, "--json", "-"]
    places = []
    for more in ([], ["--masks", "3"], ["--passes", "50"], ["--weights", "w.safetensors"], ["--precision", "bfloat16"]):
        done = patchcert(*said, *more)
        assert done.code == 0, done.err
        places.append(json.loads(done.out)["records"])
    assert len(set(places)) == 5
    two = json.loads(patchcert(*said[:4], "--threat", "patches:2:2", "--masks", "2", *VAL, *CLASSES, "--json", "-").out)
    assert two["claims"][0]["threat"] == "patches:2:2x2" and two["images"] == 12
    many = json.loads(patchcert(*said[:4], "--patch", "1..4", *VAL, *CLASSES, "--json", "-").out)
    counts = [claim["counts"]["certified"] for claim in many["claims"]]
    assert len(counts) == 4 and counts == sorted(counts, reverse=True)


def test_a_dry_run_counts_passes_hours_and_disk_and_writes_nothing(patchcert) -> None:  # type: ignore[no-untyped-def]
    before = sorted(map(str, Path().rglob("*")))
    done = patchcert("certify", "mine:build", *DEFENSE, *VAL, *CLASSES, "--dry-run", "--json", "-")
    assert done.code == 0, done.err
    value = json.loads(done.out)
    assert sorted(p for p in map(str, Path().rglob("*")) if "__pycache__" not in p) == before
    assert value["images"] == 12 and 9 <= value["passes_per_image"] <= 45
    assert value["passes"] == pytest.approx(12 * value["passes_per_image"], abs=1) and value["estimated_hours"] >= 0
    assert 0 < value["disk_bytes"] < 12 * 400
    limited = patchcert("certify", "mine:build", *DEFENSE, *VAL, *CLASSES, "--dry-run", "--limit", "5", "--json", "-")
    assert json.loads(limited.out)["images"] == 5
    packed = json.loads(patchcert("certify", "mine:build", *DEFENSE, *VAL, *CLASSES, "--json", "-").out)
    measured = sum(row.get("passes", 0) for row in records(packed)) / 12
    assert measured == 0 or value["passes_per_image"] == pytest.approx(measured, rel=0.5)
    after = json.loads(patchcert("certify", "mine:build", *DEFENSE, *VAL, *CLASSES, "--dry-run", "--json", "-").out)
    assert after["disk_bytes"] < 12 * 400 and after["out"] == str(Path(packed["records"]).parent)


def test_one_picture_and_an_attack(patchcert) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", "mine:named", *DEFENSE, "--image", "val/dog/0.png", "--resize", "--json", "-")
    assert done.code == 0, done.err
    assert json.loads(done.out)["class"] == "dog"
    whole = json.loads(patchcert("certify", "mine:named", *DEFENSE, *VAL, "--json", "-").out)
    for name, row in zip(("cat", "cat", "cat", "cat", "dog", "dog"), records(whole)[:6], strict=True):
        path = f"val/{name}/{row['index'] % 4}.png"
        one = json.loads(patchcert("certify", "mine:named", *DEFENSE, "--image", path, "--resize", "--json", "-").out)
        assert one["prediction"] == row["prediction"]
        assert {key: one["claims"][0][key] for key in ("certified", "margin", "worst")} == {
            key: row["claims"][0][key] for key in ("certified", "margin", "worst")
        }
    attacked = patchcert("attack", "mine:named", *DEFENSE, *VAL, "--limit", "3", "--steps", "1", "--json", "-")
    assert attacked.code == 0, attacked.err
    assert json.loads(attacked.out)["broken"] == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            "mine:build D V",
            6,
            "3 classes in imagefolder:./val@16, and nothing says what the 3 outputs of mine:build are called",
        ),
        ("mine:build D V --classes wrong.txt", 6, "1 of them none of the 3 outputs of mine:build (red_fox is not among cat, dog"),
        ("mine:build D V --classes none.txt", 6, "--classes 'none.txt' cannot be read"),
        ("mine:build --patch 3 V C", 2, "mine:build is a plain classifier."),
        ("mine:build --patch 3 V C --defense patchclenser", 3, "Did you mean patchcleanser?"),
        ("mine:build --patch 3 V C --defense ibp", 2, "ibp cannot be put around a classifier."),
        (
            "mine:build --defense patchcleanser V C",
            2,
            "a plain classifier is made for no threat.",
        ),
        ("mine:build D C", 2, "mine:build comes without images."),
        ("mine:build D C --data ./val", 3, "no data set './val'."),
        ("mine:build D C --data imagefolder:./none", 6, "there is no folder 'none'"),
        ("mine:build D C --data imagefolder:./empty", 6, "'empty/cat' has no images (.jpg,"),
        ("mine:build D C --data imagefolder:./val/cat", 6, "'val/cat' has no class folders."),
        ("mine:build D C --data imagefolder:./val@16/9", 2, "RESIZE at least SIZE"),
        ("mine:build D V C --weights none", 2, "--weights none means random weights, whose answers mean nothing"),
        ("mine:build D V C --weights x.pth", 5, "looks like a pickle, which could run code: it was not opened"),
        ("mine:build D V C --weights w.safetensors", 5, "does not fit mine:build: missing centre; unexpected body"),
        ("mine:broken D C --data imagefolder:./val@224", 5, "mine:broken answers NaN or infinity for images (2, 3, 224, 224)"),
        ("mine:raw D V C", 6, "the images have different sizes ('val/cat/0.png' is 24x30, 'val/cat/1.png' is 25x29)"),
        ("mine:maps D C --data imagefolder:./val@224", 5, "It must return logits [B, K], K >= 2."),
        ("mine:raises D V C", 2, "mine:raises fails: ValueError: no luck."),
        ("mine:biuld D V C", 3, "no function in mine 'biuld'."),
        ("surely_none:build D V C", 3, "no module 'surely_none'."),
        (
            "mine:build --defense patchcleanser --patch 20 V C",
            2,
            "patch 20x20 does not fit a 16x16 image.",
        ),
        (
            "mine:build --defense patchcleanser --patch 9 --passes 5 V C",
            2,
            "passes 5 is too few for masks against patch:9x9.",
        ),
        ("mine:build --defense patchcleanser --patch 2 --masks 90 --data imagefolder:./val@224 C", 2, "more than 4096 masks"),
        ("mine:build D V C --passes 9", 2, "--masks and --passes both choose how many masks there are."),
        ("mine:build --defense patchcleanser --patch 3 --masks 0 V C", 2, "--masks is 0."),
        ("mine:build D V C --mask-shape any --masks 3", 2, "--mask-shape any is chosen for a number of passes."),
        ("mine:build D V C --labels int8", 2, "invalid --precision 'int8'."),
        (
            "mnist-ibp-p5 --patch 5 --masks 3",
            2,
            "mnist-ibp-p5 is a model of ibp, which has no masks to choose.",
        ),
        ("mnist-ibp-p5 --patch 5 --weights w.safetensors", 2, "'mnist-ibp-p5' has its own weights."),
        (
            "cifar-bagcert-rf7 --patch 5 V",
            6,
            "3 classes in imagefolder:./val@32/32, 1 of them none of the 10 outputs of cifar-bag",
        ),
        ("mnist-ibp-p5 --patch 5 V", 6, "images are (3, 28, 28), but mnist-ibp-p5 takes (1, 28, 28)"),
    ],
)
def test_bad_input_is_one_clear_line(patchcert, words: str, code: int, said: str) -> None:  # type: ignore[no-untyped-def]
    pictures(Path("empty"), 0, {"cat": 0})
    files.write_atomically(Path("w.safetensors"), checkpoint.pack({"body": torch.zeros(3)}, {}))
    short = {"D": DEFENSE, "V": VAL, "C": CLASSES}
    done = patchcert("certify", *(word for each in words.split() for word in short.get(each, [each])))
    assert (done.code, done.out) == (code, ""), done.err
    wrong = done.err[done.err.index("error[") :]  # what is noted before the refusal may stay
    check_refused(wrong, code, said)


def test_names_of_timm_and_weights_that_cannot_be_had(patchcert) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("timm")
    for address, code, said in (
        ("timm:test_resnett", 3, "Did you mean test_resnet"),
        ("timm:resnet18.a1_in2k", 3, "Did you mean a1_in1k"),
        (f"timm:{TINY}", 4, "Fetch it once while online. Or give the weights as a file: --weights"),
        (f"hf-hub:timm/{TINY}@main", 4, "Or give the weights as a file: --weights FILE.safetensors"),
        (f"hf-hub:timm/{TINY}", 2, "hf-hub:ORG/REPO@COMMIT"),
    ):
        done = patchcert("certify", address, *DEFENSE, *VAL)
        assert done.code == code and said in done.err.splitlines()[-1], done.err


def test_without_timm_it_is_said_what_to_type(patchcert, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    done = patchcert("certify", "timm:resnet18", *DEFENSE, *VAL)
    assert done.code == 7
    check_refused(done.err, 7, "timm is not installed", 'pip install "patchcert[timm]"')


def imagenet(folder: Path) -> list[str]:
    """A validation folder of ImageNet's shape: 1,000 class folders with a tiny picture each."""
    from patchcert_cli.models import timm

    names = [names[0] for names in timm.imagenet_labels()]
    pictures(folder, 1, {name: at % 256 for at, name in enumerate(names)})
    return names


def test_imagenet_with_a_card_whose_weights_are_public(patchcert, served: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """The whole path of the card of the zoo, with timm's smallest network in the place of the large one."""
    card = bundled.card("imagenet-patchcleanser-vit-b16", Path(__file__).parents[2] / "zoo")
    small = replace(card, name="small", classifier=f"timm:{TINY}", recipe=card.recipe | {"masks": {"per_axis": 2}})
    files.write_atomically(Path("zoo/small/README.md"), small.render().encode())
    monkeypatch.setenv(bundled.ENVIRONMENT, "zoo")
    weights(served / files.WEIGHTS)
    names = imagenet(Path("data/imagenet/val"))
    assert patchcert("certify", "small", "--data-dir", "none").err.startswith("error[6]: no imagenet test data")
    tried = patchcert("certify", "small", "--dry-run", "--json", "-")
    assert tried.code == 0, tried.err
    value = json.loads(tried.out)
    assert value["images"] == 1000 and value["dataset"] == "imagenet@160/168,bilinear" and value["threat"] == "patch:2%"
    assert 4 <= value["passes_per_image"] <= 10 and 0 < value["disk_bytes"] < 1000 * 400
    done = patchcert("certify", "small", "--limit", "3", "--json", "-")
    assert done.code == 0, done.err
    assert f"pin it with timm:{TINY}@{COMMIT}" in done.err and "1000 classes matched by name: n01440764 is output 0" in done.err
    found = json.loads(done.out)
    manifest = json.loads((Path(found["records"]).parent / "manifest.json").read_text())
    assert manifest["setting"] == manifest["setting"] | {"commit": COMMIT, "classifier": f"timm:{TINY}"}
    assert manifest["setting"]["masks"] == {"covers": ["patch:2%"], "per_axis": 2}
    assert all(row["label"] == row["index"] for row in records(found)) and len(names) == 1000
    for words, said in (
        (["zoo", "pull", "small"], "its weights are those of timm:"),
        (["train", "--recipe", "small"], "Measure them: patchcert certify"),
    ):
        assert said in patchcert(*words).err
    assert "public weights" in patchcert("zoo", "list").out


def test_a_network_of_timm_is_trained_on_own_pictures_and_certified(patchcert, served: Path) -> None:  # type: ignore[no-untyped-def]
    weights(served / files.WEIGHTS)
    pictures(Path("pets/train"), 10)
    said = f"train --defense patchcleanser --model timm:{TINY} --data imagefolder:./pets/train@32 --patch 2% --device cpu".split()
    said += [
        "--network-option",
        "size=32",
        "--option",
        "per_axis=2",
        "--batch-size",
        "9",
        "--learning-rate",
        "0.01",
        "--json",
        "-",
    ]
    tried = patchcert(*said, "--epochs", "20", "--dry-run")
    assert tried.code == 0, tried.err
    value = json.loads(tried.out)
    assert value["steps"] == 20 * (27 // 9) and value["validation"] == 3 and value["estimated_seconds"] > 0
    assert value["disk_bytes"] > 30 * 3 * 32 * 32 + 2 * 370_000 * 4 and not Path("runs").exists()
    done = patchcert(*said, "--epochs", "2")
    assert done.code == 0, done.err
    run = json.loads(done.out)["out"]
    assert dict(text.train_rows(json.loads(done.out)))["next"] == f"patchcert certify {run} --data imagefolder:..."
    assert run == "runs/pets-patchcleanser-p2pct"
    config = files.read_json(Path(run) / files.CONFIG)
    assert config["deployed"]["classes"] == list(COLOURS) and config["dataset"] == "imagefolder:./pets/train@32"
    options = config["deployed"]["network"]["options"]
    assert options["weights"] == f"timm/{TINY}@{COMMIT}" and options["size"] == [32]
    assert options["mean"] == [0.5] * 3  # the network's own, not the data set's
    card = cards.Card.read(Path(run))
    assert "datasets:" not in card.render()  # the Hub is not told what somebody's folders are called
    assert "--network-option architecture=test_resnet" in card.command and "imagefolder:./pets/train@32" in card.command
    refused = patchcert("certify", run, "--patch", "2%")
    assert refused.code == 2 and "was trained on imagefolder:./pets/train@32." in refused.err
    found = patchcert("certify", run, *VAL, "--json", "-")
    assert found.code == 0, found.err
    assert json.loads(found.out)["images"] == 12 and "cat is output 0, dog is output 1, red_fox is output 2" in found.err
    other = patchcert("certify", run, *VAL, "--masks", "3", "--limit", "2", "--json", "-")
    assert other.code == 0 and json.loads(other.out)["records"] != json.loads(found.out)["records"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--weights w.safetensors", 2, "--weights goes with --model."),
        ("--model timm:test_resnet --network cnn", 2, "--model and --network both name a network."),
        ("--model mine:build", 2, "'mine:build' cannot be trained: what is trained is rebuilt from a configuration"),
        ("--model timm:test_resnet --weights none --data imagefolder:./nowhere", 6, "there is no folder 'nowhere'"),
        ("--model timm:test_resnet --data imagefolder:./val", 4, "Or begin with random weights: --weights none"),
    ],
)
def test_training_that_cannot_begin_is_one_clear_line(patchcert, words: str, code: int, said: str) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("timm")
    done = patchcert("train", "--defense", "patchcleanser", "--patch", "2%", *words.split())
    assert (done.code, done.out) == (code, "")
    check_refused(done.err, code, said)


def test_a_certified_model_with_another_defense_around_it(patchcert) -> None:  # type: ignore[no-untyped-def]
    done = patchcert(
        "certify", "mnist-ibp-p5", "--defense", "patchcleanser", "--masks", "2", "--patch", "3", "--limit", "4", "--json", "-"
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["defense"], found["images"]) == ("patchcleanser", 4)
    manifest = json.loads((Path(found["records"]).parent / "manifest.json").read_text())
    assert manifest["setting"]["classifier"] == "the class scores of ibp" and manifest["setting"]["fill"] == [0.1307]


def test_the_hub_is_not_asked_before_the_rest_is_right(patchcert, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("timm")

    def never(*_: Any, **__: Any) -> None:
        raise HubError("asked")

    monkeypatch.setattr(client, "fetch_unlisted", never)
    address = f"timm:{TINY}"
    for words in (
        ["--patch", "3", *VAL],
        [*DEFENSE],
        ["--defense", "patchcleanser", *VAL],
        [*DEFENSE, "--data", "imagefolder:none"],
    ):
        assert "asked" not in patchcert("certify", address, *words).err
    assert "asked" in patchcert("certify", address, *DEFENSE, *VAL).err


def test_the_page_about_own_models_keeps_its_word(patchcert) -> None:  # type: ignore[no-untyped-def]
    page = (Path(__file__).parents[2] / "docs" / "own-models.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    assert len(blocks) == 2 and blocks[0].startswith("# mine.py")
    Path("shown.py").write_text(blocks[0], encoding="utf-8")
    words = ["certify", "shown:build", "--defense", "patchcleanser", "--patch", "32", "--masks", "2", *VAL, "--json", "-"]
    done = patchcert(*words)
    assert done.code == 0, done.err
    assert json.loads(done.out)["images"] == 12
    scope: dict[str, Any] = {"images": torch.rand(2, 3, 48, 48)}
    exec(compile("\n".join(blocks), "own-models.md", "exec"), scope)
    assert scope["certificate"].certified.shape == (2,) and str(scope["certificate"].threat) == "patch:5x5"
    for option in ("--defense", "--masks", "--passes", "--weights", "--classes", "--precision", "--data", "--dry-run", "--limit"):
        assert option in page and option in patchcert("certify", "--help").out


def test_plain_accuracy_and_what_is_in_front_stand_in_every_result(patchcert) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", "mine:named", *DEFENSE, *VAL)
    front = (
        "pixels in [0, 1], resized to 16x16 (bicubic) where they are not, minus mean 0.5 0.5 0.5, divided by std 0.25 0.25 0.25"
    )
    assert done.code == 0 and f"preprocessing of mine:named: {front}" in done.err, done.err
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert rows["plain"] == "100.00 % (12/12) without defense and masks"
    assert rows["clean"] == "100.00 % (12/12) with the defense" and front in rows["in"]
    found = json.loads(patchcert("certify", "mine:turned", *DEFENSE, *VAL, "--json", "-").out)
    assert (found["plain_accuracy"], found["plain_right"], found["in_front"]) == (4 / 12, 4, front)
    assert all(row["plain"] == row["prediction"] for row in records(found))
    for more in ([], ["--no-certify"]):
        said = ["attack", "mine:turned", *DEFENSE, *VAL, "--limit", "1", "--steps", "1", "--json", "-", *more]
        attacked = json.loads(patchcert(*said).out)
        assert (
            attacked["plain_right"] == sum(row["plain"] == row["label"] for row in records(attacked))
            and attacked["in_front"] == front
        )
    one = json.loads(patchcert("certify", "mine:named", *DEFENSE, "--image", "val/dog/0.png", "--resize", "--json", "-").out)
    assert (one["plain_label"], one["in_front"]) == ("dog", front)
    other = json.loads(patchcert("certify", "cifar-bagcert-rf7", "--patch", "2", "--limit", "2", "--json", "-").out)
    assert "plain_accuracy" not in other and "in_front" not in other


CHANGING = """
import torch
from pathlib import Path
from torch import nn
import CHANGING_helper


class Net(nn.Module):
    def forward(self, x):
        bright = x.mean(dim=(1, 2, 3)) * CHANGING_helper.FACTOR * float(Path("factor.txt").read_text())
        return -(bright[:, None] - bright.new_tensor([0.15, 0.5, 0.85])).abs()


def build():
    made = Net()
    made.classes, made.size = ["cat", "dog", "red fox"], 16
    return made
"""


def changing(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Path(f"{name}.py").write_text(CHANGING.replace("CHANGING", name))
    Path(f"{name}_helper.py").write_text("FACTOR = 1.0\n")
    Path("factor.txt").write_text("1.0")
    return ["certify", f"{name}:build", *DEFENSE, *VAL, "--out", "run"]


def test_a_changed_helper_or_file_is_another_run(patchcert, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    said = changing("first", monkeypatch)
    assert patchcert(*said).code == 0 and "is complete" in patchcert(*said).err
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert set(manifest["setting"]["code_sha256"]) == {"first", "first_helper"} and len(manifest["answers"]["sums"]) == 12
    Path("factor.txt").write_text("1.01")
    done = patchcert(*said)
    assert done.code == 2 and "have changed since 'run' was begun: a file that it reads" in done.err
    Path("factor.txt").write_text("1.0")
    assert patchcert(*said).code == 0
    Path("first_helper.py").write_text("FACTOR = 1.0  # the same\n")
    for name in ("first", "first_helper"):
        del sys.modules[name]
    done = patchcert(*said)
    assert done.code == 2 and "was made with other settings (setting.code_sha256.first_helper '" in done.err, done.err
    assert patchcert(*said, "--fresh").code == 0


def test_a_file_that_changes_in_the_middle_of_a_run_gives_no_result(patchcert, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    said = changing("second", monkeypatch)
    append = Run.append

    def change(self: Run, records: Any) -> None:
        append(self, records)
        Path("factor.txt").write_text("1.01")

    monkeypatch.setattr(Run, "append", change)
    done = patchcert(*said, "--batch-size", "6")
    assert done.code == 2 and "network's outputs for fixed images have changed since 'run' was begun" in done.err, done.err
    assert not Path("run/result.json").exists()
    assert patchcert(*said).code == 2


def test_random_weights_measure_the_cost_of_any_pictures(patchcert, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Neither the names of classes nor the self-test stop a dry run with weights whose answers mean nothing."""
    pytest.importorskip("timm")

    def fails(self: PatchCleanser) -> None:
        raise IntegrityError("in float32 logits are off by 9.9e-01 of their scale;")

    monkeypatch.setattr(PatchCleanser, "self_test", fails)
    said = ["certify", f"timm:{TINY}", "--defense", "patchcleanser", "--masks", "2", "--patch", "2%", "--device", "cpu", *VAL]
    done = patchcert(*said, "--limit", "2", "--weights", "none", "--dry-run", "--json", "-")
    assert done.code == 0 and json.loads(done.out)["images"] == 2, done.err
    assert "random weights fail the self-test, which is of no consequence for what they cost: in float32" in done.err
    refused = patchcert("certify", "mine:named", *DEFENSE, *VAL)
    assert refused.code == 5 and "logits are off by" in refused.err


DETECT = ["--defense", "minority", "--masks", "3", "--patch", "3", "--device", "cpu"]


def test_a_threshold_of_certified_detection_and_the_picture_of_all(patchcert) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("matplotlib")
    said = ["certify", "mine:build", *DETECT, *VAL, *CLASSES]
    done = patchcert(*said, "--threshold", "0.5", "--plot-thresholds", "t.png", "--json", "-")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert Path("t.png").is_file() and "drew t.png" in done.err
    rows = {row["threshold"]: row for row in found["claims"][0]["thresholds"]}
    assert {0.0, 0.5, 0.999} <= set(rows)
    manifest = json.loads((Path(found["records"]).parent / "manifest.json").read_text())
    assert manifest["setting"]["threshold"] == 0.5 and manifest["setting"]["compared"] == sorted(rows)
    places = {found["records"]}
    for threshold in (0.0, 0.5, 0.9):
        one = json.loads(patchcert(*said, "--threshold", str(threshold), "--json", "-").out)
        counts = {key: rows[threshold][key] for key in ("clean", "alarms", "certified", "or_alarm")}
        assert one["claims"][0]["counts"] == counts and "thresholds" not in one["claims"][0]
        places.add(one["records"])
    assert len(places) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--threshold", "1"], "with --threshold 1 minority never raises an alarm."),
        (["--threshold", "1.5"], "--threshold 1.5 is not a confidence."),
        (["--threshold", "-0.1"], "--threshold -0.1 is not a confidence"),
        (["--threshold", "nan"], "--threshold nan is not a confidence"),
    ],
)
def test_what_is_no_threshold_is_refused(patchcert, more: list[str], words: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", "mine:build", *DETECT, *VAL, *CLASSES, *more)
    assert done.code == 2 and words in done.err


def test_hicert_warns_of_everything_at_threshold_one_and_the_published_metric_counts_it(patchcert) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("certify", "mine:build", *DETECT, "--defense", "hicert", *VAL, *CLASSES, "--threshold", "1")
    assert done.code == 0, done.err
    shown = " ".join(done.out.split())
    assert "100.00 % (12/12) of the unattacked images" in shown and "published metric 100.00 % (12/12) certified incl." in shown
    assert "certified 0.00 % (0/12), silent on the clean image, right" in shown


def test_a_defense_that_raises_no_alarms_has_no_threshold(patchcert) -> None:  # type: ignore[no-untyped-def]
    for more, flag in ((["--threshold", "0.5"], "--threshold"), (["--plot-thresholds", "t.png"], "--plot-thresholds")):
        done = patchcert("certify", "mine:build", *DEFENSE, *VAL, *CLASSES, *more)
        assert done.code == 2 and f"patchcleanser raises no alarms, so {flag} means nothing." in done.err
    done = patchcert("certify", "mnist-ibp-p2", "--patch", "2", "--threshold", "0.5")
    assert done.code == 2 and "ibp raises no alarms" in done.err


def test_given_pictures_are_pasted_and_counted(patchcert) -> None:  # type: ignore[no-untyped-def]
    from PIL import Image

    Path("patches").mkdir()
    for name, colour in (("red", (255, 0, 0)), ("white", (255, 255, 255))):
        Image.new("RGB", (3, 3), colour).save(f"patches/{name}.png")
    said = ["attack", "mine:build", *DEFENSE, *VAL, *CLASSES, "--saved", "patches"]
    done = patchcert(*said, "--places", "2", "--turn", "20", "--shrink", "0.5", "--json", "-")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    rows = records(found)
    assert all(row["tries"] == 4 and row["changed"] <= 4 for row in rows) and len(rows) == 12
    right = [row for row in rows if row["prediction"] == row["label"]]
    pasted = found["pasted"]
    assert (pasted["right"], pasted["tries"]) == (len(right), 4 * len(right))
    assert pasted["changed"] == sum(row["changed"] for row in right)
    assert pasted["plain_changed"] == sum(row["plain_changed"] for row in rows if row["plain"] == row["label"])
    assert found["broken"] == [] and set(found["attack"]["pictures"]) == {"red.png", "white.png"}
    shown = patchcert(*said)
    bare = patchcert("attack", "mnist-ibp-p5", "--patch", "5", "--saved", "patches", "--limit", "4")
    assert bare.code == 0 and "pastings change" in bare.out and "plain network" not in bare.out
    assert shown.code == 0 and "pastings change a right answer" in shown.out and "plain network" in shown.out


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--saved", "nowhere"], 6, "there is no folder 'nowhere'"),
        (["--saved", "val"], 6, "'val' has no image files"),
        (["--saved", "val/cat", "--patch", "2"], 2, "larger than patch:2x2."),
        (["--saved", "val/cat", "--steps", "3"], 2, "--steps is for an attack that searches"),
        (["--turn", "3"], 2, "--turn is about images to paste."),
        (["--saved", "val/cat", "--places", "0"], 2, "--places"),
    ],
)
def test_what_cannot_be_pasted(patchcert, more: list[str], code: int, words: str) -> None:  # type: ignore[no-untyped-def]
    done = patchcert("attack", "mine:build", *DEFENSE, *VAL, *CLASSES, *more)
    assert done.code == code and words in done.err, done.err
