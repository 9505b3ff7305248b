"""Run folders of evaluations: claimed for one set of settings, appended to image by image, safe against crashes.

A folder holds ``manifest.json`` (what is run), ``records.jsonl`` (one line per image) and, once every image is done,
``result.json``. One process at a time works in it, or the ranks of one job: then each appends to a file of its own,
``records-RANK.jsonl``, and the first merges them in the end. What a stopped job leaves is merged when the run is opened again, by
any number of processes.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from patchcert_cli.cards.results import FORMAT, current_record
from patchcert_cli.errors import IntegrityError, MachineError, PatchcertError, UsageError
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.schema import differences
from patchcert_cli.storage import files, locks
from patchcert_cli.storage.files import MANIFEST, RECORDS
from patchcert_cli.version import __version__

Record = dict[str, Any]


PARTS = "records-*.jsonl"  # of the ranks of one job


@contextmanager
def opened(
    folder: Path,
    identity: dict[str, Any],
    *,
    device: str,
    command: str,
    fresh: bool,
    answers: dict[str, Any] | None = None,
    workers: Workers | None = None,
) -> Iterator[Run]:
    """A :class:`Run` that no process outside of the job ``workers`` writes to as long as the block lasts.

    Raises:
        MachineError: another process uses the folder, or the ranks do not share it.
        UsageError: the folder holds another run, or something else; or the ranks are about different runs.
    """
    workers = workers or Workers()
    workers.agree({name: str(value) for name, value in identity.items()})
    with ExitStack() as held:
        if workers.first:
            try:
                held.enter_context(locks.held(folder, MANIFEST))
                run = Run(folder, identity, device=device, command=command, fresh=fresh, answers=answers)
            except PatchcertError as problem:
                workers.failed("opened", problem)
                raise
            workers.tell("opened", True)
            workers.check_shared(folder / MANIFEST)
        else:
            workers.outcome("opened")
            workers.check_shared(folder / MANIFEST)
            run = Run(folder, identity, device=device, command=command, fresh=False, answers=answers, joins=True)
        if not workers.alone:
            run.part = f"records-{workers.rank}.jsonl"
        yield run


class Run:
    """A run folder: claimed for one identity, appended to image by image.

    Attributes:
        records: by the number of the image, those that there were and those that this process has made.
        part: the file that this process appends to.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        *,
        device: str,
        command: str,
        fresh: bool,
        answers: dict[str, Any] | None = None,
        joins: bool = False,
    ) -> None:
        """Claim ``folder``, which this process holds (see :func:`opened`), or go on with it.

        Args:
            folder: where the run is kept.
            identity: everything that decides the records.
            device: where it is computed.
            command: what the user typed.
            fresh: whether to start over.
            answers: shows whether a user's network is still the same, see :meth:`check_answers`.
            joins: another rank of the job holds the folder, and has claimed it.

        Raises:
            UsageError: the folder holds another run, or one of a network that gave other answers.
        """
        self.folder, self.identity, self.answers, self.part = folder, identity, answers, RECORDS
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
        self.records = self._lines(folder / RECORDS)
        if not joins:
            self.merge()

    def _check_same(self, manifest: dict[str, Any]) -> None:
        changed = list(differences(manifest, self.identity))
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

    def merge(self) -> None:
        """Join the records that ranks have made with the others, in the order of the images, and bring the file in this order.

        Raises:
            IntegrityError: two ranks have different records of an image.
        """
        parts = sorted(self.folder.glob(PARTS))
        for path in parts:
            for index, record in self._lines(path).items():
                if self.records.setdefault(index, record) != record:
                    raise IntegrityError(f"'{path}' has another record of image {index}.", hint="Use --fresh to start over.")
        if parts or list(self.records) != sorted(self.records):
            self.records = dict(sorted(self.records.items()))
            content = "".join(json.dumps(record) + "\n" for record in self.records.values())
            files.write_atomically(self.folder / RECORDS, content.encode())
        for path in parts:
            path.unlink()

    def _lines(self, path: Path) -> dict[int, Record]:
        """The records of a file; a last line torn by a crash is cut off."""
        if not path.exists():
            return {}
        content = files.read(path)
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            files.write_atomically(path, whole)
        return _parsed(path, whole)

    def append(self, records: Iterable[Record]) -> None:
        """Write the records of one batch."""
        records = list(records)
        try:
            with (self.folder / self.part).open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(record) + "\n" for record in records))
        except OSError as problem:
            raise MachineError(
                f"cannot write '{self.folder / self.part}': {problem.strerror or problem}.",
                hint=f"Free some space and run the same command: {len(self.records)} images are kept.",
            ) from problem
        self.records.update((record["index"], record) for record in records)


def read(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Manifest and records of a run, finished or not, in the order of the images; nothing in the folder is changed.

    A last line that is being written, or was torn by a crash, does not count.

    Raises:
        IntegrityError: a file is missing or damaged.
    """
    manifest, found = files.read_json(folder / MANIFEST), dict[int, Record]()
    for path in (folder / RECORDS, *sorted(folder.glob(PARTS))):
        content = files.read(path) if path.exists() else b""
        found |= _parsed(path, content[: content.rfind(b"\n") + 1])
    return manifest, [found[index] for index in sorted(found)]


def _parsed(path: Path, whole: bytes) -> dict[int, Record]:
    """Records from whole lines of a file."""
    try:
        lines = [current_record(json.loads(line)) for line in whole.splitlines()]
        return {int(line["index"]): line for line in lines}
    except (ValueError, TypeError, LookupError) as problem:
        raise IntegrityError(f"'{path}' is damaged: {problem!r}.", hint="Use --fresh to start over.") from problem
