"""The certify and attack loops: one record per image, appended as it is made, resumable, with a manifest of what was run.

What a run folder holds: :mod:`patchcert_cli.runs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import checkpoint, files, results
from patchcert_cli.attacks.base import Attack, Start
from patchcert_cli.data import Images, to_float
from patchcert_cli.errors import Interrupted, MachineError
from patchcert_cli.plan import Plan
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.runs import RESULT, Record, Run

BROKEN = "broken.safetensors"  # adversarial images of certified ones


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
    defense = plan.subject.defense

    def batch(part: Images) -> list[Record]:
        x = to_float(part.read()).to(defense.device)
        return list(results.certify_records(part, defense.certify_each(x, plan.claims)))

    def result(seconds: float, resumed: int) -> dict[str, Any]:
        return results.certify_result(plan, run, seconds, resumed)

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

    ``settings`` names the attack's options in the manifest. The attack sees the defense and, with ``join``, the location and the
    rival of the smallest certified margin as a place to begin.

    Raises:
        ClaimError: a certified image was flipped. The records and the adversarial images are on disk.
    """
    plan.check()
    extra = {"attack": settings, "joined": join}
    folder = folder or plan.folder("attack", extra)
    run = Run(folder, plan.identity("attack", extra), device=str(plan.subject.defense.device), command=plan.command, fresh=fresh)
    defense = plan.subject.defense

    def batch(part: Images) -> list[Record]:
        x = to_float(part.read()).to(defense.device)
        certificate = defense.certify(x, plan.threat) if join else None
        start = None if certificate is None else Start(certificate.worst, certificate.rival)
        outcome = attacker(defense, x, plan.threat, index=part.index, start=start)
        records = results.certify_records(part, [certificate]) if certificate else [{"index": i} for i in part.index.tolist()]
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
        if attacker.judges_each:
            merged = [
                record | judged
                for record, judged in zip(merged, results.judged(outcome, defense.plain(x[:0]) is not None), strict=True)
            ]
        if certificate is not None and bool((certificate.certified & outcome.success).any()):
            broken = (certificate.certified & outcome.success).nonzero()[:, 0].cpu()
            tensors = {"index": part.index[broken], "adversarial": outcome.adversarial.cpu()[broken]}
            files.write_atomically(folder / f"{int(part.index[0])}-{BROKEN}", checkpoint.pack(tensors, {}))
        return merged

    def result(seconds: float, resumed: int) -> dict[str, Any]:
        records = results.ordered(plan, run)
        survived = sum(r["prediction"] == r["label"] and not r["flipped"] for r in records)
        many = (plan, run, records, seconds, resumed)
        return {
            **(results.certify_result(plan, run, seconds, resumed) if join else results.summary(*many)),
            "method": "attack",
            "guarantee": str(plan.subject.defense.guarantee),
            "attacked_accuracy": survived / len(records),
            "flipped": sum(r["flipped"] for r in records),
            "queries": sum(r["queries"] for r in records),
            "attack": settings,
            **({"pasted": results.judged_in_all(records)} if attacker.judges_each else {}),
            "broken": [r["index"] for r in records if r.get("certified") and r["flipped"]],
        }

    return _finish(plan, run, batch, result, progress or Silent())


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
            progress.update(resumed + done, len(plan.images), results.so_far(run.records.values()))
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
