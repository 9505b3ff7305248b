"""Files of models and runs: their names and hashes, atomic writes, and checks of paths that the user names. No torch here."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from patchcert_cli.errors import DataError, IntegrityError, MachineError, UsageError

CARD, CONFIG, WEIGHTS = "README.md", "config.json", "model.safetensors"
MANIFEST, RECORDS, RESULT = "manifest.json", "records.jsonl", "result.json"  # of an evaluation
STATE, METRICS = "state.safetensors", "metrics.jsonl"  # of a training run
INDEX = "model.safetensors.index.json"  # of weights in several files
PUBLISHED_RECORDS = "records.jsonl.gz"
PARTIAL = ".partial"  # the ending of a file while it is being written
MAX_NAME_BYTES = 255  # on every file system in use
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
SAMPLE = r"sample-\d{1,4}\.jsonl\.gz"  # records of images that are not a test split
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".th")


def shard(number: int, of: int) -> str:
    """Name of one of several weight files, numbered from 1."""
    return f"model-{number:05}-of-{of:05}.safetensors"


def weight_files(names: Iterable[str]) -> list[str]:
    """The names that hold weights: ``model.safetensors``, or the index and all its shards; empty if one is missing."""
    given = set(names)
    if WEIGHTS in given:
        return [WEIGHTS]
    counts = [int(match[1]) for name in given if (match := re.fullmatch(r"model-\d{5}-of-(\d{5})\.safetensors", name))]
    wanted = [INDEX, *(shard(number, counts[0]) for number in range(1, counts[0] + 1))] if counts else []
    return wanted if given.issuperset(wanted) else []


def file_size(count: int) -> str:
    """A number of bytes as people read it: ``1.4 MB``."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{max(count / 1e3, 0.1):.1f} kB"


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(content: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content so that a crash leaves either the old or the new one.

    Raises:
        MachineError: it cannot be written, or ``path`` is not a regular file.
    """
    with _replacing(path) as partial, partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def copy_atomically(source: Path, path: Path) -> None:
    """Copy the content of a file, as :func:`write_atomically` writes it, without reading it into memory."""
    with _replacing(path) as partial:
        shutil.copyfile(source, partial)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes ``path`` when the block ends, and is removed if it fails."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file")
        yield partial
        os.replace(partial, path)
    except OSError as problem:
        with suppress(OSError):
            partial.unlink()
        raise unwritten(path, problem) from problem


def write_named(path: Path, content: bytes) -> None:
    """Write a file that the user named: links are followed; pipes and devices are written to and stay what they are.

    Raises:
        MachineError: it cannot be written.
    """
    if not _takes_a_stream(_status(path)):
        write_atomically(Path(os.path.realpath(path)), content)
        return
    try:
        with path.open("wb") as stream:
            stream.write(content)
    except OSError as problem:
        raise unwritten(path, problem) from problem


def unwritten(path: Path, problem: OSError) -> MachineError:
    """The error that ``path`` cannot be written, and why."""
    hint = "Free some space" if problem.errno in DISK_FULL else "Name another place, or make this one writable"
    return MachineError(
        f"cannot write '{_brief(path)}': {problem.strerror or problem}.", hint=f"{hint}, then run the same command again."
    )


def check_file(path: Path, option: str) -> None:
    """Refuse a file that ``option`` names and that :func:`write_named` could not write. Nothing is created or changed.

    Raises:
        UsageError: it is a folder, a disk, stdout or below a file, or its name is too long.
        MachineError: nothing can be written there.
    """
    facts = _status(path)
    if _takes_a_stream(facts):
        if _is_stdout(facts):
            raise UsageError(f"{option} '{path}' is stdout, which gets the table.", hint="Name a file.")
        if not os.access(path, os.W_OK):
            raise MachineError(f"{option} '{path}' is not writable.", hint="Name another file.")
        return
    if facts is not None and not stat.S_ISREG(facts.st_mode):
        what = "a folder" if stat.S_ISDIR(facts.st_mode) else "no regular file"
        raise UsageError(f"{option} '{path}' is {what}.", hint="Name a file.")
    if facts is not None and _is_stdout(facts):
        raise UsageError(f"{option} '{path}' is what stdout goes to.", hint="Name another file.")
    _check_place(path, option, PARTIAL)


def check_folder(path: Path, option: str) -> None:
    """Refuse a folder that ``option`` names and that could not be created or written into. Nothing is created or changed.

    Raises:
        UsageError: it is a file or below one, or its name is too long.
        MachineError: nothing can be written there.
    """
    facts = _status(path)
    if facts is not None and not stat.S_ISDIR(facts.st_mode):
        raise UsageError(f"{option} '{path}' is a file.", hint="Name a folder.")
    _check_place(path, option)


def nearest(path: Path) -> Path:
    """The path itself, or the nearest of its parent folders that exists and can be read."""
    return next(one for one in (path, *path.absolute().parents) if _status(one) is not None)


def _check_place(path: Path, option: str, suffix: str = "") -> None:
    """Refuse a path that does not exist yet, by the nearest parent folder that does."""
    most, real = MAX_NAME_BYTES - len(suffix), Path(os.path.realpath(path))
    if any(len(os.fsencode(part)) > most for part in real.parts):
        raise UsageError(f"{option} '{_brief(path)}' has too long a name.", hint=f"Use at most {most} bytes.")
    place = nearest(real)
    if not place.is_dir() and place != real:
        raise UsageError(f"{option} '{path}': '{place}' is a file.", hint="Name a folder that can hold it.")
    place = place if place.is_dir() else place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as problem:
        raise MachineError(
            f"{option} '{path}': nothing can be written into '{place}' ({problem.strerror or problem}).",
            hint="Free some space." if problem.errno in DISK_FULL else "Name another place.",
        ) from problem


def _status(path: Path) -> os.stat_result | None:
    """The status of a path, links followed; None if it does not exist or cannot be read."""
    try:
        return path.stat()
    except OSError:
        return None


def _takes_a_stream(facts: os.stat_result | None) -> bool:
    return facts is not None and (stat.S_ISFIFO(facts.st_mode) or stat.S_ISCHR(facts.st_mode))


def _is_stdout(facts: os.stat_result | None) -> bool:
    """Whether this is the file or pipe that stdout goes to; a terminal or /dev/null may be written to twice."""
    try:
        other = os.fstat(sys.stdout.fileno())
    except (AttributeError, OSError, ValueError):  # none, or not a file, as in tests
        return False
    return facts is not None and not stat.S_ISCHR(facts.st_mode) and os.path.samestat(facts, other)


def _brief(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-20:]}"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON object as the content of a file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is an :class:`IntegrityError`."""
    return parse_json(read(path), path)


def read(path: Path) -> bytes:
    """The content of a file; a file that is missing or cannot be read is an :class:`IntegrityError`."""
    try:
        return path.read_bytes()
    except FileNotFoundError as problem:
        raise IntegrityError(f"'{path}' is missing.", hint="Check the path.") from problem
    except OSError as problem:
        raise IntegrityError(
            f"'{path}' is not readable: {problem.strerror or problem}.", hint="Check the path and its permissions."
        ) from problem


def unpacked(path: Path) -> bytes:
    """The content of a file, decompressed if its name ends in ``.gz``; a damaged file is a :class:`DataError`."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        page = content.lstrip()[:1] == b"<"
        what = "a web page, not a gzip file" if page else f"not an intact gzip file ({problem})"
        raise DataError(f"'{path}' is {what}.", hint="Delete it and fetch the data again.") from problem
    except OSError as problem:
        raise DataError(
            f"'{path}' cannot be read: {problem.strerror or problem}.", hint="Check the path and its permissions."
        ) from problem


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from the content of ``path``; anything else is an :class:`IntegrityError`."""
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError as problem:
        raise IntegrityError(
            f"'{path}' is not readable JSON: it is nested too deeply.", hint="Restore the file as it was written."
        ) from problem
    except ValueError as problem:
        raise IntegrityError(
            f"'{path}' is not readable JSON: {problem}.", hint="Restore the file as it was written."
        ) from problem
    if not isinstance(value, dict):
        raise IntegrityError(f"'{path}' does not hold a JSON object.", hint="Restore the file as it was written.")
    return value


def refuse_pickle(path: Path) -> None:
    """Raise :class:`IntegrityError` if a file is a pickle by name or by its first bytes; it is never opened as one."""
    if path.suffix.lower() in PICKLES:
        raise IntegrityError(
            f"'{path}' looks like a pickle, which could run code: it was not opened.",
            hint=f"Convert it to safetensors first: patchcert convert {path} --out {path.with_suffix('.safetensors').name}",
        )
    if path.is_file() and path.suffix == ".safetensors":
        with path.open("rb") as stream:
            refuse_pickled(stream.read(9), path)


def refuse_pickled(head: bytes, path: Path) -> None:
    """Raise :class:`IntegrityError` if the first bytes of a file of weights are those of a pickle."""
    pickled = head[8:9] != b"{" and (head[:2] == b"PK" or head[:1] == b"\x80")  # safetensors may begin with any length
    if pickled and path.suffix == ".safetensors":
        raise IntegrityError(
            f"'{path}' is a pickle under another name: it was not opened.", hint="Convert it to safetensors first."
        )
