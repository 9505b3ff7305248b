"""Run folders of evaluations: claimed for one set of settings, appended to image by image, safe against crashes.

A folder holds ``manifest.json`` (what is run), ``records.jsonl`` (one line per image) and, once every image is done,
``result.json``. One process at a time works in it.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import __version__, files, locks
from patchcert_cli.errors import IntegrityError, MachineError, UsageError

MANIFEST, RECORDS, RESULT = "manifest.json", "records.jsonl", "result.json"

Record = dict[str, Any]


@contextmanager
def opened(folder: Path, identity: dict[str, Any], *, device: str, command: str, fresh: bool) -> Iterator[Run]:
    """A :class:`Run` that no other process writes to as long as the block lasts.

    Raises:
        MachineError: another process is at work in the folder.
        UsageError: the folder holds another run, or something else.
    """
    with locks.held(folder, MANIFEST):
        yield Run(folder, identity, device=device, command=command, fresh=fresh)


class Run:
    """A run folder: claimed for one identity, appended to image by image."""

    def __init__(self, folder: Path, identity: dict[str, Any], *, device: str, command: str, fresh: bool) -> None:
        """Claim a folder that this process holds; see :func:`opened`."""
        self.folder, self.identity = folder, identity
        files.check_folder(folder, "--out")
        if fresh and (folder / MANIFEST).exists():
            locks.clear(folder)
        if (folder / MANIFEST).exists():
            self._check_same(files.read_json(folder / MANIFEST))
        elif not locks.empty(folder):
            raise UsageError(f"'{folder}' is not empty and holds no evaluation run;", hint="use another --out.")
        else:
            files.write_json(
                folder / MANIFEST,
                {
                    **identity,
                    "device": device,
                    "versions": {"patchcert": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
                    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "command": command,
                },
            )
        self.records = self._read()

    def _check_same(self, manifest: dict[str, Any]) -> None:
        changed = [
            f"{key} {manifest.get(key)!r}, not {value!r}" for key, value in self.identity.items() if manifest.get(key) != value
        ]
        if changed:
            raise UsageError(
                f"'{self.folder}' was made with other settings ({'; '.join(changed)});",
                hint="use another --out, or --fresh to start over.",
            )

    def _read(self) -> dict[int, Record]:
        """Records so far; a last line torn by a crash is cut off."""
        path = self.folder / RECORDS
        if not path.exists():
            return {}
        content = files.read(path)
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            files.write_atomically(path, whole)
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            return {int(line["index"]): line for line in lines}
        except (ValueError, TypeError, LookupError) as problem:
            raise IntegrityError(f"'{path}' is damaged: {problem!r};", hint="use --fresh to start over.") from problem

    def append(self, records: Iterable[Record]) -> None:
        """Write the records of one batch."""
        records = list(records)
        try:
            with (self.folder / RECORDS).open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(record) + "\n" for record in records))
        except OSError as problem:
            raise MachineError(
                f"cannot write '{self.folder / RECORDS}': {problem.strerror or problem};",
                hint=f"free some space and run the same command: {len(self.records)} images are kept.",
            ) from problem
        self.records.update((record["index"], record) for record in records)
