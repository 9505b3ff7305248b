"""What checking costs: a pull from the cache, the first and second look at 300 MB, the list of the zoo, many pulls at once.

    python benchmarks/hub.py [--crowd 100]

The Hub is one on the loopback interface (``tests/hub/loopback.py``), the client the real one; times are wall times, the best of
five, and "beyond the interpreter" has the time of ``python -c pass`` taken off.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hub.loopback import LoopbackHub  # type: ignore[import-not-found]
from hub.test_crowds import NAME, PULL, publish  # type: ignore[import-not-found]

from patchcert_cli.storage import checksum_cache, files

REPEATS = 5


def best(action: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def run(variables: dict[str, str], *command: str) -> None:
    subprocess.run([sys.executable, *command], env=variables, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pulls(place: Path, crowd: int) -> None:
    with LoopbackHub() as hub:
        card = publish(hub, place / "zoo")
        variables = hub.environment(place / "hf", PATCHCERT_ZOO=str(place / "zoo"))
        bare = best(lambda: run(variables, "-c", "pass"))
        began = time.perf_counter()
        crowded = [subprocess.Popen([sys.executable, "-c", PULL], env=variables, stdout=-1, stderr=-1) for _ in range(crowd)]
        failed = sum(process.communicate() is None or process.returncode != 0 for process in crowded)
        took = time.perf_counter() - began
        fetched = max(hub.downloads(name) for name in card.files)
        print(f"{crowd} pulls at once: {failed} failed, each file sent {fetched} time(s), {took:.1f} s")
        hub.reset_log()
        cached = best(lambda: run(variables, "-m", "patchcert_cli", "zoo", "pull", NAME))
        print(
            f"pull of a cached model: {cached - bare:.2f} s beyond the interpreter ({bare:.2f} s), {len(hub.requests)} requests"
        )
    plain = {**os.environ, "HF_HUB_OFFLINE": "1"}
    print(f"zoo list: {best(lambda: run(plain, '-m', 'patchcert_cli', 'zoo', 'list')) - bare:.2f} s beyond the interpreter")


def hashes(place: Path) -> None:
    path = place / "large"
    with path.open("wb") as stream:
        for _ in range(300):
            stream.write(os.urandom(1_000_000))
    time.sleep(checksum_cache.MIN_AGE_SECONDS + 0.5)  # only files of some age are remembered
    files.sha256(path)  # from memory, not from the disk
    began = time.perf_counter()
    checksum_cache.sha256(path)
    first = time.perf_counter() - began
    print(f"300 MB: {first:.2f} s the first time, {1000 * best(lambda: checksum_cache.sha256(path)):.2f} ms from then on")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crowd", type=int, default=100)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = str(Path(folder) / "own")
        hashes(Path(folder))
        pulls(Path(folder), chosen.crowd)
