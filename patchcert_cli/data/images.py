"""Data sets as 8-bit images, found on disk, fetched on request, or bundled; pixels become floats in [0, 1] batch by batch.

A data set that comes as pictures in class folders (:mod:`patchcert_cli.data.folders`) lies in ``DIR/NAME/train/CLASS/`` and
``DIR/NAME/val/CLASS/``; somebody's own pictures, ``imagefolder:DIR/FOLDER``, in ``DIR/FOLDER/CLASS/``. When it is first used it
is packed into ``DIR/.patchcert/``, or if that cannot be written to into ``HF_HOME/patchcert/packed/``, and from then on mapped:
no subset of it is ever copied.

Shapes: n images, C channels, H x W pixels.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli.data import class_folders, folders, idx
from patchcert_cli.data.datasets import Dataset, info
from patchcert_cli.errors import DataError, MachineError, UsageError, first_line
from patchcert_cli.progress import Progress
from patchcert_cli.storage import hub_cache

ENVIRONMENT = "PATCHCERT_DATA"
DEFAULT_DIRECTORY = "data"
STORE = ".patchcert"  # inside the data directory: packed pictures


@dataclass(frozen=True)
class Rows:
    """Rows of a mapped file of images: which ones, so that no subset needs a copy.

    Attributes:
        file: uint8 [N, C, H, W].
        at: int64 [n].
        sha256: of the whole file.
    """

    file: Tensor
    at: Tensor
    sha256: str

    @property
    def outline(self) -> Tensor:
        """uint8 [n, C, H, W] on the meta device: shape and type without content, so that nobody takes the file for its rows."""
        return torch.empty((len(self.at), *self.file.shape[1:]), dtype=torch.uint8, device="meta")


@dataclass(frozen=True)
class Images:
    """Labelled 8-bit images, in memory or mapped from a file.

    Attributes:
        pixels: uint8 [n, C, H, W]; of mapped images only the shape. :meth:`read` reads both kinds.
        labels: int64 [n].
        index: int64 [n], position of each image in its full split.
        name: data set.
        split: ``train``, ``validation`` or ``test``, or ``folder`` for own pictures, which have none.
        source: where it came from: ``bundled`` or a folder.
        mapped: where mapped images are; None for images in memory.
        classes: what the labels are called.
        remarks: what a user should know of how pictures became images, and of files that were skipped, a line each.
        files: of pictures in folders, the path of each one of the full split inside its folder, by ``index``.
    """

    pixels: Tensor
    labels: Tensor
    index: Tensor
    name: str
    split: str
    source: str
    mapped: Rows | None = None
    classes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, positions: Tensor | slice = slice(None)) -> Tensor:
        """The pixels at some positions, uint8 [m, C, H, W]."""
        if self.mapped is None:
            return self.pixels[positions]
        return self.mapped.file.index_select(0, self.mapped.at[positions])

    def digest(self) -> str:
        """sha256 of the pixels and labels; for mapped images the sha256 of their file, not read again, stands for the pixels."""
        if self.mapped is None:
            content = hashlib.sha256(self.pixels.numpy().tobytes())
        else:
            content = hashlib.sha256(self.mapped.sha256.encode() + self.mapped.at.numpy().tobytes())
        content.update(self.labels.numpy().tobytes())
        return content.hexdigest()

    def take(self, positions: Tensor) -> Images:
        """The images at these positions, in this order."""
        labels, index = self.labels[positions], self.index[positions]
        if self.mapped is None:
            return replace(self, pixels=self.pixels[positions], labels=labels, index=index)
        mapped = replace(self.mapped, at=self.mapped.at[positions])
        return replace(self, pixels=mapped.outline, labels=labels, index=index, mapped=mapped)

    def relabelled(self, outputs: Sequence[int]) -> Images:
        """The same images, label i replaced by ``outputs[i]``."""
        return replace(self, labels=torch.tensor(outputs, dtype=torch.int64)[self.labels])

    def limit(self, count: int | None, seed: int) -> Images:
        """A seeded, fixed subset of ``count`` images in the split's order; a larger subset contains the smaller ones."""
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise UsageError(f"--limit {count} leaves no image.", hint=f"Allowed: 1 to {len(self)}.")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self.take(chosen.sort().values)

    def hold_out(self, count: int, seed: int) -> tuple[Images, Images]:
        """``(rest, validation)`` with ``count`` seeded random images in the second."""
        if not 0 < count < len(self):
            raise UsageError(f"cannot hold {count} of {len(self)} images out for validation.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = replace(self.take(order[:count].sort().values), split="validation")
        return self.take(order[count:].sort().values), held


@dataclass(frozen=True)
class Glance:
    """Images of a split, and what it would take to have them all.

    Attributes:
        images: all that there are; if they would have to be packed first, a seeded subset.
        there: how many there are.
        total: how many images the split has.
        disk: bytes that packing them takes; 0 if nothing has to be packed.
    """

    images: Images
    there: int
    total: int
    disk: int = 0


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [..., H, W] -> float32 in [0, 1]."""
    return pixels.float() / 255


def directory(given: Path | None) -> Path:
    """The data directory: as given, else ``PATCHCERT_DATA``, else ``./data``."""
    return given or Path(os.environ.get(ENVIRONMENT) or DEFAULT_DIRECTORY)


def load(
    name: str,
    split: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    fetch: str = "",
    progress: Progress | None = None,
) -> Images:
    """Load ``split`` (``train`` or ``test``) of a data set from a data directory, or the bundled copy of a test split.

    ``fetch`` is the command that an error message names as the way to get the data; ``progress`` is told how far a data set in
    class folders is packed.

    Raises:
        UnknownName: no such data set.
        UsageError: nobody can download it for you.
        DataError: it is not there, or not intact; the message says what to type.
        MachineError: no room to pack it.
    """
    facts = info(name)
    root = directory(data_dir)
    if facts.resize_crop is not None:
        return _in_folders(facts, root, split, download, progress)
    if download:
        _torchvision(name, root, split, download=True)
    if name == "mnist":
        found = idx.mnist(root / "MNIST" / "raw", split)
    else:
        found = _torchvision(name, root, split, download=False) if (root / "cifar-10-batches-py").is_dir() else None
    if found is not None:
        return _checked(*found, facts, split, str(root))
    whole = facts.bundled == facts.test_images
    if facts.bundled and split == "test" and (whole or data_dir is None):  # a part never stands in for a folder that was named
        return _bundled(name)
    raise DataError(
        f"no {name} {split} data in '{root}' (set --data-dir or {ENVIRONMENT} to a folder in torchvision's layout).",
        hint=f"Fetch it with: {fetch}" if fetch else "Load it with download=True to fetch it.",
    )


def glance(name: str, split: str, count: int, seed: int, *, data_dir: Path | None = None, fetch: str = "") -> Glance:
    """Images of a split without packing or downloading anything, and if that means to do without most of them, ``count`` ones.

    Other arguments and errors are those of :func:`load`.
    """
    facts, root = info(name), directory(data_dir)
    if facts.resize_crop is not None:
        folder, stores = _class_folders(facts, root, split)
        listed = class_folders.scan(folder)
        total = len(listed)
        if folders.find(listed, facts.resize_crop, stores=stores) is None:
            chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values
            pixels, said = folders.glance(listed, chosen.tolist(), facts.resize_crop)
            split, source = _called(facts, split, root)
            labels, classes = listed.labels[chosen], listed.classes
            some = Images(pixels, labels, chosen, facts.name, split, source, classes=classes, remarks=said)
            return Glance(some, total, total, total * math.prod(facts.shape))
    whole = load(name, split, data_dir=data_dir, fetch=fetch)
    return Glance(whole, len(whole), whole_split(whole))


def classes_of(name: str, split: str, *, data_dir: Path | None = None) -> tuple[str, ...]:
    """What the labels of a split are called, without opening an image; errors are those of :func:`load`."""
    facts = info(name)
    in_folders = facts.resize_crop is not None
    return class_folders.class_names(_class_folders(facts, directory(data_dir), split)[0]) if in_folders else facts.classes


def count(name: str) -> int:
    """How many pictures there are in somebody's own class folders."""
    path = info(name).path
    assert path is not None, f"{name} is no folder"
    return len(class_folders.scan(path))


def whole_split(images: Images) -> int:
    """How many images the split has that these were loaded from; of a bundled one only some are there."""
    return info(images.name).test_images if images.source == "bundled" else len(images)


def _class_folders(facts: Dataset, root: Path, split: str) -> tuple[Path, tuple[Path, Path]]:
    """Where the class folders of a split are, checked by their names, and where packed files of theirs may lie."""
    home = hub_cache.home() / "patchcert" / "packed"
    if facts.path is not None:
        return facts.path, (facts.path.parent / STORE, home)
    base = root / facts.label
    folder = base / ("train" if split == "train" else "val")
    if not folder.is_dir():
        raise DataError(f"no {facts.label} {split} data: there is no folder '{folder}'.", hint=_obtain(facts, base))
    names, wanted = class_folders.class_names(folder), len(facts.classes)
    strange = [name for name in names if not re.fullmatch(facts.folders, name)]
    if strange or len(names) != wanted:  # classes are told by position, so that any other set of folders would be mistaken
        found = f"{len(names)} class folders ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        found += f", {len(strange)} of them not named so ({strange[0]})" if strange else ""
        raise DataError(
            f"'{folder}' is not {facts.label}: it has {found}.",
            hint=f"Its {wanted} class folders are named after WordNet ids, such as n01440764.",
        )
    return folder, (root / STORE, home)


def _obtain(facts: Dataset, base: Path) -> str:
    return (
        f"Get it at {facts.page} (this needs an account) and put its pictures into '{base}/train/<wnid>/' and"
        f" '{base}/val/<wnid>/', or name another folder with --data-dir or {ENVIRONMENT}."
    )


def _called(facts: Dataset, split: str, root: Path) -> tuple[str, str]:
    """Split and source of pictures in class folders, as :class:`Images` tell them."""
    return (split, str(root)) if facts.path is None else ("folder", str(facts.path))


def _in_folders(facts: Dataset, root: Path, split: str, download: bool, progress: Progress | None) -> Images:
    """A data set of pictures in class folders, mapped."""
    if download and facts.path is not None:
        raise UsageError(f"{facts.name} is a folder of yours.", hint="Leave --download out.")
    if download:
        hint = _obtain(facts, root / facts.label)
        raise UsageError(f"{facts.label} cannot be downloaded by --download.", hint=hint)
    folder, stores = _class_folders(facts, root, split)
    assert facts.resize_crop is not None
    packed = folders.load(folder, facts.resize_crop, stores=stores, progress=progress)
    count = torch.arange(len(packed.labels))
    mapped = Rows(packed.pixels, count, packed.sha256)
    split, source = _called(facts, split, root)
    about = (packed.classes, packed.remarks, packed.files)
    return Images(mapped.outline, packed.labels, count, facts.name, split, source, mapped, *about)


@cache
def _bundled(name: str) -> Images:
    folder, facts = resources.files("patchcert_cli") / "samples", info(name)
    labels = idx.read(gzip.decompress((folder / f"{name}-test-labels.idx.gz").read_bytes()), "labels")
    grey = folder / f"{name}-test-images.idx.gz"
    if facts.shape[0] == 1:
        pixels = idx.read(gzip.decompress(grey.read_bytes()), "images")
    else:  # colour images, in rows on one sheet
        sheet = pixels_of(io.BytesIO((folder / f"{name}-test-images.png").read_bytes()))  # [C, rows * H, columns * W]
        _, height, width = facts.shape
        pixels = sheet.unfold(1, height, height).unfold(2, width, width).permute(1, 2, 0, 3, 4).reshape(-1, *facts.shape)
    return _checked(pixels, labels, facts, "test", "bundled")


def pixels_of(file: Any) -> Tensor:
    """The 8-bit pixels of a picture file, uint8 [C, H, W]."""
    import numpy
    from PIL import Image

    with Image.open(file) as picture:
        return torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).contiguous()


def _checked(pixels: Tensor, labels: Tensor, facts: Dataset, split: str, source: str) -> Images:
    pixels = pixels.reshape(len(pixels), *pixels.shape[-3:]) if pixels.ndim == 4 else pixels[:, None]
    if tuple(pixels.shape[1:]) != facts.shape or labels.ndim != 1 or len(pixels) != len(labels) or not len(labels):
        raise DataError(f"{facts.name} {split} data in '{source}' has shape {tuple(pixels.shape)}, not n x {facts.shape}.")
    labels = labels.long()
    if int(labels.max()) >= len(facts.classes):
        raise DataError(
            f"{facts.name} {split} data in '{source}' has label {int(labels.max())}, not 0 to {len(facts.classes) - 1}."
        )
    return Images(pixels, labels, torch.arange(len(labels)), facts.name, split, source, classes=facts.classes)


def _torchvision(name: str, root: Path, split: str, *, download: bool) -> tuple[Tensor, Tensor]:
    try:
        from torchvision import datasets  # type: ignore[import-untyped]  # it ships no types
    except (RuntimeError, OSError, ImportError) as problem:
        raise MachineError(
            f"torch {torch.__version__} and the installed torchvision do not fit together ({problem}).",
            hint="Reinstall both: pip install --upgrade --force-reinstall torch torchvision",
        ) from problem
    kinds = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}
    try:
        loaded = kinds[name](str(root), train=split == "train", download=download)
    except Exception as problem:  # damaged files raise nearly anything
        action = "downloaded to" if download else "read from"
        remedy = "Check the network." if download else "Delete it, then run the command again with --download."
        raise DataError(f"{name} could not be {action} '{root}': {first_line(problem)}.", hint=remedy) from problem
    pixels = torch.as_tensor(loaded.data)
    if pixels.ndim == 4:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.as_tensor(loaded.targets)
