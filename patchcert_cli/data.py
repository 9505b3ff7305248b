"""Data sets as 8-bit images, found on disk, fetched on request, or bundled; pixels become floats in [0, 1] batch by batch.

Shapes: n images, C channels, H x W pixels.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import struct
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli.errors import DataError, MachineError, UsageError, unknown

ENVIRONMENT = "PATCHCERT_DATA"
DEFAULT_DIRECTORY = "data"


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a data set without opening it.

    Attributes:
        mean, std: per channel over its training images.
        test_images: how many its test split has.
        bundled: how many of them, the first ones, come with the package.
    """

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    test_images: int = 10_000
    bundled: int = 0


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
    )
}


def info(name: str) -> DatasetInfo:
    """The facts of data set ``name``."""
    if name not in DATASETS:
        raise unknown("data set", name, DATASETS)
    return DATASETS[name]


@dataclass(frozen=True)
class Images:
    """Labelled 8-bit images.

    Attributes:
        pixels: uint8 [n, C, H, W].
        labels: int64 [n].
        index: int64 [n], position of each image in its full split.
        name: data set.
        split: ``train``, ``validation`` or ``test``.
        source: where it came from: ``bundled`` or a folder.
    """

    pixels: Tensor
    labels: Tensor
    index: Tensor
    name: str
    split: str
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """sha256 of the pixels and labels."""
        content = hashlib.sha256(self.pixels.numpy().tobytes())
        content.update(self.labels.numpy().tobytes())
        return content.hexdigest()

    def take(self, positions: Tensor) -> Images:
        """The images at these positions, in this order."""
        return replace(self, pixels=self.pixels[positions], labels=self.labels[positions], index=self.index[positions])

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


def load(name: str, split: str, *, data_dir: Path | None = None, download: bool = False, fetch: str = "") -> Images:
    """Load ``split`` (``train`` or ``test``) of a data set from torchvision's layout, or the bundled copy of a test split.

    ``fetch`` is the command that an error message names as the way to get the data.

    Raises:
        UnknownName: no such data set.
        DataError: it is not there, or not intact; the message says what to type.
    """
    facts = info(name)
    root = directory(data_dir)
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
