"""Images that stay in their files: the same pixels in any order, only those that are needed, and every damaged one named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchcert_cli import data
from patchcert_cli.checkpoint import load_defense
from patchcert_cli.data import image_files, image_reader
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.defenses import Claim
from patchcert_cli.errors import DataError, Interrupted, UsageError
from patchcert_cli.evaluation import estimate, evaluate
from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask
from patchcert_cli.progress import Silent
from patchcert_cli.threats import Patch
from patchcert_cli.training import loop, state
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.run import train

SIZE = 16
WORDS = ("n00000003", "n00000011", "n01000000")


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fill(folder: Path, names: tuple[str, ...] = WORDS, each: int = 5, suffix: str = ".png") -> Path:
    """Class folders with a few images of various shapes."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for one in range(each):
            noise(19 + 3 * one, 31 - 4 * number % 20, 100 * number + one).save(folder / name / f"{name}_{one}{suffix}")
    return folder


def load(folder: Path) -> data.Images:
    return data.load(f"imagefolder:{folder}@{SIZE}", "test")


def square(path: Path) -> bytes:
    return image_files.decode(path, ResizeCrop.square(SIZE)).pixels.numpy().tobytes()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all images that are opened, with blocks of four."""
    names: list[str] = []
    honest = image_files.decode

    def decode(path: Path, resize_crop: ResizeCrop, channels: int = 3) -> image_files.DecodedImage:
        names.append(path.name)
        return honest(path, resize_crop, channels)

    monkeypatch.setattr(image_files, "decode", decode)
    monkeypatch.setattr(image_reader, "BLOCK", 4)
    return names


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """No images fit into memory."""
    monkeypatch.setattr(image_reader, "MAX_BYTES_IN_MEMORY", 0)


PALETTE = ("P", "clear palette")
MODES = {
    ".png": ("RGB", "L", "1", "LA", "RGBA", *PALETTE),
    ".jpg": ("RGB", "L", "CMYK"),
    ".JPEG": ("RGB", "L", "CMYK"),
    ".webp": ("RGB",),
    ".bmp": ("RGB", "L", "1", "P"),
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES.items() for mode in modes])
def test_every_mode_becomes_eight_bit_colours(tmp_path: Path, suffix: str, mode: str) -> None:
    image = noise(40, 30, 3).convert("P" if mode in PALETTE else mode)
    more: dict[str, Any] = {"transparency": bytes(range(200))} if mode == "clear palette" else {}
    image.save(tmp_path / f"a{suffix}", **more)
    with Image.open(tmp_path / f"a{suffix}") as again:
        assert again.mode == ("P" if mode in PALETTE else mode)
    found = np.frombuffer(square(tmp_path / f"a{suffix}"), np.uint8).reshape(3, SIZE, SIZE).astype(int)
    grey = mode in ("L", "1", "LA")
    assert found.std() > 0 and (np.ptp(found, axis=0).max() == 0) == grey


def test_images_are_read_in_the_order_of_their_names_and_only_those_that_are_asked_for(tmp_path: Path, opened: list[str]) -> None:
    folder = fill(tmp_path / "d", ("b", "a", "c"), suffix=".JPEG")
    images = load(folder)
    assert opened == [] and images.pixels.is_meta and images.pixels.shape == (15, 3, SIZE, SIZE)
    assert images.classes == ("a", "b", "c") and images.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    wanted = [folder / name / f"{name}_{one}.JPEG" for name in "abc" for one in range(5)]
    for row, path in zip(images.read(), wanted, strict=True):
        assert row.numpy().tobytes() == square(path)
    opened.clear()
    assert images.read(torch.tensor([7, 3]))[1].numpy().tobytes() == square(wanted[3])
    assert images.read(slice(0, 0)).shape == (0, 3, SIZE, SIZE)
    assert sorted(opened[:2]) == ["a_3.JPEG", "b_2.JPEG"] and len(opened) == 3


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_batches_do_not_depend_on_the_number_of_threads(tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(fill(tmp_path / "d"))
    wanted = images.read()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(images.read(), wanted) and torch.equal(load(tmp_path / "d").checked().pixels, wanted)


def test_subsets_are_those_of_images_in_memory(tmp_path: Path) -> None:
    lazy = load(fill(tmp_path / "d"))
    plain = replace(lazy, pixels=lazy.read(), reader=None)
    kept, held = lazy.hold_out(4, 1)
    pairs = [
        (lazy.limit(6, 3), plain.limit(6, 3)),
        (kept, plain.hold_out(4, 1)[0]),
        (held.take(torch.tensor([3, 0])), plain.hold_out(4, 1)[1].take(torch.tensor([3, 0]))),
        (kept.limit(5, 2).take(torch.tensor([4, 4, 1])), plain.hold_out(4, 1)[0].limit(5, 2).take(torch.tensor([4, 4, 1]))),
    ]
    for some, wanted in pairs:
        assert some.reader is not None and torch.equal(some.read(), wanted.pixels) and some.pixels.shape == wanted.pixels.shape
        assert torch.equal(some.read(slice(1, 3)), wanted.read(slice(1, 3))) and some.digest() == wanted.digest()
        assert torch.equal(some.labels, wanted.labels) and torch.equal(some.index, wanted.index) and some.split == wanted.split


def test_a_check_reads_once_and_keeps_what_is_small(tmp_path: Path, opened: list[str]) -> None:
    images = load(fill(tmp_path / "d")).limit(6, 0)
    checked = images.checked()
    assert len(opened) == 6 and checked.reader is None
    assert checked.remarks[0].startswith("6 of 6 images resampled, from ")
    assert checked.checked() is checked and len(opened) == 6
    assert checked.digest() == replace(checked, sha256="").digest() == images.digest()


def test_a_check_of_large_images_is_remembered_until_a_file_changes(
    tmp_path: Path, opened: list[str], large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(image_reader, "MIN_AGE_SECONDS", -1e9)  # as if the files were old
    folder = fill(tmp_path / "d")
    first = load(folder).checked()
    assert len(opened) == 15 and first.reader is not None
    again = load(folder).checked()
    assert len(opened) == 15 and (again.sha256, again.remarks) == (first.sha256, first.remarks)
    assert load(folder).relabelled([1, 0, 2]).checked().sha256 != first.sha256 and len(opened) == 30
    noise(20, 20, 9).save(folder / WORDS[0] / f"{WORDS[0]}_0.png")
    assert load(folder).checked().sha256 != first.sha256 and len(opened) == 45
    (entry, *_) = (tmp_path / "hf" / "patchcert" / "images").iterdir()
    for damage in (b"{", b"[]", b'{"format": 1}', b'{"format": 1, "sha256": "x", "changes": [1]}'):
        for entry in (tmp_path / "hf" / "patchcert" / "images").iterdir():
            entry.write_bytes(damage)
        assert load(folder).checked().sha256 == load(folder).digest()


def test_young_files_and_a_home_that_cannot_be_written_are_read_each_time(
    tmp_path: Path, opened: list[str], large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "d")
    assert load(folder).checked().sha256 == load(folder).checked().sha256 and len(opened) == 30
    monkeypatch.setattr(image_reader, "MIN_AGE_SECONDS", -1e9)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hf"))
    assert load(folder).checked().sha256 == load(folder).checked().sha256 and len(opened) == 60


CHANGES: dict[str, Callable[[Path], object]] = {
    "more": lambda d: noise(20, 20, 9).save(d / "a" / "a_9.png"),
    "fewer": lambda d: (d / "a" / "a_2.png").unlink(),
    "another": lambda d: noise(20, 20, 8).save(d / "b" / "b_0.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_has_another_digest_and_a_copy_the_same(tmp_path: Path, change: str) -> None:
    folder, copy = fill(tmp_path / "d", ("a", "b")), fill(tmp_path / "e", ("a", "b"))
    before = load(folder).digest()
    assert load(copy).digest() == before
    CHANGES[change](folder)
    assert load(folder).digest() != before


def broken(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:400])
    elif how == "deep":
        Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(path)
    elif how == "gone":
        path.unlink()
        path.symlink_to("nowhere.png")
    else:
        path.write_bytes(b"<html>" if how == "page" else b"")


@pytest.mark.parametrize("how", ["truncated", "page", "empty", "deep", "gone"])
def test_a_broken_image_is_named_in_one_line(tmp_path: Path, how: str) -> None:
    folder = fill(tmp_path / "d")
    bad = folder / WORDS[2] / f"{WORDS[2]}_1.png"
    broken(bad, how)
    for read in (lambda images: images.read(), lambda images: images.checked(), lambda images: images.digest()):
        with pytest.raises(DataError) as caught:
            read(load(folder))
        assert caught.value.code == 6 and str(bad) in str(caught.value) and "\n" not in str(caught.value)
    assert len(load(folder).read(slice(10))) == 10  # others are not in the way


class Told(Silent):
    """Keeps notes; Ctrl-C once so many images are read."""

    def __init__(self, stop: int = 99) -> None:
        self.stop, self.notes = stop, list[str]()

    def update(self, done: int, total: int, text: str) -> None:
        if done >= self.stop:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_all_damaged_images_are_reported_together(tmp_path: Path, opened: list[str]) -> None:
    folder, progress = fill(tmp_path / "d"), Told()
    bad = [folder / WORDS[at // 5] / f"{WORDS[at // 5]}_{at % 5}.png" for at in (6, 7, 9, 14)]
    for path, how in zip(bad, ("truncated", "page", "deep", "empty"), strict=True):
        broken(path, how)
    with pytest.raises(DataError, match="4 of 15 images cannot be used: ") as caught:
        load(folder).checked(progress)
    assert str(caught.value).count("\n") == 0 and caught.value.code == 6
    assert all(str(path) in str(caught.value) for path in bad[:3]) and "And 1 more." in str(caught.value)
    assert len(opened) == 15 and all(any(str(path) in line for line in progress.notes) for path in bad)


def test_ctrl_c_while_images_are_checked(tmp_path: Path, opened: list[str]) -> None:
    with pytest.raises(Interrupted) as caught:
        load(fill(tmp_path / "d")).checked(Told(stop=8))
    assert caught.value.code == 130 and len(opened) == 8


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImageNet of three classes and 16x16 pixels."""
    how = ResizeCrop.square(SIZE, 18)
    facts = replace(
        data.open_dataset("imagenet"), shape=(3, SIZE, SIZE), classes=("0", "1", "2"), test_images=15, resize_crop=how
    )
    monkeypatch.setitem(data.DATASETS, "imagenet", facts)


def test_imagenet_is_described_as_published() -> None:
    facts = data.open_dataset("imagenet")
    assert (facts.shape, len(facts.classes), facts.test_images, facts.bundled) == ((3, 224, 224), 1000, 50_000, 0)
    assert facts.classes[0] == "0" and facts.classes[999] == "999"


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_imagenet_says_what_to_put_where(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match=f"no imagenet {split} data: there is no folder") as caught:
        data.load("imagenet", split, data_dir=tmp_path, fetch="patchcert certify m --download")
    said = str(caught.value)
    assert caught.value.code == 6 and "--download" not in said and "\n" not in said
    for words in ("https://image-net.org/download.php", f"{tmp_path}/imagenet/train/<wnid>/", f"{tmp_path}/imagenet/val/<wnid>/"):
        assert words in said
    with pytest.raises(UsageError, match="imagenet cannot be downloaded by --download. Get it at https"):
        data.load("imagenet", split, data_dir=tmp_path, download=True)


def test_other_class_folders_are_never_taken_for_imagenets(tmp_path: Path, small: None) -> None:
    ten = tuple(f"n0{1440764 + number}" for number in range(10))
    fill(tmp_path / "a" / "imagenet" / "val", ten, 1)
    with pytest.raises(
        DataError, match=r"has 10 class folders \(n01440764, n01440765, n01440766, \.\.\.\)\. Its 3 class folders"
    ):
        data.load("imagenet", "test", data_dir=tmp_path / "a")
    fill(tmp_path / "b" / "imagenet" / "train", ("dog", "n01440764", "n01440765"), 1)
    with pytest.raises(DataError, match=r"has 3 class folders \(dog, .*\), 1 of them with another name \(dog\)") as caught:
        data.load("imagenet", "train", data_dir=tmp_path / "b")
    assert caught.value.code == 6


def imagenet(root: Path, split: str = "test") -> data.Images:
    return data.load("imagenet", split, data_dir=root)


RECIPE = Recipe(
    "patch:12%",
    "imagenet",
    "bagcert",
    network_options={"widths": [8, 12], "kernels": [3, 3], "dilations": [1, 2], "mixes": [0, 1], "stride": 2},
    epochs=2,
    batch_size=8,
    learning_rate=0.01,
    validation=9,
    options={"shift": 1, "every": 1},
)


def test_training_and_certifying_are_those_of_images_in_memory(
    tmp_path: Path, small: None, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "imagenet" / "train", each=13)
    fill(tmp_path / "imagenet" / "val")
    monkeypatch.setattr(state, "FITTED", 10)
    recipe = replace(RECIPE)  # one that finds these images: it was made before them
    found = train(recipe, tmp_path / "run", data_dir=tmp_path, device="cpu")
    lazy, test = imagenet(tmp_path, "train"), imagenet(tmp_path)
    plain = loop.train(recipe, replace(lazy, pixels=lazy.read(), reader=None), tmp_path / "plain")
    defense, config = load_defense(tmp_path / "run")
    assert found["validation"]["counts"] == {"clean": plain.validation.clean, "certified": plain.validation.certified}
    for name, value in plain.defense.state_dict().items():
        assert torch.equal(defense.state_dict()[name], value), name
    assert config["deployed"]["classes"] == ["0", "1", "2"]
    results = []
    for images in (test, replace(test, pixels=test.read(), reader=None)):
        model = EvaluatedModel(defense, "m", "bagcert", "0" * 64, "folder")
        task = EvaluationTask(model, images.limit(11, 0), (Claim(Patch(2, 2)),), 15, batch_size=4)
        results.append(evaluate.certify(task, tmp_path / f"certified-{len(results)}"))
        estimate.evaluation(task, tmp_path / "out")
    records = [(tmp_path / f"certified-{number}" / "records.jsonl").read_text() for number in (0, 1)]
    assert records[0] == records[1] and len(records[0].splitlines()) == 11 == results[0]["images"]
    manifests = [json.loads((tmp_path / f"certified-{number}" / "manifest.json").read_text()) for number in (0, 1)]
    assert manifests[0]["data_sha256"] == manifests[1]["data_sha256"] == test.limit(11, 0).digest()


def test_a_run_notices_a_changed_image(tmp_path: Path, small: None) -> None:
    fill(tmp_path / "imagenet" / "val")
    defense = load_defense(run_of(tmp_path))[0]
    model = EvaluatedModel(defense, "m", "bagcert", "0" * 64, "folder")

    def certify() -> dict[str, Any]:
        return evaluate.certify(EvaluationTask(model, imagenet(tmp_path), (Claim(Patch(2, 2)),), 15), tmp_path / "out")

    assert certify()["images"] == 15
    path = tmp_path / "imagenet" / "val" / WORDS[1] / f"{WORDS[1]}_1.png"
    before = path.stat()
    noise(22, 27, 77).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UsageError, match="was made with other settings .*data_sha256"):
        certify()


def run_of(tmp_path: Path) -> Path:
    """A small model for these images."""
    fill(tmp_path / "imagenet" / "train", each=7)
    train(replace(RECIPE, epochs=1), tmp_path / "run", data_dir=tmp_path, device="cpu")
    return tmp_path / "run"


def test_a_defense_is_finished_with_all_classes(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class folders come sorted: the first images would be of one class alone."""
    fill(tmp_path / "imagenet" / "train", each=13)
    monkeypatch.setattr(state, "FITTED", 6)
    defense: Any = SimpleNamespace(device=torch.device("cpu"))
    images = imagenet(tmp_path, "train")
    assert torch.equal(state.some_images(defense, images), data.to_float(images.read(torch.arange(6) * 6)))
    assert images.labels[::6][:6].tolist() == [0, 0, 0, 1, 1, 2]
    mixed = images.take(torch.arange(39).flip(0))  # any other order: the first ones, as ever
    assert torch.equal(state.some_images(defense, mixed), data.to_float(mixed.read(slice(6))))
