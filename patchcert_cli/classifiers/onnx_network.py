"""Networks in ONNX files, computed by onnxruntime (the extra ``onnx``).

A session is a function of float32 images without gradient, parameters or a float64 of its own. So what rounding leaves in doubt
about its labels is computed in float32, and certifies nothing.

Shapes: B images, C channels, H x W pixels, K outputs.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchcert_cli.errors import IntegrityError, MachineError, UsageError
from patchcert_cli.storage import files

INSTALL = 'pip install "patchcert[onnx]"'
TYPE = "tensor(float)"


def library() -> Any:
    """The onnxruntime library.

    Raises:
        MachineError: it is not installed, or broken.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError as problem:
        raise MachineError("onnxruntime is not installed.", hint=f"Type: {INSTALL}") from problem
    except (ImportError, OSError) as problem:
        raise MachineError(f"onnxruntime cannot be imported: {problem}.", hint=f"Type: {INSTALL}") from problem


class NoGradient(UsageError, RuntimeError):
    """A gradient is requested of a network that has none; a RuntimeError, as torch's own error of this kind."""


class OnnxNetwork(nn.Module):
    """A network in an ONNX file: float32 [B, C, H, W] -> [B, K].

    A function of user code may return it with ``mean``, ``std`` and ``classes`` set as attributes, where it needs preprocessing.

    Attributes:
        sha256: of the file.
        size: H and W, if the file says; else None.
        channels: C, if the file says; else None.
        last: whether it takes [B, H, W, C].
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file once: what is hashed is what is computed with.

        Raises:
            MachineError: onnxruntime is not installed.
            IntegrityError: there is no such file, or it is not an ONNX network, or keeps weights in other files.
            UsageError: it does not take one batch of float images.
        """
        super().__init__()
        self._path, self._content = Path(path), files.read(Path(path))
        self.sha256 = files.sha256_of(self._content)
        self._sessions: dict[str, Any] = {}
        session, self._batch = self._session("cpu"), 0
        given, told = session.get_inputs(), session.get_outputs()
        if len(given) != 1 or given[0].type != TYPE or len(given[0].shape) != 4:
            said = ", ".join(f"{one.name} {one.type} {one.shape}" for one in given)
            raise UsageError(f"'{path}' takes {said}.", hint=f"It must take one batch of images, {TYPE} [B, C, H, W].")
        self._input, sides = given[0].name, [one if isinstance(one, int) and one > 0 else None for one in given[0].shape]
        self._batch = sides[0] or 0
        self.last = sides[3] in (1, 3) and sides[1] not in (1, 3)
        channels, height, width = (sides[3], sides[1], sides[2]) if self.last else (sides[1], sides[2], sides[3])
        self.channels = channels
        self.size = (height, width) if height and width else None
        flat = [one.name for one in told if len(one.shape) == 2] or [told[0].name]
        self._output = flat[0]

    def _session(self, device: str) -> Any:
        if device not in self._sessions:
            runtime = library()
            wanted = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
            if wanted not in runtime.get_available_providers():
                raise MachineError(
                    f"this onnxruntime has no {wanted}.", hint="Use --device cpu, or install onnxruntime-gpu instead."
                )
            options = runtime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
            more = {"use_tf32": "0"} if device == "cuda" else {}
            try:
                made = runtime.InferenceSession(self._content, options, providers=[(wanted, more)])
            except Exception as problem:  # onnxruntime's errors have no common class of their own
                said = (str(problem).splitlines() or [""])[0][:200]
                raise IntegrityError(
                    f"'{self._path}' is not a network that onnxruntime can read: {said}.",
                    hint="Export the network again with torch.onnx.export.",
                ) from problem
            self._sessions[device] = made
        return self._sessions[device]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError(f"an ONNX session computes in float32, not {x.dtype}")
        if x.requires_grad and torch.is_grad_enabled():
            raise NoGradient(
                f"'{self._path}' is an ONNX network, which has no gradient to attack by.", hint="Certify it instead."
            )
        session, size = self._session(x.device.type), self._batch or max(len(x), 1)
        parts = [self._run(session, part) for part in torch.split(x.detach(), size)]
        return torch.cat(parts).to(x.device)

    def _run(self, session: Any, x: Tensor) -> Tensor:
        """One batch; a network of fixed batches is given copies of the last image to fill one."""
        more = max(0, self._batch - len(x))
        full = torch.cat([x, x[-1:].expand(more, -1, -1, -1)]) if more else x
        given = (full.permute(0, 2, 3, 1) if self.last else full).contiguous().cpu().numpy()
        found = torch.from_numpy(session.run([self._output], {self._input: given})[0])
        return found[: len(x)]

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxNetwork:
        return self  # it has no state
