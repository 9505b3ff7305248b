"""Names of data sets: words, folders, and the size of what is cut out of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from own_models import pictures

from patchcert_cli import data
from patchcert_cli.data import datasets, image_files
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import DataError, UnknownName, UsageError


@pytest.fixture
def val(tmp_path: Path) -> Path:
    return pictures(tmp_path / "pets" / "val", 2)


@pytest.mark.parametrize("split", ["foo", "Test", ""])
def test_a_split_that_is_none_is_refused(split: str) -> None:
    for name in ("mnist", "cifar10"):
        with pytest.raises(UsageError, match="Allowed: train, test") as caught:
            data.load(name, split)
        assert f"no split '{split}'" in str(caught.value)


def test_a_folder_says_all_that_its_name_says(val: Path) -> None:
    facts = datasets.open_dataset(f"imagefolder:{val}@48/60")
    assert (facts.name, facts.shape, facts.resize_crop) == (f"imagefolder:{val}@48/60", (3, 48, 48), ResizeCrop.square(48, 60))
    assert (facts.classes, facts.path, facts.label) == (("cat", "dog", "red_fox"), val, "pets")
    assert datasets.open_dataset(f"imagefolder:{val}@48").resize_crop == ResizeCrop((48, 48))
    assert datasets.open_dataset(f"imagefolder:{val}").name == f"imagefolder:{val}@224"
    assert datasets.open_dataset(f"imagefolder:{val}@48x32").shape == (3, 48, 32)
    assert datasets.open_dataset(datasets.open_dataset(f"imagefolder:{val}@48").name) == datasets.open_dataset(
        f"imagefolder:{val}@48"
    )
    assert datasets.open_dataset("imagefolder:.@9").label != ""


@pytest.mark.parametrize(
    ("given", "meant", "wanted"),
    [
        ("imagefolder:V", "160/168,bilinear", "imagefolder:V@160/168,bilinear"),
        ("imagefolder:V", "160", "imagefolder:V@160"),
        ("imagefolder:V@32", "160/168", "imagefolder:V@32"),
        ("imagenet", "224/248", "imagenet@224/248"),
        ("imagenet", "224/256", "imagenet"),
        ("imagenet@64", "224/248", "imagenet@64"),
        ("mnist", "224/248", "mnist"),
        ("cifar10", "224", "cifar10"),
    ],
)
def test_a_model_decides_the_size_that_nobody_else_does(val: Path, given: str, meant: str, wanted: str) -> None:
    assert datasets.open_dataset(given.replace("V", str(val))).resized(ResizeCrop.parse(meant)).name == wanted.replace(
        "V", str(val)
    )


def test_names_of_one_data_set_are_recognized() -> None:
    assert datasets.base_name("imagenet@64") == "imagenet" and datasets.base_name("imagefolder:a@b@9") == "imagefolder:a@b"
    assert datasets.stated_resize_crop("imagenet@64") == ResizeCrop((64, 64)) and datasets.stated_resize_crop(
        "x@64/70"
    ) == ResizeCrop.square(64, 70)
    assert datasets.stated_resize_crop("x") is datasets.stated_resize_crop("mnist") is None and datasets.stated_resize_crop(
        "imagenet"
    ) == ResizeCrop.square(224, 256)
    assert datasets.is_custom("imagefolder:a") and not datasets.is_custom("cifar10")
    assert datasets.open_dataset("imagenet@64").label == "imagenet" and datasets.open_dataset("imagenet@64").classes[999] == "999"
    assert datasets.open_dataset("imagenet@224/256").name == datasets.open_dataset("imagenet").name == "imagenet"


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ("imagefolder:", UsageError, "is not a data set. Use, for example, cifar10 or imagefolder:./val"),
        ("", UsageError, "is not a data set"),
        ("imagefolder:none", DataError, "there is no folder 'none'"),
        ("imagefolder:flat", DataError, "'flat' has no class folders"),
        ("pets", UnknownName, "no data set 'pets'. For the images in its class folders use imagefolder:pets"),
        ("cifar", UnknownName, "Did you mean cifar10"),
        ("mnist@32", UsageError, "mnist images are 28x28 as they are. Use --data mnist"),
        ("imagefolder:pets@0", UsageError, "is not a valid size. Use NAME@SIZE or NAME@SIZE/RESIZE"),
        ("imagefolder:pets@64/32", UsageError, "RESIZE at least SIZE"),
        ("imagefolder:pets@9999", UsageError, "1 to 4096"),
    ],
)
def test_names_that_mean_nothing_are_refused(val: Path, given: str, kind: type[Exception], said: str) -> None:
    Path("flat").mkdir()
    with pytest.raises(kind) as caught:
        datasets.open_dataset(given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_folder_given_is_what_is_used(val: Path) -> None:
    name = f"imagefolder:{val}@16/20"
    images = data.load(name, "train")
    assert (len(images), images.split, images.source, images.name) == (6, "folder", str(val), name)
    dataset = data.open_dataset(name)
    assert images.classes == dataset.class_names("test") == ("cat", "dog", "red_fox")
    assert len(dataset.image_files("train")) == 6
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (
        images.read()[3].numpy().tobytes()
        == image_files.decode(val / "dog" / "1.png", ResizeCrop.square(16, 20)).pixels.numpy().tobytes()
    )
    assert data.whole_split(images) == 6
    with pytest.raises(UsageError, match="is a folder of yours. Leave --download out"):
        data.load(name, "test", download=True)


def test_labels_become_outputs(val: Path) -> None:
    images = data.load(f"imagefolder:{val}@16", "test")
    named = images.relabelled([7, 0, 3])
    assert named.labels.tolist() == [7, 7, 0, 0, 3, 3] and named.digest() != images.digest()
    assert images.relabelled([0, 1, 2]).digest() == images.digest()
