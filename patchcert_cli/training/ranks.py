"""Training in several processes: DistributedDataParallel around the loss of any defense.

Each step's batch is divided among the ranks, and gradients are averaged as if one process had computed the whole batch. Batch
normalization uses the statistics of each rank's part; the running ones, which are deployed, are those of the first rank.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from patchcert_cli.defenses import Trainable, TrainingStep
from patchcert_cli.errors import MachineError, UsageError
from patchcert_cli.parallel.workers import Workers

Loss = Callable[[Tensor, Tensor, TrainingStep], Tensor]
TIMEOUT = datetime.timedelta(hours=12)  # the launcher ends all ranks when one dies


class _Loss(nn.Module):
    """The loss of a defense as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, defense: Trainable, auxiliary: nn.Module) -> None:
        super().__init__()
        self.defense, self.auxiliary = defense, auxiliary

    def forward(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        return self.defense.training_loss(x, label, step)


@dataclass
class Ranks:
    """The processes of a training run.

    Attributes:
        workers: these processes.
        device: where this one computes.
    """

    workers: Workers
    device: torch.device
    _loss: nn.parallel.DistributedDataParallel | None = None

    @property
    def alone(self) -> bool:
        """Whether there is only this one."""
        return self.workers.alone

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch, every n-th row of [B, ...]."""
        return batch[self.workers.rank :: self.workers.size]

    def loss(self, defense: Trainable, auxiliary: nn.Module) -> Loss:
        """The loss of a rank's part, whose gradient is averaged over the ranks; keep it until the gradient was computed."""
        if self.alone:
            return defense.training_loss
        if self._loss is None or self._loss.module.defense is not defense:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.14 on
                self._loss = nn.parallel.DistributedDataParallel(
                    _Loss(defense, auxiliary), broadcast_buffers=False, find_unused_parameters=True
                )
        return self._loss

    def weight(self, part: int, whole: int) -> float:
        """What the mean loss of ``part`` images is multiplied by, so that the average over ranks is that of ``whole`` images."""
        return 1.0 if self.alone else part * self.workers.size / whole

    def total(self, *values: float) -> list[float]:
        """The sum over all ranks of each value, the same on every rank."""
        if self.alone:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def first_of(self, value: float) -> float:
        """The value of the first rank."""
        return self.total(value if self.workers.first else 0.0)[0]

    def agree(self, modules: Sequence[nn.Module]) -> None:
        """Give every rank the buffers of the first one."""
        if not self.alone:
            for module in modules:
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)


@contextmanager
def joined(workers: Workers, device: str, batch_size: int) -> Iterator[Ranks]:
    """The ranks of a run, with a process group among them as long as the block lasts.

    Raises:
        UsageError: there are more ranks than images in a batch.
        MachineError: the ranks cannot form a group.
    """
    ranks = Ranks(workers, torch.device(device))
    if workers.store is None:
        yield ranks
        return
    if batch_size < workers.size:
        raise UsageError(
            f"{workers.size} processes are more than the {batch_size} images of a batch.", hint="Use a larger --batch-size."
        )
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    store = dist.PrefixStore("group", workers.store)  # type: ignore[attr-defined]
    try:
        dist.init_process_group(backend, store=store, rank=workers.rank, world_size=workers.size, timeout=TIMEOUT)
    except RuntimeError as problem:
        raise MachineError(f"the ranks cannot form a group: {problem}.", hint="See docs/scaling.md.") from problem
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
