"""Where the Hub client keeps its files, from the environment variables that it reads. No network here."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The Hub client's home folder, ``HF_HOME``."""
    given = os.environ.get("HF_HOME")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface").expanduser()


def folder() -> Path:
    """The Hub client's cache, ``HF_HUB_CACHE``."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(given).expanduser() if given else home() / "hub"


def repository(repo: str) -> Path:
    """The folder of the cache for ``repo``."""
    return folder() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, commit: str) -> Path:
    """Where the cache keeps ``repo`` at ``commit``, whether or not it is there."""
    return repository(repo) / "snapshots" / commit
