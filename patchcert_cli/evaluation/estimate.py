"""What a run would do and cost, from some seconds of it: masks, passes, time, disk. Nothing is written.

Images are computed as the run would compute them, in batches that grow, until enough is known or time runs out. Passes
differ from image to image, so more images are looked at until their mean is known to a tenth; what a pass takes is known sooner.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchcert_cli import defenses
from patchcert_cli.attacks import AnyAttack
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.evaluation import hints, results
from patchcert_cli.evaluation.pace import Clock, Pace
from patchcert_cli.evaluation.task import EvaluationTask
from patchcert_cli.layers import passes
from patchcert_cli.progress import Progress, Silent

MOST = 64  # images in files that are opened for it
SECONDS, PATIENCE = 5.0, 60.0  # that measuring takes at least, if there are enough images, and at most
KNOWN = 0.1  # relative standard error of the mean passes of an image that is good enough
STEADY = 1.3  # times the pace of the fastest batch up to which nothing was set up in a batch
HOPE = 4  # times the time limit that the most queries of an image may take for an attack to be tried


def evaluation(
    task: EvaluationTask,
    folder: Path,
    attacker: AnyAttack | None = None,
    total: int | None = None,
    *,
    join: bool = True,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """What certifying, or attacking, all images would take, where ``task`` holds them all, or some of ``total``.

    With ``join``, attacked images are certified first if the defense has certificates. Where not even one image is finished in
    :data:`PATIENCE` seconds, or an attack is hopelessly slow, the estimate is of the most that an image can take.

    Raises:
        UnsupportedThreat: a defense without certificates is to be certified.
    """
    if attacker is None:
        task.model.defense.check_proves()
    task.check()
    join = join and task.model.defense.guarantee.proves
    total, defense = total or len(task.images), task.model.defense
    masks = defense.set if isinstance(defense, defenses.MaskedClassifier) else None
    said: dict[str, Any] = {
        "model": task.model.name,
        "threat": ", ".join(dict.fromkeys(str(claim.threat) for claim in task.claims)),
        "atoms": task.threat.count(*defense.input_shape[1:]),
        "dataset": task.images.name,
        "images": total,
        **({"masks": f"{masks.sizes} pixels"} if masks else {}),
        "batch_size": task.batch_size,
    }
    order = torch.randperm(len(task.images), generator=torch.Generator().manual_seed(task.seed))  # class folders come sorted
    trial = _Trial(task.images, order, progress or Silent(), clock)
    cost = _certifying(task, total, trial) if attacker is None else _attacking(task, total, trial, attacker, join)
    return said | cost | {"device": str(defense.device), "hardware": _hardware(defense.device), "out": str(folder)}


class _TimeIsUp(Exception):
    """Stops a batch that takes longer than the time limit."""


class _Batch(NamedTuple):
    """A finished batch: its images, the passes of each if the proof counts them, seconds, and bytes of records."""

    images: int
    counted: list[int]
    seconds: float
    size: int

    @property
    def work(self) -> int:
        """What its time is measured against: passes, or images."""
        return sum(self.counted) or self.images

    @property
    def pace(self) -> float:
        """Seconds of a pass, or of an image."""
        return self.seconds / self.work


@dataclass
class _Trial:
    """Some batches, measured.

    Attributes:
        whole: the images there are.
        order: in which they are taken.
        batches: those that were finished.
        stopped: seconds and passes of one that was not.
    """

    whole: Images
    order: Tensor
    progress: Progress
    clock: Clock
    batches: list[_Batch] = field(default_factory=list)
    stopped: tuple[float, int] = (0.0, 0)

    def run(self, pace: Pace, batch: Callable[[Images], tuple[list[int], int]]) -> None:
        """Compute batches, which return passes and bytes, until enough is known, or images or time run out."""
        began = self.clock()
        while self.images < len(self.order) and not self._enough(self.clock() - began):
            part = self.whole.take(self.order[self.images : self.images + pace.size])
            start, heard = self.clock(), [0]

            def hear(count: int, heard: list[int] = heard) -> None:
                heard[0] += count
                self.progress.update(self.images, len(self.order), "measuring")
                if self.clock() - began > PATIENCE:
                    raise _TimeIsUp

            try:
                with passes.heard(hear):
                    counted, size = batch(part)
            except _TimeIsUp:
                self.stopped = (self.clock() - start, heard[0])
                return
            self.batches.append(_Batch(len(part), counted, self.clock() - start, size))
            pace.took(len(part), self.batches[-1].seconds, heard[0])

    @property
    def images(self) -> int:
        """How many were finished."""
        return sum(batch.images for batch in self.batches)

    @property
    def steady(self) -> list[_Batch]:
        """The batches that went about as fast as the fastest; in the others something was set up."""
        best = min(batch.pace for batch in self.batches)
        return [batch for batch in self.batches if batch.pace <= STEADY * best]

    @property
    def pace(self) -> float:
        """Seconds of a pass, or of an image where passes are not counted, once everything is set up."""
        return sum(batch.seconds for batch in self.steady) / sum(batch.work for batch in self.steady)

    @property
    def once(self) -> float:
        """Seconds that setting things up took."""
        return sum(batch.seconds - self.pace * batch.work for batch in self.batches if batch not in self.steady)

    @property
    def counted(self) -> list[int]:
        """Passes of each finished image, if the proof counts them."""
        return [passes for batch in self.batches for passes in batch.counted]

    @property
    def bytes_each(self) -> float:
        """Bytes of the records of an image."""
        return sum(batch.size for batch in self.batches) / self.images

    def _enough(self, spent: float) -> bool:
        if spent >= PATIENCE:
            return True
        if spent < SECONDS or len(self.steady) < 2:
            return False
        return not self.counted or _error(self.counted) <= KNOWN * _mean(self.counted)


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def _error(values: list[int]) -> float:
    """Standard error of the mean; infinite for fewer than two values."""
    n, mean = len(values), _mean(values)
    return math.sqrt(sum((one - mean) ** 2 for one in values) / (n - 1) / n) if n > 1 else math.inf


def _certifying(task: EvaluationTask, total: int, trial: _Trial) -> dict[str, Any]:
    defense, cost = task.model.defense, task.model.defense.passes_per_image()

    def batch(part: Images) -> tuple[list[int], int]:
        certificates = defense.certify_claims(to_float(part.read()).to(defense.device), task.claims)
        counted = certificates[0].passes
        return [] if counted is None else counted.tolist(), _bytes(part, certificates)

    trial.run(Pace(task.batch_size, cost), batch)
    if not trial.batches:
        seconds, made = trial.stopped
        if cost is None or not made:
            return {"not_measured": f"not one image was finished in {seconds:.0f} s"}
        return {
            **_bound(cost[1], seconds / made, 0.0, total),
            "disk_bytes": 0,
            "measured_on": f"{made} passes of an image that was not finished in {seconds:.0f} s",
        }
    found: dict[str, Any] = {}
    counted, each = trial.counted, trial.pace
    if counted:
        each = trial.pace * _mean(counted)
        found = {"passes_per_image": round(_mean(counted), 1), "passes": round(_mean(counted) * total)}
        if len(counted) > 1:
            found["passes_per_image_error"] = round(_error(counted), 1)
    found |= {"seconds_per_image": _digits(each), **_total(trial.once + each * total)}
    if counted and cost is not None:
        found |= _bound(cost[1], trial.pace, trial.once, total)
    found["disk_bytes"] = round(trial.bytes_each * total)
    return found | {"measured_on": f"{trial.images} images"}


def _bound(passes: int, pace: float, once: float, images: int) -> dict[str, Any]:
    """What the run takes if every image takes the most passes, at ``pace`` seconds a pass, and ``once`` to set things up."""
    return {
        "passes_per_image_at_most": passes,
        "passes_at_most": passes * images,
        "seconds_per_image_at_most": _digits(passes * pace),
        **_total(once + passes * pace * images, at_most=True),
    }


def _attacking(task: EvaluationTask, total: int, trial: _Trial, attacker: AnyAttack, join: bool) -> dict[str, Any]:
    """What attacking takes: the most from one query, and from whole images where that is not hopeless."""
    defense = task.model.defense
    query = _one_query(task, trial.clock)
    effort = attacker.most(defense, task.threat, hinted=join)
    found: dict[str, Any] = {"seconds_per_query": _digits(query)}
    if effort is not None:
        found |= {"queries_per_image_at_most": effort.queries, "answers_per_image_at_most": effort.answers}

    def batch(part: Images) -> tuple[list[int], int]:
        x = to_float(part.read()).to(defense.device)
        _, certificate = hints.search(defense, x, task.threat, attacker, part.index, join=join)
        return [], 0 if certificate is None else _bytes(part, [certificate])

    hopeless = effort is not None and effort.queries * query > HOPE * PATIENCE
    if not hopeless:
        trial.run(Pace(task.batch_size, unit=attacker.together(defense)), batch)
    if trial.batches:
        found |= {"seconds_per_image": _digits(trial.pace), **_total(trial.once + trial.pace * total)}
        size = round(trial.bytes_each * total)
        return found | {"disk_bytes": size, "measured_on": f"{trial.images} images"}
    if effort is not None:
        most = effort.queries * query
        found |= {"seconds_per_image_at_most": _digits(most), **_total(most * total, at_most=True)}
    besides = "the deployed answers" + (" and certificates" if join else "")
    return found | {"disk_bytes": 0, "measured_on": f"one query; {besides} come on top"}


def _one_query(task: EvaluationTask, clock: Clock) -> float:
    """Seconds of one query: half of logits and their gradient on one image, the second time if that costs little."""
    defense, spent = task.model.defense, math.inf
    x = to_float(task.images.take(torch.arange(1)).read()).to(defense.device)
    for _ in range(2):
        began = clock()
        with torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            slope = torch.autograd.grad(defenses.surrogates(defense)[0].whole(point).amax(), point)[0]
        slope.sum().item()  # to the host, so that a device has finished
        spent = min(spent, clock() - began)
        if spent > SECONDS:
            break
    return spent / 2


def _total(seconds: float, *, at_most: bool = False) -> dict[str, Any]:
    tail = "_at_most" if at_most else ""
    return {f"estimated_seconds{tail}": round(seconds, 1), f"estimated_hours{tail}": round(seconds / 3600, 2)}


def _digits(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def _bytes(part: Images, certificates: list[Any]) -> int:
    return sum(len(json.dumps(record)) + 1 for record in results.certify_records(part, certificates))


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''}"
