"""Files that a user names: refused before anything is computed, and nothing is replaced that is no regular file."""

from __future__ import annotations

import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from patchcert_cli.errors import MachineError, PatchcertError, UsageError
from patchcert_cli.storage import files, locks


def test_a_file_that_can_be_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new.json", "a/b/new.json", "x" * (255 - len(files.PARTIAL))):
        files.check_file(tmp_path / name, "--json")
    files.check_file(Path("/dev/null"), "--json")
    files.check_folder(tmp_path / "runs" / "new", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"] and (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (".", 2, "is a folder. Name a file"),
        ("file/below.json", 2, "file' is a file. Name a folder that can hold it"),
        ("x" * 300, 2, "too long a name. Use at most 247 bytes"),
        ("new/" + "é" * 130 + "/r.json", 2, "too long a name"),
        ("/proc/x", 7, "nothing can be written into '/proc' .* Name another place"),
        ("/proc/self/x/y", 7, "nothing can be written into '/proc/"),
    ],
)
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_what_cannot_be_written_is_one_line(name: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PatchcertError, match=said) as caught:
        files.check_file(tmp_path / name, "--json")
    assert caught.value.code == code and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("file", 2, "is a file. Name a folder"),
        ("file/runs/x", 2, "file' is a file"),
        ("pipe", 2, "is a file. Name a folder"),
        ("x" * 300, 2, "too long a name. Use at most 255 bytes"),
        ("/proc/x", 7, "nothing can be written into"),
    ],
)
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_folder_that_cannot_be_written_is_one_line(name: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PatchcertError, match=said) as caught:
        files.check_folder(tmp_path / name, "--out")
    assert caught.value.code == code and (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_may_not_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o500)
    for check in (files.check_file, files.check_folder):
        with pytest.raises(MachineError, match="nothing can be written into .*shut"):
            check(tmp_path / "shut" / "x", "--out")


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, target in (("old", tmp_path / "there" / "old.json"), ("dangling", Path("there") / "new.json")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "there" / "old.json").write_text("old")
    for name in ("old", "dangling"):
        files.check_file(tmp_path / name, "--json")
        files.write_named(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink() and (tmp_path / name).read_bytes() == b"new"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new.json", "old.json"]


def test_a_pipe_gets_the_content_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    files.check_file(pipe, "--json")
    files.write_named(pipe, b"content")
    reader.join(timeout=60)
    assert got == [b"content"] and stat.S_ISFIFO(pipe.lstat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    with pytest.raises(MachineError, match="not a regular file"):
        files.write_atomically(pipe, b"content")
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_process_substitution_gets_the_content(tmp_path: Path) -> None:
    read, write = os.pipe()
    path = Path(f"/dev/fd/{write}")
    files.check_file(path, "--json")
    files.write_named(path, b"content")
    os.close(write)
    assert os.read(read, 100) == b"content"
    os.close(read)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_a_device_is_written_to_and_stays_a_device(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No space left on device. Free some space"):
        files.write_named(Path("/dev/full"), b"content")
    files.write_named(Path("/dev/null"), b"content")
    assert all(stat.S_ISCHR(Path(name).lstat().st_mode) for name in ("/dev/full", "/dev/null"))
    main, other = os.openpty()
    terminal = Path(os.ttyname(other))
    files.check_file(terminal, "--json")
    files.write_named(terminal, b"content\n")
    assert os.read(main, 100).strip() == b"content" and stat.S_ISCHR(terminal.lstat().st_mode)
    for number in (main, other):
        os.close(number)


def test_what_stdout_goes_to_is_no_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out.txt").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(UsageError, match="is what stdout goes to. Name another file"):
            files.check_file(tmp_path / "out.txt", "--json")
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(UsageError, match="is stdout, which gets the table"):
            files.check_file(Path(f"/dev/fd/{write}"), "--json")
    os.close(read)


def test_clearing_a_folder_keeps_the_folder_and_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "here").symlink_to(tmp_path / "run")
    locks.clear(tmp_path / "here")
    assert not list((tmp_path / "run").iterdir()) and (tmp_path / "here").is_symlink()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
