"""Data sets as 8-bit images, found on disk, fetched on request, or bundled; pixels become floats in [0, 1] batch by batch.

A data set that comes as pictures in class folders (:mod:`patchcert_cli.folders`) lies in ``DIR/NAME/train/CLASS/`` and
``DIR/NAME/val/CLASS/``. When it is first used it is packed into ``DIR/.patchcert/``, or if that cannot be written to into
``HF_HOME/patchcert/packed/``, and from then on mapped: no subset of it is ever copied.

Shapes: n images, C channels, H x W pixels.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import re
import struct
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli import folders, verified
from patchcert_cli.errors import DataError, MachineError, UsageError, unknown
from patchcert_cli.progress import Progress

ENVIRONMENT = "PATCHCERT_DATA"
DEFAULT_DIRECTORY = "data"
STORE = ".patchcert"  # inside the data directory: packed pictures


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set without opening it.

    Attributes:
        mean, std: per channel over its training images.
        test_images: how many its test split has.
        bundled: how many of them, the first ones, come with the package.
        folders: what its class folders are called, a pattern, if it comes as pictures in class folders; class i is the i-th
            folder in the order of names.
        page: where to get it, if nobody can download it for you.
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
        ),
    )
}


def info(name: str) -> DatasetInfo:
    """The facts of data set ``name``."""
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    return DATASETS[name]


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
        split: ``train``, ``validation`` or ``test``.
        source: where it came from: ``bundled`` or a folder.
        mapped: where mapped images are; None for images in memory.
    """

    pixels: Tensor
    labels: Tensor
    index: Tensor
    name: str
    split: str
    source: str
    mapped: Rows | None = None

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

    def limit(self, count: int | None, seed: int) -> Images:
        """A seeded, fixed subset of ``count`` images in the split's order; a larger subset contains the smaller ones."""
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise UsageError(f"--limit {count} leaves no image;", hint=f"allowed: 1 to {len(self)}.")
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return self.take(chosen.sort().values)

    def hold_out(self, count: int, seed: int) -> tuple[Images, Images]:
        """``(rest, validation)`` with ``count`` seeded random images in the second."""
        if not 0 < count < len(self):
            raise UsageError(f"cannot hold {count} of {len(self)} images out for validation.")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = replace(self.take(order[:count].sort().values), split="validation")
        return self.take(order[count:].sort().values), held


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
    if facts.folders:
        return _in_folders(facts, root, split, download, progress)
    if download:
        _torchvision(name, root, split, download=True)
    if name == "mnist":
        found = _mnist(root / "MNIST" / "raw", split)
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


def _in_folders(facts: DatasetInfo, root: Path, split: str, download: bool, progress: Progress | None) -> Images:
    """A data set of pictures in class folders, mapped."""
    base = root / facts.name
    folder = base / ("train" if split == "train" else "val")
    obtain = (
        f"Get it at {facts.page} (this needs an account) and put its pictures into '{base}/train/<wnid>/' and"
        f" '{base}/val/<wnid>/', or name another folder with --data-dir or {ENVIRONMENT}."
    )
    if download:
        raise UsageError(f"{facts.name} cannot be downloaded by --download.", hint=obtain)
    if not folder.is_dir():
        raise DataError(f"no {facts.name} {split} data: there is no folder '{folder}'.", hint=obtain)
    names, wanted = folders.class_names(folder), len(facts.classes)
    strange = [name for name in names if not re.fullmatch(facts.folders, name)]
    if strange or len(names) != wanted:  # classes are told by position, so that any other set of folders would be mistaken
        found = f"{len(names)} class folders ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        found += f", {len(strange)} of them not named so ({strange[0]})" if strange else ""
        raise DataError(
            f"'{folder}' is not {facts.name}: it has {found}.",
            hint=f"Its {wanted} class folders are named after WordNet ids, such as n01440764.",
        )
    stores = (root / STORE, verified.home() / "patchcert" / "packed")
    packed = folders.load(folder, facts.shape[1], stores=stores, progress=progress)
    count = torch.arange(len(packed.labels))
    mapped = Rows(packed.pixels, count, packed.sha256)
    return Images(mapped.outline, packed.labels, count, facts.name, split, str(root), mapped)


@cache
def _bundled(name: str) -> Images:
    folder, facts = resources.files("patchcert_cli") / "samples", info(name)
    labels = _idx(gzip.decompress((folder / f"{name}-test-labels.idx.gz").read_bytes()), "labels")
    grey = folder / f"{name}-test-images.idx.gz"
    if facts.shape[0] == 1:
        pixels = _idx(gzip.decompress(grey.read_bytes()), "images")
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


def _checked(pixels: Tensor, labels: Tensor, facts: DatasetInfo, split: str, source: str) -> Images:
    pixels = pixels.reshape(len(pixels), *pixels.shape[-3:]) if pixels.ndim == 4 else pixels[:, None]
    if tuple(pixels.shape[1:]) != facts.shape or len(pixels) != len(labels) or not len(labels):
        raise DataError(f"{facts.name} {split} data in '{source}' has shape {tuple(pixels.shape)}, not n x {facts.shape}.")
    labels = labels.long()
    if int(labels.max()) >= len(facts.classes):
        raise DataError(
            f"{facts.name} {split} data in '{source}' has label {int(labels.max())}, not 0 to {len(facts.classes) - 1}."
        )
    return Images(pixels, labels, torch.arange(len(labels)), facts.name, split, source)


def _mnist(folder: Path, split: str) -> tuple[Tensor, Tensor] | None:
    """MNIST's own files, plain or gzipped, or None if they are not there."""
    stem = "train" if split == "train" else "t10k"
    found = []
    for part, axes in (("images", 3), ("labels", 1)):
        plain = folder / f"{stem}-{part}-idx{axes}-ubyte"
        packed = plain.with_name(plain.name + ".gz")
        if plain.is_file():
            found.append(_idx(plain.read_bytes(), str(plain)))
        elif packed.is_file():
            found.append(_idx(gzip.decompress(packed.read_bytes()), str(packed)))
        else:
            return None
    return found[0], found[1]


def _idx(content: bytes, where: str) -> Tensor:
    """Read the IDX format: two zero bytes, type 8 (uint8), number of axes, their sizes as big-endian int32, the data."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"'{where}' is not an IDX file of bytes.", hint="Delete it and fetch the data again.")
    axes = content[3]
    start = 4 + 4 * axes
    sizes = struct.unpack(f">{axes}i", content[4:start]) if len(content) >= start else (-1,)
    if len(content) != start + math.prod(sizes):
        raise DataError(f"'{where}' is truncated or damaged.", hint="Delete it and fetch the data again.")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(sizes)


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
    except (RuntimeError, OSError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        action = "downloaded to" if download else "read from"
        remedy = "Check the network." if download else "Delete it, then run the command again with --download."
        raise DataError(f"{name} could not be {action} '{root}': {reason}.", hint=remedy) from problem
    pixels = torch.as_tensor(loaded.data)
    if pixels.ndim == 4:
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return pixels, torch.as_tensor(loaded.targets)
