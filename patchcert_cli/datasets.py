"""What data sets there are, and what is known of each without opening it.

A data set is named by a word, ``cifar10``, or is anybody's pictures in class folders, ``imagefolder:PATH``. Pictures in class
folders become squares; ``NAME@SIDE/SHORT`` says of how many pixels, and to what length the shorter side of a picture is scaled
before the middle is cut out: ``imagefolder:./val@224/248``. A patch is counted in pixels of that square.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from patchcert_cli import folders
from patchcert_cli.errors import UnknownName, UsageError, unknown

OWN = "imagefolder:"
SIDE, LARGEST = 224, 4096  # of squares: unless somebody says otherwise, and at most
SPLITS = ("train", "training", "val", "valid", "validation", "test")  # folders that do not say what their pictures are of


@dataclass(frozen=True)
class DatasetInfo:
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
        short: the length to which the shorter side of a picture in a class folder is scaled; 0 if it does not come as such.
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
    short: int = 0
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
        DatasetInfo("mnist", (1, 28, 28), tuple("0123456789"), (0.1307,), (0.3081,), bundled=10_000),
        DatasetInfo(
            "cifar10",
            (3, 32, 32),
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
            (0.4914, 0.4822, 0.4465),
            (0.2470, 0.2435, 0.2616),
            bundled=1_000,
        ),
        DatasetInfo(
            "imagenet",  # ILSVRC 2012; its test split is the official validation images
            (3, 224, 224),
            tuple(map(str, range(1000))),  # class i is the i-th WordNet id
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            test_images=50_000,
            folders=r"n\d{8}",
            page="https://image-net.org/download.php",
            short=256,
        ),
    )
}


def info(name: str) -> DatasetInfo:
    """The facts of data set ``name``; for own pictures the folder is looked at, but none of them.

    Raises:
        UnknownName: no such data set.
        UsageError: a size that cannot be meant, or one for images that have theirs.
        DataError: no such folder, or one without class folders.
    """
    base, side, short = _read(name)
    if base.startswith(OWN):
        path, like = Path(base.removeprefix(OWN)), DATASETS["imagenet"]
        wide = side or SIDE
        whole = short or folders.shorter(wide)
        return DatasetInfo(
            name=f"{base}@{wide}/{whole}",
            shape=(3, wide, wide),
            classes=folders.class_names(path),
            mean=like.mean,
            std=like.std,
            test_images=0,
            short=whole,
            path=path,
        )
    if base not in DATASETS:
        if Path(base).is_dir():
            raise UnknownName(f"no data set '{base}'.", hint=f"For the pictures in its class folders say {OWN}{name}")
        raise unknown("data set", base, [*DATASETS, f"{OWN}PATH"])
    known = DATASETS[base]
    if side is None:
        return known
    if not known.folders:
        raise UsageError(f"{base} images are {known.shape[1]}x{known.shape[2]} as they are;", hint=f"say --data {base}.")
    whole = short or folders.shorter(side)
    if (known.shape, known.short) == ((3, side, side), whole):
        return known
    return replace(known, name=f"{base}@{side}/{whole}", shape=(3, side, side), short=whole)


def fitted(name: str, side: int, short: int | None = None) -> str:
    """``name`` with squares of this size, if it is one of pictures in class folders and does not say itself how large."""
    base, own, _ = _read(name)
    if own is not None or not (base.startswith(OWN) or (base in DATASETS and DATASETS[base].folders)):
        return name
    return info(f"{base}@{side}/{max(short or folders.shorter(side), side)}").name


def own(name: str) -> bool:
    """Whether a name means somebody's own pictures."""
    return name.startswith(OWN)


def size(name: str) -> tuple[int, int] | None:
    """The side of squares, and the length of a picture's shorter side before, that a name says; None if it says none."""
    _, side, short = _read(name)
    return None if side is None else (side, short or folders.shorter(side))


def same(one: str, other: str) -> bool:
    """Whether two names mean the same data set, of images of any size."""
    return _read(one)[0] == _read(other)[0]


def _read(name: str) -> tuple[str, int | None, int | None]:
    """``NAME@SIDE/SHORT`` in parts."""
    match = re.fullmatch(r"(?P<base>.+?)(?:@(?P<side>\d{1,6})(?:/(?P<short>\d{1,6}))?)?", name.strip())
    if match is None or match["base"] == OWN:
        raise UsageError(f"--data '{name}' names no data set;", hint=f"say, for example, cifar10 or {OWN}./val")
    side, short = (None if match[part] is None else int(match[part]) for part in ("side", "short"))
    if side is not None and not (1 <= side <= LARGEST and (short is None or side <= short <= LARGEST)):
        raise UsageError(
            f"--data '{name}' cannot be meant:", hint=f"give NAME@SIDE or NAME@SIDE/SHORT, 1 to {LARGEST}, SHORT at least SIDE."
        )
    return match["base"], side, short
