"""The certify and attack loops: one record per image, appended as it is made, resumable, with a manifest of what was run.

The files of a run folder: :mod:`patchcert_cli.evaluation.run_folder`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli import checkpoint
from patchcert_cli.attacks import AnyAttack, AttackResult
from patchcert_cli.cards.results import read_result
from patchcert_cli.certificate import Certificate
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.device import sent
from patchcert_cli.errors import IntegrityError, Interrupted, MachineError, PatchcertError, UsageError
from patchcert_cli.evaluation import attack_results, hints, results, run_folder
from patchcert_cli.evaluation.adversarial_images import AdversarialFolder
from patchcert_cli.evaluation.pace import Clock, Pace, spoken
from patchcert_cli.evaluation.run_folder import Record, Run
from patchcert_cli.evaluation.task import EvaluationTask
from patchcert_cli.layers import passes
from patchcert_cli.parallel import workers as jobs
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage import files
from patchcert_cli.storage.files import RESULT

BROKEN = "broken.safetensors"  # adversarial images of certified ones
EVERY = 5.0  # seconds between two looks at what a batch has come to
WAIT = 0.1  # and at whether the other ranks have finished


def certify(
    task: EvaluationTask,
    folder: Path | None = None,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> results.Result:
    """Certify every image of a task; returns what ``result.json`` holds.

    Batches are as large as fits into some seconds (:mod:`patchcert_cli.evaluation.pace`), by ``clock``.

    Raises:
        UnsupportedThreat: the defense has no certificates.
        UsageError: the folder holds another run.
        Interrupted: stopped by Ctrl-C; the same call goes on where it stopped.
        MachineError: out of memory at a batch of one image, or the disk is full, or another process uses the folder.
    """
    task.model.defense.check_proves()
    task.check()
    folder, defense = folder or task.folder("certify", {}), task.model.defense
    group = defense.group(task.claims)

    def batch(part: Images) -> list[Record]:
        x = sent(to_float(part.read()), defense.device)
        groups = [defense.certify_claims(group, task.claims) for group in torch.split(x, group or len(x))]
        certificates = [Certificate.cat(parts) for parts in zip(*groups, strict=True)]
        return list(results.certify_records(part, certificates, task.model.plain(x)))

    workers = jobs.current().scope()
    with _opened(task, "certify", {}, folder, fresh, workers) as run:
        work = _Work(
            task,
            run,
            workers,
            Pace(task.batch_size, defense.passes_per_image(), unit=group or 1),
            progress or Silent(),
            clock,
            most=defense.passes_per_image(),
        )
        found = work.finish(batch, lambda seconds, resumed: results.certify_result(task, run, seconds, resumed))
        return results.Result(found)


def attack(
    task: EvaluationTask,
    attacker: AnyAttack,
    settings: dict[str, Any],
    folder: Path | None = None,
    *,
    join: bool = True,
    fresh: bool = False,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
    max_seconds: float | None = None,
    save: Path | None = None,
) -> results.Result:
    """Attack every image of a task; with ``join`` certify the same images and hold the attack against the certificates.

    ``settings`` names the attack's options in the manifest. The attack sees the defense and, with ``join``, the location and the
    runner-up of the smallest certified margin as a start. A defense without certificates is attacked alone.

    After ``max_seconds`` no further image is finished: the result is about those that are, says under ``left`` how many are not,
    and is not written into the folder; the same call goes on with these.

    With ``save``, the adversarial images are kept in that folder, also those of an earlier call that kept none: they are attacked
    again. The returned result says under ``saved`` how many there are, on the first rank of a job.

    Raises:
        UsageError: no image was finished within ``max_seconds``, or ``save`` holds something else; and as :func:`certify`.
    """
    task.check()
    join = join and task.model.defense.guarantee.proves
    extra = {"attack": settings, "joined": join}
    folder, defense = folder or task.folder("attack", extra), task.model.defense

    kept = None if save is None else AdversarialFolder(save, json.loads(json.dumps(task.identity("attack", extra))))

    def searched(part: Images) -> list[Record]:
        x = sent(to_float(part.read()), defense.device)
        outcome, certificate = hints.search(defense, x, task.threat, attacker, part.index, join=join)
        if certificate is not None:
            _keep_broken(folder, part, certificate, outcome)
        if kept is not None:
            kept.keep(defense, x, part.index.tolist(), part.labels.tolist(), task.threat, outcome)
        return attack_results.records(task, part, attacker, outcome, certificate, task.model.plain(x))

    def result(seconds: float, resumed: int) -> dict[str, Any]:
        return attack_results.result(task, run, attacker, settings, join, seconds, resumed)

    workers = jobs.current().scope()
    with _opened(task, "attack", extra, folder, fresh, workers) as run:
        if kept is not None:
            workers.lead("kept", kept.claim)
        unit = attacker.together(defense)
        pace = Pace(task.batch_size, unit=unit)
        found = _Work(task, run, workers, pace, progress or Silent(), clock, max_seconds=max_seconds).finish(searched, result)
        if kept is None or not workers.first:
            return results.Result(found)
        for some in torch.split(_lost(task, run, kept), unit):
            searched(task.images.take(some))
        return results.Result(found | {"saved": kept.listed()})


def _lost(task: EvaluationTask, run: Run, kept: AdversarialFolder) -> Tensor:
    """Positions of the flipped images that an earlier call did not keep, int64 [n]."""
    flipped = [at for at, i in enumerate(task.images.index.tolist()) if run.records.get(i, {}).get("flipped") and not kept.has(i)]
    return torch.tensor(flipped, dtype=torch.int64)


def _keep_broken(folder: Path, part: Images, certificate: Certificate, outcome: AttackResult) -> None:
    """Keep the adversarial images of certified ones that were flipped: there is a bug in the proof."""
    broken = (certificate.certified & outcome.success).nonzero()[:, 0].cpu()
    if len(broken):
        tensors = {"index": part.index[broken], "adversarial": outcome.adversarial.cpu()[broken]}
        files.write_atomically(folder / f"{int(part.index[0])}-{BROKEN}", checkpoint.pack(tensors, {}))


def _opened(
    task: EvaluationTask, kind: str, extra: dict[str, Any], folder: Path, fresh: bool, workers: Workers
) -> contextlib.AbstractContextManager[Run]:
    device = str(task.model.defense.device)
    answers = task.model.fingerprint()
    identity = task.identity(kind, extra)
    return run_folder.opened(folder, identity, device=device, command=task.command, fresh=fresh, answers=answers, workers=workers)


class _TimeIsUp(Exception):
    """Stops a batch; what it has come to is dropped."""


class _Work:
    """The records of a run that are missing, made batch by batch: those that no other rank of the job has taken."""

    def __init__(
        self,
        task: EvaluationTask,
        run: Run,
        workers: Workers,
        pace: Pace,
        progress: Progress,
        clock: Clock,
        *,
        most: tuple[int, int] | None = None,
        max_seconds: float | None = None,
    ) -> None:
        self._task, self._run, self._pace, self._progress, self._clock = task, run, pace, progress, clock
        self._workers = workers
        self._most = None if most is None else most[1]  # passes of an image
        self._max, self._began, self._spoke = max_seconds, clock(), clock()
        self._resumed, self._counts = len(run.records), results.RunningCounts(run.records.values(), workers)
        self._batch = self._passes = self._all_passes = 0  # images of this batch; passes of this batch, and of all
        self._cold: tuple[float, int] | None = None  # when the first passes were made, which set up much, and how many

    def finish(self, batch: Callable[[Images], list[Record]], result: Callable[[float, int], dict[str, Any]]) -> dict[str, Any]:
        """Make the records that are missing, then the result."""
        run, task = self._run, self._task
        if self._resumed == len(task.images) and (run.folder / RESULT).exists():
            self._progress.note(f"{run.folder} is complete; --fresh runs it again")
            return read_result(run.folder / RESULT)
        if self._resumed:
            left = len(task.images) - self._resumed
            self._progress.note(f"resuming {run.folder}: {self._resumed} images done, {left} left")
        try:
            self._make(batch)
            self._wait()
        except KeyboardInterrupt as problem:
            raise Interrupted(
                f"interrupted at {self._counts.images} of {len(task.images)} images.", hint="Resume with the same command."
            ) from problem
        if not self._workers.first:
            final: dict[str, Any] = self._workers.outcome("result", jobs.LONGEST)
            return final
        try:
            final = self._result(result)
        except PatchcertError as problem:
            self._workers.failed("result", problem)
            raise
        self._workers.tell("result", final)
        return final

    def _result(self, result: Callable[[float, int], dict[str, Any]]) -> dict[str, Any]:
        """The result of all records, which is written if none is missing."""
        run, task = self._run, self._task
        run.merge()
        until = time.monotonic() + jobs.VISIBLE
        while len(run.records) < self._counts.images and not self._workers.alone and time.monotonic() < until:
            time.sleep(1.0)  # until this node sees what others have written
            run.merge()
        left = len(task.images) - len(run.records)
        if left and self._max is None:
            raise IntegrityError(f"{left} records are missing in '{run.folder}'.", hint="Resume with the same command.")
        if left and not run.records:
            together = self._pace.size
            few = "" if together == 1 else f", or fewer images at a time than {together}: --batch-size 1"
            raise UsageError(
                f"no image was finished in {self._max:g} s.",
                hint=f"Give more --max-seconds{few}; --dry-run says what an image takes.",
            )
        run.check_answers(task.model.fingerprint())
        final = result(self._clock() - self._began, self._resumed)
        if left:
            return final | {"left": left}
        files.write_json(run.folder / RESULT, final)
        return final

    def _make(self, batch: Callable[[Images], list[Record]]) -> None:
        task, run = self._task, self._run
        known = [index in run.records for index in task.images.index.tolist()]
        open_ = (~torch.tensor(known, dtype=torch.bool)).nonzero()[:, 0]
        self._tell()
        for share in self._shares(len(open_)):
            at = share.start
            while at < share.stop:
                if self._over():
                    return
                part = task.images.take(open_[at : min(at + self._pace.size, share.stop)])
                self._batch, self._passes, began = len(part), 0, self._clock()
                try:
                    with passes.heard(self._heard):
                        records = batch(part)
                except _TimeIsUp:
                    return
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
                    self._smaller(problem)
                    continue
                run.append(records)
                self._pace.took(len(part), self._clock() - began, self._passes)
                self._counts.add(records)
                at += len(part)
                self._tell()

    def _shares(self, total: int) -> Iterator[range]:
        """Ranges of the ``total`` open images for this rank: each the next ones that no rank has taken.

        Images differ in cost, so ranks never have fixed shares: towards the end a rank takes so few that the others have as many
        left.
        """
        if self._workers.alone:
            yield range(total)
            return
        end = 0
        while end < total:
            end = self._workers.add("taken", size := self._pace.share(total - end, self._workers.size))
            if end - size < total:
                yield range(end - size, min(end, total))

    def _wait(self) -> None:
        """Until every rank has finished its last batch; the first shows how far they are."""
        finished = self._workers.add("finished", 1)
        while self._workers.first and finished < self._workers.size:
            time.sleep(WAIT)
            finished = self._workers.add("finished", 0)
            self._tell()

    def _over(self) -> bool:
        return self._max is not None and self._clock() - self._began >= self._max

    def _tell(self, more: str = "") -> None:
        self._spoke = self._clock()
        self._counts.share()
        self._progress.update(self._counts.images, len(self._task.images), f"{self._counts}{more}")

    def _heard(self, count: int) -> None:
        """Passes were made: show them now and then, and stop where the time is up."""
        self._passes, self._all_passes = self._passes + count, self._all_passes + count
        if self._over():
            raise _TimeIsUp
        now = self._clock()
        if self._cold is None and self._all_passes:
            self._cold = now, self._all_passes
        if now - self._spoke < EVERY or not self._passes:
            return
        what = "the next image" if self._batch == 1 else f"the next {self._batch} images"
        of = "" if self._most is None else f" of at most {self._most * self._batch:,}"
        text = f"; {what}: {self._passes:,}{of} passes"
        if (
            self._most is not None and len(self._run.records) == self._resumed and self._cold is not None
        ):  # no image's time is known
            most, (since, before) = self._most * (len(self._task.images) - self._resumed) - self._all_passes, self._cold
            if self._all_passes > before:
                text += f", at most {spoken(max(most, 0) * (now - since) / (self._all_passes - before))} left"
        self._tell(text)

    def _smaller(self, problem: BaseException) -> None:
        """Half the batch size after an out-of-memory error; any other error goes on."""
        memory = isinstance(problem, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(problem)
        if not memory:
            raise problem
        size = self._batch
        if size == 1:
            raise MachineError("out of memory at a batch of one image.", hint="Use a machine with more memory.") from problem
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._progress.note(f"out of memory at batch {size}; retrying with {size // 2} (results do not depend on it)")
        self._pace.halve(size)
