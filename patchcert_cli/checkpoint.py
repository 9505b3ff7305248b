"""Checkpoints: ``config.json`` and ``model.safetensors``, which together rebuild a defense exactly. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from patchcert_cli import defenses
from patchcert_cli.defenses.base import Defense
from patchcert_cli.errors import IntegrityError
from patchcert_cli.files import CONFIG, WEIGHTS, read_json, refuse_pickle, sha256, write_atomically, write_json

HALF = (torch.float16, torch.bfloat16)


def pack(tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> bytes:
    """Safetensors bytes, the same for the same content: all metadata in one JSON string, tensors contiguous on the CPU."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(ready, {"patchcert": json.dumps(note, sort_keys=True)})


def unpack(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`pack` wrote."""
    refuse_pickle(path)
    try:
        tensors = load_file(str(path), device=device)
        with safe_open(str(path), framework="pt") as opened:
            note = json.loads((opened.metadata() or {}).get("patchcert", "{}"))
    except FileNotFoundError as problem:
        raise IntegrityError(f"'{path}' is missing.") from problem
    except (SafetensorError, OSError, ValueError) as problem:
        raise IntegrityError(f"'{path}' is not an intact safetensors file: {str(problem).splitlines()[0]}.") from problem
    return tensors, note


def save_defense(folder: Path, defense: Defense, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors``."""
    write_json(folder / CONFIG, config)
    stored = getattr(torch, config.get("recipe", {}).get("stored", "float32"))
    tensors = {name: _stored(tensor, stored) for name, tensor in defense.state_dict().items()}
    write_atomically(folder / WEIGHTS, pack(tensors, {"defense": config["defense"]}))


def _stored(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """A tensor in fewer bits, if that does not change it."""
    short = tensor.to(kind) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
    return short if torch.equal(short.to(tensor), tensor) else tensor


def load_defense(folder: Path, *, device: str = "cpu", expected_sha256: str | None = None) -> tuple[Defense, dict[str, Any]]:
    """Rebuild a defense from a folder: ``(defense in eval mode, configuration)``.

    Raises:
        IntegrityError: a file is missing or damaged, a hash differs, or names or shapes of weights do not fit the configuration.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        for candidate in sorted(folder.iterdir()) if folder.is_dir() else []:
            refuse_pickle(candidate)
        raise IntegrityError(f"'{folder}' holds no {WEIGHTS};", hint="give a folder that patchcert train or zoo pull made.")
    config = read_json(folder / CONFIG)
    if expected_sha256 is not None and (actual := sha256(weights)) != expected_sha256:
        raise IntegrityError(
            f"{weights}: sha256 {actual[:12]}… but its card says {expected_sha256[:12]}….",
            hint="Fetch it again with: patchcert zoo pull NAME, or train it again.",
        )
    try:
        defense = defenses.build(config)
    except (KeyError, TypeError, ValueError) as problem:
        raise IntegrityError(f"'{folder / CONFIG}' does not describe a defense: {problem!r}.") from problem
    tensors, _ = unpack(weights)
    _check_fit(defense.state_dict(), tensors, weights)
    defense.load_state_dict(tensors, strict=True)  # half precision widens without a change
    defense = defense.to(torch.device(device)).eval()
    defense.self_test()
    return defense, config


def _check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], where: Path) -> None:
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    problems += [
        f"{name} has shape {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems += [
        f"{name} is {given[name].dtype}"
        for name, tensor in expected.items()
        if name in given and given[name].dtype not in (tensor.dtype, *(HALF if tensor.is_floating_point() else ()))
    ]
    if problems:
        raise IntegrityError(f"'{where}' does not fit its {CONFIG}: {'; '.join(problems[:4])}.")
