"""Run folders of evaluations: claimed for one set of settings, appended to image by image, safe against crashes.

A folder holds ``manifest.json`` (what is run), ``records.jsonl`` (one line per image) and, once every image is done,
``result.json``. One process at a time works in it.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from patchcert_cli.cards.results import FORMAT, current_record
from patchcert_cli.errors import IntegrityError, MachineError, UsageError
from patchcert_cli.storage import files, locks
from patchcert_cli.storage.files import MANIFEST, RECORDS
from patchcert_cli.version import __version__

Record = dict[str, Any]


@contextmanager
def opened(
    folder: Path,
    identity: dict[str, Any],
    *,
    device: str,
    command: str,
    fresh: bool,
    answers: dict[str, Any] | None = None,
) -> Iterator[Run]:
    """A :class:`Run` that no other process writes to as long as the block lasts.

    Raises:
        MachineError: another process uses the folder.
        UsageError: the folder holds another run, or something else.
    """
    with locks.held(folder, MANIFEST):
        yield Run(folder, identity, device=device, command=command, fresh=fresh, answers=answers)


class Run:
    """A run folder: claimed for one identity, appended to image by image."""

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        *,
        device: str,
        command: str,
        fresh: bool,
        answers: dict[str, Any] | None = None,
    ) -> None:
        """Claim ``folder``, which this process holds (see :func:`opened`), or go on with it.

        Args:
            folder: where the run is kept.
            identity: everything that decides the records.
            device: where it is computed.
            command: what the user typed.
            fresh: whether to start over.
            answers: shows whether a user's network is still the same, see :meth:`check_answers`.

        Raises:
            UsageError: the folder holds another run, or one of a network that gave other answers.
        """
        self.folder, self.identity, self.answers = folder, identity, answers
        files.check_folder(folder, "--out")
        if fresh and (folder / MANIFEST).exists():
            locks.clear(folder)
        if (folder / MANIFEST).exists():
            manifest = files.read_json(folder / MANIFEST)
            self._check_same(manifest)
            self.answers = manifest.get("answers")
            self.check_answers(answers)
        elif not locks.empty(folder):
            raise UsageError(f"'{folder}' is not empty and holds no evaluation run.", hint="Use another --out.")
        else:
            files.write_json(
                folder / MANIFEST,
                {
                    **identity,
                    "format": FORMAT,
                    **({} if answers is None else {"answers": answers}),
                    "device": device,
                    "versions": {"patchcert": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
                    "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "command": command,
                },
            )
        self.records = self._read()

    def _check_same(self, manifest: dict[str, Any]) -> None:
        changed = list(_differences(manifest, self.identity))
        if changed:
            raise UsageError(
                f"'{self.folder}' was made with other settings ({'; '.join(changed)}).",
                hint="Use another --out, or --fresh to start over.",
            )

    def check_answers(self, now: dict[str, Any] | None) -> None:
        """Raise :class:`UsageError` unless a network's outputs for fixed images are those of the run's beginning.

        Rounding may differ from one device to the next, so the sums are compared up to ``near``.
        """
        then = self.answers
        if then is None or now is None:
            return
        near = max(then["near"], now["near"])
        pairs = zip(then["sums"], now["sums"], strict=False)
        same = len(then["sums"]) == len(now["sums"]) and all(abs(one - other) <= near for one, other in pairs)
        if not same or then["precision"] != now["precision"]:
            raise UsageError(
                f"the network's outputs for fixed images have changed since '{self.folder}' was begun: a file that it reads, "
                "or a library, has changed.",
                hint="Use another --out, or --fresh to start over.",
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
            lines = [current_record(json.loads(line)) for line in whole.splitlines()]
            return {int(line["index"]): line for line in lines}
        except (ValueError, TypeError, LookupError) as problem:
            raise IntegrityError(f"'{path}' is damaged: {problem!r}.", hint="Use --fresh to start over.") from problem

    def append(self, records: Iterable[Record]) -> None:
        """Write the records of one batch."""
        records = list(records)
        try:
            with (self.folder / RECORDS).open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(record) + "\n" for record in records))
        except OSError as problem:
            raise MachineError(
                f"cannot write '{self.folder / RECORDS}': {problem.strerror or problem}.",
                hint=f"Free some space and run the same command: {len(self.records)} images are kept.",
            ) from problem
        self.records.update((record["index"], record) for record in records)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """What differs in ``now``, as text; of mappings only the entries that differ."""
    for key, value in now.items():
        before = then.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            yield from _differences(before, value, f"{within}{key}.")
        elif before != value:
            yield f"{within}{key} {before!r}, not {value!r}"
    if within:
        yield from (f"{within}{key} {then[key]!r}, not None" for key in then if key not in now)
