"""What a training run would cost, from two measured steps. Nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchcert_cli import data
from patchcert_cli.errors import DataError
from patchcert_cli.training import steps
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.state import Beginning


def training(
    recipe: Recipe, *, data_dir: Path | None = None, device: str = "cpu", beginning: Beginning | None = None
) -> dict[str, Any]:
    """What training would take besides certifying held-out images, if the training images are there: steps, hours, disk."""
    try:
        images = data.open_dataset(recipe.dataset, data_dir=data_dir).load("train")
    except DataError as problem:
        return {"not_measured": str(problem)}
    kept, _ = images.limit(recipe.limit or None, recipe.seed).hold_out(recipe.validation, recipe.seed)
    tried = steps.trial(recipe, images.limit(recipe.batch_size, recipe.seed), device=device, beginning=beginning)
    count = sum(recipe.steps_of(epoch, len(kept)) for epoch in range(recipe.epochs))
    seconds = sum(tried.seconds) / len(tried.seconds) * count
    return {
        "steps": count,
        "estimated_seconds": round(seconds, 1),
        "estimated_hours": round(seconds / 3600, 2),
        "disk_bytes": tried.weights + tried.kept,
        "measured_on": "a step of the first epoch and one of the last; validation not included",
        "device": device,
    }
