"""Ranks of one job: the same bytes for any number of them, and one clear line for what cannot work.

Ranks are threads that share a store; tests/e2e/test_processes.py starts real processes.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from patchcert_cli import attacks
from patchcert_cli.errors import IntegrityError, Interrupted, MachineError, PatchcertError, UsageError
from patchcert_cli.evaluation import evaluate, run_folder
from patchcert_cli.evaluation.pace import Pace
from patchcert_cli.evaluation.task import EvaluationTask
from patchcert_cli.parallel import workers
from patchcert_cli.parallel.workers import Workers
from patchcert_cli.progress import Silent
from patchcert_cli.storage import files
from tests.evaluation import test_evaluate

SEEDING = threading.Lock()  # threads share the generator that weights are drawn from


def make_task(count: int = 40) -> EvaluationTask:
    with SEEDING:
        task = test_evaluate.make_task(count)
    task.model.defense.group = lambda claims: 4  # type: ignore[method-assign]
    return task


TIMES = ("seconds", "images_per_second", "resumed", "records")


def together(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` gives on each of ``size`` ranks; of a rank that fails its error."""
    store, found = HashStore(), [None] * size

    def rank(number: int) -> None:
        workers.use(Workers(number, size, store))
        try:
            found[number] = work(number)
        except BaseException as problem:
            found[number] = problem
        finally:
            workers.use(None)

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a rank waits for ever"
    return found


def timeless(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in TIMES}


def content(folder: Path) -> bytes:
    assert not list(folder.glob("records-*")), "files of ranks are left"
    return (folder / files.RECORDS).read_bytes()


def test_any_number_of_ranks_writes_the_same_bytes(tmp_path: Path) -> None:
    alone = evaluate.certify(make_task(), tmp_path / "alone")
    for size in (2, 3):
        folder = tmp_path / str(size)
        found = together(size, lambda rank, folder=folder: evaluate.certify(make_task(), folder))
        assert content(folder) == content(tmp_path / "alone")
        assert all(timeless(one) == timeless(alone) for one in found)
        assert timeless(files.read_json(folder / files.RESULT)) == timeless(alone)


def test_attacks_are_shared_alike(tmp_path: Path) -> None:
    task = make_task(count=9)
    attacker = attacks.for_threat(task.threat, "patch_rs", seed=1, budget=20)

    def attack(folder: Path) -> dict[str, Any]:
        return evaluate.attack(make_task(count=9), attacker, {"name": "x"}, folder)

    alone = attack(tmp_path / "alone")
    found = together(2, lambda rank: attack(tmp_path / "two"))
    assert content(tmp_path / "two") == content(tmp_path / "alone")
    assert [timeless(one) for one in found] == [timeless(alone)] * 2


def test_ranks_keep_the_adversarial_images_that_one_process_keeps(tmp_path: Path) -> None:
    attacker = attacks.for_threat(make_task(count=8).threat, steps=2, restarts=0, locations=1)

    def attack(run: Path, folder: Path) -> dict[str, Any]:
        return evaluate.attack(make_task(count=8), attacker, {}, run, save=folder)

    alone = attack(tmp_path / "alone", tmp_path / "kept")
    first, _ = together(2, lambda _: attack(tmp_path / "two", tmp_path / "shared"))
    assert first["saved"] == alone["saved"] | {"folder": str(tmp_path / "shared")} and alone["saved"]["images"] > 0
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "shared").iterdir()} == kept
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("of somebody")
    refused = together(2, lambda _: attack(tmp_path / "three", tmp_path / "other"))
    assert all(isinstance(one, UsageError) and "--save" in one.message for one in refused)


class Stop(Silent):
    """Interrupts a run once some images are done."""

    def __init__(self, at: int) -> None:
        self.at = at

    def update(self, done: int, total: int, text: str) -> None:
        if done >= self.at:
            raise KeyboardInterrupt


def test_a_stopped_job_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    evaluate.certify(make_task(), tmp_path / "alone")
    for following in (1, 3):
        folder = tmp_path / str(following)
        stopped = together(2, lambda _, to=folder: evaluate.certify(make_task(), to, progress=Stop(5), clock=lambda: 0.0))
        assert any(isinstance(one, Interrupted) for one in stopped)
        kept = sum(len(path.read_text().splitlines()) for path in folder.glob("records*.jsonl"))
        assert 5 <= kept < 40
        torn = next(folder.glob("records-*.jsonl"))
        torn.write_text(torn.read_text() + '{"index": 39, "lab')
        if following == 1:
            found = [evaluate.certify(make_task(), folder)]
        else:
            found = together(3, lambda _, to=folder: evaluate.certify(make_task(), to))
        assert {one["resumed"] for one in found} == {kept}
        assert content(folder) == content(tmp_path / "alone")


def test_ranks_take_images_from_one_counter_and_a_slow_one_takes_fewer(tmp_path: Path) -> None:
    slow = threading.Event()
    made: dict[int, int] = {0: 0, 1: 0}

    def work(rank: int) -> dict[str, Any]:
        task = make_task()
        real = task.model.defense.certify_claims

        def counted(x: Any, claims: Any) -> Any:
            made[rank] += len(x)
            if rank == 1:
                slow.wait(20)  # until the other one has all the rest
            found = real(x, claims)
            if made[0] + made[1] == 40:
                slow.set()
            return found

        task.model.defense.certify_claims = counted  # type: ignore[method-assign]
        return evaluate.certify(task, tmp_path / "run", clock=lambda: 0.0)

    together(2, work)
    assert sum(made.values()) == 40 and made[1] < 20
    assert [json.loads(line)["index"] for line in content(tmp_path / "run").splitlines()] == make_task().images.index.tolist()


def test_shares_get_small_towards_the_end_in_whole_units() -> None:
    pace = Pace(64, unit=4)
    pace.took(64, 0.01)
    assert pace.size == 64
    shares, left = [], 200
    while left > 0:
        shares.append(pace.share(left, 2))
        left -= shares[-1]
    assert all(share % 4 == 0 for share in shares) and shares[0] == 32 and shares[-1] == 4
    assert pace.share(1, 512) == 4


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda task: replace(task, model=replace(task.model, sha256="1" * 64)), "rank 1 has another model_sha256 than rank 0"),
        (lambda task: make_task(count=39), "rank 1 has another data_sha256 than rank 0"),
    ],
)
def test_ranks_that_differ_are_refused_before_anything_is_written(
    tmp_path: Path, other: Callable[[EvaluationTask], EvaluationTask], message: str
) -> None:
    def work(rank: int) -> Any:
        return evaluate.certify(other(make_task()) if rank == 1 else make_task(), tmp_path / "run")

    found = together(2, work)
    assert all(isinstance(one, UsageError) and message in one.message for one in found)
    assert not (tmp_path / "run").exists()


def test_an_error_of_the_first_rank_reaches_all(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    found = together(2, lambda rank: evaluate.certify(make_task(), tmp_path / "mine"))
    assert all(isinstance(one, UsageError) and "not empty" in one.message for one in found)


def test_ranks_that_do_not_share_the_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "VISIBLE", 0.05)
    found = together(2, lambda rank: evaluate.certify(make_task(), tmp_path / str(rank)) if rank else first(tmp_path))
    assert isinstance(found[1], MachineError) and "does not see the run folder" in found[1].message


def test_a_file_that_becomes_visible_late_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a.json").write_text("{}")

    def late(rank: int) -> None:
        if rank == 0:
            return workers.current().check_shared(tmp_path / "0" / "a.json")
        timer = threading.Timer(0.05, (tmp_path / "1").symlink_to, [tmp_path / "0"])
        timer.start()
        return workers.current().check_shared(tmp_path / "1" / "a.json")

    assert together(2, late) == [None, None]


def test_records_that_become_visible_late_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = run_folder.Run.merge, []

    def merge(self: run_folder.Run) -> None:
        calls.append(1)
        if len(calls) != 2:  # the first one opens the folder, and this is the first after all have finished
            real(self)

    monkeypatch.setattr(run_folder.Run, "merge", merge)
    monkeypatch.setattr(evaluate.time, "sleep", lambda _: None)
    together(2, lambda rank: evaluate.certify(make_task(), tmp_path / "run"))
    assert len(calls) == 3 and len(content(tmp_path / "run").splitlines()) == 40


@pytest.mark.parametrize("name", ["patchcert", "torch"])
def test_ranks_of_other_versions_are_refused(name: str) -> None:
    store = HashStore()
    store.set("about 1", json.dumps({"patchcert": workers.__version__, "torch": str(torch.__version__), name: "0.0"}))
    with pytest.raises(UsageError, match=f"rank 1 has another {name} than rank 0: 0.0, not"):
        Workers(0, 2, store).agree({})


def first(tmp_path: Path) -> Any:
    """Rank 0, which ends as the launcher would end it when rank 1 fails."""

    class Killed(Silent):
        def update(self, done: int, total: int, text: str) -> None:
            raise KeyboardInterrupt

    return evaluate.certify(make_task(), tmp_path / "0", progress=Killed())


def test_different_records_of_one_image_are_refused(tmp_path: Path) -> None:
    evaluate.certify(make_task(), tmp_path / "run")
    (tmp_path / "run" / files.RESULT).unlink()
    lines = (tmp_path / "run" / files.RECORDS).read_text().splitlines()
    (tmp_path / "run" / "records-1.jsonl").write_text(lines[3].replace('"label": ', '"label": 1') + "\n")
    with pytest.raises(IntegrityError, match="another record of image"):
        evaluate.certify(make_task(), tmp_path / "run")


def test_a_store_that_is_gone_is_one_line() -> None:
    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise RuntimeError("Connection reset by peer\nmore")

    with pytest.raises(MachineError, match=r"the store of the job is gone \(Connection reset by peer\)"):
        Workers(1, 2, Gone()).add("x", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"RANK": "2"}, "RANK=2 is not one of WORLD_SIZE=2"), ({"RANK": "x"}, "RANK='x' is not a whole number")],
)
def test_variables_of_a_launcher_that_mean_nothing(given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (usual | given).items():
        monkeypatch.setenv(name, value)
    workers._of_environment.cache_clear()
    with pytest.raises(UsageError, match=message):
        workers.current()
    workers._of_environment.cache_clear()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a port"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is not a port"),
        ({"PATCHCERT_MEETING_SECONDS": "soon", "RANK": "1"}, "PATCHCERT_MEETING_SECONDS=soon is not a number of seconds"),
        ({"PATCHCERT_MEETING_SECONDS": "nan", "RANK": "1"}, "PATCHCERT_MEETING_SECONDS=nan is not a number of seconds"),
    ],
)
def test_numbers_that_cannot_be_are_refused(given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_variables_of_a_launcher_that_mean_nothing(given, message, monkeypatch)


def listening() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def test_a_port_in_use_and_a_host_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCERT_MEETING_SECONDS", "0.2")
    with listening() as server:
        port = server.getsockname()[1]
        with pytest.raises(MachineError, match=f"port {port} is in use"):
            workers._store(0, 2, "127.0.0.1", port)
    with pytest.raises(MachineError, match=rf"rank 1 of 2 does not reach 127\.0\.0\.1:{port} within 0\.2 s \(Connection refused"):
        workers._store(1, 2, "127.0.0.1", port)


def test_a_rank_that_never_begins_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCERT_MEETING_SECONDS", "0.05")
    with pytest.raises(MachineError, match=r"rank 1 of 2 did not begin within 0\.05 s"):
        Workers(0, 2, HashStore()).agree({"models": "x"})


def test_the_rank_that_hosts_the_store_leaves_last() -> None:
    store, ended = HashStore(), []
    host = threading.Thread(target=lambda: (workers.leave(store, 3), ended.append("host")))
    host.start()
    for rank in (1, 2):
        ended.append(rank)
        workers.leave(store, 0)
    host.join(20)
    assert ended == [1, 2, "host"]
    workers.leave(HashStore(), 2, seconds=0.01)  # the other one was killed


def test_a_rank_ends_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[object] = []
    alive = workers.end_with_launcher(0.001, codes.append)
    assert alive.is_alive() and not codes
    monkeypatch.setenv(workers.LAUNCHER, "0")  # the number of no process
    workers.end_with_launcher(0.001, codes.append).join(20)
    assert codes == [MachineError.code]
    monkeypatch.setattr(workers.os, "getppid", lambda: 0)  # as if this one's were gone
    alive.join(20)
    assert codes == [MachineError.code] * 2


def test_errors_keep_their_class_from_rank_to_rank() -> None:
    store = HashStore()
    Workers(0, 2, store).failed("result", MachineError("no room.", hint="Make some."))
    with pytest.raises(MachineError, match=r"no room\. Make some\.") as found:
        Workers(1, 2, store).outcome("result")
    assert isinstance(found.value, PatchcertError) and found.value.code == 7
