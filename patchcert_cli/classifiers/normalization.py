"""Whether a network normalizes images itself with the statistics that it states, so that doing it in front would be twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchcert_cli.errors import FOREIGN, UsageError

NEAR = 1e-4  # share of the largest logit by which two ways to compute the same may differ
MEANS, STDS = ("mean", "mu"), ("std", "sigma")  # what names of statistics contain


def twice(address: str, network: nn.Module, mean: Sequence[float], std: Sequence[float], x: Tensor) -> bool:
    """Whether ``network``, which states mean and std per channel, normalizes images with them itself.

    All tensors and lists in it that hold these values under such a name are replaced by 0 and 1 for a moment. If nothing
    changes, they are not used, and it wants normalized images. If it then answers normalized images as it answers plain ones
    otherwise, it does the same itself.

    Args:
        address: what to call it in messages.
        network: in eval mode.
        mean, std: as it states them.
        x: some images [B, C, H, W] in [0, 1] of a size that it takes.

    Raises:
        UsageError: it uses the values it states, but not to normalize what it is given.
    """
    plain = _answer(network, x)
    shape = (1, -1, 1, 1)
    normalized = (x - x.new_tensor(mean).reshape(shape)) / x.new_tensor(std).reshape(shape)
    with _neutral(network, mean, std):
        without, given = _answer(network, x), _answer(network, normalized)
    if plain is None or without is None or given is None or _same(plain, without):
        return False
    again = _answer(network, x)
    if again is None or not _same(plain, again):  # it is random, which the self-test tells
        return False
    if _same(plain, given):
        return True
    raise UsageError(
        f"{address} states mean and std, and uses them itself, but not to normalize what it is given.",
        hint="Rename the attributes that it uses itself, or normalize in forward and state none.",
    )


def _answer(network: nn.Module, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            found = network(x.clone())  # which it may write into
    except FOREIGN:  # the error is reported where its logits are computed
        return None
    return found if isinstance(found, Tensor) and bool(found.isfinite().all()) else None


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().amax()) <= NEAR * float(one.abs().amax())


@contextlib.contextmanager
def _neutral(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Iterator[None]:
    """Replace every value of the network that is ``mean`` by 0 and every one that is ``std`` by 1, for a while."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    stated = [name for name in ("mean", "std") if name not in _holders(network, name)]
    try:
        for part in network.modules():
            for holder in (vars(part), part._buffers, part._parameters):
                for name, value in list(holder.items()):
                    number = _neutral_value(name, value, mean, std)
                    if number is not None:
                        changed.append((holder, name, value))
                        holder[name] = _filled(value, number)
        for name in stated:  # of its class
            value = getattr(network, name, None)
            if value is not None and not isinstance(getattr(type(network), name, None), property):
                vars(network)[name] = _filled(value, 0.0 if name == "mean" else 1.0)
        yield
    finally:
        for name in stated:
            vars(network).pop(name, None)
        for holder, name, value in changed:
            holder[name] = value


def _holders(network: nn.Module, name: str) -> set[str]:
    return {name} if any(name in holder for holder in (vars(network), network._buffers, network._parameters)) else set()


def _neutral_value(name: str, value: Any, mean: Sequence[float], std: Sequence[float]) -> float | None:
    """0 for what is called and is the mean, 1 for what is called and is the deviation, None for anything else."""
    listed = value.detach().flatten().tolist() if isinstance(value, Tensor) and value.numel() == len(mean) else value
    if not isinstance(listed, list | tuple) or len(listed) != len(mean):
        return None
    if not all(isinstance(one, int | float) for one in listed):
        return None
    if _close(listed, mean) and any(word in name.lower() for word in MEANS):
        return 0.0
    return 1.0 if _close(listed, std) and any(word in name.lower() for word in STDS) else None


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(a - b) <= 1e-6 * max(1.0, abs(b)) for a, b in zip(one, other, strict=True))


def _filled(value: Any, number: float) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(torch.full_like(value, number), requires_grad=value.requires_grad)
    if isinstance(value, Tensor):
        return torch.full_like(value, number)
    return type(value)([number] * len(value)) if isinstance(value, list | tuple) else number
