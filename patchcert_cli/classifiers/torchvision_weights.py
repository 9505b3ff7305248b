"""Networks of torchvision and their published weights: found by name, read with their published hash, never unpickled as code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn
from torchvision.models import WeightsEnum  # type: ignore[import-untyped]

from patchcert_cli import checkpoint
from patchcert_cli.errors import HubError, IntegrityError, MachineError, UsageError, first_line, unknown
from patchcert_cli.models import timm
from patchcert_cli.storage import files

PAGE = "https://docs.pytorch.org/vision/stable/models.html"


@dataclass(frozen=True)
class Transform:
    """Torchvision's transform of some weights: the shorter side to ``short``, the middle ``side``, mean and std."""

    side: int
    short: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str


def find(name: str, tag: str) -> Any:
    """The published weights ``tag`` of network ``name``, or its default ones.

    Raises:
        UnknownName: no such classifier, or no such weights of it; says what is near.
    """
    known = list(torchvision.models.list_models(module=torchvision.models))
    if name not in known:
        raise unknown("torchvision network", name, known, see=PAGE)
    members = torchvision.models.get_model_weights(name).__members__
    if tag and tag not in members:
        raise unknown(f"weights of {name}", tag, members)
    return members[tag or "DEFAULT"]


def transform(member: Any) -> Transform:
    """The evaluation transform of some weights."""
    made = member.transforms()
    (side,), (short,) = made.crop_size, made.resize_size
    return Transform(int(side), int(short), tuple(made.mean), tuple(made.std), str(made.interpolation.value))


def names(member: Any) -> tuple[tuple[str, ...], ...]:
    """For each output the names that it goes by; those of ImageNet with their WordNet ids, where timm is there to say them."""
    words = [str(one) for one in member.meta["categories"]]
    ids = _wordnet(len(words))
    if ids and all(word.lower() in map(str.lower, names) for word, names in list(zip(words, ids, strict=True))[:10]):
        return tuple((one[0], word, *one[1:]) for word, one in zip(words, ids, strict=True))
    return tuple((word,) for word in words)


def _wordnet(count: int) -> tuple[tuple[str, ...], ...]:
    try:
        return timm.imagenet_labels(count)
    except MachineError:
        return ()


def fetched(member: Any, *, download: bool) -> tuple[Path, bytes]:
    """The file of some weights in torch's cache and its content, which has the hash that its name publishes.

    Raises:
        HubError: it is not there, and may not or cannot be downloaded.
        IntegrityError: it has another hash.
    """
    file = member.url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    begin = re.search(r"-([0-9a-f]{8,64})\.pth$", file)
    if begin is None:
        raise IntegrityError(f"{member.url} publishes no hash.", hint="Convert it, and say --weights FILE.safetensors.")
    if not path.is_file():
        hint = "Add --download, or give them as a file: --weights FILE.safetensors"
        if not download:
            raise HubError(f"the weights {member} are not at '{path}'.", hint=hint)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(member.url, str(path), hash_prefix=begin[1], progress=False)
        except (OSError, RuntimeError) as problem:
            raise HubError(f"{member.url} cannot be downloaded: {first_line(problem)}.", hint=hint) from problem
    content = files.read(path)
    if not files.sha256_of(content).startswith(begin[1]):
        raise IntegrityError(f"'{path}' is damaged: its sha256 does not begin with {begin[1]}.", hint="Delete it.")
    return path, content


def built(name: str, member: Any | None, tensors: Mapping[str, Tensor], where: str = "") -> nn.Module:
    """The network as torchvision builds it for published weights, with ``tensors`` for its weights; with none, random ones.

    Without ``member`` it has as many classes as the tensors have.

    Raises:
        IntegrityError: the tensors do not fit.
        UsageError: only for published weights it is known what the network does to its images.
    """
    make = torchvision.models.get_model_builder(name)
    with torch.random.fork_rng():
        if member is not None:
            with _instead(tensors), _misfit(name, where):
                return cast(nn.Module, make(weights=member, progress=False))
        if not tensors:
            return cast(nn.Module, make(weights=None))
        network = make(weights=None, num_classes=_classes(make, tensors))
    if hasattr(network, "transform_input"):
        raise UsageError(f"{name} changes its images as its weights want it.", hint=f"Name them: torchvision:{name}@WEIGHTS")
    given = checkpoint.renamed(network.state_dict(), tensors)
    checkpoint.check_fit(
        network.state_dict(), given, f"'{where}' does not fit torchvision's {name}", hint="Give weights of this architecture."
    )
    network.load_state_dict(given, strict=True)
    return cast(nn.Module, network)


def _classes(make: Any, tensors: Mapping[str, Tensor]) -> int:
    """How many classes some weights are of: the first side of the tensor whose shape goes with the number of classes."""
    with torch.device("meta"):
        one, other = (make(weights=None, num_classes=count).state_dict() for count in (5, 7))
    heads = [key for key in one if one[key].shape != other[key].shape and key in tensors and tensors[key].ndim]
    return len(tensors[heads[0]]) if heads else 1000


@contextlib.contextmanager
def _instead(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let torchvision's builders load these tensors, where they would fetch and unpickle."""
    original = WeightsEnum.get_state_dict
    try:
        WeightsEnum.get_state_dict = lambda self, *_, **__: dict(tensors)
        yield
    finally:
        WeightsEnum.get_state_dict = original


@contextlib.contextmanager
def _misfit(name: str, where: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AttributeError, KeyError) as problem:
        said = " ".join(str(problem).split())[:200]
        raise IntegrityError(
            f"'{where}' does not fit torchvision's {name}: {said}.", hint="Give weights of this architecture."
        ) from problem
