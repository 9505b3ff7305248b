"""What certify measured, as a run folder holds it: ``result.json`` and ``records.jsonl``. No torch here.

Format 2: ``claims`` is a list, in a result and in each record. Format 1 is still read: there, the fields of a single claim are
beside the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.cards.entries import Date, Proven, Sha256, Share, Text, ThreatField
from patchcert_cli.errors import IntegrityError
from patchcert_cli.schema import Count, Invalid, Positive, read
from patchcert_cli.storage import files
from patchcert_cli.threats import Guarantee

FORMAT = 2
CLAIM = (  # the fields of a claim in a result
    *("threat", "method", "guarantee", "arithmetic", "clean_accuracy", "certified_accuracy", "certified_interval", "counts"),
    "thresholds",
)
VERDICT = ("certified", "margin", "worst", "runner_up", "method", "arithmetic")  # and in a record
DETECTION = ("or_alarm", "thresholds", "or_alarm_thresholds")  # and of certified detection
FORMER_NAMES = {"rival": "runner_up"}  # of fields of records


@dataclass(frozen=True)
class Counts:
    """Right answers, and right answers that are certified.

    Attributes:
        clean: right answers, none of them an alarm.
        certified: those of them that are certified.
        alarms: of certified detection, images that raise an alarm without an attack.
        or_alarm: of certified detection, images of which every attack is answered right or with an alarm, those that raise one
            without an attack included; the published metric.
    """

    clean: Count
    certified: Count
    alarms: Count = 0
    or_alarm: Count = 0


@dataclass(frozen=True)
class ClaimResult:
    """One claim over all images; accuracies are fractions of the images, the interval is the exact 95 % one."""

    threat: ThreatField
    method: Text
    clean_accuracy: Share
    certified_accuracy: Share
    certified_interval: tuple[Share, Share]
    counts: Counts
    guarantee: Proven = Guarantee.RECOVERY
    arithmetic: Arithmetic | None = None


@dataclass(frozen=True)
class CertifyResult:
    """The part of a ``result.json`` of certify that a card may publish.

    Attributes:
        full_split: whether every image of the split was certified.
    """

    model_sha256: Sha256
    defense: Text
    dataset: Text
    split: Text
    images: Positive
    full_split: bool
    command: Text
    date: Date
    patchcert: Text
    claims: tuple[ClaimResult, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> CertifyResult:
        """Read the values of a ``result.json`` of either format; ``where`` is its path, for messages.

        Raises:
            IntegrityError: they are not a result of certify; everything that is wrong is listed.
        """
        result = current_result(values)
        if "attack" in result or not all("certified" in (claim.get("counts") or {}) for claim in result["claims"]):
            raise IntegrityError(f"'{where}' is not a result of patchcert certify.", hint="Give the result.json of a run folder.")
        if any(claim.get("top", 1) != 1 for claim in result["claims"]):
            raise IntegrityError(
                f"'{where}' is about the first {result['claims'][0]['top']} classes.",
                hint="A card claims answers: leave --top out.",
            )
        try:
            claims = [_known(ClaimResult, claim) for claim in result["claims"]]
            return read(cls, {**_known(cls, result), "claims": claims})
        except Invalid as invalid:
            raise IntegrityError(
                f"'{where}' is not a result of patchcert certify: {invalid}.",
                hint="Give the result.json of a run folder, as it was written.",
            ) from invalid


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that ``kind`` has; a result holds more."""
    return {item.name: values[item.name] for item in fields(kind) if item.name in values}


def current_result(values: Mapping[str, Any]) -> dict[str, Any]:
    """A result of certify or attack in format 2; of one in format 1 the same numbers."""
    if "claims" in values:
        return dict(values)
    attack = "attack" in values
    kept = (*CLAIM[:3], "clean_accuracy") if attack else ("clean_accuracy",)
    common = {name: value for name, value in values.items() if name in kept or name not in CLAIM}
    counts = values.get("counts") or {}
    common["counts"] = {"clean": counts["clean"]} if "clean" in counts else {}
    certified = not attack or "certified_accuracy" in values
    return {**common, "claims": [{name: values[name] for name in CLAIM if name in values}] if certified else []}


def current_record(values: Mapping[str, Any]) -> dict[str, Any]:
    """A record in format 2; of one in format 1 the same verdicts."""
    verdicts = values.get("claims")
    if verdicts is None:
        held = {name: value for name, value in values.items() if FORMER_NAMES.get(name, name) in (*VERDICT, *DETECTION)}
        values = {name: value for name, value in values.items() if name not in held}
        verdicts = [held] if "certified" in held else []
    renamed = [{FORMER_NAMES.get(name, name): value for name, value in one.items()} for one in verdicts]
    return {**values, "claims": renamed}


def read_result(path: Path) -> dict[str, Any]:
    """The result of a run folder, in format 2."""
    return current_result(files.read_json(path))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run folder in the order in which they were made, in format 2."""
    return [current_record(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
