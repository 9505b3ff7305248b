"""From pickles of weights to safetensors: what is found inside, what is refused, and that no code runs."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import check_refused

from patchcert_cli import checkpoint
from patchcert_cli.classifiers import convert
from patchcert_cli.errors import DataError, IntegrityError, UsageError
from patchcert_cli.storage import files

WEIGHTS = OrderedDict({"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.tensor([1.0, -1.0])})


def prefixed(prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("saved", "notes"),
    [
        (WEIGHTS, ()),
        (
            {"state_dict": prefixed("module."), "epoch": 3},
            ("taken from its entry state_dict", "prefix module. taken off every name"),
        ),
        ({"model": {**prefixed("_orig_mod.module."), "epoch": 3}}, ("left out, since they are not tensors: epoch",)),
        ({"model": {"state_dict": WEIGHTS}}, ("taken from its entry model.state_dict",)),
        ({"model_ema": prefixed("model."), "optimizer": {"lr": 0.1}}, ("taken from its entry model_ema",)),
    ],
)
def test_weights_are_found_inside_wrappers(tmp_path: Path, saved: Any, notes: tuple[str, ...]) -> None:
    torch.save(saved, tmp_path / "w.pth")
    found = convert.read(tmp_path / "w.pth")
    assert (set(notes) <= set(found.notes) and found.tensors.keys() == WEIGHTS.keys()) or "epoch" in str(found.notes)
    convert.write(found, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="is a safetensors file already."):
        convert.read(tmp_path / "w.safetensors")
    tensors, _ = checkpoint.unpack(tmp_path / "w.safetensors")
    assert tensors.keys() == WEIGHTS.keys() and all(torch.equal(tensors[name], WEIGHTS[name]) for name in WEIGHTS)


def test_several_sets_of_weights_are_asked_for_by_name(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "ema": {name: value + 1 for name, value in WEIGHTS.items()}}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="holds weights as model and as ema."):
        convert.read(tmp_path / "w.pth")
    assert float(convert.read(tmp_path / "w.pth", "ema").tensors["fc.bias"][0]) == 2.0
    with pytest.raises(UsageError, match="has no entry 'emma' with weights. It has model, ema"):
        convert.read(tmp_path / "w.pth", "emma")


class Evil:
    def __reduce__(self) -> Any:
        return (Path("ran").touch, ())


def test_code_in_a_pickle_is_never_run(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "callback": Evil()}, tmp_path / "w.pth")
    with pytest.raises(IntegrityError, match="holds objects of a program.*, not only tensors: no code of it was run") as caught:
        convert.read(tmp_path / "w.pth")
    assert caught.value.code == 5 and "\n" not in str(caught.value) and not Path("ran").exists()


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save(WEIGHTS, tmp_path / "whole.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:300])
    for name, kind, said in (
        ("list.pth", UsageError, "holds no state dict, but a list"),
        ("torn.pth", IntegrityError, "is not an intact file of torch.save"),
        ("none.pth", IntegrityError, "is missing"),
    ):
        with pytest.raises(kind, match=said):
            convert.read(tmp_path / name)


def test_the_command_says_what_it_did_and_replaces_nothing(patchcert, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.save({"state_dict": prefixed("module.")}, tmp_path / "w.pth")
    done = patchcert("convert", "w.pth", "--to", "w.safetensors")
    assert done.code == 0 and done.err.splitlines() == ["taken from its entry state_dict", "prefix module. taken off every name"]
    assert done.out == f"w.safetensors: 2 tensors, 8 numbers, sha256 {files.sha256(tmp_path / 'w.safetensors')}\n"
    again = patchcert("convert", "w.pth", "--to", "w.safetensors")
    assert again.code == 6
    check_refused(again.err, 6, "'w.safetensors' exists", "--force")
    assert patchcert("convert", "w.pth", "--to", "w.safetensors", "--force").code == 0
    check_refused(patchcert("convert", "w.pth", "--to", "w.pt").err, 2, "--out 'w.pt' must end in .safetensors")
    with pytest.raises(DataError):
        convert.check(tmp_path / "w.safetensors")
