"""Is a published claim true? The same images certified again, compared one by one with the published records, then attacked.

A certificate is a theorem about one image and one set of weights, so two honest runs agree on every verdict. A random sample
exposes false numbers: if a share p of the records were false, n sampled images would all agree with probability (1 - p)^n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli.arithmetic import weakest
from patchcert_cli.attacks import Attack
from patchcert_cli.cards.published import PublishedRecord, PublishedRecords
from patchcert_cli.cards.results import read_records
from patchcert_cli.defenses import Claim
from patchcert_cli.errors import ClaimError, DataError, IntegrityError
from patchcert_cli.evaluation import evaluate
from patchcert_cli.evaluation.run_folder import Record
from patchcert_cli.evaluation.task import EvaluationTask
from patchcert_cli.parallel import workers
from patchcert_cli.progress import Progress
from patchcert_cli.storage import files

CONFIDENCE = 0.95


def reproduce(
    task: EvaluationTask,
    published: PublishedRecords,
    attacker: Attack | None,
    settings: Mapping[str, Any],
    folder: Path | None = None,
    *,
    limit: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Certify the images of ``task`` under its threat, compare with the published records, attack what is certified.

    ``limit`` is the most certified images to attack; ``attacker`` None attacks none. Returns what ``verdict.json`` holds.

    Raises:
        IntegrityError: the published records are about other weights.
        DataError: they do not speak of this threat, this data set or these images: nothing was claimed.
    """
    at = published.position(task.threat, guarantee=task.model.defense.guarantee)
    method = published.claims[at].method
    known = method in task.model.defense.methods  # else it is what the defense calls its best
    task = replace(task, claims=(Claim(task.threat, method if known else None),))
    folder = folder or task.folder("verify", {"published": str(published.claims[at])})
    _check_subject(task, published)
    certified = evaluate.certify(task, folder / "certify", fresh=fresh, progress=progress)
    records = read_records(folder / "certify" / files.RECORDS)
    verdicts = {record["index"]: record["claims"][0]["certified"] for record in records}
    arithmetic = certified["claims"][0]["arithmetic"]
    different = [row for row in (difference(published.rows[r["index"]], at, r) for r in records) if row]
    held = [r["index"] for r in records if verdicts[r["index"]] and r["prediction"] == r["label"]]
    said = published.claims[at].arithmetic
    outcome: dict[str, Any] = {
        "model": task.model.name,
        "model_sha256": task.model.sha256,
        "claim": str(published.claims[at]),
        "dataset": task.images.name,
        "split": task.images.split,
        "images": len(records),
        "of": len(published.rows),
        "agree": len(records) - len(different),
        "false_share_at_most": bound(len(records)) if not different else None,
        "different": different,
        "arithmetic": arithmetic,
        "published_arithmetic": str(said or ""),
        "overstated": said is not None and weakest((said, arithmetic)) != said,
        "certified": len(held),
        "attacked": 0,
        "broken": [],
        "seconds": certified["seconds"],
    }
    if attacker is not None and held:
        chosen = among(task.images.index.tolist(), held, limit)
        part = replace(task, images=task.images.take(chosen), batch_size=min(task.batch_size, 64))
        found = evaluate.attack(part, attacker, dict(settings), folder / "attack", fresh=fresh, progress=progress)
        outcome |= {"attacked": found["images"], "broken": found["broken"], "attack": dict(settings)}
        outcome["seconds"] += found["seconds"]
    outcome["holds"] = not outcome["different"] and not outcome["broken"] and not outcome["overstated"]
    if workers.current().first:
        files.write_json(folder / "verdict.json", outcome)
    return {**outcome, "out": str(folder), "result": str(folder / "certify" / files.RESULT)}


def _check_subject(task: EvaluationTask, published: PublishedRecords) -> None:
    """Raise unless the published records are about these weights and hold these images."""
    if published.model_sha256 != task.model.sha256:
        raise IntegrityError(
            f"the published records are about other weights (sha256 {published.model_sha256[:12]}…,"
            f" not {task.model.sha256[:12]}…).",
            hint="Install patchcert again, or give --records the file of these weights.",
        )
    if (published.dataset, published.split) != (task.images.name, task.images.split):
        raise DataError(
            f"the published records are about {published.dataset} {published.split}, not {task.images.name} {task.images.split}.",
            hint="Leave --data out.",
        )
    missing = [index for index in task.images.index.tolist() if index not in published.rows]
    if missing:
        raise DataError(
            f"the published records lack {len(missing)} of the images (indices {shown(missing)}).",
            hint="Use --limit, or the images that were certified.",
        )


def among(indices: Sequence[int], held: Sequence[int], limit: int | None) -> Tensor:
    """Positions, int64 [n], of those ``indices`` that are among the first ``limit`` of ``held``."""
    wanted = set(held[:limit])
    return torch.tensor([at for at, index in enumerate(indices) if index in wanted], dtype=torch.int64)


def difference(row: PublishedRecord, at: int, record: Record) -> dict[str, Any] | None:
    """What a new record says otherwise than the published one, or None if they agree."""
    published = {"label": row.label, "prediction": row.prediction, "certified": row.certified[at]}
    found = {"label": record["label"], "prediction": record["prediction"], "certified": record["claims"][0]["certified"]}
    if found == published:
        return None
    return {"index": record["index"], "published": published, "found": found}


def bound(agreeing: int) -> float:
    """The largest share of false records that ``agreeing`` sampled ones, all true, do not contradict with 95 % confidence."""
    return float(1 - (1 - CONFIDENCE) ** (1 / agreeing)) if agreeing else 1.0


def shown(indices: Sequence[int]) -> str:
    """The first of some indices, as text."""
    return ", ".join(map(str, indices[:10])) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")


def check(outcome: Mapping[str, Any]) -> None:
    """Raise :class:`ClaimError` if the claim did not reproduce; it lists the images."""
    problems = []
    different = [row["index"] for row in outcome["different"]]
    if different:
        problems.append(f"{len(different)} of {outcome['images']} records differ (indices {shown(different)})")
    if outcome["broken"]:
        problems.append(f"the attack flipped {len(outcome['broken'])} certified images (indices {shown(outcome['broken'])})")
    if outcome.get("overstated"):
        problems.append(f"published as {outcome['published_arithmetic']}, it is {outcome['arithmetic']}")
    if problems:
        raise ClaimError(
            f"{outcome['model']}: {'; '.join(problems)}: the claim does not reproduce.",
            hint=f"See {outcome['out']}/verdict.json.",
        )
