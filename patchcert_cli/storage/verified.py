"""sha256 of files, remembered by size, times and inode: checking a file twice costs nothing.

What is remembered lies beside the Hub's own cache, in ``HF_HOME/patchcert``; without it everything works, only slower. A file is
hashed again as soon as anything about it has changed, and while it is so young that a change within the clock's grain could hide.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from patchcert_cli.storage import files

YOUNG = 2.0  # seconds; no file system in use has coarser timestamps


def home() -> Path:
    """The Hub client's home, ``HF_HOME``, read as the client reads it."""
    given = os.environ.get("HF_HOME")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface").expanduser()


def hub_cache() -> Path:
    """The Hub client's cache, ``HF_HUB_CACHE``."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(given).expanduser() if given else home() / "hub"


def snapshot(repo: str, commit: str) -> Path:
    """Where the Hub client keeps ``repo`` at ``commit``, whether or not it is there."""
    return repository(repo) / "snapshots" / commit


def repository(repo: str) -> Path:
    """The folder of the Hub client's cache for ``repo``."""
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def digest(path: Path) -> str:
    """sha256 of a file's content, from memory if the file is the one that was hashed before.

    Raises:
        OSError: the file cannot be read.
    """
    memory = _memory(path)
    before = _identity(path)
    known = _remembered(memory)
    if known is not None and known[0] == before:
        return known[1]
    actual = files.sha256(path)
    young = time.time() - max(before[1], before[2]) / 1e9 < YOUNG
    if not young and _identity(path) == before:
        with suppress(OSError):  # a read-only home costs time, not trust
            memory.parent.mkdir(parents=True, exist_ok=True)
            partial = memory.with_name(f"{memory.name}.{os.getpid()}.partial")
            partial.write_text(json.dumps({"path": str(path), "identity": before, "sha256": actual}), encoding="utf-8")
            os.replace(partial, memory)
    return actual


def forget(path: Path) -> None:
    """Hash ``path`` again at the next :func:`digest`."""
    with suppress(OSError):
        _memory(path).unlink()


def _memory(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:40]
    return home() / "patchcert" / "sha256" / f"{name}.json"


def _identity(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev]


def _remembered(memory: Path) -> tuple[list[int], str] | None:
    try:
        value = json.loads(memory.read_text(encoding="utf-8"))
        return list(value["identity"]), str(value["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
