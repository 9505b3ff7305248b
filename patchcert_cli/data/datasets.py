"""What data sets there are, and what is known of each without opening it.

A data set is named by a word, ``cifar10``, or is a folder of class folders, ``imagefolder:PATH``. Images in class folders are
resized and cropped; what follows ``@`` says how (:mod:`patchcert_cli.data.resize_crop`): ``imagefolder:./val@224/248``. Patch
sizes are counted in pixels of the result.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from patchcert_cli.data import class_folders
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import UnknownName, UsageError, unknown

OWN = "imagefolder:"
SIDE = 224  # of squares, unless somebody says otherwise
SPLITS = ("train", "training", "val", "valid", "validation", "test")  # folders that do not say what their pictures are of


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set without opening it.

    Attributes:
        shape: C, H and W of its images.
        classes: what its labels are called.
        mean, std: per channel over its training images; of own pictures those of ImageNet.
        test_images: how many its test split has; 0 if only the folder knows.
        bundled: how many of them, the first ones, come with the package.
        folders: what its class folders are called, a pattern, if it comes as pictures in class folders; class i is the i-th
            folder in the order of names.
        page: where to get it, if nobody can download it for you.
        resize_crop: how a picture in a class folder becomes an image; None if it does not come as such.
        path: the folder of somebody's own class folders, which is all there is to the data set: it has no splits.
    """

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_images: int = 10_000
    bundled: int = 0
    folders: str = ""
    page: str = ""
    resize_crop: ResizeCrop | None = None
    path: Path | None = None

    @property
    def label(self) -> str:
        """A word for names of files: of own pictures the folder's name, or the one above it where it is named after a split."""
        if self.path is None:
            return self.name.partition("@")[0]
        parts = [part for part in self.path.resolve().parts if part.lower() not in SPLITS]
        return re.sub(r"[^A-Za-z0-9.-]+", "-", parts[-1]).strip("-") or "pictures"


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
            folders=r"n\d{8}",
            page="https://image-net.org/download.php",
            resize_crop=ResizeCrop.square(SIDE, 256),
        ),
    )
}


def info(name: str) -> Dataset:
    """The facts of data set ``name``; for own pictures the folder is looked at, but none of them.

    Raises:
        UnknownName: no such data set.
        UsageError: a size that cannot be meant, or one for images that have theirs.
        DataError: no such folder, or one without class folders.
    """
    base, said = _read(name)
    if base.startswith(OWN):
        path, like = Path(base.removeprefix(OWN)), DATASETS["imagenet"]
        meant = said or ResizeCrop.square(SIDE)
        return Dataset(
            name=f"{base}@{meant}",
            shape=(3, *meant.size),
            classes=class_folders.class_names(path),
            mean=like.mean,
            std=like.std,
            test_images=0,
            resize_crop=meant,
            path=path,
        )
    if base not in DATASETS:
        if Path(base).is_dir():
            raise UnknownName(f"no data set '{base}'.", hint=f"For the pictures in its class folders say {OWN}{name}")
        raise unknown("data set", base, [*DATASETS, f"{OWN}PATH"])
    known = DATASETS[base]
    if said is None or said == known.resize_crop:
        return known
    if known.resize_crop is None:
        raise UsageError(f"{base} images are {known.shape[1]}x{known.shape[2]} as they are.", hint=f"Use --data {base}.")
    return replace(known, name=f"{base}@{said}", shape=(3, *said.size), resize_crop=said)


def fitted(name: str, meant: ResizeCrop) -> str:
    """``name`` with this resize and crop, if it names a data set of image files and states none itself."""
    base, said = _read(name)
    if said is not None or not (base.startswith(OWN) or (base in DATASETS and DATASETS[base].resize_crop is not None)):
        return name
    return info(f"{base}@{meant}").name


def own(name: str) -> bool:
    """Whether a name means somebody's own pictures."""
    return name.startswith(OWN)


def resize_crop(name: str) -> ResizeCrop | None:
    """How a name says that pictures become images, or the data set of that name; None where neither says."""
    base, said = _read(name)
    return said or (DATASETS[base].resize_crop if base in DATASETS else None)


def same(one: str, other: str) -> bool:
    """Whether two names mean the same data set, of images of any size."""
    return _read(one)[0] == _read(other)[0]


def _read(name: str) -> tuple[str, ResizeCrop | None]:
    """``NAME@FRAMING`` in parts."""
    match = re.fullmatch(r"(?P<base>.+?)(?:@(?P<resize_crop>\d[\dx]*(?:/[\dx]*)?(?:,[a-z\d-]+)*))?", name.strip())
    if match is None or match["base"] == OWN:
        raise UsageError(f"--data '{name}' names no data set.", hint=f"Use, for example, cifar10 or {OWN}./val.")
    return match["base"], None if match["resize_crop"] is None else ResizeCrop.parse(match["resize_crop"])
