"""How large the numbers are that a network's logits are made of, and whether its float64 is float64.

Rounding errors of logits grow with the terms that are added up, not with the logits themselves: an image can be
made whose logits nearly vanish under some masks, while their terms are as large as ever. So a logit margin is measured against a
**scale** that such an image does not shrink:

- where the last layer is known, the largest ``sum_j |w_kj v_j| + |b_k|`` of the pass, with w and b its weights and v its input;
- everywhere at least the largest scale met on some fixed images (:class:`Calibration`, ``least``), or the largest logit met
there
  if no last layer is known.

The second rule makes a constant of the network a lower limit, so the scale of a pass is a function of that pass alone.

Shapes: K classes, n passes, d inputs of the last layer, C channels, H x W pixels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAR, NEAR = 1e-5, 1e-11  # steps of an input, of which float32 knows the first alone
AGREE = 0.1  # how far the responses to both may be from proportional

Head = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Calibration:
    """What was found out about a network, as its weights are now.

    Attributes:
        head: the name of the layer whose output the logits are; None if there is none.
        least: the smallest scale of a pass, a power of two.
        double: whether its results in float64 carry more than float32.
        last: whether many passes at a time are computed with channels last in memory.
    """

    head: str | None
    least: float
    double: bool
    last: bool = False


class CalibrationCache:
    """The calibration of a network, measured again when its weights have changed (changes through ``.data`` go unnoticed)."""

    def __init__(self) -> None:
        self._known: tuple[object, Calibration] | None = None

    def of(self, network: nn.Module, also: object, find: Callable[[], Calibration]) -> Calibration:
        """The calibration of ``network`` in a setting ``also``, from ``find`` if it is not known."""
        tensors = chain(network.parameters(), network.buffers())
        state = [(id(one), one.data_ptr(), None if one.is_inference() else one._version) for one in tensors]
        key = (id(network), state, [layer.training for layer in network.modules()], also)
        if self._known is None or self._known[0] != key:
            self._known = (key, find())
        return self._known[1]

    def amend(self, calibration: Calibration) -> None:
        """Something else was found out about the same network."""
        assert self._known is not None
        self._known = (self._known[0], calibration)


@dataclass
class HeadRecorder:
    """What a layer did in one call of its network; nothing is reported if it was not called exactly once.

    Attributes:
        calls: for each call its output, [n, ...], and its largest sum of terms, [n].
    """

    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def scale(self, logits: Tensor) -> Tensor:
        """float64 [n] on the CPU: the largest sum of terms if the layer's output is ``logits`` [n, K], else the largest logit."""
        largest = logits.double().abs().amax(dim=1)
        if len(self.calls) == 1:
            output, terms = self.calls[0]
            if output.shape == logits.shape and torch.equal(output.to(logits), logits):
                largest = torch.maximum(largest, terms.double())
        return largest.cpu()


@contextlib.contextmanager
def recording_head(network: nn.Module, name: str | None) -> Iterator[HeadRecorder]:
    """HeadRecorder the layer ``name`` of a network; None watches nothing."""
    watch = HeadRecorder()
    if name is None:
        yield watch
        return
    layer = cast(Head, network.get_submodule(name))

    def seen(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if given and isinstance(output, Tensor):  # copied, since others may write into it
            watch.calls.append((output.detach().flatten(1).clone(), _terms(layer, given[0].detach())))

    handle = layer.register_forward_hook(seen)
    try:
        yield watch
    finally:
        handle.remove()


def _terms(layer: Head, v: Tensor) -> Tensor:
    """The largest ``sum_j |w_kj v_j| + |b_k|`` over the classes k, [n], for inputs [n, d, ...] that are one window."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    with torch.autocast(v.device.type, enabled=False):
        weight, seen = layer.weight.detach().flatten(1).abs().to(wide), v.flatten(1).abs().to(wide)
        if seen.shape[1] != weight.shape[1]:
            return torch.zeros(len(v), dtype=wide, device=v.device)
        terms = seen @ weight.T
        return (terms if layer.bias is None else terms + layer.bias.detach().abs().to(wide)).amax(dim=1)


def head_of(network: nn.Module, run: Callable[[], Tensor]) -> str | None:
    """The name of the last linear layer whose output, in one call, is what ``run`` returns from the network: logits [n, K]."""
    outputs: dict[str, list[Tensor]] = {}
    handles = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def seen(_: nn.Module, __: Any, output: Any) -> None:
            known = outputs.pop(name, [])  # again at the end: names are in the order of their last call
            small = isinstance(output, Tensor) and math.prod(output.shape[2:]) == 1
            outputs[name] = [*known, output.detach().flatten(1).clone() if small else torch.zeros(0)]

        return seen

    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            handles.append(layer.register_forward_hook(note(name)))
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    fits = [name for name, found in outputs.items() if len(found) == 1 and torch.equal(found[0].to(logits), logits)]
    return fits[-1] if fits else None


def power_above(value: float) -> float:
    """The smallest power of two that is not below ``value``, so that two machines nearly always find the same."""
    return 2.0 ** math.ceil(math.log2(max(value, 2.0**-900)))


def responds(logits: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether float64 results follow steps of the input that float32 cannot see.

    For images x and random directions d, ``f(x + s d) - f(x)`` is all but proportional to s where f is smooth. Results that
    passed through float32 anywhere jump in steps of 2^-24, which hides the response to steps of :data:`NEAR`. A network that
    does not respond at all is rejected too.

    Args:
        logits: float64 images [n, C, H, W] to logits [n, K].
        x: float64 [n, C, H, W], at least :data:`FAR` inside [0, 1].
    """
    generator = torch.Generator().manual_seed(1)
    step = (torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1).to(x.device)
    base = logits(x)
    far, near = logits(x + FAR * step) - base, (logits(x + NEAR * step) - base) * (FAR / NEAR)
    size = far.abs().amax(dim=1)
    return bool(((near - far).abs().amax(dim=1) <= AGREE * size).all() and (size > 0).all())


def probe_images(shape: tuple[int, ...]) -> Tensor:
    """Fixed images [6, C, H, W] in [0, 1]: noise, larger squares, one grey, and a slope."""
    generator = torch.Generator().manual_seed(0)
    x = 0.05 + 0.9 * torch.rand(6, *shape, generator=generator)
    x[2:4] = F.interpolate(x[2:4, :, ::4, ::4], shape[1:])
    x[4] = 0.5
    x[5] = torch.linspace(0, 1, shape[2])
    return x


def shrunk(logits: Callable[[Tensor], Tensor], x: Tensor, steps: int = 12) -> Tensor | None:
    """Images near x [n, C, H, W] whose logits are nearly equal, in 8-bit steps; None if the network has no gradient.

    Each step goes along the gradient of ``g = |z - mean z|^2`` as far as would bring g to zero if it were linear.
    """
    at = x.clone()
    try:
        for _ in range(steps):
            with torch.enable_grad():
                moved = at.detach().requires_grad_()
                z = logits(moved)
                size = (z - z.mean(dim=1, keepdim=True)).square().sum(dim=1)
                (slope,) = torch.autograd.grad(size.sum(), moved)
            length = size.detach() / slope.flatten(1).square().sum(dim=1).clamp(min=1e-30)
            at = (at - length.reshape(-1, 1, 1, 1) * slope).clamp(0, 1)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return (at * 255).round() / 255 if bool(at.isfinite().all()) else None
