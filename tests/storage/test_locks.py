"""One process at a time in a run folder: asked by real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from patchcert_cli.errors import MachineError, UsageError
from patchcert_cli.evaluation import run_folder
from patchcert_cli.storage import files, locks

OTHER = """
import sys
from pathlib import Path
from patchcert_cli.storage import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def opened(folder: Path, fresh: bool = False) -> dict[int, run_folder.Record]:
    with run_folder.opened(folder, {"kind": "test"}, device="cpu", command="", fresh=fresh) as run:
        run.append([{"index": 7}])
        return run.records


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", OTHER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for fresh in (False, True):
            with pytest.raises(MachineError, match="is being written by another process. Wait until it ends") as caught:
                opened(folder, fresh)
            assert caught.value.code == 7
        assert not (folder / files.RECORDS).exists()
        other.kill()
    assert opened(folder) == {7: {"index": 7}}


def test_a_folder_is_free_again_after_an_error_and_fresh_keeps_only_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), locks.held(folder):
        raise KeyboardInterrupt
    opened(folder)
    (folder / "certify").mkdir()
    (folder / "certify" / "old").write_text("old")
    with run_folder.opened(folder, {"kind": "test"}, device="cpu", command="", fresh=True) as run:
        assert run.records == {}
        assert {path.name for path in folder.iterdir()} == {locks.LOCK, files.MANIFEST}


def test_no_lock_is_left_in_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        opened(tmp_path, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot make"):
        opened(tmp_path / "file" / "run")
