"""Checkpoints: only intact safetensors that fit their configuration are loaded, and nothing is ever unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchcert_cli import checkpoint, defenses, files
from patchcert_cli.errors import IntegrityError, MachineError
from patchcert_cli.training.recipe import Recipe

CONFIG = Recipe("patch:5x5", network_options={"hidden": [12]}).config()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save_defense(tmp_path / "run", defenses.build(CONFIG), CONFIG)
    return tmp_path / "run"


def test_a_round_trip_is_exact_and_bytes_are_reproducible(folder: Path) -> None:
    defense, config = checkpoint.load_defense(folder)
    assert config == CONFIG and not defense.training
    checkpoint.save_defense(folder.parent / "again", defense, config)
    assert files.sha256(folder / files.WEIGHTS) == files.sha256(folder.parent / "again" / files.WEIGHTS)


def test_damaged_weights_are_refused(folder: Path) -> None:
    weights = folder / files.WEIGHTS
    whole = weights.read_bytes()
    digest = files.sha256(weights)
    for content in (b"", whole[:1000], whole[:-7], b"<html>404</html>", b"\xff" * 64 + whole[64:]):
        weights.write_bytes(content)
        with pytest.raises(IntegrityError, match="not an intact safetensors file"):
            checkpoint.load_defense(folder)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # one flipped bit loads, so the hash must tell
    with pytest.raises(IntegrityError, match="sha256 .* but its card says"):
        checkpoint.load_defense(folder, expected_sha256=digest)


def test_weights_of_another_shape_or_name_are_refused(folder: Path) -> None:
    tensors = load_file(folder / files.WEIGHTS)
    for change, message in (
        ({"network.2.weight": torch.zeros(13, 784)}, r"shape \(13, 784\) instead of \(12, 784\)"),
        ({"network.2.weight": torch.zeros(12, 784, dtype=torch.float64)}, "float64"),
        ({"extra": torch.zeros(1)}, "unexpected extra"),
    ):
        save_file({**tensors, **change}, folder / files.WEIGHTS)
        with pytest.raises(IntegrityError, match=message):
            checkpoint.load_defense(folder)
    save_file({name: tensor for name, tensor in tensors.items() if "4" not in name}, folder / files.WEIGHTS)
    with pytest.raises(IntegrityError, match=r"missing network\.4\.weight"):
        checkpoint.load_defense(folder)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (Path.write_text, (Path("exploded"), "boom"))


def test_a_pickle_is_refused_unread_under_any_name(folder: Path) -> None:
    (folder / files.WEIGHTS).write_bytes(pickle.dumps({"weight": Bomb()}))
    with pytest.raises(IntegrityError, match="pickle under another name"):
        checkpoint.load_defense(folder)
    torch.save({"weight": torch.zeros(2)}, folder / files.WEIGHTS)
    with pytest.raises(IntegrityError, match="pickle under another name"):
        checkpoint.load_defense(folder)
    (folder / files.WEIGHTS).rename(folder / "model.pth")
    with pytest.raises(IntegrityError, match="looks like a pickle"):
        checkpoint.load_defense(folder)
    assert not Path("exploded").exists()


def test_a_broken_configuration_is_refused(folder: Path) -> None:
    config = folder / files.CONFIG
    for content, message in (
        ("{", "not readable JSON"),
        ("[1]", "does not hold a JSON object"),
        (json.dumps({**CONFIG, "network": {}}), "does not describe a defense"),
        (json.dumps({**CONFIG, "network": {"name": "mlp", "options": {"depth": 3}}}), "cannot be built"),
    ):
        config.write_text(content)
        with pytest.raises(IntegrityError, match=message):
            checkpoint.load_defense(folder)
    config.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        checkpoint.load_defense(folder)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "state"
    files.write_atomically(target, b"old")
    (tmp_path / "state.partial").symlink_to("/dev/full")
    with pytest.raises(MachineError, match="No space left on device"):
        files.write_atomically(target, b"new" * 10_000)
    assert target.read_bytes() == b"old"
