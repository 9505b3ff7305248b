"""Images that stay in their files until they are needed: decoded by threads, in any order, never all in memory.

Decoding happens outside of Python's lock, so threads are enough: measured on two cores they are as fast as two worker processes,
need no start-up, and end with the process. A batch does not depend on their number.

Shapes: m images, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from patchcert_cli.data import image_files
from patchcert_cli.data.class_folders import MAX_SHOWN, ClassFolders
from patchcert_cli.data.image_files import DecodedImage, ImageChanges
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import DataError, IntegrityError, Interrupted, MachineError
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage import files, hub_cache
from patchcert_cli.storage.checksum_cache import MIN_AGE_SECONDS

FORMAT = 1  # of the files that keep the results of checks
BLOCK = 256  # images that are decoded before their pixels are hashed
MAX_BYTES_IN_MEMORY = 1 << 30  # pixels that a check keeps; more stay in their files


class Check(NamedTuple):
    """What reading images once has shown.

    Attributes:
        sha256: of their pixels, then their labels.
        changes: how they were resized and turned.
        pixels: uint8 [m, 3, H, W]; None if they are too large to be kept in memory.
    """

    sha256: str
    changes: ImageChanges
    pixels: Tensor | None


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of class folders by number, resized and cropped."""

    folder: ClassFolders
    resize_crop: ResizeCrop

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Images as uint8 [m, 3, H, W].

        Raises:
            DataError: a file is not an image, or is damaged.
        """
        if not numbers:
            return torch.empty(0, 3, *self.resize_crop.size, dtype=torch.uint8)
        images = []
        for one in self._decode(numbers):
            if isinstance(one, DataError):
                raise one
            images.append(one.pixels)
        return torch.stack(images)

    def check(self, numbers: Sequence[int], labels: Tensor, progress: Progress | None = None) -> Check:
        """Read images once: hashes them, counts what resizing changed, and reports all damaged ones together.

        Of images that are not kept in memory the result is remembered in ``HF_HOME/patchcert/images``, with the names, sizes and
        times of their files.

        Raises:
            DataError: files are not images, or damaged; all are named.
            Interrupted: stopped by Ctrl-C.
        """
        progress = progress or Silent()
        in_memory = len(numbers) * 3 * math.prod(self.resize_crop.size) <= MAX_BYTES_IN_MEMORY
        entry = None if in_memory else self._entry(numbers, labels)
        known = None if entry is None else _remembered(entry)
        if known is not None:
            return known
        content, changes = hashlib.sha256(), ImageChanges()
        damaged: list[DataError] = []
        parts: list[Tensor] = []
        try:
            for begin in range(0, len(numbers), BLOCK):
                for one in self._decode(numbers[begin : begin + BLOCK]):
                    if isinstance(one, DataError):
                        damaged.append(one)
                        progress.note(one.message)
                        continue
                    content.update(one.pixels.numpy().tobytes())
                    changes += ImageChanges.of(one)
                    if in_memory:
                        parts.append(one.pixels)
                done = min(begin + BLOCK, len(numbers))
                progress.update(done, len(numbers), f"reading images{f', {len(damaged)} damaged' if damaged else ''}")
        except KeyboardInterrupt as problem:
            raise Interrupted("interrupted while reading images.", hint="Run the same command again.") from problem
        if damaged:
            raise _damaged(damaged, len(numbers))
        content.update(labels.numpy().tobytes())
        result = Check(content.hexdigest(), changes, torch.stack(parts) if in_memory else None)
        if entry is not None:
            with suppress(MachineError):  # a read-only home costs time only
                files.write_json(entry, {"format": FORMAT, "sha256": result.sha256, "changes": changes.to_list()})
        return result

    def _decode(self, numbers: Sequence[int]) -> Iterable[DecodedImage | DataError]:
        with image_files.without_warnings(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return list(pool.map(self._one, numbers))

    def _one(self, number: int) -> DecodedImage | DataError:
        try:
            return image_files.decode(self.folder.path(number), self.resize_crop)
        except DataError as problem:
            return problem

    def _entry(self, numbers: Sequence[int], labels: Tensor) -> Path | None:
        """The file that keeps the result of a check; None if an image is so young that a change could go unnoticed."""
        import PIL

        key, newest = hashlib.sha256(), 0
        key.update(json.dumps([FORMAT, str(self.resize_crop), PIL.__version__]).encode())
        with suppress(OSError):
            for number in numbers:
                facts = self.folder.path(number).stat()
                newest = max(newest, facts.st_mtime_ns, facts.st_ctime_ns)
                name = os.fsencode(self.folder.files[number])
                key.update(name + b"\0%d\0%d\0%d\n" % (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))
            key.update(labels.numpy().tobytes())
            if time.time() - newest / 1e9 >= MIN_AGE_SECONDS:
                return hub_cache.home() / "patchcert" / "images" / f"{key.hexdigest()[:40]}.json"
        return None


def _remembered(entry: Path) -> Check | None:
    try:
        value = files.read_json(entry)
        return Check(str(value["sha256"]), ImageChanges.from_list(value["changes"]), None) if value["format"] == FORMAT else None
    except (IntegrityError, KeyError, TypeError, ValueError):
        return None


def _damaged(problems: list[DataError], total: int) -> DataError:
    """One error for all images that cannot be read."""
    if len(problems) == 1:
        return DataError(problems[0].message, hint="Replace or remove it, then run the same command again.")
    more = f" And {len(problems) - MAX_SHOWN} more." if len(problems) > MAX_SHOWN else ""
    return DataError(
        f"{len(problems)} of {total} images cannot be used: {' '.join(one.message for one in problems[:MAX_SHOWN])}{more}",
        hint="Replace or remove them, then run the same command again.",
    )
