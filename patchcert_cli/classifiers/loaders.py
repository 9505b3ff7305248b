"""Loading plain classifiers that are not timm's: user code, networks of torchvision, ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchcert_cli import checkpoint
from patchcert_cli.classifiers import convert, normalization, user_code
from patchcert_cli.classifiers.addresses import RANDOM, RANDOM_SOURCE, TORCHVISION, Classifier
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import FOREIGN, UsageError
from patchcert_cli.layers.preprocessing import WithPreprocessing
from patchcert_cli.storage import files


def user(address: str, module: str, function: str, weights: str | None) -> Classifier:
    """What a function of the user's own returns, with the preprocessing that it states itself.

    Raises:
        UnknownName, UsageError: see :func:`patchcert_cli.classifiers.user_code.call` and
        :func:`patchcert_cli.classifiers.user_code.stated`. IntegrityError: the weights do not fit.
    """
    returned = user_code.call(module, function)
    said = user_code.stated(address, returned)
    made, taken = user_code.unwrapped(returned)
    given = weights not in (None, RANDOM)
    if given:
        tensors, _ = checkpoint.unpack(Path(str(weights)))
        expected = _state(address, made)
        tensors = checkpoint.renamed(expected, tensors)
        checkpoint.check_fit(expected, tensors, f"'{weights}' does not fit {address}", hint="Give weights of this network.")
        made.load_state_dict(tensors, strict=True)
    if said == user_code.NOTHING:
        said = user_code.stated(address, made)
    channels = None if said.mean is None else len(said.mean)
    note = f"{address}: your own code" + (f" inside {', '.join(taken)}, which was taken off" if taken else "")
    note += f", weights in '{weights}'" if given else ", no weights given: the network is as the function returns it"
    if not given and module.startswith("torchvision."):
        note += f" (torchvision:{function} has published weights)"
    network = WithPreprocessing(made, size=said.size, mean=said.mean, std=said.std, channels=channels, summary=address)
    return Classifier(
        network=network,
        name=address,
        names=said.names,
        mean=said.mean,
        sha256=checkpoint.digest(_state(address, made)),
        source="code",
        note=note,
        setting={
            "preprocessing": {"size": said.size, "mean": said.mean, "std": said.std},
            "code_sha256": user_code.digest(module),
        },
        resize_crop=None if said.size is None else ResizeCrop(said.size),
    )


def _state(address: str, network: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a network; other state that it keeps is covered by its answers."""
    try:
        state = network.state_dict()
        return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    except FOREIGN as problem:
        raise UsageError(f"the state of {address} cannot be read: {user_code.line(problem)}.", hint=user_code.SHOW) from problem


def onnx(address: str, path: Path, weights: str | None) -> Classifier:
    """The network in an ONNX file, given pixels in [0, 1] in the size that it states.

    Raises:
        UsageError, IntegrityError, MachineError: see :class:`patchcert_cli.classifiers.onnx_network.OnnxNetwork`.
    """
    from patchcert_cli.classifiers import onnx_network

    if weights is not None:
        raise UsageError(f"{address} has its own weights.", hint="Leave --weights out.")
    made = onnx_network.OnnxNetwork(path)
    network = WithPreprocessing(made, size=made.size, channels=made.channels, summary=address)
    note = f"{address}: sha256 {made.sha256[:12]}…, no float64: labels in doubt certify nothing"
    return Classifier(
        network=network,
        name=address,
        names=(),
        mean=None,
        sha256=made.sha256,
        source="file",
        note=note,
        setting={
            "preprocessing": {"size": made.size, "mean": None, "std": None},
            "onnxruntime": onnx_network.library().__version__,
        },
        resize_crop=None if made.size is None else ResizeCrop(made.size),
    )


def torchvision(address: str, weights: str | None, *, download: bool) -> Classifier:
    """A network of torchvision with published or the user's weights, and with the transform of the published ones.

    Raises:
        UnknownName: no such network, or no such weights of it.
        HubError: the weights are not in torch's cache, and may not or cannot be downloaded.
        IntegrityError: they are damaged, or do not fit.
    """
    from patchcert_cli.classifiers import torchvision_weights  # torchvision takes a second to import

    name, _, tag = address.removeprefix(TORCHVISION).partition("@")
    member = torchvision_weights.find(name, tag)
    if weights == RANDOM:
        network, source = torchvision_weights.built(name, None, {}), RANDOM_SOURCE
        sha256, note = checkpoint.digest(network.state_dict()), f"{address}: random weights, whose answers mean nothing"
    elif weights is not None:
        path = Path(weights)
        content = files.read(path)
        tensors, _ = checkpoint.unpack(path, content)
        sha256, source, note = files.sha256_of(content), "file", f"{address}: weights in '{path}'"
        network = torchvision_weights.built(name, member if tag else None, tensors, str(path))
    else:
        path, content = torchvision_weights.fetched(member, download=download)
        tensors, sha256, source = convert.load(path, content), files.sha256_of(content), "torchvision"
        network = torchvision_weights.built(name, member, tensors, str(path))
        pin = "" if tag else f"; pin it with {address}@{member.name}"
        note = f"{address}: {member.name}, sha256 as torchvision publishes it{pin}"
    facts = torchvision_weights.transform(member)
    size = (facts.side, facts.side)
    inside: dict[str, Any] = {"size": size, "mean": facts.mean, "std": facts.std, "interpolation": facts.interpolation}
    return Classifier(
        network=WithPreprocessing(network, **inside, channels=len(facts.mean), summary=address),
        name=address,
        names=torchvision_weights.names(member) if source != "file" or tag else (),
        mean=facts.mean,
        sha256=sha256,
        source=source,
        note=note,
        setting={"preprocessing": inside},
        resize_crop=ResizeCrop(size, (facts.short, facts.short), interpolation=facts.interpolation),
    )


def settled(classifier: Classifier, shape: Sequence[int], device: str = "cpu") -> tuple[Classifier, list[str]]:
    """The classifier for images [C, H, W], without a normalization that it does itself; and notes on what was found.

    Raises:
        UsageError: it uses mean and std, but not to normalize what it is given.
    """
    network, stated = classifier.network.to(device), classifier.setting.get("preprocessing", {})
    if classifier.source != "code" or not isinstance(network, WithPreprocessing) or network.centre is None:
        return classifier, []
    mean, std = stated["mean"], stated["std"]
    size = (len(mean), *(network.size or shape[1:]))
    x = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)).to(device)
    if not normalization.twice(classifier.name, network.model, mean, std, x):
        return classifier, []
    network.centre = None
    inside = {"preprocessing": {**stated, "mean": None, "std": None, "normalized_by_itself": True}}
    said = f"{classifier.name} normalizes by its mean and std itself, so this is not done a second time before it"
    return replace(classifier, setting=classifier.setting | inside), [said]
