"""Published records: what a model answered on every test image, and whether each claim holds there, as one compressed file.

``records.jsonl.gz`` begins with a line that names the weights, the data and the claims. A line per image follows: its index in
the split, its label, the prediction, and one verdict and margin per claim. No torch here.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from patchcert_cli.arithmetic import Arithmetic, former, weakest
from patchcert_cli.cards.entries import Measured, Proven, Sha256, Text, ThreatField
from patchcert_cli.cards.results import CertifyResult, read_records
from patchcert_cli.errors import ClaimError, DataError, IntegrityError
from patchcert_cli.schema import Count
from patchcert_cli.schema import read as read_as
from patchcert_cli.storage.files import PUBLISHED_RECORDS, RECORDS
from patchcert_cli.threats import Guarantee, Threat

MAX_BYTES = 1 << 29  # after decompression: guards against decompression bombs

MADE_AGAIN = "Certify again with --fresh; for a model that comes with patchcert, install patchcert again."


@dataclass(frozen=True)
class ClaimKey:
    """Which claim a verdict is about: threat model, proof, guarantee, and arithmetic (None in files that do not name it)."""

    threat: ThreatField
    method: Text
    guarantee: Proven = Guarantee.RECOVERY
    arithmetic: Arithmetic | None = None

    def to_dict(self) -> dict[str, str]:
        """As plain values."""
        values = {"threat": str(self.threat), "method": self.method, "guarantee": self.guarantee.value}
        return values | ({"arithmetic": self.arithmetic.value} if self.arithmetic else {})

    def __str__(self) -> str:
        return f"{self.threat} ({self.method}, {self.guarantee})"

    @property
    def about(self) -> str:
        """The threat, and the guarantee unless it is recovery."""
        return str(self.threat) if self.guarantee is Guarantee.RECOVERY else f"{self.threat} ({self.guarantee})"

    def same_claim(self, threat: Threat, method: str, guarantee: Guarantee) -> bool:
        """Whether it is this claim, whatever its arithmetic."""
        return (self.threat, self.method, self.guarantee) == (threat, method, guarantee)


@dataclass(frozen=True)
class PublishedRecord:
    """One image: label, prediction, and per claim whether it is certified and by what margin (None if not finite)."""

    label: int
    prediction: int
    certified: tuple[bool, ...]
    margin: tuple[float | None, ...]


@dataclass(frozen=True)
class Header:
    """The first line of the file."""

    model_sha256: Sha256
    dataset: Text
    split: Text
    images: Count
    claims: tuple[ClaimKey, ...]
    format: int = 1


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
        return len(self._right), sum(row.certified[at] for row in self._right)

    @cached_property
    def _right(self) -> list[PublishedRecord]:
        return [row for row in self.rows.values() if row.label == row.prediction]

    def position(self, threat: Threat, method: str | None = None, guarantee: Guarantee = Guarantee.RECOVERY) -> int:
        """Which claim promises ``guarantee`` under ``threat``, proven by ``method``, or by the proof that certifies most.

        Raises:
            DataError: there is none.
        """
        found = [at for at, claim in enumerate(self.claims) if claim.same_claim(threat, method or claim.method, guarantee)]
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
            first, *lines = (json.loads(line) for line in io.BytesIO(content))
            head = read_as(Header, first)
            rows = {int(line["index"]): _record(line, len(head.claims)) for line in lines}
            if not len(rows) == len(lines) == head.images:
                raise ValueError(f"{len(lines)} lines about {len(rows)} images instead of {head.images}")
            return cls(head.model_sha256, head.dataset, head.split, head.claims, rows)
        except FileNotFoundError as problem:
            raise IntegrityError(f"'{path}' is missing.", hint=MADE_AGAIN) from problem
        except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zlib.error) as problem:
            raise IntegrityError(f"'{path}' holds no published records: {problem}.", hint=MADE_AGAIN) from problem

    @classmethod
    def from_runs(
        cls, results: Mapping[str, CertifyResult], *, before: PublishedRecords | None = None
    ) -> PublishedRecords | None:
        """The records of certify results, by the path of their ``result.json``, after those of ``before``.

        All are about the same weights and images.

        Raises:
            ClaimError: records are missing, or results or records contradict each other.
        """
        parts = [_of_run(Path(where), result) for where, result in results.items()]
        parts = [before, *parts] if before else parts
        return _joined(parts) if parts else None

    def only(self, claims: Collection[tuple[Threat, str, Guarantee]]) -> PublishedRecords:
        """The same with these claims alone."""
        places = [at for at, one in enumerate(self.claims) if (one.threat, one.method, one.guarantee) in claims]

        def row(one: PublishedRecord) -> PublishedRecord:
            certified, margins = zip(*((one.certified[at], one.margin[at]) for at in places), strict=True)
            return replace(one, certified=certified, margin=margins)

        rows = {index: row(one) for index, one in self.rows.items()}
        return replace(self, claims=tuple(self.claims[at] for at in places), rows=rows)


def _record(line: Mapping[str, Any], claims: int) -> PublishedRecord:
    verdicts = tuple(line["certified"])
    margins = tuple(None if margin is None else float(margin) for margin in line["margin"])
    if not all(isinstance(verdict, bool) for verdict in verdicts):
        raise ValueError(f"verdicts of image {line['index']} that are not true or false")
    if not len(verdicts) == len(margins) == claims:
        raise ValueError(f"image {line['index']} has verdicts for {len(verdicts)} of {claims} claims")
    return PublishedRecord(int(line["label"]), int(line["prediction"]), verdicts, margins)


def _of_run(where: Path, result: CertifyResult) -> PublishedRecords:
    path = where.parent / RECORDS
    try:
        lines = read_records(path)
    except FileNotFoundError as problem:
        raise ClaimError(
            f"'{path}' is missing: a result counts only with its records.", hint="Run patchcert certify again with --fresh."
        ) from problem
    except (OSError, ValueError) as problem:
        raise ClaimError(f"'{path}' is damaged: {problem}.", hint="Run patchcert certify again with --fresh.") from problem
    claims = tuple(ClaimKey(one.threat, one.method, one.guarantee, one.arithmetic) for one in result.claims)
    try:
        rows = {int(line["index"]): _published(line) for line in lines}
    except (KeyError, TypeError, ValueError) as problem:
        raise ClaimError(
            f"'{path}' holds no records of patchcert certify: {problem!r}.",
            hint="Give the run folder as patchcert certify wrote it.",
        ) from problem
    records = PublishedRecords(result.model_sha256, result.dataset, result.split, claims, rows)
    if len(rows) != result.images or any(len(row.certified) != len(claims) for row in rows.values()):
        raise ClaimError(
            f"'{path}' has records of {len(rows)} images, but the result is about {result.images}.",
            hint="Give the run folder as patchcert certify wrote it.",
        )
    for at, one in enumerate(result.claims):
        check_counts(records, at, result.images, one.counts.clean, one.counts.certified, str(path))
    return records


def check_counts(records: PublishedRecords, at: int, images: int, clean: int, certified: int, where: str) -> None:
    """Raise :class:`ClaimError` if claim number ``at`` does not have these counts."""
    found = (len(records.rows), *records.counts(at))
    if found != (images, clean, certified):
        raise ClaimError(
            f"'{where}': {records.claims[at]} is published with {clean} right and {certified} certified of {images} images,"
            f" but its records have {found[1]} and {found[2]} of {found[0]}.",
            hint=MADE_AGAIN,
        )


def _published(record: Mapping[str, Any]) -> PublishedRecord:
    verdicts = record["claims"]
    certified = tuple(bool(verdict["certified"]) for verdict in verdicts)
    margins = tuple(_short(float(verdict["margin"])) for verdict in verdicts)
    return PublishedRecord(int(record["label"]), int(record["prediction"]), certified, margins)


def _short(margin: float) -> float | None:
    return float(f"{margin:.5g}") if math.isfinite(margin) else None


def _joined(parts: Sequence[PublishedRecords]) -> PublishedRecords:
    """The records of several runs about the same images; what they have in common must agree."""
    first = parts[0]
    answers = {index: (row.label, row.prediction) for index, row in first.rows.items()}
    for other in parts[1:]:
        if {index: (row.label, row.prediction) for index, row in other.rows.items()} != answers:
            raise ClaimError(
                "the results are about other images, or their predictions differ.",
                hint="Certify again with --fresh. If a zoo folder has older records, add the training run instead.",
            )
    columns: dict[ClaimKey, tuple[PublishedRecords, int]] = {}
    for records in parts:
        for at, claim in enumerate(records.claims):
            columns.setdefault(claim, (records, at))

    def row(index: int) -> PublishedRecord:
        verdicts = [(records.rows[index], at) for records, at in columns.values()]
        certified = tuple(one.certified[at] for one, at in verdicts)
        return PublishedRecord(*answers[index], certified, tuple(one.margin[at] for one, at in verdicts))

    rows = {index: row(index) for index in answers}
    return PublishedRecords(first.model_sha256, first.dataset, first.split, tuple(columns), rows)


def check_card(records: PublishedRecords, results: Iterable[Measured], where: str, defense: str) -> None:
    """Raise :class:`ClaimError` unless every measurement of a card of ``defense`` has counts and arithmetic of its records."""
    for one in results:
        same = [at for at, claim in enumerate(records.claims) if claim.same_claim(one.threat, one.method, one.guarantee)]
        if not same or (one.dataset, one.split) != (records.dataset, records.split):
            raise ClaimError(
                f"'{where}' has no records for {one.threat} ({one.method}) on {one.dataset} {one.split}.",
                hint=MADE_AGAIN,
            )
        known = records.claims[same[0]].arithmetic or former(defense)
        if one.arithmetic and weakest((one.arithmetic, known)) != one.arithmetic:
            raise ClaimError(
                f"'{where}': {one.threat} ({one.method}) claims to be {one.arithmetic}, but its records are {known}.",
                hint=MADE_AGAIN,
            )
        check_counts(records, same[0], one.images, one.clean, one.certified, f"{where}/{PUBLISHED_RECORDS}")
