"""From what an attack found to records, and from records to a result.

A record of an attacked image has, besides its certificates if it was certified: ``attacked`` (the deployed answer on the changed
image), ``flipped``, ``queries`` (all that were spent), where it was flipped ``flipped_at`` (those spent until then), and of
several attacks ``by`` (the one that flipped it). Records of earlier versions have neither of the last two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from patchcert_cli.attacks import AnyAttack, AttackResult, Combined
from patchcert_cli.certificate import Certificate
from patchcert_cli.data.images import Images
from patchcert_cli.evaluation import results
from patchcert_cli.evaluation.run_folder import Record, Run
from patchcert_cli.evaluation.task import EvaluationTask

POINTS = 200  # of a curve in a result, at most about


def records(
    task: EvaluationTask,
    part: Images,
    attacker: AnyAttack,
    outcome: AttackResult,
    certificate: Certificate | None,
    plain: Tensor | None,
) -> list[Record]:
    """A record for each image of a batch: what was certified of it, if it was, and what the attack did."""
    if certificate is not None:
        found: Iterable[Record] = results.certify_records(part, [certificate], plain)
    else:
        alone = [{}] * len(part) if plain is None else [{"plain": one} for one in plain.tolist()]
        named = [{"picture": part.files[i]} if part.files else {} for i in part.index.tolist()]
        none: Record = {"claims": []}
        found = [{"index": i} | a | b | none for i, a, b in zip(part.index.tolist(), named, alone, strict=True)]
    merged = [record | row for record, row in zip(found, _rows(part.labels, attacker, outcome), strict=True)]
    if not attacker.judges_each:
        return merged
    judged = results.judged(outcome, task.model.defense.plain(outcome.adversarial[:0]) is not None)
    return [record | counts for record, counts in zip(merged, judged, strict=True)]


def _rows(labels: Tensor, attacker: AnyAttack, outcome: AttackResult) -> Iterable[Record]:
    """What an attack did to each image."""
    parts = (
        labels,
        outcome.clean_prediction,
        outcome.prediction,
        outcome.success,
        outcome.queries,
        outcome.flipped_at,
        outcome.by,
    )
    for label, clean, attacked, flipped, queries, at, by in zip(*(part.tolist() for part in parts), strict=True):
        row = {"label": label, "prediction": clean, "attacked": attacked, "flipped": flipped, "queries": queries}
        yield {
            **row,
            **({"flipped_at": at} if flipped else {}),
            **({"by": attacker.names[by] if flipped else None} if isinstance(attacker, Combined) else {}),
        }


def result(
    task: EvaluationTask,
    run: Run,
    attacker: AnyAttack,
    settings: Mapping[str, Any],
    join: bool,
    seconds: float,
    resumed: int,
) -> dict[str, Any]:
    """What ``result.json`` of an attack holds."""
    found = results.ordered(task, run)
    survived = sum(r["prediction"] == r["label"] and not r["flipped"] for r in found)
    return {
        **results.summary(task, run, found, seconds, resumed),
        "threat": str(task.threat),
        "claims": results.claim_rows(task, found) if join else [],
        "method": "attack",
        "guarantee": str(task.model.defense.guarantee),
        "attacked_accuracy": survived / len(found),
        "flipped": sum(r["flipped"] for r in found),
        "queries": sum(r["queries"] for r in found),
        "attack": dict(settings),
        "broken": [r["index"] for r in found if r["flipped"] and any(one["certified"] for one in r["claims"])],
        **({"by": by_attack(attacker.names, found)} if isinstance(attacker, Combined) else {}),
        **({"curve": points} if (points := curve(found)) else {}),
        **({"pasted": results.judged_in_all(found)} if attacker.judges_each else {}),
    }


def by_attack(names: Sequence[str], found: Sequence[Record]) -> list[dict[str, Any]]:
    """For each of several attacks, in their order: how many images it was given, and how many it flipped."""
    rows, left = [], len(found)
    for name in names:
        flipped = sum(record.get("by") == name for record in found)
        rows.append({"attack": name, "images": left, "flipped": flipped})
        left -= flipped
    return rows


def curve(found: Sequence[Record]) -> list[list[int]]:
    """How many rightly answered images were flipped within how many queries: rows of (queries, images), both rising.

    It ends at the most queries that an image took. Empty without records, or if one was flipped by a version that did not count.
    """
    flipped = [r for r in found if r["flipped"]]
    if not found or not all("flipped_at" in r for r in flipped):
        return []
    at = sorted(r["flipped_at"] for r in flipped if r["prediction"] == r["label"])
    last = {queries: count for count, queries in enumerate(at, start=1)}  # of equal ones the last
    rows = [[queries, count] for queries, count in last.items()]
    every = -(-len(rows) // POINTS)
    kept = rows[::every] if every > 1 else rows
    kept += [row for row in rows[-1:] if row not in kept]
    return [*kept, [max(max(r["queries"] for r in found), at[-1] if at else 0), len(at)]]
