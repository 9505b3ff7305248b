"""Choosing where to compute."""

from __future__ import annotations

import re

import torch

from patchcert_cli.errors import MachineError, UsageError


def resolve(text: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a torch device string; ``auto`` takes the first GPU if there is one.

    Raises:
        UsageError: not one of these.
        MachineError: this machine has no such device.
    """
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cpu":
        return text
    match = re.fullmatch(r"cuda(?::(\d+))?", text)
    if not match:
        raise UsageError(f"invalid device '{text}':", hint="use auto, cpu, cuda or cuda:N.")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1] or 0) >= present:
        raise MachineError(
            f"no device '{text}': this machine has {present} CUDA device{'' if present == 1 else 's'};",
            hint="use --device cpu or auto.",
        )
    return text
