"""TensorBoard: event files in ``RUN/tensorboard``, shown by ``tensorboard --logdir runs``."""

from __future__ import annotations

from collections.abc import Mapping

from patchcert_cli.training.trackers._base import TrackedRun, Tracker


class TensorBoard(Tracker):
    """Scalars by epoch; a resumed run goes on in the same folder."""

    module = "torch.utils.tensorboard"

    def start(self, run: TrackedRun) -> None:
        self.writer = self.library.SummaryWriter(str(run.folder / "tensorboard"))

    def log(self, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()
