"""Which image files a folder of class folders has, found without opening one.

The layout is that of torchvision's ``ImageFolder``, ``FOLDER/CLASS/IMAGE`` or deeper inside ``CLASS``, and so is the order:
classes by name, then sub-folders, then files. Hidden files and folders are skipped. A class folder without images is refused, as
there.

Two data sets have their test images in one folder with a list of classes beside it: Tiny-ImageNet (``val/images`` with
``val_annotations.txt``) and GTSRB (``Final_Test/Images`` with ``GT-final_test.csv``).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from patchcert_cli.data import image_files
from patchcert_cli.data.resize_crop import Size, written
from patchcert_cli.errors import DataError

MAX_SHOWN = 3  # names in a message


class Layout(NamedTuple):
    """Images in one folder, with a text file that has the class of each.

    Attributes:
        folder: name of the folder.
        list_file: name of the text file, in the same folder or in the one above.
        entry: file name and class from a line of it; raises ValueError or IndexError.
        header: how many lines at the top are not entries.
    """

    folder: str
    list_file: str
    entry: Callable[[str], tuple[str, str]]
    header: int


def _tiny_imagenet(line: str) -> tuple[str, str]:
    name, label = line.split("\t")[:2]
    return name, label


def _gtsrb(line: str) -> tuple[str, str]:
    columns = line.split(";")
    return columns[0], f"{int(columns[7]):05}"  # the training images' class folders are 00000 to 00042


LAYOUTS = (
    Layout("images", "val_annotations.txt", _tiny_imagenet, 0),
    Layout("Images", "GT-final_test.csv", _gtsrb, 1),
)


@dataclass(frozen=True)
class ClassFolders:
    """The image files of a folder of class folders.

    Attributes:
        classes: names of the classes, sorted.
        files: the path of each image inside ``folder``.
        labels: the class of each image, as a position in ``classes``.
        skipped: how many files are not images, by the endings of their names.
    """

    folder: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: tuple[int, ...]
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.files)

    def path(self, number: int) -> Path:
        """Where image ``number`` is."""
        return self.folder / self.files[number]


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the classes of ``folder``, sorted; class i is the i-th.

    Raises:
        DataError: there is no such folder, it has no class folders, or one of them has no images.
    """
    names, entries = _classes(folder)
    if entries is None:
        with _readable(folder):
            for name in names:
                if not any(_is_image(file) for _, files in _walk(folder / name) for file in files):
                    raise _without_images(folder / name, Counter())
    return names


def scan(folder: Path) -> ClassFolders:
    """List the images of ``folder`` without opening one.

    Raises:
        DataError: there is no such folder, it has no class folders, or one of them has no images.
    """
    names, entries = _classes(folder)
    skipped: Counter[str] = Counter()
    with _readable(folder):
        skipped.update(_ending(entry.name) for entry in os.scandir(folder) if not entry.is_dir())
        if entries is not None:
            return _listed(folder, names, entries, skipped)
        files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            images = _images(folder, name, skipped)
            if not images:
                raise _without_images(folder / name, skipped)
            files += images
            labels += [label] * len(images)
    return ClassFolders(folder, names, tuple(files), tuple(labels), skipped)


def common_size(images: ClassFolders) -> Size:
    """Height and width of the images, if all have the same.

    Raises:
        DataError: they do not.
    """
    first = image_files.size_of(images.path(0))
    for number in range(1, len(images)):
        size = image_files.size_of(images.path(number))
        if size != first:
            one, other = (f"'{images.path(at)}' is {written(of)}" for at, of in ((0, first), (number, size)))
            raise DataError(
                f"the images have different sizes ({one}, {other}), and the model does not state its size.",
                hint=f"Use --data imagefolder:{images.folder}@SIZE, or state it: the attribute size of your module.",
            )
    return first


def skipped_text(skipped: Counter[str]) -> str:
    """``7 other files skipped (2 .heic, 2 hidden, ...)``; empty if none was."""
    if not skipped:
        return ""
    kinds = [f"{count} {ending}" for ending, count in sorted(skipped.items(), key=lambda one: (-one[1], one[0]))[:MAX_SHOWN]]
    return f"{skipped.total()} other files skipped ({', '.join(kinds)}{', ...' if len(skipped) > MAX_SHOWN else ''})"


def _classes(folder: Path) -> tuple[tuple[str, ...], Mapping[str, str] | None]:
    """The names of the classes, and the class of each file where a text file has it instead of a folder."""
    if not folder.is_dir():
        raise DataError(
            f"there is no folder '{folder}'.", hint="Give a folder with a folder of images per class: imagefolder:PATH."
        )
    with _readable(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    for layout in LAYOUTS:
        if names == [layout.folder]:
            listed = _read_list(folder, layout)
            if listed is not None:
                return tuple(sorted(set(listed.values()))), listed
    if not names:
        raise DataError(f"'{folder}' has no class folders.", hint="Put the images of each class into a folder of their own.")
    return tuple(names), None


def _read_list(folder: Path, layout: Layout) -> dict[str, str] | None:
    """The class of each file from the text file of a layout; None if there is no such file."""
    places = (folder / layout.list_file, folder / layout.folder / layout.list_file)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    with _readable(folder):
        lines = path.read_text(encoding="utf-8").splitlines()[layout.header :]
    try:
        listed = dict(layout.entry(line) for line in lines if line.strip())
    except (ValueError, IndexError) as problem:
        raise DataError(f"'{path}' does not state the class of each image.", hint="Restore the original file.") from problem
    if not listed:
        raise DataError(f"'{path}' is empty.", hint="Restore the original file.")
    return listed


def _listed(folder: Path, names: Sequence[str], entries: Mapping[str, str], skipped: Counter[str]) -> ClassFolders:
    """The images of a single folder, by the classes that a text file states."""
    by_class: dict[str, list[str]] = {name: [] for name in names}
    (inside,) = {layout.folder for layout in LAYOUTS if (folder / layout.folder).is_dir()}
    for file in _images(folder, inside, skipped):
        name = file.rpartition("/")[2]
        if name not in entries:
            raise DataError(f"the class of '{folder / file}' is not stated.", hint="Remove the image, or add its line.")
        by_class[entries[name]].append(file)
    labels = tuple(label for label, name in enumerate(names) for _ in by_class[name])
    return ClassFolders(folder, tuple(names), tuple(file for files in by_class.values() for file in files), labels, skipped)


def _images(folder: Path, name: str, skipped: Counter[str]) -> list[str]:
    """The paths inside ``folder`` of the images in ``folder/name``, at any depth; counts other files."""
    found = []
    for place, files in sorted(_walk(folder / name)):
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        for file in sorted(files):
            if _is_image(file):
                found.append(f"{inside}/{file}")
            else:
                skipped[_ending(file)] += 1
    return found


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, each with the names of its files; links are followed, but not in circles."""

    def fail(problem: OSError) -> None:
        raise problem

    def circular(path: str, here: str) -> bool:
        return os.path.islink(path) and (here + os.sep).startswith(os.path.realpath(path) + os.sep)

    for place, deeper, files in os.walk(folder, followlinks=True, onerror=fail):
        here = os.path.realpath(place)
        deeper[:] = [one for one in deeper if not one.startswith(".") and not circular(os.path.join(place, one), here)]
        yield place, files


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(image_files.EXTENSIONS)


def _ending(name: str) -> str:
    """How skipped files are counted."""
    return "hidden" if name.startswith(".") else Path(name).suffix.lower() or "without an ending"


def _without_images(folder: Path, skipped: Counter[str]) -> DataError:
    others = f"; {text}" if (text := skipped_text(skipped)) else ""
    return DataError(
        f"'{folder}' has no images ({', '.join(image_files.EXTENSIONS)}){others}.",
        hint="Every class folder needs an image: add one, or remove the folder.",
    )


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise DataError(
            f"'{problem.filename or folder}' cannot be read: {problem.strerror or problem}.",
            hint="Check the path and its permissions.",
        ) from problem
