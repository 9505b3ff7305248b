"""Checkpoints: ``config.json`` and ``model.safetensors``, which together rebuild a defense exactly. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from patchcert_cli import cards, defenses
from patchcert_cli.defenses.base import Defense
from patchcert_cli.errors import IntegrityError
from patchcert_cli.files import CONFIG, INDEX, WEIGHTS, read_json, refuse_pickle, shard, write_atomically, write_json

HALF = (torch.float16, torch.bfloat16)
SHARD_BYTES = 5_000_000_000  # the most that one weight file holds
MOST_SHOWN = 4  # things wrong with weights that an error lists


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


def save_defense(folder: Path, defense: Defense, config: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``config.json`` and ``model.safetensors``, or several files and their index if they exceed ``shard_bytes``."""
    write_json(folder / CONFIG, config)
    stored = getattr(torch, config.get("recipe", {}).get("stored", "float32"))
    tensors = {name: _stored(tensor, stored) for name, tensor in defense.state_dict().items()}
    parts = _shards(tensors, shard_bytes)
    note = {"defense": config["defense"]}
    for number, part in enumerate(parts, 1):
        write_atomically(folder / (shard(number, len(parts)) if len(parts) > 1 else WEIGHTS), pack(part, note))
    if len(parts) > 1:
        held = {name: shard(number, len(parts)) for number, part in enumerate(parts, 1) for name in part}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": held})


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """The tensors in order, in as few parts of at most ``most`` bytes as that allows; a larger tensor is alone."""
    parts: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if parts[-1] and filled + tensor.nbytes > most:
            parts.append({})
            filled = 0
        parts[-1][name] = tensor
        filled += tensor.nbytes
    return parts


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder. Of an index only the names of tensors count: the files are those that were hashed."""
    names = [name for name in cards.weights_of(folder) if name != INDEX]
    tensors: dict[str, Tensor] = {}
    for name in names:
        part, _ = unpack(folder / name)
        twice = tensors.keys() & part.keys()
        if twice:
            raise IntegrityError(f"'{folder}' holds {min(twice)} in several files.")
        tensors |= part
    if len(names) > 1 and set(read_json(folder / INDEX).get("weight_map", ())) != tensors.keys():
        raise IntegrityError(f"'{folder / INDEX}' lists other tensors than its files hold.")
    return tensors


def _stored(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """A tensor in fewer bits, if that does not change it."""
    short = tensor.to(kind) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
    return short if torch.equal(short.to(tensor), tensor) else tensor


def load_defense(folder: Path, *, device: str = "cpu", expected_sha256: str | None = None) -> tuple[Defense, dict[str, Any]]:
    """Rebuild a defense from a folder: ``(defense in eval mode, configuration)``.

    Raises:
        IntegrityError: a file is missing or damaged, a hash differs, or names or shapes of weights do not fit the configuration.
    """
    files = cards.weights_of(folder) if folder.is_dir() else []
    if not files:
        for candidate in sorted(folder.iterdir()) if folder.is_dir() else []:
            refuse_pickle(candidate)
        raise IntegrityError(f"'{folder}' holds no {WEIGHTS};", hint="give a folder that patchcert train or zoo pull made.")
    config = read_json(folder / CONFIG)
    actual = cards.weights_sha256({name: cards.File.of(folder / name) for name in files})
    if expected_sha256 not in (None, actual):
        raise IntegrityError(
            f"{folder / files[0]}: sha256 {actual[:12]}… but its card says {str(expected_sha256)[:12]}….",
            hint="Fetch it again with: patchcert zoo pull NAME, or train it again.",
        )
    try:
        defense = defenses.build(config)
    except (KeyError, TypeError, ValueError) as problem:
        raise IntegrityError(f"'{folder / CONFIG}' does not describe a defense: {problem!r}.") from problem
    defense.load_state_dict(weights_for(defense, folder), strict=True)  # half precision widens without a change
    defense = defense.to(torch.device(device)).eval()
    defense.test_once()
    return defense, config


def weights_for(defense: Defense, folder: Path) -> dict[str, Tensor]:
    """The weights of a folder, for a defense that has such ones.

    Raises:
        IntegrityError: names, shapes or types are not those of the defense.
    """
    tensors = _weights(folder)
    check_fit(defense.state_dict(), tensors, f"'{folder / cards.weights_of(folder)[0]}' does not fit its {CONFIG}")
    return tensors


def check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], otherwise: str, *, hint: str = "") -> None:
    """Raise :class:`IntegrityError`, which begins with ``otherwise``, unless names, shapes and kinds of tensors agree."""
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
        more = f" and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise IntegrityError(f"{otherwise}: {'; '.join(problems[:MOST_SHOWN])}{more}.", hint=hint)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, kinds, shapes and values of tensors, which identifies weights that are in no file."""
    content = hashlib.sha256()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        content.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        content.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
