"""What data sets there are, and what is known of each without opening it.

A data set is named by a word, ``cifar10``, or is a folder of class folders, ``imagefolder:PATH``. Images in class folders are
resized and cropped; what follows ``@`` says how (:mod:`patchcert_cli.data.resize_crop`): ``imagefolder:./val@224/248``. Patch
sizes are counted in pixels of the result.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from patchcert_cli import registry
from patchcert_cli.data import class_folders
from patchcert_cli.data.class_folders import ClassFolders
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import DataError, UnknownName, UsageError, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from patchcert_cli.data.images import Images

ENVIRONMENT = "PATCHCERT_DATA"
DEFAULT_DIRECTORY = "data"
PREFIX = "imagefolder:"
DEFAULT_SIZE = 224  # of square images, if neither the user nor the model states one
OFFERED = ("train", "test")  # splits of a data set
SPLITS = ("train", "training", "val", "valid", "validation", "test")  # folder names that do not describe the images


def directory(given: Path | None) -> Path:
    """The data directory: as given, else ``PATCHCERT_DATA``, else ``./data``."""
    return given or Path(os.environ.get(ENVIRONMENT) or DEFAULT_DIRECTORY)


@dataclass(frozen=True)
class Dataset:
    """A data set: what is known of it without opening it, and where its images are.

    Attributes:
        name: with the resize and crop, if they are not the data set's own.
        shape: C, H and W of its images.
        classes: names of its labels.
        mean, std: per channel over its training images; of class folders those of ImageNet.
        test_images: how many its test split has; 0 if only the folder knows.
        bundled: how many of them, the first ones, come with the package.
        folder_pattern: a regular expression for the names of its class folders, if it comes as class folders under the data
            directory; class i is the i-th folder in the order of names.
        page: where to get it, if it cannot be downloaded.
        resize_crop: how an image file becomes an image; None if the data set does not come as image files.
        stated: whether the name says how.
        path: the folder of ``imagefolder:PATH``, which is the whole data set: it has no splits.
        data_dir: where to look for it; None for the default, see :func:`directory`.
        read: of a data set of another package: from a split and the data directory to pixels uint8 [N, C, H, W] and labels [N].
    """

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_images: int = 10_000
    bundled: int = 0
    folder_pattern: str = ""
    page: str = ""
    resize_crop: ResizeCrop | None = None
    stated: bool = False
    path: Path | None = None
    data_dir: Path | None = None
    read: Callable[[str, Path], tuple[Tensor, Tensor]] | None = field(default=None, repr=False, compare=False)
    _scanned: dict[Path, ClassFolders] = field(default_factory=dict, repr=False, compare=False)

    @property
    def base(self) -> str:
        """The name without resize and crop."""
        return base_name(self.name)

    @property
    def label(self) -> str:
        """A word for names of files: of a folder its name, or that of the one above where it is named after a split."""
        if self.path is None:
            return self.base
        parts = [part for part in self.path.resolve().parts if part.lower() not in SPLITS]
        return re.sub(r"[^A-Za-z0-9.-]+", "-", parts[-1]).strip("-") or "images"

    @property
    def custom(self) -> bool:
        """Whether it is a folder of the user's."""
        return self.path is not None

    @property
    def in_folders(self) -> bool:
        """Whether it comes as image files in class folders."""
        return self.resize_crop is not None

    def resized(self, default: ResizeCrop) -> Dataset:
        """This data set with resize and crop ``default``, if it consists of image files and its name does not state them."""
        if self.stated or not self.in_folders:
            return self
        return open_dataset(f"{self.base}@{default}", data_dir=self.data_dir)

    def common_size(self) -> ResizeCrop:
        """The size that all images of a user's folder have.

        Raises:
            DataError: they have different ones.
        """
        return ResizeCrop(class_folders.common_size(self.image_files("test")))

    def folder(self, split: str) -> Path:
        """Where the class folders of a split (``train`` or ``test``) are, checked by their names.

        Raises:
            DataError: there is no such folder, or it is another data set.
        """
        if self.path is not None:
            return self.path
        base = directory(self.data_dir) / self.label
        folder = base / ("train" if split == "train" else "val")
        if not folder.is_dir():
            raise DataError(f"no {self.label} {split} data: there is no folder '{folder}'.", hint=self.source_hint)
        names, wanted = class_folders.class_names(folder), len(self.classes)
        other = [name for name in names if not re.fullmatch(self.folder_pattern, name)]
        if other or len(names) != wanted:  # labels are positions, so other folders would get wrong labels
            found = f"{len(names)} class folders ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            found += f", {len(other)} of them with another name ({other[0]})" if other else ""
            raise DataError(
                f"'{folder}' is not {self.label}: it has {found}.",
                hint=f"Its {wanted} class folders are named after WordNet ids, such as n01440764.",
            )
        return folder

    @property
    def source_hint(self) -> str:
        """Where to get a data set that cannot be downloaded, and where to put it."""
        base = directory(self.data_dir) / self.label
        return (
            f"Get it at {self.page} (this needs an account) and put its images into '{base}/train/<wnid>/' and"
            f" '{base}/val/<wnid>/', or name another folder with --data-dir or {ENVIRONMENT}."
        )

    def image_files(self, split: str) -> ClassFolders:
        """The image files of a split, listed once; errors are those of :meth:`folder` and :func:`class_folders.scan`."""
        folder = self.folder(split)
        if folder not in self._scanned:
            self._scanned[folder] = class_folders.scan(folder)
        return self._scanned[folder]

    def class_names(self, split: str) -> tuple[str, ...]:
        """The names of the labels of a split, without opening an image; errors are those of :meth:`folder`."""
        return class_folders.class_names(self.folder(split)) if self.in_folders else self.classes

    def load(self, split: str, *, download: bool = False, fetch: str = "") -> Images:
        """The images of ``train`` or ``test``; those in class folders are not read yet.

        Args:
            split: ``train`` or ``test``; a folder of the user's is the same for both.
            download: whether a missing data set may be downloaded.
            fetch: the command that an error message gives as the way to get the data.

        Raises:
            UsageError: there is no such split, or it cannot be downloaded.
            DataError: it is not there, or damaged; the message says what to type.
        """
        if split not in OFFERED:
            raise UsageError(f"no split '{split}'.", hint=f"Allowed: {', '.join(OFFERED)}.")
        from patchcert_cli.data import images

        return images.load_split(self, split, download=download, fetch=fetch)


DATASETS = {
    info.name: info
    for info in (
        Dataset("mnist", (1, 28, 28), tuple("0123456789"), (0.1307,), (0.3081,), bundled=10_000),
        Dataset(
            "cifar10",
            (3, 32, 32),
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
            bundled=1_000,
        ),
        Dataset(
            "imagenet",  # ILSVRC 2012; its test split is the official validation images
            (3, 224, 224),
            tuple(map(str, range(1000))),  # class i is the i-th WordNet id
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            test_images=50_000,
            folder_pattern=r"n\d{8}",
            page="https://image-net.org/download.php",
            resize_crop=ResizeCrop.square(DEFAULT_SIZE, 256),
        ),
    )
}


def open_dataset(name: str, *, data_dir: Path | None = None) -> Dataset:
    """The data set of this name; of a folder only the names of the class folders are read.

    Raises:
        UnknownName: no such data set.
        UsageError: an invalid size, or a size for a data set whose images have one.
        DataError: no such folder, or one without class folders.
    """
    base, given = _parse(name)
    if base.startswith(PREFIX):
        path, like = Path(base.removeprefix(PREFIX)), DATASETS["imagenet"]
        resize_crop = given or ResizeCrop.square(DEFAULT_SIZE)
        return Dataset(
            name=f"{base}@{resize_crop}",
            shape=(3, *resize_crop.size),
            classes=class_folders.class_names(path),
            mean=like.mean,
            std=like.std,
            test_images=0,
            resize_crop=resize_crop,
            stated=given is not None,
            path=path,
            data_dir=data_dir,
        )
    known = replace(_named(base, name), data_dir=data_dir, stated=given is not None)
    if given is None or given == known.resize_crop:
        return known
    if known.resize_crop is None:
        raise UsageError(f"{base} images are {known.shape[1]}x{known.shape[2]} as they are.", hint=f"Use --data {base}.")
    return replace(known, name=f"{base}@{given}", shape=(3, *given.size), resize_crop=given)


def _named(base: str, name: str) -> Dataset:
    """The data set of this name, of this package or of an installed one (entry points ``patchcert.datasets``)."""
    if base in DATASETS:
        return DATASETS[base]
    outside = registry.names("dataset", ())
    if base in outside:
        module = registry.entry("dataset", "", base, ())
        facts, read = getattr(module, "DATASET", None), getattr(module, "load", None)
        if not isinstance(facts, Dataset) or facts.name != base or facts.in_folders or not callable(read):
            raise UsageError(
                f"{module.__name__} does not define data set '{base}'.",
                hint=f"It needs DATASET = Dataset(name='{base}', ...) and load(split, data_dir) -> (pixels, labels).",
            )
        return replace(facts, read=read)
    if Path(base).is_dir():
        raise UnknownName(f"no data set '{base}'.", hint=f"For the images in its class folders use {PREFIX}{name}")
    raise unknown("data set", base, [*DATASETS, *outside, f"{PREFIX}PATH"])


def base_name(name: str) -> str:
    """A data set's name without resize and crop, the same for all sizes of the same images; the data set is not looked at."""
    return _parse(name)[0]


def is_custom(name: str) -> bool:
    """Whether a name means a folder of the user's, which is not looked at."""
    return name.startswith(PREFIX)


def stated_resize_crop(name: str) -> ResizeCrop | None:
    """The resize and crop that a name states, or else those of the data set of that name; a folder is not looked at."""
    base, given = _parse(name)
    return given or (DATASETS[base].resize_crop if base in DATASETS else None)


def _parse(name: str) -> tuple[str, ResizeCrop | None]:
    """``NAME@RESIZE_CROP`` in parts."""
    match = re.fullmatch(r"(?P<base>.+?)(?:@(?P<size>\d[\dx]*(?:/[\dx]*)?(?:,[a-z\d-]+)*))?", name.strip())
    if match is None or match["base"] == PREFIX:
        raise UsageError(f"--data '{name}' is not a data set.", hint=f"Use, for example, cifar10 or {PREFIX}./val")
    return match["base"], None if match["size"] is None else ResizeCrop.parse(match["size"])
