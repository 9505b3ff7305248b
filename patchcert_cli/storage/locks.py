"""One process at a time in a run folder. No torch here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from patchcert_cli.errors import MachineError

LOCK = ".lock"  # stays behind in the folder; what holds it ends with the process, however that ends


@contextmanager
def held(folder: Path, ours: str = LOCK) -> Iterator[None]:
    """Hold a run folder, which is made if need be.

    Nothing is held in a folder of others, which is not empty and has neither a lock nor a file named ``ours``; nor where nothing
    can be written, or where the file system knows no locks.

    Raises:
        MachineError: another process holds it, or it cannot be made.
    """
    if not empty(folder) and not (folder / LOCK).exists() and not (folder / ours).exists():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise MachineError(
            f"cannot make '{folder}': {problem.strerror or problem}.", hint="Use another --out, or make room."
        ) from problem
    lock = FileLock(folder / LOCK)
    if os.access(folder, os.W_OK | os.X_OK):
        try:
            lock.acquire(blocking=False)
        except Timeout as problem:
            raise MachineError(
                f"'{folder}' is being written by another process.", hint="Wait until it ends, or use another --out."
            ) from problem
        except (OSError, NotImplementedError):
            pass
    try:
        yield
    finally:
        lock.release()


def empty(folder: Path) -> bool:
    """Whether a folder is not there, or holds nothing but the lock."""
    return not folder.is_dir() or all(path.name == LOCK for path in folder.iterdir())


def clear(folder: Path) -> None:
    """Delete everything in a folder, which may be a link to one, but the lock, which this process holds.

    Raises:
        MachineError: something cannot be deleted.
    """
    try:
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    except OSError as problem:
        raise MachineError(f"cannot clear '{folder}': {problem.strerror or problem}.", hint="Use another --out.") from problem
