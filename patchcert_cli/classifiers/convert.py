"""From a pickle of weights, as ``torch.save`` writes them, to safetensors: tensors only, and no code is ever run.

``torch.load(weights_only=True)`` builds tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchcert_cli import checkpoint
from patchcert_cli.errors import DataError, IntegrityError, UsageError
from patchcert_cli.storage import files

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "weights",
)  # entries that hold weights
AVERAGES = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model")  # and averages of them
PREFIXES = (*checkpoint.PREFIXES, "model.", "net.", "network.")


@dataclass(frozen=True)
class Found:
    """Tensors of a file, and lines on what was done to get at them."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def read(path: Path, key: str | None = None) -> Found:
    """The weights in a file of ``torch.save``, under the names that the network has for them.

    Args:
        path: the file.
        key: which entry holds them, where there are several.

    Raises:
        IntegrityError: it is not such a file, is damaged, or holds anything but tensors and plain values.
        UsageError: nothing, or no single entry, of it is a state dict.
    """
    content = load(path)
    held, where, notes = content, "", []
    while (inner := _inner(path, held, key)) is not None:
        where, held, key = f"{where}.{inner}" if where else inner, held[inner], None
    if not isinstance(held, Mapping) or not any(isinstance(value, Tensor) for value in held.values()):
        raise UsageError(
            f"'{path}' holds no state dict, but {_kind(content)}.", hint="Save model.state_dict(), then convert that."
        )
    if where:
        notes.append(f"taken from its entry {where}")
    left = [str(name) for name, value in held.items() if not isinstance(value, Tensor)]
    if left:
        notes.append(f"left out, since they are not tensors: {', '.join(left[:4])}{', ...' if len(left) > 4 else ''}")
    tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    while prefix := next((one for one in PREFIXES if all(name.startswith(one) and name != one for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        notes.append(f"prefix {prefix} taken off every name")
    return Found(tensors, tuple(notes))


def load(path: Path, content: bytes | None = None) -> Any:
    """What ``torch.load(weights_only=True)`` reads from a file, or from its ``content`` if that was read before.

    Raises:
        IntegrityError: it cannot be read so.
        UsageError: it is a safetensors file.
    """
    content = files.read(path) if content is None else content
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
        raise UsageError(f"'{path}' is a safetensors file already.", hint=f"Give it as it is: --weights {path}.")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as problem:  # damaged files raise anything
        said = str(problem)
        code = next(iter(re.findall(r"GLOBAL ([\w.]+)", said)), "")
        if "GLOBAL" in said or "weights_only" in said.lower() or "TorchScript" in said:
            what = f"objects of a program ({code})" if code else "objects of a program"
            raise IntegrityError(
                f"'{path}' holds {what}, not only tensors: no code of it was run.",
                hint="Save model.state_dict() where that program is installed, then convert that file.",
            ) from problem
        raise IntegrityError(
            f"'{path}' is not an intact file of torch.save ({type(problem).__name__}).",
            hint="Save the state dict again with torch.save.",
        ) from problem


def write(found: Found, to: Path, *, force: bool = False) -> None:
    """Write the tensors as safetensors.

    Raises:
        UsageError: the name does not end so.
        DataError: there is such a file, and ``force`` does not say to replace it.
        MachineError: it cannot be written.
    """
    check(to, force=force)
    files.write_atomically(to, checkpoint.pack({name: value.clone() for name, value in found.tensors.items()}, {}))


def check(to: Path, *, force: bool = False) -> None:
    """Raise, as :func:`write` would, before anything is read."""
    if to.suffix != ".safetensors":
        raise UsageError(f"--out '{to}' must end in .safetensors.", hint="Use a name such as model.safetensors.")
    if to.exists() and not (force and to.is_file()):
        raise DataError(f"'{to}' exists.", hint="Use another --out, or --force to replace it.")


def _inner(path: Path, held: Any, key: str | None) -> str | None:
    """The entry in which the weights are, or None if they are right here."""
    if not isinstance(held, Mapping):
        return None
    inside = [str(name) for name, value in held.items() if isinstance(value, Mapping) and name in (*WRAPPERS, *AVERAGES)]
    if key is not None:
        if not isinstance(held.get(key), Mapping):
            raise UsageError(f"'{path}' has no entry '{key}' with weights.", hint=f"It has {', '.join(map(str, held))[:200]}.")
        return key
    if len(inside) > 1:
        raise UsageError(f"'{path}' holds weights as {' and as '.join(inside)}.", hint=f"Choose one: --key {inside[0]}")
    return inside[0] if inside else None


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"entries {', '.join(map(str, list(content)[:6])) or 'of nothing'}"
    return f"a {type(content).__name__}"
