"""trackio: a local dashboard, shown by ``trackio show``. With ``TRACKIO_SPACE_ID`` it writes to a Space on the Hub."""

from __future__ import annotations

from collections.abc import Mapping

from patchcert_cli.training.trackers._base import PROJECT, TrackedRun, Tracker


class Trackio(Tracker):
    """Metrics by epoch, with the recipe as configuration; runs are resumed by their name, which ends with the id."""

    module = "trackio"

    def start(self, run: TrackedRun) -> None:
        self.library.init(project=PROJECT, name=f"{run.name}-{run.id}", resume="allow", config=run.recipe)

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        self.library.log(dict(values), step=epoch)

    def finish(self) -> None:
        self.library.finish()  # not the run's own, which finishes it again when the process ends
