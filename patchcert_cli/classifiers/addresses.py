"""From an address to a plain classifier, which some defenses can be put around.

=================================  =====================================================================================
``timm:NAME[@COMMIT]``             a network of timm with the published weights of that name
``hf-hub:ORG/REPO@REVISION``       network and weights of a repository on the Hub in timm's format
``torchvision:NAME[@WEIGHTS]``     a network of torchvision with published weights and their transform
``onnx:FILE``                      an ONNX file, computed by onnxruntime
``PACKAGE.MODULE:FUNCTION``        user code: a function without arguments that returns a module, images to logits
=================================  =====================================================================================

User code is imported only because its address was typed; no card and no configuration can name any. Weights are
safetensors, from the Hub at a commit that is printed and recorded, or from a file.

Shapes: B images, C channels, H x W pixels, K outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchcert_cli import checkpoint, models
from patchcert_cli.catalog import resolve
from patchcert_cli.classifiers import user_code
from patchcert_cli.data import class_names
from patchcert_cli.data.class_names import Names
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import FOREIGN, HubError, IntegrityError, MachineError, PatchcertError, UsageError
from patchcert_cli.hub import client
from patchcert_cli.layers.preprocessing import WithPreprocessing
from patchcert_cli.models import timm
from patchcert_cli.storage import checksum_cache, files

TIMM, HUB, TORCHVISION, ONNX = "timm:", "hf-hub:", "torchvision:", "onnx:"
OWN = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<function>[A-Za-z_]\w*)")
FORMS = "timm:NAME, torchvision:NAME, hf-hub:ORG/REPO@COMMIT, onnx:FILE or PACKAGE.MODULE:FUNCTION"
RANDOM, RANDOM_SOURCE = "none", "random"  # what --weights says for random weights, and where they then come from
OTHER_WEIGHTS = "Give weights of this architecture."
AS_FILE = "Or give the weights as a file: --weights FILE.safetensors"


@dataclass(frozen=True)
class Classifier:
    """A plain classifier with its preprocessing, and what is known of it.

    Attributes:
        network: [B, C, H, W] in [0, 1] -> logits [B, K], in eval mode.
        name: the address.
        names: for each output the names that it goes by; empty if unknown.
        mean: per channel, of the images that it was trained on; None if unknown.
        sha256: of the weights.
        source: where they came from: ``hub``, ``file``, ``code`` or ``random``.
        note: one line about where they came from.
        setting: what besides the weights decides its answers, for manifests.
        resize_crop: how image files are resized and cropped to the size that it was made for; None if it takes any.
    """

    network: nn.Module
    name: str
    names: Names
    mean: tuple[float, ...] | None
    sha256: str
    source: str
    note: str
    setting: dict[str, Any] = field(default_factory=dict)
    resize_crop: ResizeCrop | None = None

    @property
    def random(self) -> bool:
        """Whether its weights are random because the user asked for such ones."""
        return self.source == RANDOM_SOURCE

    @property
    def in_front(self) -> str:
        """Its preprocessing as text."""
        return self.network.description if isinstance(self.network, WithPreprocessing) else "pixels in [0, 1], as they are"


def is_address(text: str) -> bool:
    """Whether ``text`` is the address of a plain classifier, rather than the name or folder of a certified model."""
    return text.startswith((TIMM, HUB, TORCHVISION, ONNX)) or (OWN.fullmatch(text) is not None and not Path(text).exists())


def open_(
    address: str, *, weights: str | None = None, classes: str | None = None, typed: bool = False, download: bool = False
) -> Classifier:
    """The classifier at ``address``.

    Args:
        address: one of the forms above.
        weights: a safetensors file to use instead of the published weights, or to load into what user code returns; or ``none``
            for random weights, whose answers mean nothing but whose cost can be measured.
        classes: a text file with the names of its outputs, one line per output, or ``imagenet``.
        typed: whether the user typed this very address; only then code is imported.
        download: whether weights of torchvision may be fetched.

    Raises:
        UnknownName: no such network, module or function; says what is near.
        UsageError: the address, or what user code returns, is invalid.
        HubError: the weights are not on this disk, and the Hub is out of reach or refuses.
        IntegrityError: weights that do not fit the network, or are damaged.
        DataError: ``classes`` is not a list of names.
        MachineError: timm is not installed.
    """
    from patchcert_cli.classifiers import loaders

    if address.startswith(TIMM):
        found = _timm(address, weights)
    elif address.startswith(HUB):
        found = _repository(address, weights)
    elif address.startswith(TORCHVISION):
        found = loaders.torchvision(address, weights, download=download)
    elif address.startswith(ONNX) and typed:
        found = loaders.onnx(address, Path(address.removeprefix(ONNX)), weights)
    elif (match := OWN.fullmatch(address)) is not None and typed:
        found = loaders.user(address, match["module"], match["function"], weights)
    else:
        raise UsageError(f"'{address}' is not an address of a classifier.", hint=f"Use {FORMS}.")
    if classes is not None:
        found = replace(found, names=timm.imagenet_labels() if classes == "imagenet" else class_names.read(Path(classes)))
    return replace(found, network=found.network.eval())


def outputs(classifier: Classifier, shape: Sequence[int], device: str = "cpu") -> int:
    """K, found by asking the classifier about two grey images [C, H, W].

    Raises:
        IntegrityError: it fails, or what it returns is not one finite number per image and class.
    """
    name, images = classifier.name, torch.full((2, *shape), 0.5, device=device)
    said = f"for images {tuple(images.shape)}"
    try:
        with torch.no_grad():
            logits = classifier.network.to(device)(images)
    except PatchcertError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as problem:
        raise MachineError(f"out of memory {said}.", hint="Use a machine with more memory.") from problem
    except FOREIGN as problem:
        raise IntegrityError(f"{name} fails {said}: {user_code.line(problem)}.", hint=user_code.SHOW) from problem
    if not isinstance(logits, Tensor):
        raise IntegrityError(
            f"{name} returns {type(logits).__name__} {said}.", hint="It must return one tensor of logits [B, K]."
        )
    if logits.ndim != 2 or len(logits) != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        raise IntegrityError(
            f"{name} returns {logits.dtype} of shape {tuple(logits.shape)} {said}.", hint="It must return logits [B, K], K >= 2."
        )
    if not bool(logits.isfinite().all()):
        raise IntegrityError(f"{name} answers NaN or infinity {said}.", hint="Its weights or its preprocessing are broken.")
    return int(logits.shape[1])


@dataclass(frozen=True)
class Beginning:
    """What training begins with: the options of the network ``timm``, see :func:`begin_with`, and lines about its weights."""

    options: dict[str, Any]
    source: timm.Facts


def beginning(address: str, weights: str | None, *, fetch: bool = True) -> Beginning:
    """The network of ``address`` and the weights that training begins with.

    Args:
        address: ``timm:NAME[@COMMIT]`` or ``hf-hub:ORG/REPO@REVISION``.
        weights: a safetensors file to begin with instead, or ``none`` for random weights.
        fetch: whether the weights may be fetched now, to know what they are; else training would, and the options do not say.

    Raises:
        UsageError: user code, which no configuration can name.
        UnknownName, HubError, IntegrityError, MachineError: as :func:`open_`.
    """
    if not address.startswith((TIMM, HUB)):
        raise UsageError(
            f"'{address}' cannot be trained: what is trained is rebuilt from a configuration, which can name no code.",
            hint="Train it yourself, then certify it with --weights, or use timm:NAME.",
        )
    if address.startswith(HUB):
        repo, revision, source = _of_repository(address)
    else:
        name, _, revision = address.removeprefix(TIMM).partition("@")
        source = timm.facts(name)
        repo = source.repo
    options = source.options()
    if "arguments" in options:
        raise UsageError(f"'{address}' has arguments of its own, which no recipe spells out.", hint="Use timm:NAME.")
    if weights == RANDOM:
        return Beginning(options, source)
    if weights is not None:
        return Beginning(options | {"weights": weights, "weights_sha256": _digest_of(Path(weights))}, source)
    if not repo:
        raise UsageError(f"no weights are published for {address}.", hint="Use --weights FILE.safetensors, or --weights none.")
    if not fetch:
        return Beginning(options | {"weights": repo + (f"@{revision}" if revision else "")}, source)
    commit, folder = _fetch(repo, revision or None, [files.WEIGHTS], "Or begin with random weights: --weights none")
    return Beginning(options | {"weights": f"{repo}@{commit}", "weights_sha256": _digest_of(folder / files.WEIGHTS)}, source)


def begin_with(network: nn.Module, options: Mapping[str, Any]) -> None:
    """Load the weights that :func:`beginning` found into a network ``timm``, all but the layers that give the classes.

    Raises:
        IntegrityError: they do not fit, or are other weights than they were.
        HubError: they are not on this disk, and the Hub is out of reach or refuses.
    """
    assert isinstance(network, WithPreprocessing)
    where, source = str(options["weights"]), timm.facts(str(options["architecture"]))
    match = None if Path(where).is_file() else resolve.ADDRESS.fullmatch(where)
    if match is None:
        path = Path(where)
    else:
        _, folder = _fetch(match["repo"], match["revision"], [files.WEIGHTS], "Or begin with random weights: --weights none")
        path = folder / files.WEIGHTS
    files.refuse_pickle(path)
    content = files.read(path)
    if options.get("weights_sha256", actual := files.sha256_of(content)) != actual:
        raise IntegrityError(f"'{path}' is not what this run began with (sha256 {actual[:12]}…).", hint="Use another --out.")
    tensors, _ = checkpoint.unpack(path, content)
    misfit = f"'{where}' does not fit timm's {source.architecture}"
    if match is not None:
        tensors = _current(source, network, tensors, misfit)
    wanted, heads = network.model.state_dict(), tuple(f"{name}." for name in source.heads)

    def body(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in values.items() if not name.startswith(heads)}

    checkpoint.check_fit(body(wanted), body(tensors), misfit, hint=OTHER_WEIGHTS)
    network.model.load_state_dict({**wanted, **body(tensors)}, strict=True)


def _digest_of(path: Path) -> str:
    """sha256 of a file of weights."""
    files.refuse_pickle(path)
    try:
        return checksum_cache.sha256(path)
    except OSError as problem:
        raise IntegrityError(
            f"'{path}' cannot be read: {problem.strerror or problem}.", hint="Check the path and its permissions."
        ) from problem


def _timm(address: str, weights: str | None) -> Classifier:
    name, _, revision = address.removeprefix(TIMM).partition("@")
    source = timm.facts(name)
    if source.outputs < 2:
        raise UsageError(f"{address} gives no classes: it has {source.outputs} outputs.", hint="Name weights of a classifier.")
    if weights is not None:
        return _given(address, source, weights)
    if not source.repo:
        raise UsageError(f"timm has no published weights for {name}.", hint="Give some: --weights FILE.safetensors")
    commit, folder = _fetch(source.repo, revision or None, [files.WEIGHTS])
    pin = "" if revision == commit else f"; pin it with {TIMM}{name}@{commit}"
    return _published(address, source, commit, folder, pin)


def _repository(address: str, weights: str | None) -> Classifier:
    repo, revision, source = _of_repository(address)
    if weights is not None:
        return _given(address, source, weights)
    commit, folder = _fetch(repo, revision, [files.WEIGHTS])
    pin = "" if revision == commit else f"; pin it with {HUB}{repo}@{commit}"
    return _published(address, source, commit, folder, pin)


def _of_repository(address: str) -> tuple[str, str, timm.Facts]:
    """Name and revision of a repository on the Hub, and what its configuration says, which is to be in timm's format."""
    match = resolve.ADDRESS.fullmatch(address.removeprefix(HUB))
    if match is None or not match["revision"]:
        raise UsageError(f"'{address}' names no revision.", hint="Pin one: hf-hub:ORG/REPO@COMMIT")
    repo, revision = match["repo"], match["revision"]
    _, folder = _fetch(repo, revision, [files.CONFIG])
    said = files.read_json(folder / files.CONFIG)
    if "defense" in said:
        raise UsageError(f"{repo} is a model of patchcert.", hint=f"Use {repo}@{revision}.")
    architecture, inner = said.get("architecture"), said.get("pretrained_cfg")
    if not isinstance(architecture, str):
        raise IntegrityError(f"{files.CONFIG} of {repo} names no architecture of timm.", hint=f"Use {FORMS}.")
    timm.check(architecture)
    more = {key: said[key] for key in ("num_classes", "label_names", "label_descriptions") if key in said}
    try:
        facts = {**(inner if isinstance(inner, Mapping) else said), **more}
        return repo, revision, replace(timm.described(architecture, facts, said.get("model_args")), repo=repo)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        said_ = f"{files.CONFIG} of {repo} does not describe a network of timm: {user_code.line(problem)}."
        raise IntegrityError(said_, hint=f"Use another repository, or {FORMS}.") from problem


def _fetch(repo: str, revision: str | None, names: list[str], otherwise: str = AS_FILE) -> tuple[str, Path]:
    try:
        return client.fetch_unlisted(repo, revision, names, hint=otherwise)
    except HubError as problem:
        if problem.hint == otherwise:
            raise
        raise HubError(problem.message, hint=f"{problem.hint} {otherwise}".lstrip()) from problem


def _published(address: str, source: timm.Facts, commit: str, folder: Path, pin: str) -> Classifier:
    """A network of timm with the weights that its publisher made for it."""
    path = folder / files.WEIGHTS
    content = files.read(path)
    tensors, _ = checkpoint.unpack(path, content)
    network, misfit = _built(source, source.outputs), f"the weights of {source.repo} do not fit {source.architecture}"
    tensors = _current(source, network, tensors, misfit)
    checkpoint.check_fit(network.model.state_dict(), tensors, misfit, hint=OTHER_WEIGHTS)
    network.model.load_state_dict(tensors, strict=True)
    note = f"{address}: {source.repo} @ {commit[:7]}, sha256 as the Hub says{pin}"
    made = _described(address, source, network, files.sha256_of(content), "hub", note, source.labels)
    return replace(made, setting=made.setting | {"commit": commit})


def _current(source: timm.Facts, network: WithPreprocessing, tensors: dict[str, Tensor], misfit: str) -> dict[str, Tensor]:
    """Published weights under the names that the network's code has for them; it knows how to read older ones."""
    if tensors.keys() == network.model.state_dict().keys():
        return tensors
    try:
        return timm.converted(source, tensors)
    except (RuntimeError, KeyError, ValueError, TypeError) as problem:
        raise IntegrityError(
            f"{misfit}: {user_code.line(problem)}.",
            hint=OTHER_WEIGHTS,
        ) from problem


def _given(address: str, source: timm.Facts, weights: str) -> Classifier:
    """A network of timm with the user's weights, and as many classes as these have; the names of the classes are unknown."""
    if weights == RANDOM:
        network, note = _built(source, source.outputs), f"{address}: random weights, whose answers mean nothing"
        return _described(address, source, network, checkpoint.digest(network.state_dict()), RANDOM_SOURCE, note, source.labels)
    path = Path(weights)
    files.refuse_pickle(path)
    content = files.read(path)
    tensors, _ = checkpoint.unpack(path, content)
    heads = [tensors[name] for head in source.heads for name in (f"{head}.weight", f"{head}.bias") if name in tensors]
    count = len(heads[0]) if heads and heads[0].ndim else source.outputs
    network = _built(source, count)
    checkpoint.check_fit(
        network.model.state_dict(), tensors, f"'{path}' does not fit timm's {source.architecture}", hint=OTHER_WEIGHTS
    )
    network.model.load_state_dict(tensors, strict=True)
    return _described(address, source, network, files.sha256_of(content), "file", f"{address}: weights in '{path}'", ())


def _built(source: timm.Facts, count: int) -> WithPreprocessing:
    options = {**source.options(), "input_shape": (source.channels, *source.size), "classes": count}
    with torch.random.fork_rng():  # its random weights are not kept
        network = models.build("timm", options)
    assert isinstance(network, WithPreprocessing)
    return network


def _described(
    address: str, source: timm.Facts, network: WithPreprocessing, sha256: str, kind: str, note: str, names: Names
) -> Classifier:
    options = source.options()
    return Classifier(
        network=network,
        name=address,
        names=names,
        mean=source.mean,
        sha256=sha256,
        source=kind,
        note=note,
        setting={"preprocessing": {key: options[key] for key in ("size", "mean", "std", "interpolation")}},
        resize_crop=source.resize_crop,
    )
