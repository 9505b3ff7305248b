"""Labelled 8-bit images, found on disk, downloaded on request, or bundled; they become floats in [0, 1] batch by batch.

A data set of image files lies in ``DIR/NAME/train/CLASS/`` and ``DIR/NAME/val/CLASS/``, the user's own images,
``imagefolder:FOLDER``, in ``FOLDER/CLASS/``. They stay in their files until they are read
(:mod:`patchcert_cli.data.image_reader`).

Shapes: n images, C channels, H x W pixels.
"""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli.data import idx
from patchcert_cli.data.class_folders import skipped_text
from patchcert_cli.data.datasets import ENVIRONMENT, Dataset, directory, open_dataset
from patchcert_cli.data.image_reader import ImageReader
from patchcert_cli.errors import FOREIGN, DataError, MachineError, UsageError, first_line
from patchcert_cli.progress import Progress


@dataclass(frozen=True)
class Images:
    """Labelled 8-bit images, in memory or still in their files.

    Attributes:
        pixels: uint8 [n, C, H, W]; of images in files on the meta device, with the shape only. :meth:`read` reads both kinds.
        labels: int64 [n].
        index: int64 [n], position of each image in its full split.
        name: of the data set.
        split: ``train``, ``validation`` or ``test``, or ``folder`` for a folder of the user's, which has no splits.
        source: where they come from: ``bundled`` or a folder.
        reader: reads images that are in files; None for images in memory.
        classes: names of the labels.
        remarks: what a user should know of how images were resized, and of files that were skipped, a line each.
        files: of images in files, the path of each one of the full split inside its folder, by ``index``.
        sha256: of pixels and labels, if known; see :meth:`digest`.
    """

    pixels: Tensor
    labels: Tensor
    index: Tensor
    name: str
    split: str
    source: str
    reader: ImageReader | None = None
    classes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    sha256: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, positions: Tensor | slice = slice(None)) -> Tensor:
        """The pixels at some positions, uint8 [m, C, H, W].

        Raises:
            DataError: an image file is damaged.
        """
        return self.pixels[positions] if self.reader is None else self.reader.read(self.index[positions].tolist())

    def checked(self, progress: Progress | None = None) -> Images:
        """The same images after reading those in files once: hashed, remarked upon, and kept in memory if they are not large.

        Raises:
            DataError: image files are damaged; all are named.
            Interrupted: stopped by Ctrl-C.
        """
        if self.reader is None:
            return self
        check = self.reader.check(self.index.tolist(), self.labels, progress)
        remarks = (*check.changes.lines(self.reader.resize_crop), *self.remarks)
        if check.pixels is None:
            return replace(self, remarks=remarks, sha256=check.sha256)
        return replace(self, pixels=check.pixels, reader=None, remarks=remarks, sha256=check.sha256)

    def digest(self) -> str:
        """sha256 of the pixels, then the labels."""
        return self.sha256 or self._digest

    @cached_property
    def _digest(self) -> str:
        if self.reader is not None:
            return self.checked().sha256
        content = hashlib.sha256(self.pixels.numpy().tobytes())
        content.update(self.labels.numpy().tobytes())
        return content.hexdigest()

    def take(self, positions: Tensor) -> Images:
        """The images at these positions, in this order."""
        labels, index = self.labels[positions], self.index[positions]
        pixels = self.pixels[positions] if self.reader is None else self.pixels.new_empty((len(labels), *self.pixels.shape[1:]))
        return replace(self, pixels=pixels, labels=labels, index=index, sha256="")

    def relabelled(self, outputs: Sequence[int]) -> Images:
        """The same images, label i replaced by ``outputs[i]``."""
        return replace(self, labels=torch.tensor(outputs, dtype=torch.int64)[self.labels], sha256="")

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
            raise UsageError(
                f"{count} of {len(self)} images cannot be held out for validation.",
                hint=f"Use --validation {max(1, len(self) // 10)}.",
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = replace(self.take(order[:count].sort().values), split="validation")
        return self.take(order[count:].sort().values), held


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [..., H, W] -> float32 in [0, 1]."""
    return pixels.float() / 255


def load(
    name: str,
    split: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    fetch: str = "",
) -> Images:
    """``open_dataset(name, data_dir=data_dir).load(split, ...)``; see :func:`open_dataset` and :meth:`Dataset.load`."""
    return open_dataset(name, data_dir=data_dir).load(split, download=download, fetch=fetch)


def load_split(dataset: Dataset, split: str, *, download: bool, fetch: str) -> Images:
    """See :meth:`Dataset.load`."""
    if dataset.resize_crop is not None:
        return _in_folders(dataset, split, download)
    root = directory(dataset.data_dir)
    if dataset.read is not None:
        return _outside(dataset, root, split, download)
    if download:
        _torchvision(dataset.name, root, split, download=True)
    if dataset.name == "mnist":
        found = idx.mnist(root / "MNIST" / "raw", split)
    else:
        there = (root / "cifar-10-batches-py").is_dir()
        found = _torchvision(dataset.name, root, split, download=False) if there else None
    if found is not None:
        return _checked(*found, dataset, split, str(root))
    # A part never replaces a folder that was named, and nothing replaces one that does not exist.
    replaces = dataset.data_dir is None or (dataset.bundled == dataset.test_images and root.is_dir())
    if dataset.bundled and split == "test" and replaces:
        return _bundled(dataset.name)
    raise DataError(
        f"no {dataset.name} {split} data in '{root}' (set --data-dir or {ENVIRONMENT} to a folder in torchvision's layout).",
        hint=f"Fetch it with: {fetch}" if fetch else "Add --download to fetch it; in Python: load(..., download=True).",
    )


def _outside(dataset: Dataset, root: Path, split: str, download: bool) -> Images:
    """A data set that another package reads; its pixels and labels are checked like all others."""
    assert dataset.read is not None
    if download:
        raise UsageError(f"{dataset.name} cannot be downloaded by --download.", hint="Its package says where to get it.")
    try:
        pixels, labels = dataset.read(split, root)
    except FOREIGN as problem:
        raise DataError(
            f"{dataset.name} could not be read from '{root}': {first_line(problem)}.",
            hint="Its package says what it needs there.",
        ) from problem
    if not isinstance(pixels, Tensor) or not isinstance(labels, Tensor) or pixels.dtype != torch.uint8:
        raise DataError(f"{dataset.name} does not consist of uint8 pixels and labels.", hint="Repair the package that reads it.")
    return _checked(pixels, labels, dataset, split, str(root))


def whole_split(images: Images) -> int:
    """How many images the split has that these were loaded from; of a bundled one only some are there."""
    return open_dataset(images.name).test_images if images.source == "bundled" else len(images)


def _in_folders(dataset: Dataset, split: str, download: bool) -> Images:
    """A data set of image files, not read yet."""
    assert dataset.resize_crop is not None
    if download and dataset.custom:
        raise UsageError(f"{dataset.name} is a folder of yours.", hint="Leave --download out.")
    if download:
        raise UsageError(f"{dataset.label} cannot be downloaded by --download.", hint=dataset.source_hint)
    found = dataset.image_files(split)
    pixels = torch.empty((len(found), *dataset.shape), dtype=torch.uint8, device="meta")
    skipped = f"{text} in '{found.folder}'" if (text := skipped_text(found.skipped)) else ""
    return Images(
        pixels,
        torch.tensor(found.labels),
        torch.arange(len(found)),
        dataset.name,
        "folder" if dataset.custom else split,
        str(dataset.path or directory(dataset.data_dir)),
        ImageReader(found, dataset.resize_crop),
        classes=found.classes,
        remarks=(skipped,) if skipped else (),
        files=found.files,
    )


@cache
def _bundled(name: str) -> Images:
    folder, facts = resources.files("patchcert_cli") / "samples", open_dataset(name)
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
    """The 8-bit pixels of an image file, uint8 [C, H, W]."""
    import numpy
    from PIL import Image

    with Image.open(file) as image:
        return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


def _checked(pixels: Tensor, labels: Tensor, facts: Dataset, split: str, source: str) -> Images:
    hint = f"Put the files of {facts.name} there, or fetch them into another folder with --data-dir and --download."
    pixels = pixels.reshape(len(pixels), *pixels.shape[-3:]) if pixels.ndim == 4 else pixels[:, None]
    if tuple(pixels.shape[1:]) != facts.shape or labels.ndim != 1 or len(pixels) != len(labels) or not len(labels):
        raise DataError(
            f"{facts.name} {split} data in '{source}' has shape {tuple(pixels.shape)}, not n x {facts.shape}.",
            hint=hint,
        )
    labels = labels.long()
    if int(labels.max()) >= len(facts.classes):
        raise DataError(
            f"{facts.name} {split} data in '{source}' has label {int(labels.max())}, not 0 to {len(facts.classes) - 1}.",
            hint=hint,
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
