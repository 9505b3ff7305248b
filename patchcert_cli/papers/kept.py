"""Files of rows that benchmarks made for papers, in JSON: read once for each state of the file."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from patchcert_cli import schema
from patchcert_cli.errors import IntegrityError

Kind = TypeVar("Kind")


def read(kind: type[Kind], path: Path, maker: str) -> Kind | None:
    """The content of a file as dataclass ``kind``; None if there is no file. ``maker`` is the command that makes it.

    Raises:
        IntegrityError: the file is damaged.
    """
    wanted: Any = kind  # a class can be hashed, which mypy does not know of a type variable
    return cast(Kind, _read(wanted, path, maker, path.stat().st_mtime_ns)) if path.is_file() else None


@lru_cache(maxsize=8)
def _read(kind: Any, path: Path, maker: str, changed: int) -> Any:
    try:
        return schema.read(kind, json.loads(path.read_bytes()))
    except (ValueError, OSError) as problem:
        raise IntegrityError(f"'{path}' has no rows of papers: {problem}.", hint=f"Make it again: {maker}.") from problem
