"""Checkpoints: only intact safetensors that fit their configuration are loaded, and nothing is ever unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from patchcert_cli import checkpoint, defenses
from patchcert_cli.errors import IntegrityError, MachineError
from patchcert_cli.storage import files
from patchcert_cli.training.recipe import Recipe

CONFIG = Recipe("patch:5x5", network_options={"hidden": [12]}).config()


def with_(**entries: object) -> dict[str, object]:
    """The configuration with other entries in what it deploys."""
    return {**CONFIG, "deployed": {**CONFIG["deployed"], **entries}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save_defense(tmp_path / "run", defenses.build(CONFIG["deployed"]), CONFIG)
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
        (json.dumps(with_(network={})), "does not describe a defense"),
        (json.dumps(with_(network={"name": "mlp", "options": {"depth": 3}})), "cannot be built"),
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


def test_the_bytes_that_are_hashed_are_the_bytes_that_are_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are swapped as soon as they were read or hashed: either the old ones load, or nothing does."""
    other = defenses.build(CONFIG["deployed"])
    checkpoint.save_defense(folder.parent / "other", other, {**CONFIG, "threat": "patch:2x2"})
    digest, config = files.sha256(folder / files.WEIGHTS), files.sha256(folder / files.CONFIG)
    wanted, _ = checkpoint.load_defense(folder)
    reads: list[str] = []
    read_bytes, hashed = Path.read_bytes, files.sha256

    def swapped(path: Path) -> None:
        if path.parent == folder and path.name in (files.WEIGHTS, files.CONFIG):
            reads.append(path.name)
            path.write_bytes(read_bytes(folder.parent / "other" / path.name))

    def read_then_swap(path: Path) -> bytes:
        content = read_bytes(path)
        swapped(path)
        return content

    def hash_then_swap(path: Path) -> str:
        found = hashed(path)
        swapped(path)
        return found

    monkeypatch.setattr(Path, "read_bytes", read_then_swap)
    monkeypatch.setattr(files, "sha256", hash_then_swap)
    loaded, said = checkpoint.load_defense(folder, expected_sha256=digest, expected_config=config)
    assert said == CONFIG and sorted(reads) == [files.CONFIG, files.WEIGHTS], "each file is read once"
    for mine, theirs in zip(loaded.state_dict().values(), wanted.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    for expected in ({"expected_sha256": digest}, {"expected_config": config}):
        with pytest.raises(IntegrityError, match="but its card says"):
            checkpoint.load_defense(folder, **expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (json.dumps({**CONFIG, "note": "x" * (1 << 20)}), "A configuration has at most"),
        ("9" * 5000, "not readable JSON"),
    ],
    ids=["lists", "tables", "bytes", "digits"],
)
def test_a_configuration_that_is_a_burden_is_refused_at_once(folder: Path, content: str, said: str) -> None:
    _refused(folder, content, said)


def _refused(folder: Path, content: str, said: str) -> None:
    (folder / files.CONFIG).write_text(content)
    with pytest.raises(IntegrityError, match=said) as caught:
        checkpoint.load_defense(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(folder))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"std": [0.0]}, "std above 0"),
        ({"std": [-1.0]}, "std above 0"),
        ({"std": [float("nan")]}, "std is .*nan.*, which is not finite"),
        ({"mean": [float("inf")]}, "mean is .*inf.*, which is not finite"),
        ({"hidden": [16] * 20_000}, "hidden has 20000 entries, and 256 are allowed"),
        ({"hidden": [100_000, 100_000]}, "its network has [0-9]+ numbers"),
        ({"hidden": [10**9]}, "its network has [0-9]+ numbers"),
        ({"hidden": [10**30]}, "does not describe a defense|cannot be built"),
        ({"hidden": [-5]}, "does not describe a defense|cannot be built"),
        ({"hidden": "wide"}, "does not describe a defense|cannot be built"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_that_nobody_trained_with_are_refused_at_once(folder: Path, options: dict[str, object], said: str) -> None:
    network = CONFIG["deployed"]["network"]
    _refused(folder, json.dumps(with_(network={**network, "options": {**network["options"], **options}})), said)


@pytest.mark.parametrize("shape", [[1, 28], [1, 28, 10**9], [1, 28, -28], "big", [1, 28, 28.0]], ids=str)
def test_image_shapes_that_are_none_are_refused(folder: Path, shape: object) -> None:
    _refused(folder, json.dumps(with_(input_shape=shape)), "input_shape is .*, not three whole numbers")


FORMER: dict[str, dict[str, Any]] = {  # format 1: by defense, what was deployed besides the network, and where it was
    "bagcert": {"options": {"margin": 0.5, "aggregate": "weighted", "shift": 4}},
    "clipped": {"options": {"clip": "linear", "slope": 0.5, "middle": 2.0, "flip": True}},
    "ibp": {"options": {"linear": 0.0}},
    "minority": {"masks": {"covers": ["patch:2x2"]}, "labels": "bfloat16", "threshold": 0.25, "options": {"threshold": 0.9}},
    "patchcleanser": {"masks": {"covers": ["patch:2x2"]}, "labels": "bfloat16", "fill": [0.5], "options": {"labels": "float32"}},
    "patchguard": {"masks": {"covers": ["patch:2x2"]}, "options": {"covers": "5", "share": 0.25}},
    "smoothing": {"options": {"ablation": "row", "band": 5, "threshold": 0.3, "vote": "threshold", "shift": 4}},
}
NOW: dict[str, dict[str, Any]] = {
    "bagcert": {"aggregate": "weighted"},
    "clipped": {"clip": "linear", "slope": 0.5, "middle": 2.0},
    "ibp": {},
    "minority": {"masks": {"covers": ["patch:2x2"]}, "prediction_dtype": "bfloat16", "threshold": 0.25},
    "patchcleanser": {"masks": {"covers": ["patch:2x2"]}, "prediction_dtype": "bfloat16", "fill": [0.5]},
    "patchguard": {"covers": ["patch:2x2"], "share": 0.25},
    "smoothing": {"ablation": "row", "band": 5, "threshold": 0.3, "vote": "threshold"},
}


@pytest.mark.parametrize("kind", sorted(FORMER))
def test_the_former_format_is_converted(kind: str) -> None:
    common = {"defense": kind, "input_shape": [1, 8, 8], "classes": ["a", "b"], "network": {"name": "mlp", "options": {}}}
    beside = {"dataset": "mnist", "threat": "patch:2x2", "recipe": {"threat": "patch:2x2"}, "names": [["a"], ["b"]]}
    for given in ({"format": 1}, {}):
        now = checkpoint.upgraded({**given, **common, **beside, **FORMER[kind]}, Path("config.json"))
        assert now == {"format": 2, "deployed": {**common, **NOW[kind]}, **beside}
    assert checkpoint.upgraded(now, Path("config.json")) == now


def test_every_published_configuration_is_read() -> None:
    paths = sorted((Path(__file__).parents[1] / "zoo").glob("*/config.json"))
    assert len(paths) > 10
    for path in paths:
        deployed = checkpoint.upgraded(files.read_json(path), path)["deployed"]
        if deployed["input_shape"] != [3, 224, 224]:  # large networks take their time
            assert defenses.by_name(deployed["defense"]).from_config(deployed).classes == tuple(deployed["classes"])


def test_an_unknown_format_or_entry_is_refused_in_one_line(folder: Path) -> None:
    _refused(folder, json.dumps({**CONFIG, "format": 3}), "is a configuration of format 3")
    _refused(folder, json.dumps(with_(depth=3)), "ibp cannot be built: depth is not a known entry")
