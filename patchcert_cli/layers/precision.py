"""In what precision networks compute: strictly in the tensors' own, or as a copy in float64.

Shapes: any.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from patchcert_cli.errors import MachineError, UsageError

FAST_MATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")  # variables that let oneDNN compute in less than float32
STRICT = "STRICT"
ONE_THREAD = threading.RLock()
"""Held by the thread that has changed torch's settings of the whole process. Another one waits: restoring its own values
meanwhile, it would switch the fast ways on inside a proof, or leave them off permanently."""


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Switch off everything that computes in less than the tensors' own precision (TF32, bfloat16 products, autocast).

    Also switches off NNPACK, whose convolutions are not plain sums of products, and cuDNN's search for the fastest algorithm,
    which may find another one in each run. These are settings of the whole process: of several threads one is inside at a time.

    Raises:
        MachineError: an environment variable lets oneDNN compute in less. It is read once, so that cannot be undone.
    """
    for name in FAST_MATH:
        if os.environ.get(name, STRICT).upper() not in (STRICT, ""):
            raise MachineError(
                f"{name}={os.environ[name]} lets convolutions and products compute in less than float32.",
                hint=f"Start again without it: env -u {name} patchcert ...",
            )
    with ONE_THREAD:
        switches = _precision_switches()
        before = [getattr(owner, name) for owner, name, _ in switches]
        try:
            for owner, name, exact in switches:
                setattr(owner, name, exact)
            with (
                torch.autocast("cpu", enabled=False),
                torch.autocast("cuda", enabled=False),
                torch.backends.nnpack.flags(enabled=False),
            ):
                yield
        finally:
            for (owner, name, _), value in zip(switches, before, strict=True):
                setattr(owner, name, value)


@contextlib.contextmanager
def plain_sums() -> Iterator[None]:
    """Let torch compute convolutions as sums of products alone, and in the tensors' own precision (:func:`exact_arithmetic`).

    Rounding rules, and sums that are never rounded, are about sums of products in any order. Fast algorithms (Winograd, FFT)
    transform inputs and weights first and err more, by how much depends on the algorithm. torch takes them from cuDNN, oneDNN and
    NNPACK only. Without these it writes the columns of every window side by side and multiplies matrices (``slow_conv2d``,
    ``slow_conv_dilated2d`` in its source) or sums up products directly (``conv_depthwise2d``). Bounds, and the answers that they
    are about, are computed inside.
    """
    owners: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    with exact_arithmetic():
        before = [owner.enabled for owner in owners]
        try:
            for owner in owners:
                owner.enabled = False
            yield
        finally:
            for owner, value in zip(owners, before, strict=True):
                owner.enabled = value


def exact_sums(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Inside, convolutions of whole numbers on ``device`` have no rounding error where their sums fit.

    On the CPU the fast ways are compared with float64 before they are used (:mod:`patchcert_cli.layers.integers`). Elsewhere
    nothing compares them, and cuDNN has FFT algorithms even for float64, so convolutions are :func:`plain_sums` there.
    """
    return exact_arithmetic() if device.type == "cpu" else plain_sums()


def _precision_switches() -> list[tuple[Any, str, Any]]:
    """``(owner, attribute, exact value)`` of torch's precision flags, in whichever of its two interfaces this process uses."""
    backends: Any = torch.backends
    # set last, and restored last: other switches change those of oneDNN along with their own
    onednn = [(owner, "fp32_precision", "ieee") for owner in (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)]
    search = (backends.cudnn, "benchmark", False)
    legacy = [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
    try:
        for owner, name, _ in legacy:
            getattr(owner, name)
        torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer interface has been used, and torch refuses to mix them
        owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        return [search, *((owner, "fp32_precision", "ieee") for owner in owners), *onednn]
    # the process-wide value after those that it decides about: each of them changes it to what it can express
    return [search, *legacy, (_MatmulPrecision(), "value", "highest"), *onednn]


class _MatmulPrecision:
    """torch's process-wide matmul precision as an attribute."""

    @property
    def value(self) -> str:
        return torch.get_float32_matmul_precision()

    @value.setter
    def value(self, precision: str) -> None:
        torch.set_float32_matmul_precision(precision)


def double(network: nn.Module) -> nn.Module:
    """A float64 copy of a network, in eval mode."""
    return copy.deepcopy(network).double().eval()


def frozen(network: nn.Module) -> nn.Module:
    """The network itself if all of it is in eval mode, else a copy that is: what is deployed and what is proven."""
    if not any(layer.training for layer in network.modules()):
        return network
    try:
        return copy.deepcopy(network).eval()
    except Exception as problem:  # a user's code can raise anything when it is copied
        said = (str(problem).splitlines() or [""])[0]
        raise UsageError(
            f"the network cannot be copied ({type(problem).__name__}: {said}).",
            hint="Call its eval() first.",
        ) from problem


def first_largest(scores: Tensor) -> Tensor:
    """The class of the largest of scores [B, K, ...], the lowest index among equals, which decides deployed answers: int64."""
    return (scores == scores.amax(dim=1, keepdim=True)).int().argmax(dim=1)
