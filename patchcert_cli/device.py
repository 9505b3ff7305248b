"""The device that a command computes on."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from patchcert_cli.errors import MachineError, UsageError
from patchcert_cli.parallel import workers


def resolve(text: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a torch device string; ``auto`` takes the first GPU if there is one.

    Raises:
        UsageError: not one of these.
        MachineError: this machine has no such device.
    """
    if text == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        local = os.environ.get("LOCAL_RANK", "") if workers.inside() else ""  # each rank of a machine has a GPU of its own
        return f"cuda:{int(local) % torch.cuda.device_count()}" if local.isdecimal() else "cuda"
    if text == "cpu":
        return text
    if text.partition(":")[0] == "mps":
        raise UsageError(f"proofs need float64, which device '{text}' does not compute in.", hint="Use --device cpu or auto.")
    match = re.fullmatch(r"cuda(?::(\d+))?", text)
    if not match:
        raise UsageError(f"invalid device '{text}'.", hint="Use auto, cpu, cuda or cuda:N.")
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1] or 0) >= present:
        raise MachineError(
            f"no device '{text}': this machine has {present} CUDA device{'' if present == 1 else 's'}.",
            hint="Use --device cpu or auto.",
        )
    return text


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``; to a GPU from pinned memory, without waiting for the copy."""
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes convolutions in bfloat16; if not, they are many times slower than in float32."""
    if device.type != "cpu":
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False
