"""The files of a model folder: their names, hashes, and writing them so that a crash loses nothing. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from patchcert_cli.errors import IntegrityError, MachineError

CARD, CONFIG, WEIGHTS = "README.md", "config.json", "model.safetensors"
INDEX, LEDGER = "model.safetensors.index.json", "records.jsonl.gz"  # of weights in several files; published records
SAMPLE = r"sample-\d{1,4}\.jsonl\.gz"  # records of pictures that are no test split
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


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of(content: bytes) -> str:
    """Hex digest of bytes."""
    return hashlib.sha256(content).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content so that a crash leaves either the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise MachineError(
            f"cannot write '{path}': {problem.strerror or problem}.", hint="Free some space, then run the same command again."
        ) from problem


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is an :class:`IntegrityError`."""
    return parse_json(read(path), path)


def read(path: Path) -> bytes:
    """The content of a file; a file that is missing or cannot be read is an :class:`IntegrityError`."""
    try:
        return path.read_bytes()
    except FileNotFoundError as problem:
        raise IntegrityError(f"'{path}' is missing.") from problem
    except OSError as problem:
        raise IntegrityError(f"'{path}' is not readable: {problem.strerror or problem}.") from problem


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object from the content of ``path``; anything else is an :class:`IntegrityError`."""
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError as problem:
        raise IntegrityError(f"'{path}' is not readable JSON: it is nested too deeply.") from problem
    except ValueError as problem:
        raise IntegrityError(f"'{path}' is not readable JSON: {problem}.") from problem
    if not isinstance(value, dict):
        raise IntegrityError(f"'{path}' does not hold a JSON object.")
    return value


def refuse_pickle(path: Path) -> None:
    """Raise :class:`IntegrityError` if a file is a pickle by name or by its first bytes; it is never opened as one."""
    if path.suffix.lower() in PICKLES:
        raise IntegrityError(
            f"'{path}' looks like a pickle, which could run code: it was not opened.", hint="Convert it to safetensors first."
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
