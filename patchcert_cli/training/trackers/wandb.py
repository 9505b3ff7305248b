"""Weights & Biases. Its own variables hold: ``WANDB_PROJECT``, ``WANDB_MODE=offline``, ``WANDB_API_KEY``."""

from __future__ import annotations

import os
from collections.abc import Mapping

from patchcert_cli.training.trackers._base import PROJECT, TrackedRun, Tracker


class WeightsAndBiases(Tracker):
    """Metrics by epoch, with the recipe as configuration; a resumed run goes on in the same run."""

    module = "wandb"

    def start(self, run: TrackedRun) -> None:
        self.run = self.library.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=run.name,
            id=run.id,
            resume="allow",
            config=run.recipe,
            dir=str(run.folder),
        )

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=epoch)

    def finish(self) -> None:
        self.run.finish()
