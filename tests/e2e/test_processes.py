"""Real processes: started by ``--processes`` and by torchrun, interrupted and killed. None is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

MODEL = "mnist-bagcert"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATCHCERT_MEETING_SECONDS": "60"}
TIMES = ("seconds", "images_per_second", "records", "command")


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test starts; whatever happens, they and their ranks are gone afterwards."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(started: list[subprocess.Popen[str]], *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *map(str, words)]
    started.append(
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
        )
    )
    return started[-1]


def ranks(out: Path) -> list[int]:
    """The process numbers of the ranks that write to a run folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                ranked = b"\0LOCAL_RANK=" in (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(out).encode() in words and ranked:
                found.append(int(entry.name))
    return found


def count(out: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in out.glob("records*.jsonl"))


def until_more_records(out: Path, process: subprocess.Popen[str], than: int = 0) -> None:
    for _ in range(3000):
        with suppress(FileNotFoundError):  # merged between two looks
            if count(out) > than:
                return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no record after five minutes")


def test_two_processes_write_what_one_does(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    common = ["patchcert_cli", "certify", MODEL, "--patch", "5", "--limit", "40", "--json", "-", "--out"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    found = [start(started, *common, folders[0]), start(started, *launcher, *common, folders[1])]
    outputs = [process.communicate(timeout=240) for process in found]
    assert [process.returncode for process in found] == [0, 0], outputs
    results = [json.loads(out) for out, _ in outputs]  # printed once, by the first rank
    assert (folders[0] / "records.jsonl").read_bytes() == (folders[1] / "records.jsonl").read_bytes()
    assert [{name: one[name] for name in one if name not in TIMES} for one in results[:1]] == [
        {name: one[name] for name in one if name not in TIMES} for one in results[1:]
    ]
    assert sorted(path.name for path in folders[1].iterdir()) == [".lock", "manifest.json", "records.jsonl", "result.json"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds ranks in /proc")
def test_a_killed_rank_is_one_line_and_the_run_goes_on(started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["patchcert_cli", "attack", "mnist-ibp-p5", "--patch", "5", "--batch-size", "1", "--no-certify", "--out", out]
    process = start(started, *words, "--processes", "2")
    until_more_records(out, process)
    for number in ranks(out)[1:]:
        os.kill(number, signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 7
    lines = errors.splitlines()
    assert [line for line in lines if "killed" in line] and "Traceback" not in errors
    assert lines[-1].startswith("hint: The same command resumes")
    assert not ranks(out)
    kept = count(out)
    assert 0 < kept < 1000
    again = start(started, *words, "--processes", "2")
    until_more_records(out, again, kept)
    again.send_signal(signal.SIGINT)  # as Ctrl-C does to the launcher
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 130, errors
    assert "resuming" in errors and "error[130]: interrupted at" in errors and "Traceback" not in errors
    assert not ranks(out)
    assert count(out) > kept


def test_a_rendezvous_that_never_comes_is_one_line(started: list[subprocess.Popen[str]]) -> None:
    words = ["patchcert_cli", "certify", MODEL, "--patch", "5", "--limit", "4"]
    lonely = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "PATCHCERT_MEETING_SECONDS": "1"}
    found = subprocess.run(
        [sys.executable, "-m", *words], env=ENVIRONMENT | lonely, capture_output=True, text=True, timeout=120, check=False
    )
    errors = [line for line in found.stderr.splitlines() if line.startswith(("error", "hint"))]
    assert found.returncode == 7 and not found.stdout
    assert errors[0].startswith("error[7]: rank 1 of 2 does not reach 127.0.0.1:9 within 1 s") and len(errors) == 2
    assert "Traceback" not in found.stderr


LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; from patchcert_cli.parallel import workers; "
    "workers.end_with_launcher(0.05); print('up', flush=True); time.sleep(300)"])
time.sleep(300)
"""


def test_no_rank_outlives_a_launcher_that_is_killed(started: list[subprocess.Popen[str]]) -> None:
    started.append(subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True))
    output = started[-1].stdout
    assert output is not None and output.readline() == "up\n"
    started[-1].kill()
    assert output.read() == ""  # at the end of the last process that has it
