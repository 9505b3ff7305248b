"""Published records: what a model answered on every test image, and what each claim said of it, as one compressed file.

``records.jsonl.gz`` begins with a line that says which weights, data and claims it is about; a line per image follows, with the
image's index in the split, its label, the prediction, and one verdict and margin per claim. No torch here.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchcert_cli.arithmetic import Arithmetic, former, weakest
from patchcert_cli.errors import ClaimError, DataError, IntegrityError
from patchcert_cli.storage.files import PUBLISHED_RECORDS, RECORDS
from patchcert_cli.threats import parse_threat

MAX_BYTES = 1 << 29  # bytes after decompression; a stranger's file may be a bomb


@dataclass(frozen=True)
class ClaimKey:
    """One claim of a records: threat model, proof, guarantee, and arithmetic, which is empty in files that do not say it."""

    threat: str
    method: str
    guarantee: str = "recovery"
    arithmetic: str = ""

    def to_dict(self) -> dict[str, str]:
        """As plain values; what is not said is left out."""
        return {name: value for name, value in asdict(self).items() if value}

    def __str__(self) -> str:
        return f"{self.threat} ({self.method}, {self.guarantee})"

    @property
    def about(self) -> str:
        """The threat, and the guarantee unless it is recovery."""
        return self.threat if self.guarantee == "recovery" else f"{self.threat} ({self.guarantee})"


@dataclass(frozen=True)
class PublishedRecord:
    """One image: label, prediction, and per claim whether it is certified and by what margin (None if not finite)."""

    label: int
    prediction: int
    certified: tuple[bool, ...]
    margin: tuple[float | None, ...]


@dataclass(frozen=True)
class PublishedRecords:
    """Verdicts of one model on one split, by index of the image."""

    model_sha256: str
    dataset: str
    split: str
    claims: tuple[ClaimKey, ...]
    rows: Mapping[int, PublishedRecord]

    def counts(self, at: int) -> tuple[int, int]:
        """Right answers, and right answers that claim number ``at`` certifies."""
        right = [row for row in self.rows.values() if row.label == row.prediction]
        return len(right), sum(row.certified[at] for row in right)

    def position(self, threat: str, method: str | None = None, guarantee: str = "recovery") -> int:
        """Which claim promises ``guarantee`` under ``threat``, proven by ``method``, or by the proof that certifies most.

        Raises:
            DataError: none is.
        """
        wanted = parse_threat(threat)
        found = [
            at
            for at, claim in enumerate(self.claims)
            if parse_threat(claim.threat) == wanted and method in (None, claim.method) and claim.guarantee == guarantee
        ]
        if not found:
            raise DataError(
                f"no published records for {threat}{f' by {method}' if method else ''} that promise {guarantee}.",
                hint=f"There are records for {', '.join(dict.fromkeys(claim.about for claim in self.claims))}.",
            )
        return max(found, key=lambda at: self.counts(at)[1])

    def pack(self) -> bytes:
        """The file's bytes, the same for the same content."""
        head = {"format": 1, "model_sha256": self.model_sha256, "dataset": self.dataset, "split": self.split}
        lines = [json.dumps({**head, "images": len(self.rows), "claims": [claim.to_dict() for claim in self.claims]})]
        for index, row in sorted(self.rows.items()):
            lines.append(json.dumps({"index": index, **asdict(row)}, separators=(",", ":")))
        return gzip.compress(("\n".join(lines) + "\n").encode(), compresslevel=9, mtime=0)

    @classmethod
    def read(cls, path: Path) -> PublishedRecords:
        """Inverse of :meth:`pack`.

        Raises:
            IntegrityError: the file is missing, damaged, or holds something else.
        """
        try:
            with gzip.open(path) as stream:
                content = stream.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES >> 20} MB of records")
            lines = [json.loads(line) for line in io.BytesIO(content)]
            head, rows = lines[0], {int(line["index"]): _row(line) for line in lines[1:]}
            if len(rows) != len(lines) - 1 or len(rows) != head["images"]:
                raise ValueError(f"{len(lines) - 1} lines about {len(rows)} images instead of {head['images']}")
            claims = tuple(ClaimKey(**claim) for claim in head["claims"])
            if any(claim.arithmetic not in ("", *Arithmetic) for claim in claims):
                raise ValueError(f"an arithmetic that is none of {', '.join(Arithmetic)}")
            if any(len(row.certified) != len(claims) or len(row.margin) != len(claims) for row in rows.values()):
                raise ValueError("a line with fewer or more verdicts than claims")
            return cls(head["model_sha256"], head["dataset"], head["split"], claims, rows)
        except FileNotFoundError as problem:
            raise IntegrityError(f"'{path}' is missing.") from problem
        except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zlib.error) as problem:
            raise IntegrityError(f"'{path}' holds no published records: {problem}.") from problem

    @classmethod
    def from_runs(cls, results: Mapping[str, Mapping[str, Any]]) -> PublishedRecords | None:
        """The records of certify results, by the path of their ``result.json``, all about the same weights and images.

        Raises:
            ClaimError: records are missing, or results or records contradict each other.
        """
        parts = [_of_run(Path(where), result) for where, result in results.items()]
        return _joined(parts) if parts else None


def _row(line: Mapping[str, Any]) -> PublishedRecord:
    verdicts = tuple(line["certified"])
    if not all(isinstance(verdict, bool) for verdict in verdicts):
        raise ValueError(f"verdicts of image {line['index']} that are not true or false")
    margins = tuple(None if margin is None else float(margin) for margin in line["margin"])
    return PublishedRecord(int(line["label"]), int(line["prediction"]), verdicts, margins)


def _of_run(where: Path, result: Mapping[str, Any]) -> PublishedRecords:
    path = where.parent / RECORDS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as problem:
        raise ClaimError(
            f"'{path}' is missing: a result counts only with its records.", hint="Run patchcert certify again with --fresh."
        ) from problem
    except (OSError, ValueError) as problem:
        raise ClaimError(f"'{path}' is damaged: {problem}.", hint="Run patchcert certify again with --fresh.") from problem
    stated = result.get("claims") or [result]
    claims = tuple(
        ClaimKey(str(one["threat"]), str(one["method"]), str(one.get("guarantee", "recovery")), str(one.get("arithmetic", "")))
        for one in stated
    )
    try:
        rows = {int(line["index"]): _published(line) for line in lines}
    except (KeyError, TypeError, ValueError) as problem:
        raise ClaimError(f"'{path}' holds no records of patchcert certify: {problem!r}.") from problem
    records = PublishedRecords(str(result["model_sha256"]), str(result["dataset"]), str(result["split"]), claims, rows)
    if len(rows) != result["images"] or any(len(row.certified) != len(claims) for row in rows.values()):
        raise ClaimError(f"'{path}' has records of {len(rows)} images, but the result is about {result['images']}.")
    for at, one in enumerate(stated):
        check_counts(records, at, result["images"], one["counts"]["clean"], one["counts"]["certified"], str(path))
    return records


def check_counts(records: PublishedRecords, at: int, images: int, clean: int, certified: int, where: str) -> None:
    """Raise :class:`ClaimError` if claim number ``at`` does not have these counts."""
    found = (len(records.rows), *records.counts(at))
    if found != (images, clean, certified):
        raise ClaimError(
            f"'{where}': {records.claims[at]} is said to have {clean} right and {certified} certified of {images} images,"
            f" but its records have {found[1]} and {found[2]} of {found[0]}."
        )


def _published(record: Mapping[str, Any]) -> PublishedRecord:
    verdicts: Sequence[Mapping[str, Any]] = record.get("claims") or [record]
    margins = tuple(_short(float(verdict["margin"])) for verdict in verdicts)
    return PublishedRecord(
        int(record["label"]), int(record["prediction"]), tuple(bool(verdict["certified"]) for verdict in verdicts), margins
    )


def _short(margin: float) -> float | None:
    return float(f"{margin:.5g}") if math.isfinite(margin) else None


def _joined(parts: Sequence[PublishedRecords]) -> PublishedRecords:
    """The records of several runs about the same images; what they have in common must agree."""
    first = parts[0]
    answers = {index: (row.label, row.prediction) for index, row in first.rows.items()}
    for other in parts[1:]:
        if {index: (row.label, row.prediction) for index, row in other.rows.items()} != answers:
            raise ClaimError("the results are about other images, or their predictions differ: certify again with --fresh.")
    seen: dict[ClaimKey, tuple[PublishedRecords, int]] = {}
    for records in parts:
        for at, claim in enumerate(records.claims):
            seen.setdefault(claim, (records, at))

    def row(index: int) -> PublishedRecord:
        parts = [(records.rows[index], at) for records, at in seen.values()]
        certified = tuple(part.certified[at] for part, at in parts)
        return PublishedRecord(*answers[index], certified, tuple(part.margin[at] for part, at in parts))

    return PublishedRecords(first.model_sha256, first.dataset, first.split, tuple(seen), {index: row(index) for index in answers})


def check_card(records: PublishedRecords, results: Iterable[Any], where: str, defense: str) -> None:
    """Raise :class:`ClaimError` unless every measurement of a card of ``defense`` has counts and arithmetic of its records."""
    for one in results:
        same = [
            at
            for at, claim in enumerate(records.claims)
            if (parse_threat(claim.threat), claim.method, claim.guarantee)
            == (parse_threat(one.threat), one.method, one.guarantee)
        ]
        if not same or (one.dataset, one.split) != (records.dataset, records.split):
            raise ClaimError(f"'{where}' has no records for {one.threat} ({one.method}) on {one.dataset} {one.split}.")
        known = records.claims[same[0]].arithmetic or former(defense)
        if one.arithmetic and weakest((one.arithmetic, known)) != one.arithmetic:
            raise ClaimError(
                f"'{where}': {one.threat} ({one.method}) is said to be {one.arithmetic}, but its records are {known}."
            )
        check_counts(records, same[0], one.images, one.clean, one.certified, f"{where}/{PUBLISHED_RECORDS}")
