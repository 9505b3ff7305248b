"""From certificates to records, and from records to a result: plain values, one row for each claim.

The format of both: :mod:`patchcert_cli.cards.results`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli.arithmetic import former, weakest
from patchcert_cli.attacks import AttackResult
from patchcert_cli.cards.results import FORMAT, VERDICT
from patchcert_cli.certificate import ALERT, Certificate, Guarantee, Tally
from patchcert_cli.data.images import Images
from patchcert_cli.errors import ClaimError
from patchcert_cli.evaluation.run_folder import Record, Run
from patchcert_cli.evaluation.task import EvaluationTask
from patchcert_cli.notebook import Tabular
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.storage import files
from patchcert_cli.version import __version__

ABOVE = 2.0  # above all thresholds


class Result(dict[str, Any], Tabular):
    """What ``result.json`` holds, as a dictionary; its rows are the claims."""

    def columns(self) -> dict[str, list[Any]]:
        """A row for each claim; for an attack without certificates one row."""
        same = ("model", "dataset", "split", "images")
        own = ("threat", "top", "method", "guarantee", "arithmetic", "clean_accuracy", "certified_accuracy")
        rows = self["claims"] or [{"clean_accuracy": self["clean_accuracy"], "threat": self.get("threat")}]
        found = {name: [row.get(name, self.get(name)) for row in rows] for name in (*same, *own)}
        low, high = zip(*(row.get("certified_interval", (None, None)) for row in rows), strict=True)
        found |= {"certified_low": list(low), "certified_high": list(high)}
        found["attacked_accuracy"] = [self.get("attacked_accuracy")] * len(rows)
        return {name: column for name, column in found.items() if any(value is not None for value in column)}

    def caption(self) -> str:
        """The model, the images and the time."""
        return f"{self['model']} on {self['images']} images of {self['dataset']} {self['split']}, {self['seconds']:.1f} s"


def certify_records(part: Images, certificates: Sequence[Certificate], plain: Tensor | None = None) -> Iterable[Record]:
    """One record per image: index, label, prediction, and under ``claims`` for each claim the fields of :data:`VERDICT`.

    An image from a folder is named by its path there (``picture``). Where the proof counts them, ``passes`` is the number of
    forward passes for all claims together. ``plain``, int64 [B], are the answers of a plain classifier without the defense.
    """
    columns = [list(_verdicts(certificate, part.labels)) for certificate in certificates]
    predictions = certificates[0].prediction.tolist()
    first = certificates[0]
    passes, whole, silent, plains = (
        None if values is None else values.tolist() for values in (first.passes, first.plain, first.silent, plain)
    )
    for position, (index, label) in enumerate(zip(part.index.tolist(), part.labels.tolist(), strict=True)):
        record = {"index": index, "label": label, "prediction": predictions[position]}
        if part.files:
            record["picture"] = part.files[index]
        if plains is not None:
            record["plain"] = plains[position]
        if passes is not None:
            record["passes"] = passes[position]
        if whole is not None:
            record["whole"] = whole[position]
        if silent is not None:
            record["silent"] = silent[position]
        yield {**record, "claims": [column[position] for column in columns]}


def _verdicts(certificate: Certificate, labels: Tensor) -> Iterable[dict[str, Any]]:
    parts = (certificate.certified, certificate.margin, certificate.worst, certificate.runner_up)
    same = (certificate.method, str(certificate.arithmetic))
    images = torch.arange(len(labels))
    of_labels = {"or_alarm": certificate.or_alarm, "or_alarm_thresholds": certificate.or_alarm_thresholds}  # [B, K] or [B, K, 2]
    lists = {name: value.cpu()[images, labels].tolist() for name, value in of_labels.items() if value is not None}
    lists |= {} if certificate.thresholds is None else {"thresholds": certificate.thresholds.tolist()}
    if certificate.ranking is not None and certificate.stays is not None:
        lists |= {"ranking": certificate.ranking.tolist(), "stays": certificate.stays.tolist()}
    for at, values in enumerate(zip(*(part.tolist() for part in parts), strict=True)):
        found = dict(zip(VERDICT, (*values, *same), strict=False))
        yield found | {name: value[at] for name, value in lists.items()}


def counted(record: Record, verdict: Record) -> tuple[bool, bool]:
    """Whether an image is answered right, and whether that is certified.

    Of a claim about the first k classes: whether its label is among them, and whether it is certified to stay there.
    """
    label = record["label"]
    if "ranking" not in verdict:
        right = record["prediction"] == label
        return right, right and verdict["certified"]
    stays = dict(zip(verdict["ranking"], verdict["stays"], strict=True))
    return label in stays, stays.get(label, False)


class RunningCounts:
    """Clean and certified accuracy of the first claim, counted as the records are made, by all ranks of a job."""

    def __init__(self, records: Iterable[Record] = (), workers: Workers | None = None) -> None:
        self.images = self.right = self.certified = 0
        self.claimed = False
        self.add(records)
        self._before, self._own = self._now(), self._now()
        self._workers = workers or Workers()

    def add(self, records: Iterable[Record]) -> None:
        """Count more records."""
        for record in records:
            self.images, self.right = self.images + 1, self.right + (record["prediction"] == record["label"])
            for first in record["claims"][:1]:
                self.claimed, self.certified = True, self.certified + counted(record, first)[1]

    def share(self) -> None:
        """Give what was counted since the last call to the other ranks, and take what they have counted."""
        if self._workers.alone:
            return
        more = [now - own for now, own in zip(self._now(), self._own, strict=True)]
        totals = [self._workers.add(name, count) for name, count in zip(("images", "right", "certified"), more, strict=True)]
        self.images, self.right, self.certified = (b + t for b, t in zip(self._before, totals, strict=True))
        self._own = self._now()

    def _now(self) -> tuple[int, int, int]:
        return self.images, self.right, self.certified

    def __str__(self) -> str:
        if not self.images:
            return "no image yet"
        text = f"clean {self.right / self.images:.2%}"
        return f"{text}, certified {self.certified / self.images:.2%}" if self.claimed else text


def ordered(task: EvaluationTask, run: Run) -> list[Record]:
    """All records in the order of the images; one each, as far as the run has come."""
    found = [run.records[index] for index in task.images.index.tolist() if index in run.records]
    assert len(run.records) == len(found), "records and images differ"
    return found


def certify_result(task: EvaluationTask, run: Run, seconds: float, resumed: int) -> dict[str, Any]:
    """What ``result.json`` of a certify run holds."""
    records = ordered(task, run)
    return summary(task, run, records, seconds, resumed) | {"claims": claim_rows(task, records)}


def summary(task: EvaluationTask, run: Run, records: Sequence[Record], seconds: float, resumed: int) -> dict[str, Any]:
    """The fields that all evaluations have; ``counts`` has only the clean ones."""
    clean = sum(r["prediction"] == r["label"] for r in records)
    return {
        "format": FORMAT,
        "model": task.model.name,
        "model_sha256": task.model.sha256,
        "model_source": task.model.source,
        "defense": task.model.kind,
        "dataset": task.images.name,
        "split": task.images.split,
        "data_source": task.images.source,
        "images": len(records),
        "full_split": len(records) == task.total,
        "clean_accuracy": clean / max(len(records), 1),
        "counts": {"clean": clean},
        **_plain(task, records),
        "seconds": seconds,
        "resumed": resumed,
        **({"passes": sum(r["passes"] for r in records)} if records and "passes" in records[0] else {}),
        "images_per_second": (len(records) - resumed) / seconds if seconds > 0 else 0.0,
        "device": str(task.model.defense.device),
        "records": str(run.folder / files.RECORDS),
        "command": task.command,
        "patchcert": __version__,
        "date": datetime.date.today().isoformat(),
    }


def _plain(task: EvaluationTask, records: Sequence[Record]) -> dict[str, Any]:
    """What a plain classifier gets right without the defense, and the defense around it; nothing for other models."""
    if not task.model.in_front or not all("plain" in r for r in records):
        return {}
    right = sum(r["plain"] == r["label"] for r in records)
    return {"in_front": task.model.in_front, "plain_accuracy": right / max(len(records), 1), "plain_right": right}


def claim_rows(task: EvaluationTask, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each claim over all images."""
    return [_row(task, records, at) for at in range(len(task.claims))]


def _row(task: EvaluationTask, records: Sequence[Record], at: int) -> dict[str, Any]:
    verdicts = [record["claims"][at] for record in records]
    tally = certified_tally(records, verdicts)
    top = task.claims[at].top
    return {
        "threat": str(task.claims[at].threat),
        **({"top": top} if top > 1 else {}),
        "method": verdicts[0]["method"],
        "guarantee": str(task.model.defense.guarantee),
        "arithmetic": str(weakest(one.get("arithmetic") or former(task.model.kind) for one in verdicts)),
        "clean_accuracy": tally.clean_accuracy,
        "certified_accuracy": tally.certified_accuracy,
        "certified_interval": list(tally.certified_interval),
        "counts": {"clean": tally.clean, "certified": tally.certified, **_alarms(task, records), **_or_alarm(verdicts)},
        **_compared(task, records, verdicts),
    }


def _compared(task: EvaluationTask, records: Sequence[Record], verdicts: Sequence[Record]) -> dict[str, Any]:
    """What other thresholds would give: how many alarms on unattacked images, right answers, certified ones, and images that
    count for the published metric."""
    rows = []
    for threshold in task.model.setting.get("compared", ()):
        right = [r["whole"] == r["label"] for r in records]
        quiet = [r.get("silent", (v["thresholds"][0], ABOVE)) for r, v in zip(records, verdicts, strict=True)]  # older records
        silent = [_between(threshold, one) for one in quiet]
        held = [_between(threshold, v["thresholds"]) for v in verdicts]
        counts = {"alarms": silent.count(False), "clean": sum(map(all, zip(right, silent, strict=True)))}
        counts["certified"] = sum(map(all, zip(right, held, strict=True)))
        if all("or_alarm_thresholds" in v for v in verdicts):
            counts["or_alarm"] = sum(_between(threshold, v["or_alarm_thresholds"]) for v in verdicts)
        rows.append({"threshold": threshold, **counts})
    return {"thresholds": rows} if rows else {}


def _between(threshold: float, ends: Sequence[float]) -> bool:
    return ends[0] < threshold < ends[1]


def _alarms(task: EvaluationTask, records: Sequence[Record]) -> dict[str, int]:
    """How many images raise an alarm without an attack, for a defense of detection."""
    detects = task.model.defense.guarantee is Guarantee.DETECTION
    return {"alarms": sum(r["prediction"] == ALERT for r in records)} if detects else {}


def _or_alarm(verdicts: Sequence[Record]) -> dict[str, int]:
    """How many images count for the published metric of detection; nothing if a verdict does not say it, as in older records."""
    said = bool(verdicts) and all("or_alarm" in one for one in verdicts)
    return {"or_alarm": sum(one["or_alarm"] for one in verdicts)} if said else {}


def certified_tally(records: Sequence[Record], verdicts: Sequence[Record]) -> Tally:
    """Counts of records whose claim has these verdicts."""
    found = [counted(record, verdict) for record, verdict in zip(records, verdicts, strict=True)]
    return Tally(len(found), sum(right for right, _ in found), sum(certified for _, certified in found))


def judged(outcome: AttackResult, inside: bool) -> Iterable[Record]:
    """For each image the outcomes of an attack that judges each of its tries; with ``inside`` also for the plain classifier."""
    for (tries, changed, altered), plain in zip(outcome.judged.tolist(), outcome.plain.tolist(), strict=True):
        yield {"tries": tries, "changed": changed} | ({"plain_changed": altered, "plain": plain} if inside else {})


def judged_in_all(records: Sequence[Record]) -> dict[str, int]:
    """The same over all images that are answered right: by the deployed model, and by the plain classifier."""
    right = [r for r in records if r["prediction"] == r["label"]]
    found = {"right": len(right), "tries": sum(r["tries"] for r in right), "changed": sum(r["changed"] for r in right)}
    if not records or "plain_changed" not in records[0]:
        return found
    plainly = [r for r in records if r["plain"] == r["label"]]
    found |= {"plain_right": len(plainly), "plain_tries": sum(r["tries"] for r in plainly)}
    return found | {"plain_changed": sum(r["plain_changed"] for r in plainly)}


def check_claim(result: dict[str, Any]) -> None:
    """Raise :class:`ClaimError` if an attack flipped certified images."""
    broken = result.get("broken", [])
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        raise ClaimError(
            f"{len(broken)} certified images were flipped (indices {shown}): the certificate is wrong.",
            hint=f"Please report it with {Path(str(result['records'])).parent}.",
        )
