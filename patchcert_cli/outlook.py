"""What a run would do and cost, from two measured batches: passes, time, disk. Nothing is written."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import data, results
from patchcert_cli.attacks.base import Attack
from patchcert_cli.data import Images, to_float
from patchcert_cli.errors import DataError
from patchcert_cli.plan import Plan
from patchcert_cli.training import loop
from patchcert_cli.training.recipe import Recipe

MOST = 64  # images that are looked at
FIRST, SECONDS = 2, 5.0  # images of the first batch; what the second may take
PATIENCE = 60.0  # seconds that the first batch may take; where passes cost more, they alone are measured


@dataclass(frozen=True)
class Full:
    """The run that is meant.

    Attributes:
        images: how many.
        disk: bytes that packing them takes before; 0 if they are packed or need not be.
    """

    images: int
    disk: int = 0


def evaluation(plan: Plan, folder: Path, attacker: Attack | None = None, full: Full | None = None) -> dict[str, Any]:
    """What certifying, or attacking, all images would take, where ``plan`` holds them all or some of them.

    A first batch of two shows how many images the second may have to be measured within a few seconds. Where even two images
    would take minutes, the batches are of single passes of the network, and the estimate is of the most that an image can take.
    """
    full, some = full or Full(len(plan.images)), plan.images.limit(MOST if attacker is None else MOST // 8, plan.seed)
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(plan.seed))  # class folders come sorted
    said: dict[str, Any] = {
        "model": plan.subject.name,
        "threat": ", ".join(dict.fromkeys(str(claim.threat) for claim in plan.claims)),
        "atoms": plan.threat.count(*plan.subject.defense.input_shape[1:]),
        "dataset": plan.images.name,
        "images": full.images,
        "batch_size": plan.batch_size,
    }
    if attacker is None and (slow := _by_passes(plan, some.take(order), full)):
        return said | slow | {"device": str(plan.subject.defense.device), "out": str(folder)}
    first = _measured(plan, some.take(order[:FIRST]), attacker)
    count = max(FIRST, min(len(some), int(SECONDS * first.images / max(first.seconds, 1e-9))))
    second = _measured(plan, some.take(order[-count:]), attacker)
    seconds = min(first.seconds / first.images, second.seconds / second.images) * full.images
    images, size = first.images + second.images, first.size + second.size
    if first.passes is not None and second.passes is not None:
        each = (first.passes + second.passes) / images
        seconds = min(first.seconds / first.passes, second.seconds / second.passes) * each * full.images
        said |= {"passes_per_image": round(each, 1), "passes": round(each * full.images)}
    return said | {
        "estimated_seconds": round(seconds, 1),
        "estimated_hours": round(seconds / 3600, 2),
        "disk_bytes": full.disk + round(size / images * full.images),
        "measured_on": f"{images} images in two batches",
        "device": str(plan.subject.defense.device),
        "out": str(folder),
    }


@torch.no_grad()
def _by_passes(plan: Plan, some: Images, full: Full) -> dict[str, Any]:
    """What the run takes at most, from two batches of passes; empty where whole images can be measured as well."""
    defense = plan.subject.defense
    if (cost := defense.cost()) is None:
        return {}
    paces, count = [], FIRST
    for _ in range(2):
        x, began = to_float(some.take(torch.arange(min(count, len(some)))).read()).to(defense.device), time.perf_counter()
        defense(x).sum().item()  # to the host, so that a device has finished
        paces.append((time.perf_counter() - began) / len(x))
        count = max(FIRST, min(MOST, int(SECONDS / 2 / max(paces[0], 1e-9))))
    pace = min(paces)
    if FIRST * cost[1] * pace <= PATIENCE:
        return {}
    seconds = cost[1] * full.images * pace
    return {
        "passes_per_image": f"{cost[0]} to {cost[1]}",
        "passes": cost[1] * full.images,
        "estimated_seconds": round(seconds, 1),
        "estimated_hours": round(seconds / 3600, 2),
        "disk_bytes": full.disk,
        "measured_on": "two batches of single passes; the estimate is for the most passes, and certified images take about these",
    }


def training(recipe: Recipe, *, data_dir: Path | None = None, device: str = "cpu") -> dict[str, Any]:
    """What training would take besides certifying held-out images, if the training images are there: steps, hours, disk."""
    try:
        some = data.glance(recipe.dataset, "train", recipe.batch_size, recipe.seed, data_dir=data_dir)
    except DataError as problem:
        return {"not_measured": str(problem)}
    tried = loop.trial(recipe, some.images.limit(recipe.batch_size, recipe.seed), device=device)
    steps = ((some.there - recipe.validation) // recipe.batch_size or 1) * recipe.epochs
    seconds = sum(tried.seconds) / len(tried.seconds) * steps
    return {
        "steps": steps,
        "estimated_seconds": round(seconds, 1),
        "estimated_hours": round(seconds / 3600, 2),
        "disk_bytes": some.disk + tried.weights + tried.state,
        "measured_on": "a step of the first epoch and one of the last; validation not included",
        "device": device,
    }


@dataclass(frozen=True)
class _Batch:
    """What a batch took; passes of the network, if the proof counts them, and bytes of its records."""

    images: int
    seconds: float
    passes: int | None
    size: int


def _measured(plan: Plan, part: Images, attacker: Attack | None) -> _Batch:
    defense = plan.subject.defense
    x, began = to_float(part.read()).to(defense.device), time.perf_counter()
    certificates = defense.certify_each(x, plan.claims) if attacker is None else []
    if attacker is not None:
        attacker(defense, x, plan.threat, index=part.index)
    spent = time.perf_counter() - began
    counted = certificates[0].passes if certificates else None
    passes = None if counted is None else int(counted.sum())
    records = results.certify_records(part, certificates) if certificates else []
    return _Batch(len(part), spent, passes, sum(len(json.dumps(record)) + 1 for record in records))
