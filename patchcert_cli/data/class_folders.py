"""What is in a folder of class folders, without opening a picture.

``FOLDER/CLASS/PICTURE``, or deeper inside ``CLASS``: classes are numbered in the order of their names, pictures in the order of
classes, then folders, then names, as torchvision's ``ImageFolder`` does. Hidden files and folders are skipped.
Tiny-ImageNet's validation pictures, ``FOLDER/images/PICTURE``, have their classes in ``FOLDER/val_annotations.txt``.

Shapes: n pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from patchcert_cli.data import image_files
from patchcert_cli.data.resize_crop import Size, written
from patchcert_cli.errors import DataError

NOTES, TINY = "val_annotations.txt", "images"  # Tiny-ImageNet's validation pictures, and what says their classes
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class ClassFolders:
    """What is in a folder of class folders.

    Attributes:
        classes: names of the class folders, sorted.
        pictures: one text per picture, its path inside the folder, size and time, with zero characters between.
        labels: int64 [n].
        skipped: how many files are no pictures, by the ends of their names.
    """

    folder: Path
    classes: tuple[str, ...]
    pictures: list[str]
    labels: Tensor
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def files(self) -> tuple[str, ...]:
        """The path of each picture inside the folder."""
        return tuple(text.split("\0", 1)[0] for text in self.pictures)

    def path(self, number: int) -> Path:
        """Where picture ``number`` is."""
        return self.folder / self.pictures[number].split("\0", 1)[0]

    def digest(self, begin: int = 0, end: int | None = None) -> str:
        """sha256 of names, sizes and times of the pictures from ``begin`` to ``end``; contents are not read."""
        content = hashlib.sha256()
        for text in self.pictures[begin:end]:
            content.update(os.fsencode(text + "\n"))
        return content.hexdigest()


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the class folders of ``folder``, sorted; class i is the i-th.

    Raises:
        DataError: there is no such folder, or it has none.
    """
    return _classes(folder)[0]


def scan(folder: Path) -> ClassFolders:
    """List a folder of class folders without opening a picture.

    Raises:
        DataError: there is no such folder, or it has no class folders, or one of them has no pictures.
    """
    (classes, annotated), skipped = _classes(folder), Counter[str]()
    with _readable(folder):
        _, beside = _entries(folder)
        skipped.update(_ending(one.name) for one in beside)
        if annotated is None:
            found = [list(_pictures(folder, name, skipped)) for name in classes]
        else:
            found = _by_class(annotated, _pictures(folder, TINY, skipped), classes)
    for name, pictures in zip(classes, found, strict=True):
        if not pictures:
            raise DataError(
                f"'{folder / name}' has no pictures ({', '.join(image_files.EXTENSIONS)}){skipped_text(skipped)}.",
                hint="Every class folder needs some: add, or remove it.",
            )
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(pictures) for pictures in found]))
    return ClassFolders(folder, classes, [one for pictures in found for one in pictures], labels, skipped)


def common_size(listing: ClassFolders) -> Size:
    """Height and width of the pictures, if all have the same.

    Raises:
        DataError: they have not, with the way out.
    """
    with image_files.without_warnings():
        first = image_files.size_of(listing.path(0))
        for number in range(1, len(listing)):
            size = image_files.size_of(listing.path(number))
            if size != first:
                one, other = (f"'{listing.path(at)}' is {written(of)}" for at, of in ((0, first), (number, size)))
                raise DataError(
                    f"the pictures are of many sizes ({one}, {other}), and nothing says which size the model takes.",
                    hint=f"Use --data imagefolder:{listing.folder}@SIDE, or state it in the attribute size of your module.",
                )
    return first


def _classes(folder: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The names of the classes, and for each picture its class where a file says so instead of a folder."""
    if not folder.is_dir():
        raise DataError(f"there is no folder '{folder}'.")
    with _readable(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    if names == [TINY] and (folder / NOTES).is_file():
        annotated = _annotated(folder)
        return tuple(sorted(set(annotated.values()))), annotated
    if not names:
        raise DataError(
            f"'{folder}' has no class folders.", hint="Put the pictures of each class into a sub-folder of their own."
        )
    return tuple(names), None


def _pictures(folder: Path, name: str, skipped: Counter[str]) -> Iterator[str]:
    """The pictures in ``folder/name``, at any depth, as a :class:`ClassFolders` holds them; counts what is none."""
    inside = sorted(_folders(folder / name, name, ()), key=lambda one: one[0])
    for place, entries in inside:
        for entry in sorted(entries, key=lambda one: one.name):
            if entry.name.startswith(".") or not entry.name.lower().endswith(image_files.EXTENSIONS):
                skipped[_ending(entry.name)] += 1
                continue
            facts = entry.stat()
            yield f"{place}/{entry.name}\0{facts.st_size}\0{facts.st_mtime_ns}"


def _folders(folder: Path, place: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """A folder and those below it, each with its files; links are followed, but not in circles."""
    facts = folder.stat()
    if (facts.st_dev, facts.st_ino) in above:
        return
    deeper, entries = _entries(folder)
    yield place, entries
    for entry in deeper:
        yield from _folders(folder / entry.name, f"{place}/{entry.name}", (*above, (facts.st_dev, facts.st_ino)))


def _entries(folder: Path) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Folders, without hidden ones, and files in a folder."""
    with os.scandir(folder) as entries:
        found = [(one, one.is_dir()) for one in entries]
    deeper = [one for one, is_folder in found if is_folder and not one.name.startswith(".")]
    return deeper, [one for one, is_folder in found if not is_folder]


def _ending(name: str) -> str:
    """By what files are counted that are skipped."""
    return "hidden" if name.startswith(".") else Path(name).suffix.lower() or "without an ending"


def skipped_text(skipped: Counter[str]) -> str:
    """The end of a sentence about files that were skipped; empty if none was."""
    if not skipped:
        return ""
    kinds = [f"{count} {ending}" for ending, count in sorted(skipped.items(), key=lambda one: (-one[1], one[0]))[:SHOWN]]
    return f"; {skipped.total()} other files skipped ({', '.join(kinds)}{', ...' if len(skipped) > SHOWN else ''})"


def _annotated(folder: Path) -> dict[str, str]:
    """For each picture of Tiny-ImageNet's validation part its class."""
    with _readable(folder):
        lines = (folder / NOTES).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t")[:2] for line in lines if line.strip()]
    if not pairs or any(len(pair) < 2 for pair in pairs):
        raise DataError(f"'{folder / NOTES}' does not say the class of each picture.", hint="Each line is PICTURE, a tab, CLASS.")
    return {name: label for name, label in pairs}  # noqa: C416  # mypy does not know that a pair has two


def _by_class(annotated: dict[str, str], pictures: Iterable[str], classes: Sequence[str]) -> list[list[str]]:
    """Pictures by class; those without one are refused."""
    found: dict[str, list[str]] = {name: [] for name in classes}
    for one in pictures:
        name = one.split("\0", 1)[0].rpartition("/")[2]
        if name not in annotated:
            raise DataError(f"{NOTES} does not say the class of '{name}'.", hint="Remove the picture, or add its line.")
        found[annotated[name]].append(one)
    return list(found.values())


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise DataError(f"'{problem.filename or folder}' cannot be read: {problem.strerror or problem}.") from problem
