"""One process at a time: in a run folder, or at a file that several processes share. No torch here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from patchcert_cli.errors import MachineError

LOCK = ".lock"  # the file stays in the folder; the lock ends with the process, however that ends


@contextmanager
def held(folder: Path, run_file: str = LOCK) -> Iterator[None]:
    """Lock a run folder, which is created if it does not exist; fails at once if another process has locked it.

    A folder that is not a run folder, that is, not empty and without a lock or a file named ``run_file``, is not touched. Where
    nothing can be written, or the file system has no locks, nothing is locked.

    Raises:
        MachineError: another process has locked it, or it cannot be created.
    """
    if not empty(folder) and not (folder / LOCK).exists() and not (folder / run_file).exists():
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


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, created if it does not exist; waits while another process holds it.

    Where nothing can be written, or the file system has no locks, nothing is locked.
    """
    lock = FileLock(path)
    with suppress(OSError, NotImplementedError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def empty(folder: Path, *but: str) -> bool:
    """Whether a folder does not exist, or holds nothing but the lock and files of the names ``but``."""
    return not folder.is_dir() or all(path.name in (LOCK, *but) for path in folder.iterdir())


def clear(folder: Path) -> None:
    """Delete everything in a folder, or in one that a link points to, but the lock, which this process holds.

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
