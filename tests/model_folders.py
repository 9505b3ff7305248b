"""Small model folders for tests: a finished run, and a zoo with it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import cards, checkpoint, defenses
from patchcert_cli.cards import Card, File, Hub, Measured, Published
from patchcert_cli.cards.published import ClaimKey, PublishedRecord, PublishedRecords
from patchcert_cli.schema import read
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG: dict[str, Any] = {
    "format": 2,
    "deployed": {
        "defense": "ibp",
        "input_shape": [1, 4, 4],
        "classes": ["a", "b", "c"],
        "network": {"name": "mlp", "options": {"hidden": [6], "mean": [0.4], "std": [0.5]}},
    },
    "dataset": "mnist",
    "threat": "patch:2x2",
    "recipe": {"threat": "patch:2x2", "dataset": "mnist", "defense": "ibp", "seed": 3, "learning_rate": 1e-05, "hidden": [6]},
}


def make_run(folder: Path) -> Card:
    """What a finished training run leaves: configuration, weights, a first card."""
    torch.manual_seed(3)
    checkpoint.save_defense(folder, defenses.build(CONFIG["deployed"]), CONFIG)
    card = cards.card_for_run(
        CONFIG["recipe"],
        folder,
        network="MLP 16-6-3",
        kept=55000,
        validation={"images": 5000, "clean": 4700, "certified": 3100},
        trained={"date": "2026-01-31", "seconds": 12.5, "device": "cpu", "threads": 1, "torch": "2.6.0", "patchcert": "0.1.0"},
        command="patchcert train --patch 2 --seed 3",
        source="Someone et al., Somewhere 2020",
    )
    (folder / files.CARD).write_text(card.render(), encoding="utf-8")
    return card


def measured(**changes: Any) -> Measured:
    """A measurement on the test split."""
    values: dict[str, Any] = {
        "dataset": "mnist",
        "split": "test",
        "images": 10000,
        "threat": "patch:2x2",
        "clean": 9300,
        "certified": 6000,
        "certified_interval": (0.5903, 0.6096),
        "method": "interval",
        "date": "2026-02-01",
        "command": "patchcert certify runs/small --patch 2",
        "patchcert": "0.1.0",
    }
    return read(Measured, {**values, **changes})


def book(sha256: str, results: tuple[Measured, ...]) -> PublishedRecords:
    """Records with the counts of these measurements: the first images are right, the first of them certified."""
    claims = tuple(ClaimKey(one.threat, one.method, one.guarantee) for one in results)
    clean, nothing = results[0].clean, (0.5,) * len(claims)
    rows = {}
    for i in range(results[0].images):
        certified = tuple(i < one.certified for one in results)
        rows[i] = PublishedRecord(i % 3, i % 3 if i < clean else (i + 1) % 3, certified, nothing)
    return PublishedRecords(sha256, results[0].dataset, results[0].split, claims, rows)


@cache
def packed(sha256: str, results: tuple[Measured, ...]) -> bytes:
    """The file of :func:`book`."""
    return book(sha256, results).pack()


def make_zoo(zoo: Path, name: str = "small-ibp-p2", *, revision: str | None = None, weights: bool = True) -> Card:
    """A zoo with one measured model."""
    folder = zoo / name
    results = (measured(), measured(threat="sparse:1", certified=5000, certified_interval=(0.49, 0.51), command="other"))
    card = make_run(folder)
    (folder / files.PUBLISHED_RECORDS).write_bytes(packed(cards.weights_sha256(card.files), results))
    card = replace(
        card,
        name=name,
        files={**card.files, files.PUBLISHED_RECORDS: File.of(folder / files.PUBLISHED_RECORDS)},
        status="measured",
        hub=Hub(f"patchcert/{name}", revision),
        results=results,
        published=(
            Published(Patch(2, 2), 0.92, 0.604, "table 1"),
            Published(Patch(3, 3), 0.9, 0.3, "table 2"),
        ),
    )
    (folder / files.CARD).write_text(card.render(), encoding="utf-8")
    if not weights:
        (folder / files.WEIGHTS).unlink()
    return card


def result_of(run: Path, **changes: Any) -> dict[str, Any]:
    """What ``result.json`` of certify holds about the model in ``run``."""
    one = measured()
    values: dict[str, Any] = {
        "model": str(run),
        "model_sha256": files.sha256(run / files.WEIGHTS),
        "defense": "ibp",
        "dataset": one.dataset,
        "split": one.split,
        "images": one.images,
        "full_split": True,
        "threat": str(one.threat),
        "clean_accuracy": one.clean / one.images,
        "certified_accuracy": one.certified / one.images,
        "certified_interval": list(one.certified_interval),
        "counts": {"clean": one.clean, "certified": one.certified},
        "method": one.method,
        "seconds": 3.0,
        "images_per_second": 3333.3,
        "device": "cpu",
        "command": one.command,
        "patchcert": one.patchcert,
        "date": one.date,
    }
    return {**values, **changes}


def write_result(folder: Path, run: Path, **changes: Any) -> Path:
    """A certify run about the model in ``run``: ``result.json``, and beside it records with its counts."""
    result = result_of(run, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    counts = {"certified": 6000, **result["counts"]}
    one = measured(threat=result["threat"], clean=counts["clean"], certified=counts["certified"], certified_interval=(0, 1))
    lines = [
        {"index": index, **asdict(row), "certified": row.certified[0], "margin": 0.5}
        for index, row in book(result["model_sha256"], (one,)).rows.items()
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "result.json"
