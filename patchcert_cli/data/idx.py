"""MNIST's own files: the IDX format, plain or gzipped."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from patchcert_cli.errors import DataError
from patchcert_cli.storage import files


def mnist(folder: Path, split: str) -> tuple[Tensor, Tensor] | None:
    """MNIST's own files, plain or gzipped, or None if they are not there."""
    stem = "train" if split == "train" else "t10k"
    found = []
    for part, axes in (("images", 3), ("labels", 1)):
        plain = folder / f"{stem}-{part}-idx{axes}-ubyte"
        packed = plain.with_name(plain.name + ".gz")
        if plain.is_file() or packed.is_file():
            path = plain if plain.is_file() else packed
            found.append(read(files.unpacked(path), str(path)))
        else:
            return None
    return found[0], found[1]


def read(content: bytes, where: str) -> Tensor:
    """Read the IDX format: two zero bytes, type 8 (uint8), number of axes, their sizes as big-endian int32, the data."""
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"'{where}' is not an IDX file of bytes.", hint="Delete it and fetch the data again.")
    axes = content[3]
    start = 4 + 4 * axes
    sizes = struct.unpack(f">{axes}I", content[4:start]) if len(content) >= start else ()
    if not axes or len(content) <= start or len(content) != start + math.prod(sizes):
        raise DataError(f"'{where}' is truncated or damaged.", hint="Delete it and fetch the data again.")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(sizes)
