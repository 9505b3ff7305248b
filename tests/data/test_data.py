"""Data: the bundled digits, torchvision's layout, subsets that stay put, and damaged files."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from patchcert_cli import data
from patchcert_cli.errors import DataError, UnknownName, UsageError


def write_mnist(root: Path, count: int = 7, *, packed: bool = False, cut: int = 0) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.arange(count * 784, dtype=np.int64).astype(np.uint8)
    for name, axes, body in (
        ("t10k-images-idx3-ubyte", (count, 28, 28), pixels.tobytes()),
        ("t10k-labels-idx1-ubyte", (count,), bytes(range(count))),
    ):
        content = bytes([0, 0, 8, len(axes)]) + np.array(axes, ">i4").tobytes() + body
        content = content[: len(content) - cut]
        (raw / (name + ".gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


def test_the_bundled_test_split_is_all_of_mnist() -> None:
    images = data.load("mnist", "test")
    assert images.source == "bundled"
    assert images.pixels.shape == (10_000, 1, 28, 28) and images.pixels.dtype == torch.uint8
    # class counts of the MNIST test set as published with it
    assert torch.bincount(images.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.to_float(images.pixels).mean().item() == pytest.approx(0.1325, abs=1e-4)
    assert float(data.to_float(images.pixels).amax()) == 1.0


@pytest.mark.parametrize("packed", [False, True])
def test_a_data_directory_wins_over_the_bundle(tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "d", packed=packed)
    images = data.load("mnist", "test", data_dir=tmp_path / "d")
    assert (len(images), images.source) == (7, str(tmp_path / "d"))
    assert images.pixels[1, 0, 0, 0] == 784 % 256
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path / "d"))
    assert len(data.load("mnist", "test")) == 7


def test_subsets_are_seeded_nested_and_in_order() -> None:
    images = data.load("mnist", "test")
    small, large = images.limit(50, 3), images.limit(200, 3)
    assert small.index.tolist() == sorted(small.index.tolist())
    assert set(small.index.tolist()) <= set(large.index.tolist())
    assert small.index.tolist() == images.limit(50, 3).index.tolist() != images.limit(50, 4).index.tolist()
    assert torch.equal(small.pixels, images.pixels[small.index])
    assert images.limit(10_001, 0) is images
    with pytest.raises(UsageError, match="--limit 0"):
        images.limit(0, 0)
    kept, held = images.hold_out(1000, 0)
    assert held.split == "validation" and len(held) == 1000
    assert set(kept.index.tolist()) | set(held.index.tolist()) == set(range(10_000))
    with pytest.raises(UsageError, match="10000 of 10000"):
        images.hold_out(10_000, 0)


def test_images_in_memory_are_read_as_they_lie() -> None:
    images = data.load("mnist", "test").limit(30, 0)
    assert images.reader is None
    assert images.read().data_ptr() == images.pixels.data_ptr() and torch.equal(images.read(), images.pixels)
    assert images.read(slice(4, 9)).data_ptr() == images.pixels[4:].data_ptr()
    some = torch.tensor([7, 7, 2])
    assert torch.equal(images.read(some), images.pixels[some])
    assert torch.equal(images.take(some).read(), images.pixels[some])
    content = images.pixels.numpy().tobytes() + images.labels.numpy().tobytes()
    assert images.digest() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", data.DATASETS)
def test_every_data_set_is_described_whole(name: str) -> None:
    facts = data.open_dataset(name)
    assert facts.name == name and len(facts.mean) == len(facts.std) == facts.shape[0]
    assert len(set(facts.classes)) == len(facts.classes) >= 10
    assert 0 <= facts.bundled <= facts.test_images
    assert bool(facts.folder_pattern) == bool(facts.page)


def test_a_named_folder_that_does_not_exist_is_not_replaced_by_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no mnist test data in '{tmp_path / 'nowhere'}'"):
        data.load("mnist", "test", data_dir=tmp_path / "nowhere")
    assert data.load("mnist", "test", data_dir=tmp_path).source == "bundled", "a folder with other data sets"


def test_missing_damaged_and_unknown_data_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"no data set 'mnits'\. Did you mean mnist\?"):
        data.load("mnits", "test")
    with pytest.raises(DataError, match="no cifar10 test data in .* Fetch it with: now"):
        data.load("cifar10", "test", data_dir=tmp_path, fetch="now")
    write_mnist(tmp_path / "cut", cut=5)
    with pytest.raises(DataError, match="truncated or damaged"):
        data.load("mnist", "test", data_dir=tmp_path / "cut")
    write_mnist(tmp_path / "bad")
    (tmp_path / "bad" / "MNIST" / "raw" / "t10k-images-idx3-ubyte").write_bytes(b"<html>")
    with pytest.raises(DataError, match="not an IDX file"):
        data.load("mnist", "test", data_dir=tmp_path / "bad")
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match="cifar10 could not be read"):
        data.load("cifar10", "test", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-9], "not an intact gzip file"),
        (lambda content: content[:40] + b"\xff\x00" + content[42:], "not an intact gzip file"),
        (lambda content: b"<!DOCTYPE html><title>404</title>", "a web page, not a gzip file"),
        (lambda content: b"", "is not an IDX file"),
        (lambda content: gzip.compress(b"\0\0\x08\x01\0\0\0"), "truncated or damaged"),
        (lambda content: gzip.compress(b"\0\0\x08\x01\0\0\0\0"), "truncated or damaged"),
        (lambda content: gzip.compress(b"\0\0\x08\x00"), "truncated or damaged"),
        (lambda content: gzip.compress(b"\0\0\x08\x02" + b"\xff" * 8), "truncated or damaged"),
    ],
)
@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_a_damaged_gzip_file_is_one_line(tmp_path: Path, damage: Callable[[bytes], bytes], said: str, part: str) -> None:
    write_mnist(tmp_path, packed=True)
    path = tmp_path / "MNIST" / "raw" / f"t10k-{part}-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=said) as caught:
        data.load("mnist", "test", data_dir=tmp_path)
    assert caught.value.code == 6 and caught.value.hint == "Delete it and fetch the data again."
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_labels_in_place_of_images_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    images, labels = raw / "t10k-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    for one, other in ((images, labels), (labels, images)):
        kept = one.read_bytes()
        one.write_bytes(other.read_bytes())
        with pytest.raises(DataError, match="has shape"):
            data.load("mnist", "test", data_dir=tmp_path)
        one.write_bytes(kept)
