"""Many processes: measured on this machine, simulated for larger jobs, and what the counter that they share costs.

    python benchmarks/scaling.py measure [--limit N] [--steps N] [--repeats N] [--only NAME] [--data-dir DIR]
    python benchmarks/scaling.py simulate [--images N] [--workers 8,64,512] [--seed N]
    python benchmarks/scaling.py counter [--clients N] [--processes N] [--images N]

``measure`` runs the same commands with 1 and 2 processes of one thread each, in turns, and prints ratios of the times that the
runs report, without the loading of models; and what this machine can give at most: the same work twice at once, in two
processes that share nothing. ``simulate`` shares images among workers as evaluation does, with the same rule for
sizes (:class:`patchcert_cli.evaluation.pace.Pace`), in simulated time. ``counter`` adds to a real store from many clients at
once, and merges the records of a job of that size.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from patchcert_cli.evaluation.pace import Pace
from patchcert_cli.evaluation.run_folder import Run
from patchcert_cli.evaluation.task import BATCH_SIZE, FEWEST, PASSES
from patchcert_cli.storage import files

COSTS = Path(__file__).parent / "passes.json"  # how many images took how many passes
ADDS = 4  # to counters, for each batch: the images taken, and three counts that are shown
ADD = 25e-6  # seconds that the store takes for one, about what ``counter`` measures
RESTART = 60.0  # seconds from the loss of a worker until the others go on
SECONDS_A_PASS = 0.89e-3  # of cifar-masked-cnn on one core, see docs/benchmarks.md
SECONDS_AN_IMAGE = 0.22  # of cifar-ibp-p5 on one core, interval bounds of 64 images together
CHUNKS = (1, 8, 64)


# --- simulate


@dataclass(frozen=True)
class Cost:
    """What images take.

    Attributes:
        name: what is printed.
        seconds: of each image, for a worker of speed 1.
        passes: of each image; empty if they are not counted.
        unit: images that are computed together.
    """

    name: str
    seconds: Sequence[float]
    passes: Sequence[int] = ()
    unit: int = 1

    def pace(self) -> Pace:
        """The pace of a worker that begins."""
        if not self.passes:
            return Pace(BATCH_SIZE, unit=self.unit)
        most = max(self.passes)
        return Pace(max(FEWEST, min(BATCH_SIZE, PASSES // most)), (min(self.passes), most), unit=self.unit)


@dataclass
class Worker:
    """A process of the simulated job."""

    speed: float
    pace: Pace
    end: int = 0  # of the images taken by all, when this one took its last ones
    own: list[int] = field(default_factory=list)  # its share, where shares are fixed


@dataclass(frozen=True)
class Sharing:
    """How images are shared: in fixed shares, or from a counter, by the rule of ``Pace`` or some at a time."""

    name: str
    fixed: bool = False
    chunk: int = 0  # 0: by the rule

    def fits(self, cost: Cost) -> bool:
        """Whether chunks are of whole units."""
        return self.chunk % cost.unit == 0


SHARINGS = (
    Sharing("fixed shares", fixed=True),
    Sharing("counter, the rule"),
    *(Sharing(f"counter, {n}", chunk=n) for n in CHUNKS),
)


def simulated(
    cost: Cost, images: Sequence[int], speeds: Sequence[float], sharing: Sharing, *, until: float = float("inf"), add: float = ADD
) -> tuple[float, list[int]]:
    """When the last worker ends, and the images that were not finished ``until`` then, where every worker stops.

    Args:
        cost: what images take.
        images: numbers of the images, in the order in which they are taken.
        speeds: one for each worker; 0.5 takes twice the time.
        sharing: how images are shared.
        until: when all workers are stopped; what a worker has not finished by then is lost.
        add: seconds that the store takes for one addition; it makes one at a time.
    """
    workers = [Worker(speed, cost.pace()) for speed in speeds]
    together = [images[at : at + cost.unit] for at in range(0, len(images), cost.unit)]
    for number, worker in enumerate(workers if sharing.fixed else ()):
        worker.own = [one for unit in together[number :: len(workers)] for one in unit][::-1]
    taken, free, last = 0, 0.0, 0.0  # images; when the store is free; when the last batch was finished
    done: set[int] = set()
    ready = [(0.0, number) for number in range(len(workers))]
    while ready:
        now, number = heapq.heappop(ready)
        worker = workers[number]
        if sharing.fixed:
            some = [worker.own.pop() for _ in range(min(worker.pace.size, len(worker.own)))]
        else:
            if worker.end >= len(images):
                continue
            now = free = max(now, free) + ADDS * add
            size = sharing.chunk or worker.pace.share(len(images) - worker.end, len(workers))
            some, taken = list(images[taken : taken + size]), taken + size
            worker.end = taken
        if not some:
            continue
        seconds = sum(cost.seconds[one] for one in some) / worker.speed
        if now + seconds > until:
            continue
        done.update(some)
        last = max(last, now + seconds)
        worker.pace.took(len(some), seconds, sum(cost.passes[one] for one in some) if cost.passes else 0)
        heapq.heappush(ready, (now + seconds, number))
    return last, [one for one in images if one not in done]


def ends(cost: Cost, workers: int, sharing: Sharing) -> dict[str, float]:
    """When a job of ``workers`` ends: all alike, one of them at half speed, one of them lost when half of the work was done."""
    images, alike = range(len(cost.seconds)), [1.0] * workers
    half = sum(cost.seconds) / workers / 2
    _, left = simulated(cost, images, alike, sharing, until=half)
    rest, _ = simulated(cost, left, alike[1:], sharing)
    return {
        "all alike": simulated(cost, images, alike, sharing)[0],
        "one at half speed": simulated(cost, images, [0.5, *alike[1:]], sharing)[0],
        "one lost at half time": half + RESTART + rest,
    }


def drawn(images: int, seed: int) -> list[int]:
    """Passes of ``images`` images in random order: those that were measured, each as often as any other, up to one."""
    counts = json.loads(COSTS.read_text())["counts"]
    measured = [int(passes) for passes, count in counts.items() for _ in range(count)]
    generator = random.Random(seed)
    found: list[int] = []
    while len(found) < images:
        found += generator.sample(measured, min(len(measured), images - len(found)))
    return found


def costs(images: int, seed: int) -> list[Cost]:
    """Cheap and expensive masked predictions, and a proof that takes the same for every image."""
    passes = drawn(images, seed)
    return [
        Cost("masks, 0.89 ms a pass", [SECONDS_A_PASS * one for one in passes], passes),
        Cost("masks, 10 ms a pass", [0.01 * one for one in passes], passes),
        Cost("interval bounds, 0.22 s an image", [SECONDS_AN_IMAGE] * images, unit=64),
    ]


def simulate(images: int, sizes: Sequence[int], seed: int) -> None:
    """Print a table of efficiencies: the work of all images over the workers times the time of the last one."""
    columns = ["images", "workers", "which", "ideal", *(sharing.name for sharing in SHARINGS)]
    print(f"{images} images, seed {seed}, {RESTART:g} s for a restart; efficiency in percent\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for cost in costs(images, seed):
        for workers in sizes:
            ideal = sum(cost.seconds) / workers
            found = [ends(cost, workers, sharing) if sharing.fits(cost) else {} for sharing in SHARINGS]
            for which in found[0]:
                shown = [f"{100 * ideal / one[which]:.1f}" if one else "" for one in found]
                print(f"| {cost.name} | {workers} | {which} | {ideal:.0f} s | {' | '.join(shown)} |")


# --- counter


def client(pipe: Connection, number: int, seconds: float) -> None:
    """A process with ``number`` clients of a store, which add to it in turn; sends how often, and the longest time."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    port = pipe.recv()
    began = time.perf_counter()
    stores = [TCPStore("127.0.0.1", port, timeout=timedelta(seconds=120), wait_for_workers=False) for _ in range(number)]
    pipe.send(time.perf_counter() - began)
    pipe.recv()  # all are connected
    made, longest, end = 0, 0.0, time.perf_counter() + seconds
    while (before := time.perf_counter()) < end:
        stores[made % number].add("taken", 1)
        made, longest = made + 1, max(longest, time.perf_counter() - before)
    pipe.send((made, longest))
    pipe.recv()  # all are measured


@dataclass(frozen=True)
class Counted:
    """What a store did.

    Attributes:
        rate: additions a second of all clients together.
        each: seconds of the store's processor for an addition, which do not depend on what else runs on the machine.
        longest: seconds of the slowest addition.
        connected: seconds until all clients were connected.
    """

    rate: float
    each: float
    longest: float
    connected: float


def counted(clients: int, processes: int, seconds: float) -> Counted:
    """What one store does for ``clients`` clients, which add without a pause.

    Raises:
        AssertionError: an addition was lost.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    fork = multiprocessing.get_context("fork")  # shares the memory that torch takes
    pipes, started = [], []
    try:
        for number in range(processes):
            mine, theirs = fork.Pipe()
            each = clients // processes + (number < clients % processes)
            started.append(fork.Process(target=client, args=(theirs, each, seconds), daemon=True))
            started[-1].start()
            pipes.append(mine)
        store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=120), wait_for_workers=False)
        for pipe in pipes:
            pipe.send(store.port)
        connected = max(pipe.recv() for pipe in pipes)
        spent = time.process_time()
        for pipe in pipes:
            pipe.send("go")
        found = [pipe.recv() for pipe in pipes]
        spent = time.process_time() - spent
        total = sum(made for made, _ in found)
        assert store.add("taken", 0) == total, "additions were lost"
        for pipe in pipes:
            pipe.send("end")
        for process in started:
            process.join(60)
    finally:
        for process in started:
            process.kill()
    return Counted(total / seconds, spent / total, max(longest for _, longest in found), connected)


def merged(parts: int, images: int, folder: Path) -> float:
    """Seconds of the processor in which the records of ``images`` images in ``parts`` files are merged."""
    run = Run(folder, {}, device="cpu", command="", fresh=False)
    claim = {"threat": "patch:5x5", "method": "rows", "certified": True, "margin": 0.5697990655899048, "worst": [4, 8, 5, 5]}
    record = {"label": 3, "prediction": 3, "passes": 1225, "claims": [claim | {"runner_up": 2}]}
    for part in range(parts):
        lines = [json.dumps({"index": index, **record}) + "\n" for index in range(part, images, parts)]
        (folder / f"records-{part}.jsonl").write_text("".join(lines))
    began = time.process_time()
    run.merge()
    seconds = time.process_time() - began
    assert len(run.records) == images and len((folder / files.RECORDS).read_bytes().splitlines()) == images
    return seconds


def counter(clients: int, processes: int, images: int, seconds: float) -> None:
    """Print what the counter and the merge cost in a job of ``clients`` ranks."""
    found = counted(clients, processes, seconds)
    print(f"{clients} clients in {processes} processes: all were connected after {found.connected:.1f} s")
    print(f"{found.rate:,.0f} additions a second, {1e6 * found.each:.0f} us of the store's processor each")
    print(f"the slowest addition took {1e3 * found.longest:.0f} ms")
    with tempfile.TemporaryDirectory() as place:
        spent = merged(clients, images, Path(place) / "run")
    print(f"merging {clients} files with {images} records: {spent:.2f} s of the processor")


# --- measure


def patchcert(*words: object) -> None:
    """Run a command of patchcert with one thread a process."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "patchcert_cli", *map(str, words)], env=variables, check=True, stdout=subprocess.DEVNULL
    )


def certified(model: str, limit: int, processes: int, out: Path) -> float:
    """Seconds of certifying ``limit`` images, as the run reports them."""
    patchcert("certify", model, "--patch", 5, "--limit", limit, "--processes", processes, "--out", out)
    return float(files.read_json(out / files.RESULT)["seconds"])


def trained(recipe: str, steps: int, data: Sequence[str], processes: int, out: Path) -> float:
    """Seconds of a training step, after some that are not counted."""
    words = ["--recipe", recipe, "--epochs", 2, "--steps", f"3,{steps}", "--validation", 20, "--processes", processes]
    patchcert("train", *words, *data, "--out", out)
    rows = [json.loads(line) for line in (out / files.METRICS).read_text().splitlines()]
    return float(rows[-1]["seconds"]) / steps


@contextmanager
def folders() -> Iterator[Callable[[], Path]]:
    """New folders, one for each call, that are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="scaling-") as place:
        number = iter(range(1000))
        yield lambda: Path(place) / str(next(number))


def apart(run: Callable[[int, Path], float], new: Callable[[], Path]) -> float:
    """Seconds of the slower one of two single processes that do the same work at once."""
    with ThreadPoolExecutor(2) as pool:
        return max(pool.map(lambda out: run(1, out), [new(), new()]))


def measure(limit: int, bounded: int, steps: int, repeats: int, data: Sequence[str], only: str) -> None:
    """Print the ratio of 1 and 2 processes for two ways to certify, and for training: those with ``only`` in their names."""
    work: dict[str, Callable[[int, Path], float]] = {
        f"certify cifar-masked-cnn, {limit} images": lambda n, out: certified("cifar-masked-cnn", limit, n, out),
        f"certify cifar-ibp-p5, {bounded} images": lambda n, out: certified("cifar-ibp-p5", bounded, n, out),
        f"train cifar-masked-cnn, a step of {steps}": lambda n, out: trained("cifar-masked-cnn", steps, data, n, out),
    }
    with folders() as new:
        for name, run in work.items():
            if only not in name:
                continue
            times = [(run(1, new()), run(2, new()), apart(run, new)) for _ in range(repeats)]
            one, two, twice = (statistics.median(column) for column in zip(*times, strict=True))
            each = ", ".join(f"{a / b:.2f}" for a, b, _ in times)
            print(f"{name}: {one:.2f} s with 1 process, {two:.2f} s with 2: {one / two:.2f} times ({each})", flush=True)
            print(f"  two processes that share nothing do {2 * one / twice:.2f} times the work of one", flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser()
    commands = found.add_subparsers(dest="what", required=True)
    of = commands.add_parser("measure")
    of.add_argument("--limit", type=int, default=150, help="images for masked predictions")
    of.add_argument("--bounded", type=int, default=1000, help="images for bounds, better a multiple of 128")
    of.add_argument("--steps", type=int, default=10)
    of.add_argument("--repeats", type=int, default=3)
    of.add_argument("--data-dir", help="where CIFAR-10 is, for training")
    of.add_argument("--only", default="", help="only what has this in its name: masked, ibp or train")
    of = commands.add_parser("simulate")
    of.add_argument("--images", type=int, default=50_000)
    of.add_argument("--workers", default="8,64,512")
    of.add_argument("--seed", type=int, default=0)
    of = commands.add_parser("counter")
    of.add_argument("--clients", type=int, default=512)
    of.add_argument("--processes", type=int, default=32)
    of.add_argument("--images", type=int, default=50_000)
    of.add_argument("--seconds", type=float, default=5.0)
    return found


def main(words: Sequence[str] | None = None) -> None:
    given = parser().parse_args(words)
    if given.what == "measure":
        data = ["--data-dir", given.data_dir] if given.data_dir else []
        measure(given.limit, given.bounded, given.steps, given.repeats, data, given.only)
    elif given.what == "simulate":
        simulate(given.images, [int(size) for size in given.workers.split(",")], given.seed)
    else:
        counter(given.clients, given.processes, given.images, given.seconds)


if __name__ == "__main__":
    main()
