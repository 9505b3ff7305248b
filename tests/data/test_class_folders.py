"""Which pictures a folder has, against torchvision's ImageFolder: kinds of files, depth, layouts of known data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from patchcert_cli import data
from patchcert_cli.data import class_folders, image_files
from patchcert_cli.data.image_files import ImageChanges
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import DataError


def put(*paths: str, size: tuple[int, int] = (5, 4)) -> None:
    for text in paths:
        path = Path(text)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in image_files.EXTENSIONS:
            kind = "JPEG" if path.suffix.lower() in (".jfif", ".jpe") else None
            mode = {".pgm": "L", ".pbm": "1"}.get(path.suffix.lower(), "RGB")
            Image.new(mode, size).save(path, kind)
        else:
            path.write_text("no picture")


def names(found: class_folders.ClassFolders) -> list[str]:
    return list(found.files)


def test_pictures_are_those_of_imagefolder_in_its_order() -> None:
    from torchvision.datasets import ImageFolder  # type: ignore[import-untyped]

    endings = [".jpg", ".JPEG", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"]
    put(*(f"d/b/p{ending}" for ending in endings))
    put("d/a/z.png", "d/a/deep/er/a.png", "d/a/deep/b.png", "d/a/deep-b/c.png", "d/a/B.png", "d/c c/x/y/z/1.png", "d/a/notes.txt")
    found, wanted = class_folders.scan(Path("d")), ImageFolder("d")
    assert names(found) == [str(Path(path).relative_to("d")) for path, _ in wanted.samples]
    assert list(found.labels) == wanted.targets and found.classes == tuple(wanted.classes)
    assert found.skipped == {".txt": 1} and len(found) == 15


def test_other_kinds_are_read_and_what_is_skipped_is_counted() -> None:
    put(
        *(f"d/a/p{ending}" for ending in image_files.EXTENSIONS),
        "d/a/.hidden.png",
        "d/a/._p.jpg",
        "d/a/README",
        "d/a/q.heic",
        "d/a/r.HEIC",
    )
    put("d/beside.png", "d/list.csv", "d/.trash/a.png", "d/a/.thumbs/a.png")
    found = class_folders.scan(Path("d"))
    assert len(found) == len(image_files.EXTENSIONS) == 14 and found.classes == ("a",)
    assert found.skipped == {"hidden": 2, "without an ending": 1, ".heic": 2, ".csv": 1, ".png": 1}
    assert class_folders.skipped_text(found.skipped) == "7 other files skipped (2 .heic, 2 hidden, 1 .csv, ...)"
    images = data.load("imagefolder:d@8", "test").checked()
    assert len(images) == 14 and images.remarks == (
        "14 of 14 images resampled, from 4x5 pixels (height x width), to 8x8:"
        " the shorter side is resized to 9 (bicubic), and the middle 8x8 is cropped",
        "7 other files skipped (2 .heic, 2 hidden, 1 .csv, ...) in 'd'",
    )
    some = data.load("imagefolder:d@7", "test").limit(3, 0).checked()
    assert some.remarks[0].startswith("3 of 3 images resampled")


def test_gtsrb_and_tiny_imagenet_are_read_as_they_come() -> None:
    put("gtsrb/00000/00000_00000.ppm", "gtsrb/00000/GT-00000.csv", "gtsrb/00001/00000_00000.ppm", "gtsrb/00001/GT-00001.csv")
    found = class_folders.scan(Path("gtsrb"))
    assert found.classes == ("00000", "00001") and len(found) == 2 and found.skipped == {".csv": 2}
    for name in ("n02124075", "n04067472"):
        put(f"tiny/train/{name}/{name}_boxes.txt", *(f"tiny/train/{name}/images/{name}_{at}.JPEG" for at in (0, 1)))
    train = class_folders.scan(Path("tiny/train"))
    assert train.classes == ("n02124075", "n04067472") and list(train.labels) == [0, 0, 1, 1]
    put(*(f"tiny/val/images/val_{at}.JPEG" for at in range(4)))
    notes = Path("tiny/val/val_annotations.txt")
    notes.write_text("".join(f"val_{at}.JPEG\t{('n04067472', 'n02124075')[at % 2]}\t0\t0\t9\t9\n" for at in range(4)))
    val = class_folders.scan(Path("tiny/val"))
    assert val.classes == train.classes == class_folders.class_names(Path("tiny/val"))
    assert names(val) == [f"images/val_{at}.JPEG" for at in (1, 3, 0, 2)] and list(val.labels) == [0, 0, 1, 1]
    put("tiny/val/images/val_9.JPEG")
    with pytest.raises(DataError, match="the class of 'tiny/val/images/val_9.JPEG' is not stated. Remove the image, or add"):
        class_folders.scan(Path("tiny/val"))
    notes.write_text("val_0.JPEG\n")
    with pytest.raises(DataError, match="does not state the class of each image"):
        class_folders.scan(Path("tiny/val"))


def test_gtsrbs_test_images_are_read_with_their_list() -> None:
    put(*(f"Final_Test/Images/{at:05}.ppm" for at in range(4)), "Final_Test/Images/GT-final_test.test.csv")
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    rows = "".join(f"{at:05}.ppm;53;54;6;5;48;49;{(16, 1, 38, 1)[at]}\n" for at in range(4))
    for place in ("Final_Test/Images/GT-final_test.csv", "Final_Test/GT-final_test.csv"):
        Path(place).write_text(header + rows)
        found = class_folders.scan(Path("Final_Test"))
        assert found.classes == ("00001", "00016", "00038") == class_folders.class_names(Path("Final_Test"))
        assert [Path(name).stem for name in found.files] == ["00001", "00003", "00000", "00002"]
        assert list(found.labels) == [0, 0, 1, 2]
        Path(place).write_text(header)
        with pytest.raises(DataError, match="GT-final_test.csv' is empty"):
            class_folders.scan(Path("Final_Test"))
        Path(place).unlink()
    assert class_folders.scan(Path("Final_Test")).classes == ("Images",)


def test_links_are_followed_but_not_in_circles() -> None:
    put("elsewhere/a.png", "d/a/b.png")
    Path("d/a/more").symlink_to(Path("elsewhere").resolve())
    Path("d/a/round").symlink_to(Path("d/a").resolve())
    Path("elsewhere/up").symlink_to(Path("elsewhere").resolve())
    assert names(class_folders.scan(Path("d"))) == ["a/b.png", "a/more/a.png"]


def test_a_class_without_pictures_says_what_is_there_instead() -> None:
    put("d/a/p.png", "d/b/q.heic", "d/b/r.heic")
    with pytest.raises(DataError, match=r"'d/b' has no images \(.jpg, .*\); 2 other files skipped \(2 .heic\). Every class"):
        class_folders.scan(Path("d"))
    with pytest.raises(DataError, match="'d/b' has no images"):
        data.open_dataset("imagefolder:d@8")  # known before anything else is done


def test_the_size_of_pictures_that_agree() -> None:
    put("d/a/p.png", "d/b/q.png")
    assert class_folders.common_size(class_folders.scan(Path("d"))) == (4, 5)
    put("d/b/r.png", size=(4, 5))
    exif = Image.Exif()
    exif[image_files.ORIENTATION] = 6
    Image.new("RGB", (4, 5)).save("d/b/r.png", exif=exif)  # upright it is as large as the others
    assert class_folders.common_size(class_folders.scan(Path("d"))) == (4, 5)
    put("d/b/s.png", size=(7, 7))
    with pytest.raises(DataError) as caught:
        class_folders.common_size(class_folders.scan(Path("d")))
    assert str(caught.value) == (
        "the images have different sizes ('d/a/p.png' is 4x5, 'd/b/s.png' is 7x7), and the model does not state its size."
        " Use --data imagefolder:d@SIZE, or state it: the attribute size of your module."
    )


def test_accounts_add_up() -> None:
    one, two = ImageChanges(1, 1, 0, 1, 0, (4, 5), (4, 5)), ImageChanges(1, 0, 1, 0, 1, (9, 2), (9, 2))
    both = sum([one, ImageChanges(3), two], ImageChanges())
    assert both == ImageChanges(5, 1, 1, 1, 1, (9, 2), (4, 5)) == ImageChanges.from_list(both.to_list())
    assert both.lines(ResizeCrop((4, 4))) == [
        "1 of 5 images resampled, from 9x2 to 4x5 pixels (height x width), to 4x4:"
        " the shorter side is resized to 5 (bicubic), and the middle 4x4 is cropped",
        "1 of 5 images rotated by their EXIF orientation",
        "1 of 5 images have transparent pixels: alpha dropped, colours as stored",
    ]
    assert ImageChanges(7).lines(ResizeCrop((4, 4))) == []
