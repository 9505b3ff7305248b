"""``--processes N``: the same command in several processes of this machine, started by torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import typer

from patchcert_cli.cli.groups import without
from patchcert_cli.cli.options import PROCESSES
from patchcert_cli.errors import Interrupted, MachineError, UsageError, on_all_ranks
from patchcert_cli.parallel import workers

CORES_EACH = 2  # of a machine without GPU, for "auto"
MOST_PER_CORE = 8  # processes: more would hardly start
LAST_LINES = 20  # of a rank that failed with a traceback


def start(processes: str | None, *, dry_run: bool = False) -> None:
    """Run this command in several processes, and exit as they do; return at once where one process is to do it.

    A dry run always measures one process.

    Raises:
        UsageError: not a number of processes, or torchrun has started this process.
        MachineError: a rank was killed.
        typer.Exit: with the exit code of the rank that failed first, which was printed; 0 if none did.
    """
    if processes is None:
        return
    if workers.inside():
        problem = UsageError(f"{PROCESSES} starts processes, and torchrun has started this one.", hint=f"Leave {PROCESSES} out.")
        raise on_all_ranks(problem)
    number = _number(processes)
    if number > 1 and not dry_run:
        raise typer.Exit(_launch(number, ["-m", "patchcert_cli", *without(sys.argv[1:], PROCESSES)]))


def _number(text: str) -> int:
    cores = os.cpu_count() or 1
    if text == "auto":
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else max(cores // CORES_EACH, 1)
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(
            f"{PROCESSES} {text} is not a number of processes.", hint=f"Use 1 or more, or auto; there are {cores} cores."
        )
    if int(text) > MOST_PER_CORE * cores:
        raise UsageError(
            f"{PROCESSES} {text} is more than {MOST_PER_CORE} for each of {cores} cores.",
            hint=f"Use {PROCESSES} auto, or torchrun for several machines: see docs/scaling.md.",
        )
    return int(text)


def _launch(number: int, words: Sequence[str]) -> int:
    """Run ``python WORDS`` in ``number`` ranks; returns the exit code."""
    import torch.distributed

    if not torch.distributed.is_available():
        raise MachineError("this build of torch has no torch.distributed.", hint=f"Leave {PROCESSES} out.")
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # long reports; one line is printed below
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // number, 1)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of the ranks
    os.environ[workers.LAUNCHER] = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="patchcert-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=number,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # any free port
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=dict.fromkeys(range(1, number), Std.ERR)),
        )
        try:
            elastic_launch(config, sys.executable)(*words)
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
            return _failed(failed.get_first_failure()[0], codes, Path(logs))
        except SignalException as stopped:
            return Interrupted.code if stopped.sigval == signal.SIGINT else 128 + stopped.sigval
    return 0


def _failed(first: int, codes: dict[int, int], logs: Path) -> int:
    """The exit code of a job, after printing what the rank ``first`` printed to its file."""
    ended = 128 + signal.SIGTERM  # by the launcher, because another one had failed
    failed = {rank: code for rank, code in codes.items() if code not in (ended, -signal.SIGTERM)} or codes
    killed = [rank for rank, code in failed.items() if code < 0]
    if killed:
        name = signal.Signals(-codes[killed[0]]).name
        hint = "The same command resumes, with any number of processes."
        raise MachineError(f"rank {killed[0]} was killed by {name}.", hint=hint)
    rank = 0 if 0 in failed else first if first in failed else next(iter(failed))
    for path in logs.glob(f"**/{rank}/stderr.log") if rank else ():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        began = [at for at, line in enumerate(lines) if line.startswith("error[")]
        typer.echo("\n".join(lines[began[-1] :] if began else lines[-LAST_LINES:]), err=True)
    return codes[rank]
