"""The certify and attack loops: one record per image, appended as it is made, resumable, with a manifest of what was run.

What a run folder holds: :mod:`patchcert_cli.runs`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli import __version__, checkpoint, files
from patchcert_cli.attacks.base import Attack
from patchcert_cli.certificate import Certificate, Tally
from patchcert_cli.data import Images, to_float
from patchcert_cli.defenses.base import Defense
from patchcert_cli.errors import ClaimError, DataError, Interrupted, MachineError, UsageError
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.runs import RECORDS, RESULT, Record, Run
from patchcert_cli.threats import Threat

BROKEN = "broken.safetensors"  # adversarial images of certified ones
BATCH_SIZE = 1000


@dataclass(frozen=True)
class Subject:
    """The model under evaluation: a loaded defense and what identifies it."""

    defense: Defense
    name: str
    kind: str
    sha256: str
    source: str


@dataclass(frozen=True)
class Plan:
    """One evaluation. ``command`` is what the user typed, for the manifest."""

    subject: Subject
    images: Images
    threat: Threat
    total: int
    seed: int = 0
    batch_size: int = BATCH_SIZE
    command: str = ""

    def check(self) -> None:
        """Raise unless images, model and threat fit together."""
        shape = self.subject.defense.input_shape
        if tuple(self.images.pixels.shape[1:]) != shape:
            raise DataError(
                f"{self.images.name} images are {tuple(self.images.pixels.shape[1:])}, but {self.subject.name} takes {shape}."
            )
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size} must be 1 or more.")
        self.threat.check(shape[1], shape[2], shape[0])

    def identity(self, kind: str, extra: dict[str, Any]) -> dict[str, Any]:
        """Everything that decides the records; two runs that differ here never share a folder."""
        return {
            "kind": kind,
            "model": self.subject.name,
            "model_sha256": self.subject.sha256,
            "defense": self.subject.kind,
            "dataset": self.images.name,
            "split": self.images.split,
            "data_sha256": self.images.digest(),
            "images": len(self.images),
            "subset_seed": self.seed if len(self.images) < self.total else None,
            "threat": str(self.threat),
            "patchcert": __version__,
            **extra,
        }

    def folder(self, kind: str, extra: dict[str, Any]) -> Path:
        """The default run folder: readable, and different for different runs."""
        digest = hashlib.sha256(json.dumps(self.identity(kind, extra), sort_keys=True).encode()).hexdigest()[:8]
        threat = str(self.threat).replace(":", "-").replace("%", "pct")
        return Path("runs") / f"{kind}-{Path(self.subject.name).name}-{threat}-{digest}"


def certify(plan: Plan, folder: Path | None = None, *, fresh: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Certify every image of a plan; returns what ``result.json`` holds.

    Raises:
        UsageError: the folder holds another run.
        Interrupted: stopped by Ctrl-C; the same call goes on where it stopped.
        MachineError: out of memory at a batch of one image, or the disk is full.
    """
    plan.check()
    folder = folder or plan.folder("certify", {})
    device = str(plan.subject.defense.device)
    run = Run(folder, plan.identity("certify", {}), device=device, command=plan.command, fresh=fresh)
    defense, threat = plan.subject.defense, plan.threat

    def batch(part: Images) -> list[Record]:
        return list(_certify_records(part, defense.certify(to_float(part.pixels).to(defense.device), threat)))

    def result(seconds: float, resumed: int) -> dict[str, Any]:
        return _result(plan, run, seconds, resumed, method=run.records[int(plan.images.index[0])]["method"])

    return _finish(plan, run, batch, result, progress or Silent())


def attack(
    plan: Plan,
    attacker: Attack,
    settings: dict[str, Any],
    folder: Path | None = None,
    *,
    join: bool = True,
    fresh: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Attack every image of a plan; with ``join`` certify the same images and hold the attack against the certificates.

    ``settings`` names the attack's options in the manifest. The attack itself sees the defense alone.

    Raises:
        ClaimError: a certified image was flipped. The records and the adversarial images are on disk.
    """
    plan.check()
    extra = {"attack": settings, "joined": join}
    folder = folder or plan.folder("attack", extra)
    run = Run(folder, plan.identity("attack", extra), device=str(plan.subject.defense.device), command=plan.command, fresh=fresh)
    defense = plan.subject.defense

    def batch(part: Images) -> list[Record]:
        x = to_float(part.pixels).to(defense.device)
        certificate = defense.certify(x, plan.threat) if join else None
        outcome = attacker(defense, x, plan.threat, index=part.index)
        records = _certify_records(part, certificate) if certificate else [{"index": i} for i in part.index.tolist()]
        columns = zip(
            part.labels.tolist(),
            outcome.clean_prediction.tolist(),
            outcome.prediction.tolist(),
            outcome.success.tolist(),
            outcome.queries.tolist(),
            strict=True,
        )
        merged = []
        for record, (label, clean, attacked, flipped, queries) in zip(records, columns, strict=True):
            merged.append(
                {**record, "label": label, "prediction": clean, "attacked": attacked, "flipped": flipped, "queries": queries}
            )
        if certificate is not None and bool((certificate.certified & outcome.success).any()):
            broken = (certificate.certified & outcome.success).nonzero()[:, 0].cpu()
            tensors = {"index": part.index[broken], "adversarial": outcome.adversarial.cpu()[broken]}
            files.write_atomically(folder / f"{int(part.index[0])}-{BROKEN}", checkpoint.pack(tensors, {}))
        return merged

    def result(seconds: float, resumed: int) -> dict[str, Any]:
        records = _ordered(plan, run)
        survived = sum(r["prediction"] == r["label"] and not r["flipped"] for r in records)
        return {
            **_result(plan, run, seconds, resumed, method="attack"),
            "attacked_accuracy": survived / len(records),
            "flipped": sum(r["flipped"] for r in records),
            "queries": sum(r["queries"] for r in records),
            "attack": settings,
            "broken": [r["index"] for r in records if r.get("certified") and r["flipped"]],
        }

    return _finish(plan, run, batch, result, progress or Silent())


def check_claim(result: dict[str, Any]) -> None:
    """Raise :class:`ClaimError` if an attack flipped certified images."""
    broken = result.get("broken", [])
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (", ..." if len(broken) > 10 else "")
        raise ClaimError(
            f"{len(broken)} certified images were flipped (indices {shown}): the certificate is wrong.",
            hint=f"Please report it with {Path(str(result['records'])).parent}.",
        )


def dry_run(plan: Plan, folder: Path, attacker: Attack | None = None, batch: int = 64) -> dict[str, Any]:
    """What an evaluation would do and how long it would take, from measured small batches; writes nothing."""
    defense = plan.subject.defense
    part = plan.images.take(torch.arange(min(batch if attacker is None else batch // 8, len(plan.images))))
    x, times = to_float(part.pixels).to(defense.device), []
    for _ in range(2):
        began = time.perf_counter()
        if attacker is None:
            defense.certify(x, plan.threat)
        else:
            attacker(defense, x, plan.threat, index=part.index)
        times.append(time.perf_counter() - began)
    return {
        "model": plan.subject.name,
        "threat": str(plan.threat),
        "atoms": plan.threat.count(*defense.input_shape[1:]),
        "dataset": plan.images.name,
        "images": len(plan.images),
        "batch_size": plan.batch_size,
        "estimated_seconds": round(min(times) / len(x) * len(plan.images), 1),
        "device": str(defense.device),
        "out": str(folder),
    }


def _certify_records(part: Images, certificate: Certificate) -> Iterable[Record]:
    """One record per image: index, label, prediction, certified, margin, worst atom, rival."""
    for position, (index, label) in enumerate(zip(part.index.tolist(), part.labels.tolist(), strict=True)):
        yield {
            "index": index,
            "label": label,
            "prediction": int(certificate.prediction[position]),
            "certified": bool(certificate.certified[position]),
            "margin": float(certificate.margin[position]),
            "worst": certificate.worst[position].tolist(),
            "rival": int(certificate.rival[position]),
            "method": certificate.method,
        }


def _finish(
    plan: Plan,
    run: Run,
    batch: Callable[[Images], list[Record]],
    result: Callable[[float, int], dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """Make the records that are missing, then the result."""
    resumed = len(run.records)
    if resumed == len(plan.images) and (run.folder / RESULT).exists():
        progress.note(f"{run.folder} is complete; --fresh runs it again")
        return files.read_json(run.folder / RESULT)
    if resumed:
        progress.note(f"resuming {run.folder}: {resumed} images done, {len(plan.images) - resumed} left")
    open_ = torch.tensor([i for i, index in enumerate(plan.images.index.tolist()) if index not in run.records], dtype=torch.int64)
    began, done, size = time.perf_counter(), 0, plan.batch_size
    try:
        while done < len(open_):
            part = plan.images.take(open_[done : done + size])
            try:
                records = batch(part)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
                size = _smaller(size, problem, progress)
                continue
            run.append(records)
            done += len(records)
            progress.update(resumed + done, len(plan.images), _so_far(run.records.values()))
    except KeyboardInterrupt as problem:
        raise Interrupted(
            f"interrupted at {resumed + done} of {len(plan.images)} images;", hint="resume with the same command."
        ) from problem
    final = result(time.perf_counter() - began, resumed)
    files.write_json(run.folder / RESULT, final)
    return final


def _smaller(size: int, problem: BaseException, progress: Progress) -> int:
    """Half the batch size after an out-of-memory error; any other error goes on."""
    memory = isinstance(problem, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(problem)
    if not memory:
        raise problem
    if size == 1:
        raise MachineError("out of memory at a batch of one image;", hint="use a machine with more memory.") from problem
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    progress.note(f"out of memory at batch {size}; retrying with {size // 2} (results do not depend on it)")
    return size // 2


def _so_far(records: Iterable[Record]) -> str:
    rows: Sequence[Record] = list(records)
    right = sum(r["prediction"] == r["label"] for r in rows)
    text = f"clean {right / len(rows):.2%}"
    if "certified" in rows[0]:
        certified = sum(r["certified"] and r["prediction"] == r["label"] for r in rows)
        text += f", certified {certified / len(rows):.2%}"
    return text


def _ordered(plan: Plan, run: Run) -> list[Record]:
    """All records in the order of the images; exactly one each."""
    indices = plan.images.index.tolist()
    assert len(run.records) == len(indices), "records and images differ"
    return [run.records[index] for index in indices]


def _result(plan: Plan, run: Run, seconds: float, resumed: int, *, method: str) -> dict[str, Any]:
    records = _ordered(plan, run)

    def column(name: str) -> Tensor:
        return torch.tensor([int(record.get(name, 0)) for record in records])

    tally = Tally.of(column("label"), column("prediction"), column("certified").bool())
    certified: dict[str, Any] = {}
    if "certified" in records[0]:
        certified = {
            "certified_accuracy": tally.certified_accuracy,
            "certified_interval": list(tally.certified_interval),
        }
    counts = {"clean": tally.clean} | ({"certified": tally.certified} if certified else {})
    return {
        "model": plan.subject.name,
        "model_sha256": plan.subject.sha256,
        "model_source": plan.subject.source,
        "defense": plan.subject.kind,
        "method": method,
        "guarantee": "recovery",
        "dataset": plan.images.name,
        "split": plan.images.split,
        "data_source": plan.images.source,
        "images": tally.images,
        "full_split": tally.images == plan.total,
        "threat": str(plan.threat),
        "clean_accuracy": tally.clean_accuracy,
        **certified,
        "counts": counts,
        "seconds": seconds,
        "resumed": resumed,
        "images_per_second": (tally.images - resumed) / seconds if seconds > 0 else 0.0,
        "device": str(plan.subject.defense.device),
        "records": str(run.folder / RECORDS),
        "command": plan.command,
        "patchcert": __version__,
        "date": datetime.date.today().isoformat(),
    }
