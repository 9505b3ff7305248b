"""Pictures in class folders: what is packed, when it is packed again, and what is refused; fake pictures stand for ImageNet's."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
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
from patchcert_cli.data import class_folders, folders, image_files
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.defenses import Claim
from patchcert_cli.errors import DataError, Interrupted, MachineError, UsageError
from patchcert_cli.evaluation import estimate, evaluate
from patchcert_cli.evaluation.task import EvaluatedModel, EvaluationTask
from patchcert_cli.storage import hub_cache
from patchcert_cli.threats import Patch
from patchcert_cli.training import loop, run
from patchcert_cli.training.recipe import Recipe

SIZE = 16
USUAL, TIGHT = ResizeCrop.square(SIZE), ResizeCrop.square(SIZE, SIZE)
WORDS = ("n00000003", "n00000011", "n01000000")


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def fill(folder: Path, names: tuple[str, ...] = WORDS, each: int = 5, suffix: str = ".png") -> Path:
    """Class folders with a few pictures of various shapes."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for one in range(each):
            noise(19 + 3 * one, 31 - 4 * number % 20, 100 * number + one).save(folder / name / f"{name}_{one}{suffix}")
    return folder


def load(folder: Path, **more: Any) -> folders.Packed:
    return folders.load(folder, USUAL, stores=[folder.parent / "store"], **more)


def square(path: Path, size: int, short: int | None = None) -> bytes:
    return image_files.decode(path, ResizeCrop.square(size, short)).pixels.numpy().tobytes()


class Stop:
    """Ctrl-C when so many pictures are packed."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.notes: list[str] = []

    def update(self, done: int, total: int, text: str) -> None:
        if done >= self.at:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all pictures that are opened, with blocks of four pictures."""
    names: list[str] = []
    honest = image_files.decode

    def take(path: Path, resize_crop: ResizeCrop, channels: int = 3) -> image_files.DecodedImage:
        names.append(path.name)
        return honest(path, resize_crop, channels)

    monkeypatch.setattr(image_files, "decode", take)
    monkeypatch.setattr(folders, "BLOCK", 4)
    return names


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
    picture = noise(40, 30, 3).convert("P" if mode in PALETTE else mode)
    more: dict[str, Any] = {"transparency": bytes(range(200))} if mode == "clear palette" else {}
    picture.save(tmp_path / f"a{suffix}", **more)
    with Image.open(tmp_path / f"a{suffix}") as again:
        assert again.mode == ("P" if mode in PALETTE else mode)
    found = np.frombuffer(square(tmp_path / f"a{suffix}", SIZE), np.uint8).reshape(3, SIZE, SIZE).astype(int)
    grey = mode in ("L", "1", "LA")
    assert found.std() > 0 and (np.ptp(found, axis=0).max() == 0) == grey


def test_classes_and_pictures_are_in_the_order_of_their_names_and_packed_once(tmp_path: Path, opened: list[str]) -> None:
    folder = fill(tmp_path / "d", ("b", "a", "c"), suffix=".JPEG")
    (folder / ".hidden").mkdir()
    (folder / "read.me").write_text("not a class")
    for name in ("notes.txt", "._b_0.JPEG"):
        (folder / "b" / name).write_text("not a picture")
    packed = load(folder)
    assert packed.classes == ("a", "b", "c") and packed.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    wanted = [folder / name / f"{name}_{one}.JPEG" for name in "abc" for one in range(5)]
    assert sorted(opened) == [path.name for path in wanted]
    for row, path in zip(packed.pixels, wanted, strict=True):
        assert row.numpy().tobytes() == square(path, SIZE)
    opened.clear()
    again = load(folder)
    assert not opened
    assert torch.equal(again.pixels, packed.pixels) and again.sha256 == packed.sha256
    assert packed.path.stat().st_size == 15 * 3 * SIZE * SIZE
    beside = json.loads(packed.path.with_suffix(".json").read_text())
    assert (beside["resize_crop"], beside["pictures"], beside["classes"]) == ("16", 15, ["a", "b", "c"])
    other = folders.load(folder, ResizeCrop.square(8), stores=[tmp_path / "store"])  # another size is another file
    assert len(other.pixels) == 15
    assert load(folder).sha256 == packed.sha256 and len(list((tmp_path / "store").glob("*.u8"))) == 2


def test_a_shorter_side_of_its_own_is_a_file_of_its_own(tmp_path: Path, opened: list[str]) -> None:
    folder = fill(tmp_path / "d")
    usual, tight = load(folder), folders.load(folder, TIGHT, stores=[tmp_path / "store"])
    assert len(list((tmp_path / "store").glob("*.u8"))) == 2 and usual.sha256 != tight.sha256
    assert tight.pixels[4].numpy().tobytes() == square(folder / WORDS[0] / f"{WORDS[0]}_4.png", SIZE, SIZE)
    opened.clear()
    assert folders.load(folder, ResizeCrop.parse("16"), stores=[tmp_path / "store"]).path == usual.path
    listed = class_folders.scan(folder)
    found = folders.find(listed, TIGHT, stores=[tmp_path / "none", tmp_path / "store"])
    assert found is not None and found.path == tight.path and not opened
    assert folders.find(listed, ResizeCrop.square(SIZE, SIZE + 1), stores=[tmp_path / "store"]) is None
    assert torch.equal(folders.glance(listed, [7, 3], TIGHT)[0], tight.pixels[[7, 3]])
    assert opened == [f"{WORDS[1]}_2.png", f"{WORDS[0]}_3.png"]
    touch(folder / WORDS[0] / f"{WORDS[0]}_0.png")
    assert folders.find(class_folders.scan(folder), TIGHT, stores=[tmp_path / "store"]) is None


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "more": lambda d: noise(20, 20, 9).save(d / "a" / "a_9.png"),
    "fewer": lambda d: (d / "a" / "a_2.png").unlink(),
    "another": lambda d: noise(20, 20, 8).save(d / "b" / "b_0.png"),
    "renamed": lambda d: (d / "a" / "a_0.png").rename(d / "a" / "z.png"),
    "newer": lambda d: touch(d / "b" / "b_4.png"),
    "class": lambda d: shutil.copytree(d / "a", d / "aa"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_packed_anew(tmp_path: Path, change: str) -> None:
    folder = fill(tmp_path / "d", ("a", "b"))
    before = load(folder)
    kept = before.pixels.clone()
    CHANGES[change](folder)
    after = load(folder)
    fresh = folders.load(folder, USUAL, stores=[tmp_path / "fresh"])
    assert torch.equal(after.pixels, fresh.pixels) and after.sha256 == fresh.sha256
    assert (after.sha256 == before.sha256) == (change == "newer")
    assert torch.equal(before.pixels, kept)  # whoever was using the old file still can
    assert {path.suffix for path in (tmp_path / "store").iterdir()} == {".u8", ".json", ".lock"}


@pytest.mark.parametrize("at", [4, 8, 12, 15])
def test_an_interrupted_packing_goes_on_where_it_stopped(tmp_path: Path, opened: list[str], at: int) -> None:
    whole = load(fill(tmp_path / "whole" / "d"))
    folder = tmp_path / "cut" / "d"
    shutil.copytree(tmp_path / "whole" / "d", folder)
    with pytest.raises(Interrupted, match=f"interrupted at {at} of 15 pictures. Resume with the same command") as caught:
        load(folder, progress=Stop(at))
    assert caught.value.code == 130
    assert not list((tmp_path / "cut" / "store").glob("*.u8"))
    (torn,) = (tmp_path / "cut" / "store").glob("*.partial")
    with torn.open("ab") as stream:
        stream.write(b"half a picture")
    opened.clear()
    again = load(folder)
    assert len(opened) == 15 - at
    assert torch.equal(again.pixels, whole.pixels) and again.sha256 == whole.sha256


def test_only_what_still_holds_is_kept_of_an_interrupted_packing(tmp_path: Path, opened: list[str]) -> None:
    folder = fill(tmp_path / "d")
    with pytest.raises(Interrupted):
        load(folder, progress=Stop(12))
    touch(folder / WORDS[1] / f"{WORDS[1]}_1.png")  # picture 6, in the second block
    opened.clear()
    load(folder)
    assert len(opened) == 11
    with pytest.raises(Interrupted):
        folders.load(folder, USUAL, stores=[tmp_path / "other"], progress=Stop(12))
    (torn,) = (tmp_path / "other").glob("*.partial")
    os.truncate(torn, 5 * 3 * SIZE * SIZE)
    opened.clear()
    assert torch.equal(folders.load(folder, USUAL, stores=[tmp_path / "other"]).pixels, load(folder).pixels)
    assert len(opened) == 11


def test_a_damaged_packed_file_is_made_again(tmp_path: Path, opened: list[str]) -> None:
    folder = fill(tmp_path / "d")
    whole = load(folder)
    kept = whole.pixels.clone()
    for damage in (
        lambda: whole.path.write_bytes(b"short"),
        lambda: whole.path.with_suffix(".json").write_text("{"),
        lambda: whole.path.with_suffix(".json").unlink(),
        lambda: whole.path.unlink(),
    ):
        damage()
        opened.clear()
        assert torch.equal(load(folder).pixels, kept)
        assert len(opened) == 15


def test_folders_that_are_none_of_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder '.*/none'"):
        load(tmp_path / "none")
    (tmp_path / "flat").mkdir()
    noise(20, 20, 0).save(tmp_path / "flat" / "a.png")
    with pytest.raises(DataError, match="'.*/flat' has no class folders. Put the pictures of each class into a sub-folder"):
        load(tmp_path / "flat")
    folder = fill(tmp_path / "d", ("a", "c"))
    (folder / "b" / "deeper").mkdir(parents=True)
    with pytest.raises(DataError, match=r"'.*/d/b' has no pictures \(\.jpg, .*\). Every class folder needs some") as caught:
        load(folder)
    assert caught.value.code == 6
    (folder / "b" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"'.*lost.png' cannot be read: No such file"):
        load(folder)
    assert not (tmp_path / "store").exists()


def broken(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:400])
    elif how == "deep":
        Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(path)
    else:
        path.write_bytes(b"<html>" if how == "page" else b"")


@pytest.mark.parametrize("how", ["truncated", "page", "empty", "deep"])
def test_a_broken_picture_is_named_and_what_was_packed_is_kept(tmp_path: Path, opened: list[str], how: str) -> None:
    folder = fill(tmp_path / "d")
    bad = folder / WORDS[2] / f"{WORDS[2]}_1.png"
    broken(bad, how)
    words = "more than 8 bits per channel" if how == "deep" else r"not a picture that can be read \("
    with pytest.raises(DataError, match=f"'{bad}' .*{words}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    bad.unlink()
    opened.clear()
    assert len(load(folder).pixels) == 14
    assert len(opened) == 14 - 8


def test_all_damaged_pictures_are_told_at_once_and_what_was_packed_is_kept(tmp_path: Path, opened: list[str]) -> None:
    folder, said = fill(tmp_path / "d"), Stop(99)
    bad = [folder / WORDS[at // 5] / f"{WORDS[at // 5]}_{at % 5}.png" for at in (6, 7, 9, 14)]
    for path, how in zip(bad, ("truncated", "page", "deep", "empty"), strict=True):
        broken(path, how)
    with pytest.raises(DataError, match="4 of 15 pictures cannot be used: ") as caught:
        load(folder, progress=said)
    assert str(caught.value).count("\n") == 0 and caught.value.code == 6
    assert all(str(path) in str(caught.value) for path in bad[:3]) and "And 1 more. Replace or remove them, then" in str(
        caught.value
    )
    assert len(opened) == 15 and all(any(str(path) in line for line in said.notes) for path in bad)
    for path in bad:
        noise(20, 20, 5).save(path)
    opened.clear()
    assert len(load(folder).pixels) == 15 and len(opened) == 15 - 4


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> None:
    folder = fill(tmp_path / "d")
    need = 15 * 3 * SIZE * SIZE
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
    words = r"packing 15 pictures of '.*/d' needs 0\.0 GB in '.*/store', where 0\.0 GB are free. Free some space"
    with pytest.raises(MachineError, match=words) as caught:
        load(folder)
    assert caught.value.code == 7 and not opened
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need))
    load(folder)


def test_one_process_packs_at_a_time(tmp_path: Path) -> None:
    folder = fill(tmp_path / "d")
    place = load(folder).path
    place.unlink()
    with place.with_suffix(".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(MachineError, match="another process is packing '.*u8'. Wait until it is done"):
            load(folder)
    assert load(folder).path == place


def test_the_first_store_that_can_be_written_to_is_used(tmp_path: Path, opened: list[str]) -> None:
    folder = fill(tmp_path / "d")
    (tmp_path / "file").write_text("no folder")
    stores = [tmp_path / "file" / "store", tmp_path / "second"]
    assert folders.load(folder, USUAL, stores=stores).path.parent == tmp_path / "second"
    opened.clear()
    stores = [tmp_path / "third", tmp_path / "second"]  # what is packed somewhere is found there
    assert folders.load(folder, USUAL, stores=stores).path.parent == tmp_path / "second"
    with pytest.raises(MachineError, match="cannot write to '.*/file/store'"):
        folders.load(folder, ResizeCrop.square(8), stores=[tmp_path / "file" / "store"])
    fill(tmp_path / "root" / "d")
    folders.load(tmp_path / "root" / "d", USUAL, stores=[tmp_path / "root" / ".store"])
    (tmp_path / "root").rename(tmp_path / "moved")
    opened.clear()
    folders.load(tmp_path / "moved" / "d", USUAL, stores=[tmp_path / "moved" / ".store"])
    assert not opened


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImageNet of three classes and 16x16 pixels."""
    how = ResizeCrop.square(SIZE, 18)
    facts = replace(data.info("imagenet"), shape=(3, SIZE, SIZE), classes=("0", "1", "2"), test_images=15, resize_crop=how)
    monkeypatch.setitem(data.DATASETS, "imagenet", facts)


def test_imagenet_is_described_as_published() -> None:
    facts = data.info("imagenet")
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
    with pytest.raises(DataError, match=r"has 3 class folders \(dog, .*\), 1 of them not named so \(dog\)") as caught:
        data.load("imagenet", "train", data_dir=tmp_path / "b")
    assert caught.value.code == 6 and not (tmp_path / "b" / data.STORE).exists()


def imagenet(root: Path, split: str = "test") -> data.Images:
    return data.load("imagenet", split, data_dir=root)


def in_memory(images: data.Images) -> data.Images:
    return replace(images, pixels=images.read(), mapped=None)


def test_subsets_of_mapped_images_are_those_of_images_in_memory_and_copy_nothing(tmp_path: Path, small: None) -> None:
    fill(tmp_path / "imagenet" / "val")
    images = imagenet(tmp_path)
    assert (len(images), images.split, images.source) == (15, "test", str(tmp_path))
    assert images.pixels.shape == (15, 3, SIZE, SIZE) and images.pixels.dtype == torch.uint8 and images.pixels.is_meta
    with pytest.raises(NotImplementedError):  # nobody mistakes the whole file for a subset
        data.to_float(images.pixels).tolist()
    plain = in_memory(images)
    kept, held = images.hold_out(4, 1)
    subsets = [
        (images.limit(6, 3), plain.limit(6, 3)),
        (kept, plain.hold_out(4, 1)[0]),
        (held.take(torch.tensor([3, 0])), plain.hold_out(4, 1)[1].take(torch.tensor([3, 0]))),
        (kept.limit(5, 2).take(torch.tensor([4, 4, 1])), plain.hold_out(4, 1)[0].limit(5, 2).take(torch.tensor([4, 4, 1]))),
    ]
    whole = images.mapped
    assert whole is not None
    for mapped, wanted in subsets:
        assert mapped.mapped is not None and mapped.mapped.file.data_ptr() == whole.file.data_ptr()
        assert torch.equal(mapped.read(), wanted.pixels) and mapped.pixels.shape == wanted.pixels.shape
        assert torch.equal(mapped.read(slice(1, 3)), wanted.read(slice(1, 3)))
        assert torch.equal(mapped.labels, wanted.labels) and torch.equal(mapped.index, wanted.index)
        assert mapped.split == wanted.split
    assert imagenet(tmp_path).limit(50, 0).mapped is not None
    assert (tmp_path / data.STORE).is_dir()


def test_the_digest_of_mapped_images_follows_content_and_choice(tmp_path: Path, small: None) -> None:
    for root in ("a", "b", "c"):
        fill(tmp_path / root / "imagenet" / "val")
    noise(20, 20, 77).save(tmp_path / "c" / "imagenet" / "val" / WORDS[0] / f"{WORDS[0]}_0.png")
    one, two, other = (imagenet(tmp_path / root) for root in ("a", "b", "c"))
    assert one.digest() == two.digest() != other.digest()
    assert one.take(torch.arange(15)).digest() == one.digest()
    assert len({part.digest() for part in (one, one.limit(5, 0), one.limit(5, 1), one.limit(6, 0), *one.hold_out(4, 1))}) == 6
    assert one.limit(5, 0).digest() == two.limit(5, 0).digest()


def test_packed_pictures_go_home_where_the_data_cannot_be_written_to(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "d" / "imagenet" / "val")
    monkeypatch.setattr(hub_cache, "home", lambda: tmp_path / "home")
    (tmp_path / "d" / data.STORE).write_text("in the way")
    assert len(imagenet(tmp_path / "d")) == 15
    assert list((tmp_path / "home" / "patchcert" / "packed").glob("imagenet-val-16of18-*.u8"))


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
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "imagenet" / "train", each=13)
    fill(tmp_path / "imagenet" / "val")
    monkeypatch.setattr(loop, "FITTED", 10)
    found = run.train(RECIPE, tmp_path / "run", data_dir=tmp_path, device="cpu")
    plain = loop.train(RECIPE, in_memory(imagenet(tmp_path, "train")), tmp_path / "plain")
    defense, config = load_defense(tmp_path / "run")
    assert found["validation"]["counts"] == {"clean": plain.validation.clean, "certified": plain.validation.certified}
    for name, value in plain.defense.state_dict().items():
        assert torch.equal(defense.state_dict()[name], value), name
    assert config["classes"] == ["0", "1", "2"]
    results = []
    for images in (imagenet(tmp_path), in_memory(imagenet(tmp_path))):
        model = EvaluatedModel(defense, "m", "bagcert", "0" * 64, "folder")
        task = EvaluationTask(model, images.limit(11, 0), (Claim(Patch(2, 2)),), 15, batch_size=4)
        results.append(evaluate.certify(task, tmp_path / f"certified-{len(results)}"))
        estimate.evaluation(task, tmp_path / "out")
    records = [(tmp_path / f"certified-{number}" / "records.jsonl").read_text() for number in (0, 1)]
    assert records[0] == records[1] and len(records[0].splitlines()) == 11 == results[0]["images"]
    manifest = json.loads((tmp_path / "certified-0" / "manifest.json").read_text())
    assert manifest["data_sha256"] == imagenet(tmp_path).limit(11, 0).digest()


def test_a_defense_is_finished_with_all_classes(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class folders come sorted: the first images would be of one class alone."""
    fill(tmp_path / "imagenet" / "train", each=13)
    monkeypatch.setattr(loop, "FITTED", 6)
    given: list[torch.Tensor] = []
    defense: Any = SimpleNamespace(device="cpu", finish=given.append)
    images = imagenet(tmp_path, "train")
    loop._finish(RECIPE, defense, images, rounded=False)
    assert torch.equal(given[0], data.to_float(images.read(torch.arange(6) * 6)))
    assert images.labels[::6][:6].tolist() == [0, 0, 0, 1, 1, 2]
    mixed = images.take(torch.arange(39).flip(0))  # any other order: the first ones, as ever
    loop._finish(RECIPE, defense, mixed, rounded=False)
    assert torch.equal(given[1], data.to_float(mixed.read(slice(6))))
