"""sha256 of files, kept with their size, times and inode: checking an unchanged file a second time costs nothing.

The cache is a folder of small JSON files, ``HF_HOME/patchcert/sha256``. Without it everything works, only slower. A file is
hashed again as soon as its size, times or inode have changed, and while it is so young that a change within the resolution of the
file system's timestamps could go unnoticed.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from patchcert_cli.errors import MachineError
from patchcert_cli.storage import files, hub_cache

MIN_AGE_SECONDS = 2.0  # no file system in use has coarser timestamps


def sha256(path: Path) -> str:
    """sha256 of a file's content, from the cache if the file has not changed since it was hashed.

    Raises:
        OSError: the file cannot be read.
    """
    entry = _entry(path)
    before = _identity(path)
    cached = _read(entry)
    if cached is not None and cached[0] == before:
        return cached[1]
    digest = files.sha256(path)
    young = time.time() - max(before[1], before[2]) / 1e9 < MIN_AGE_SECONDS
    if not young and _identity(path) == before:
        with suppress(MachineError):  # a read-only home costs time, not safety
            files.write_json(entry, {"path": str(path), "identity": before, "sha256": digest})
    return digest


def forget(path: Path) -> None:
    """Hash ``path`` again at the next :func:`sha256`."""
    with suppress(OSError):
        _entry(path).unlink()


def _entry(path: Path) -> Path:
    """The file of the cache for ``path``."""
    name = files.sha256_of(os.fsencode(os.path.realpath(path)))[:40]
    return hub_cache.home() / "patchcert" / "sha256" / f"{name}.json"


def _identity(path: Path) -> list[int]:
    """What changes when a file changes: size, times in nanoseconds, inode and device."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev]


def _read(entry: Path) -> tuple[list[int], str] | None:
    """Identity and digest of a file of the cache; None if it is missing or damaged."""
    try:
        value = json.loads(entry.read_text(encoding="utf-8"))
        return list(value["identity"]), str(value["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
