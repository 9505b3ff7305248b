"""The processes of one job, as ``torchrun`` starts them: ranks that share a store of keys and counters, and nothing else here.

Evaluation needs no process group: ranks take images from a counter of the job's own store. Training adds one
(:mod:`patchcert_cli.training.ranks`).

A rank waits for another one at most :data:`PATIENCE`; that a rank is alive is for the launcher to watch, which ends all of them
when one dies.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchcert_cli.errors import MachineError, PatchcertError, UsageError, first_line, of_code, on_all_ranks
from patchcert_cli.version import __version__

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

PATIENCE = 600.0  # seconds that a rank waits for what another one does at once, such as opening the run folder
LONGEST = 30 * 24 * 3600.0  # and for what others compute
MEETING = 300.0  # and for the others to appear at all, unless the variable says otherwise
VISIBLE = 60.0  # and until it sees a file that another one has written, which network file systems delay
LEAVING = 20.0  # and at most for the others to leave, where it hosts the store
MEETING_VARIABLE = "PATCHCERT_MEETING_SECONDS"
LAUNCHER = "PATCHCERT_LAUNCHER"  # the process that starts the ranks, if it is ours
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # which torchrun sets in each process


@dataclass
class Workers:
    """This process among those of its job.

    Attributes:
        rank: number of this process; the first one writes results and prints.
        size: how many there are.
        store: what they share; None for a single process.
        local_rank: number among the processes of this machine.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    local_rank: int = 0
    _counts: dict[str, int] = field(default_factory=dict)
    _scopes: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes results and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether the job has no other process."""
        return self.store is None

    def scope(self) -> Workers:
        """The same processes with keys of their own: every rank enters the same scopes in the same order."""
        self._scopes += 1
        if self.store is None:
            return Workers()
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        return Workers(self.rank, self.size, PrefixStore(f"{self._scopes}/", self.store), self.local_rank)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that all ranks share, which begins at 0; returns what it is then."""
        if self.store is None:
            self._counts[key] = self._counts.get(key, 0) + amount
            return self._counts[key]
        with _reached():
            return int(self.store.add(key, amount))

    def tell(self, key: str, value: Any) -> None:
        """Set a key to a plain value; each key is set once."""
        if self.store is not None:
            with _reached():
                self.store.set(key, json.dumps(value))

    def ask(self, key: str, seconds: float = PATIENCE, *, missing: str = "") -> Any:
        """What a rank sets a key to, once it does; ``missing`` is what to say if it does not.

        Raises:
            MachineError: nothing came in time, or the store is gone.
        """
        assert self.store is not None
        until, pause = time.monotonic() + seconds, 0.005
        while True:
            with _reached():
                if self.store.check([key]):
                    return json.loads(self.store.get(key))
            if time.monotonic() > until:
                what = missing or f"rank {self.rank} received no '{key}' from another rank"
                raise MachineError(f"{what} within {seconds:g} s.", hint="See what the other ranks print.")
            time.sleep(pause)  # not inside the store: Ctrl-C is to be heard
            pause = min(2 * pause, 0.5)

    def failed(self, key: str, problem: PatchcertError) -> None:
        """Set a key to the error that stopped this rank: :meth:`outcome` raises it on the others."""
        self.tell(key, {"error": [problem.code, problem.message, problem.hint]})

    def outcome(self, key: str, seconds: float = PATIENCE) -> Any:
        """What the first rank sets a key to; raises its error if it failed."""
        value = self.ask(key, seconds)
        if isinstance(value, Mapping) and "error" in value:
            code, message, hint = value["error"]
            raise on_all_ranks(of_code(int(code))(str(message), hint=str(hint)))
        return value

    def lead(self, key: str, action: Callable[[], None]) -> None:
        """Let the first rank do something while the others wait; its error is raised on all of them."""
        if not self.first:
            self.outcome(key)
            return
        try:
            action()
        except PatchcertError as problem:
            self.failed(key, problem)
            raise
        self.tell(key, True)

    def check_shared(self, path: Path) -> None:
        """Check that all ranks see the file that the first one has written, at once or soon: nodes cache what a folder holds.

        Raises:
            MachineError: this rank does not; the folder is not shared.
        """
        if self.store is None:
            return
        if self.first:
            self.tell(f"content of {path.name}", _digest(path))
            return
        digest, until = self.ask(f"content of {path.name}"), time.monotonic() + VISIBLE
        while _digest(path) != digest:
            if time.monotonic() > until:
                raise MachineError(
                    f"rank {self.rank} does not see the run folder '{path.parent.absolute()}' of rank 0.",
                    hint="All ranks need one --out on a file system that they share.",
                )
            time.sleep(min(1.0, VISIBLE / 10))

    def agree(self, about: Mapping[str, str]) -> None:
        """Check that all ranks say the same ``about`` what the job works on, and have the same versions of patchcert and torch.

        Raises:
            UsageError: they do not, on every rank alike; names the first entry that differs.
        """
        if self.store is None:
            return
        import torch

        about = {**about, "patchcert": __version__, "torch": str(torch.__version__)}
        self.tell(f"about {self.rank}", about)
        if self.first:
            try:
                for other in range(1, self.size):
                    missing = f"rank {other} of {self.size} did not begin"
                    _check_same(other, self.ask(f"about {other}", meeting(), missing=missing), about)
            except PatchcertError as problem:
                self.failed("agreed", problem)
                raise
            self.tell("agreed", True)
        else:
            self.outcome("agreed", 2 * meeting())  # the first one waits for others


def _digest(path: Path) -> str:
    """The sha256 of a file; empty if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _check_same(rank: int, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    for name in {**ours, **theirs}:
        if theirs.get(name) != ours.get(name):
            raise UsageError(
                f"rank {rank} has another {name} than rank 0: {theirs.get(name)}, not {ours.get(name)}.",
                hint="All ranks need the same models, images, options and versions.",
            )


@contextmanager
def _reached() -> Iterator[None]:
    """Errors of the store, as one line."""
    try:
        yield
    except RuntimeError as problem:  # DistError and its subclasses among them
        hint = "Another rank has probably failed: see what it printed. The same command resumes."
        raise MachineError(f"the store of the job is gone ({first_line(problem)[:80]}).", hint=hint) from problem


def inside() -> bool:
    """Whether this process is a rank that torchrun, or another launcher with its variables, has started."""
    return all(os.environ.get(name) for name in VARIABLES)


def leave(store: Store, size: int, seconds: float = LEAVING) -> None:
    """At the end of a process: the rank that hosts the store of ``size`` ranks waits for the others, which pass 0, to read it."""
    with contextlib.suppress(RuntimeError):
        count, until = int(store.add("left", 1)), time.monotonic() + seconds
        while count < size and time.monotonic() < until:
            time.sleep(0.05)
            count = int(store.add("left", 0))


def end_with_launcher(every: float = 1.0, end: Callable[[int], object] = os._exit) -> threading.Thread:
    """End this rank, from a thread, soon after the process that started it is gone: one that was killed cannot end its ranks.

    What a rank has appended to its records is kept, and the same command resumes.
    """
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(every)
        end(MachineError.code)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


_current = threading.local()  # ranks of tests are threads


def use(workers: Workers | None) -> None:
    """Make ``workers`` what :func:`current` gives in this thread; None: what the environment says."""
    _current.workers = workers


def current() -> Workers:
    """The processes of this job: of torchrun's, or this one alone.

    Raises:
        MachineError: the other processes are out of reach.
        UsageError: the variables of the launcher are not numbers.
    """
    return getattr(_current, "workers", None) or _of_environment()


@functools.cache
def _of_environment() -> Workers:
    if not inside():
        return Workers()
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    local = _number("LOCAL_RANK") if os.environ.get("LOCAL_RANK") else rank
    if not 0 < port < 1 << 16:
        raise UsageError(f"MASTER_PORT={port} is not a port.", hint="Allowed: 1 to 65535.")
    if not 0 <= rank < size:
        raise UsageError(f"RANK={rank} is not one of WORLD_SIZE={size} processes.", hint="Allowed: 0 to WORLD_SIZE - 1.")
    if size == 1:
        return Workers(local_rank=local)
    return Workers(rank, size, _store(rank, size, os.environ["MASTER_ADDR"], port), local)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError as problem:
        raise UsageError(
            f"{name}={os.environ[name]!r} is not a whole number.", hint="Start the job with torchrun, which sets it."
        ) from problem


def meeting() -> float:
    """Seconds that a rank waits for the others to appear.

    Raises:
        UsageError: the variable is not a number above 0.
    """
    text = os.environ.get(MEETING_VARIABLE, str(MEETING))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < LONGEST:
        raise UsageError(f"{MEETING_VARIABLE}={text} is not a number of seconds.", hint=f"Use for example {MEETING:g}.")
    return seconds


def _await_port(who: str, host: str, port: int, seconds: float) -> None:
    """Wait until ``host`` listens: torch would, but prints its stack at every attempt."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(until - time.monotonic(), 0.1)).close()
            return
        except OSError as problem:
            if time.monotonic() > until:
                raise MachineError(
                    f"{who} does not reach {host}:{port} within {seconds:g} s ({problem.strerror or problem}).",
                    hint="Is rank 0 running, and is the port open?",
                ) from problem
            time.sleep(min(1.0, seconds / 10))


def _store(rank: int, size: int, host: str, port: int) -> Store:
    """The store of the job, with keys of this start of it: torchrun restarts a job with the same store."""
    try:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
    except ImportError as problem:
        raise MachineError("this build of torch has no torch.distributed.", hint="Leave --processes out.") from problem
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else the launcher does
    if not hosts:
        _await_port(f"rank {rank} of {size}", host, port, meeting())
    seconds = datetime.timedelta(seconds=meeting())
    try:
        store = TCPStore(host, port, size, is_master=hosts, timeout=seconds, wait_for_workers=False)
    except RuntimeError as problem:
        taken = "EADDRINUSE" in str(problem) or "already in use" in str(problem)
        what = f"port {port} is in use" if taken else f"{host}:{port} has no store of a job ({first_line(problem)[:80]})"
        raise MachineError(f"{what}.", hint="Use another MASTER_PORT or --rdzv-endpoint.") from problem
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        atexit.register(leave, store, size if hosts else 0)
    return PrefixStore(f"patchcert/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/", store)
