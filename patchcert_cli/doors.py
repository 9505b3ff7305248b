"""Doors to plain classifiers that are none of timm's: own code, networks of torchvision, ONNX files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from patchcert_cli import checkpoint, own_code
from patchcert_cli.classifiers import RANDOM, Classifier
from patchcert_cli.errors import UsageError
from patchcert_cli.layers import Prepared


def own(address: str, module: str, function: str, weights: str | None) -> Classifier:
    """What a function of the user's own returns, with the preprocessing that it states itself.

    Raises:
        UnknownName, UsageError: see :func:`patchcert_cli.own_code.call` and :func:`patchcert_cli.own_code.stated`.
        IntegrityError: the weights do not fit.
    """
    returned = own_code.call(module, function)
    said = own_code.stated(address, returned)
    made, taken = own_code.unwrapped(returned)
    given = weights not in (None, RANDOM)
    if given:
        tensors, _ = checkpoint.unpack(Path(str(weights)))
        expected = _state(address, made)
        tensors = checkpoint.renamed(expected, tensors)
        checkpoint.check_fit(expected, tensors, f"'{weights}' does not fit {address}")
        made.load_state_dict(tensors, strict=True)
    if said == own_code.NOTHING:
        said = own_code.stated(address, made)
    channels = None if said.mean is None else len(said.mean)
    note = f"{address}: your own code" + (f" inside {', '.join(taken)}, which was taken off" if taken else "")
    note += f", weights in '{weights}'" if given else ", no weights given: the network is as the function returns it"
    if not given and module.startswith("torchvision."):
        note += f" (torchvision:{function} has published weights)"
    network = Prepared(made, size=said.size, mean=said.mean, std=said.std, channels=channels, summary=address)
    return Classifier(
        network=network,
        name=address,
        names=said.names,
        side=None if said.size is None else min(said.size),
        short=None,
        mean=said.mean,
        sha256=checkpoint.digest(_state(address, made)),
        source="code",
        note=note,
        setting={
            "preprocessing": {"size": said.size, "mean": said.mean, "std": said.std},
            "code_sha256": own_code.digest(module),
        },
    )


def _state(address: str, network: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a network; other state that it keeps is covered by its answers."""
    try:
        state = network.state_dict()
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    except Exception as problem:  # anybody's code can raise anything
        raise UsageError(f"the state of {address} cannot be read: {own_code.line(problem)}.", hint=own_code.SHOW) from problem
