"""Hashes that are remembered: never a stale one, and nothing twice."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import quick_process
import torch
from model_folders import CONFIG, make_run

from patchcert_cli import cards, checkpoint, defenses
from patchcert_cli.catalog import resolve
from patchcert_cli.errors import IntegrityError
from patchcert_cli.storage import checksum_cache, files


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content was read."""
    seen: list[Path] = []
    real = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: seen.append(path) or real(path))
    return seen


def old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock run on: only files of some age are remembered."""
    now = time.time() + 10
    monkeypatch.setattr(time, "time", lambda: now)
    assert path.exists()


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    old(path, monkeypatch)
    assert checksum_cache.sha256(path) == checksum_cache.sha256(path) == files.sha256_of(b"one")
    assert hashed == [path]
    (tmp_path / "link").symlink_to(path)
    assert checksum_cache.sha256(tmp_path / "link") == files.sha256_of(b"one")
    assert hashed == [path]
    checksum_cache.forget(path)
    checksum_cache.sha256(path)
    assert hashed == [path, path]


def test_a_young_file_is_not_remembered(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert checksum_cache.sha256(path) == checksum_cache.sha256(path)
    assert hashed == [path, path]


@pytest.mark.parametrize("how", ["rewritten", "replaced", "with its time set back"])
def test_a_changed_file_is_hashed_again(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    before = path.stat()
    old(path, monkeypatch)
    checksum_cache.sha256(path)
    if how == "replaced":
        (tmp_path / "new").write_bytes(b"two")
        os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(tmp_path / "new", path)
    else:
        time.sleep(0.02)
        path.write_bytes(b"two")
    if how == "with its time set back":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert checksum_cache.sha256(path) == files.sha256_of(b"two")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"identity": 3, "sha256": "x"}'])
def test_damaged_memory_is_none(tmp_path: Path, home: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    old(path, monkeypatch)
    checksum_cache.sha256(path)
    (memory,) = (home / "patchcert" / "sha256").iterdir()
    memory.write_bytes(content)
    assert checksum_cache.sha256(path) == files.sha256_of(b"one")


def test_a_home_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[Path]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hf"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    old(path, monkeypatch)
    assert checksum_cache.sha256(path) == checksum_cache.sha256(path)
    assert len(hashed) == 2


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HF_HOME": "/a/b"},
        {"XDG_CACHE_HOME": "/c"},
        {"HF_HUB_CACHE": "/d"},
        {"HF_HOME": "~/x"},
        {"HF_HOME": "/a", "HF_HUB_CACHE": "~/y"},
    ],
)
def test_the_cache_is_where_the_client_has_it(variables: dict[str, str]) -> None:
    names = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    code = (
        "from huggingface_hub import constants as c; from huggingface_hub.file_download import repo_folder_name as f\n"
        "from patchcert_cli.storage import hub_cache as v\n"
        "assert (str(v.home()), str(v.folder())) == (c.HF_HOME, c.HF_HUB_CACHE)\n"
        "assert v.repository('a/b-c').name == f(repo_id='a/b-c', repo_type='model')"
    )
    done = quick_process.run([""], environment, code)
    assert done.returncode == 0, done.stderr


def test_weights_in_several_files(tmp_path: Path) -> None:
    make_run(tmp_path / "whole")
    torch.manual_seed(3)
    defense = defenses.build(CONFIG["deployed"])
    folder = tmp_path / "parts"
    checkpoint.save_defense(folder, defense, CONFIG, shard_bytes=200)
    names = cards.weights_of(folder)
    assert names[0] == files.INDEX
    assert len(names) > 2
    loaded, _ = checkpoint.load_defense(folder)
    for name, tensor in defense.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    found = resolve.resolve(folder)
    assert found.sha256 == cards.weights_sha256({name: cards.File.of(folder / name) for name in names})
    card = cards.card_for_run(
        CONFIG["recipe"],
        folder,
        network="MLP",
        kept=9,
        validation={"images": 1, "clean": 1, "certified": 0},
        trained={"date": "2026-01-31", "seconds": 1.0, "device": "cpu", "threads": 1, "torch": "2.6.0", "patchcert": "0.1.0"},
        command="x",
    )
    assert set(card.files) == {*names, files.CONFIG}
    assert card.verify(folder) == found.sha256
    assert card.size == sum((folder / name).stat().st_size for name in names)
    with pytest.raises(IntegrityError, match="sha256"):
        checkpoint.load_defense(folder, expected_sha256="0" * 64)
    index = files.read_json(folder / files.INDEX)
    files.write_json(folder / files.INDEX, {**index, "weight_map": {**index["weight_map"], "more": names[1]}})
    with pytest.raises(IntegrityError, match="lists other tensors"):
        checkpoint.load_defense(folder)
    (folder / names[1]).unlink()
    with pytest.raises(IntegrityError, match="holds no model"):
        checkpoint.load_defense(folder)
