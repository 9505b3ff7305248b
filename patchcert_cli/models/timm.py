"""Networks of the timm library (the extra ``timm``), each after the preprocessing that its published weights were made for.

Nothing here asks a network: weights come as tensors, from wherever they were verified (:mod:`patchcert_cli.classifiers`).
"""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from patchcert_cli.data import resize_crop
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.errors import MachineError, UsageError, unknown
from patchcert_cli.layers.preprocessing import INTERPOLATIONS, WithPreprocessing

INSTALL = 'pip install "patchcert[timm]"'
USUAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # where published weights say nothing


@dataclass(frozen=True)
class Facts:
    """What timm, or a repository in its format, states about published weights.

    Attributes:
        architecture: the network's name, without the tag of its weights.
        repo: the repository on the Hub that holds the weights; empty if there is none.
        outputs: K, the number of classes.
        channels: C of what the network takes.
        size: H and W of what it takes.
        resize_crop: how an image file becomes such an image, to the pixel as timm's transform for evaluation makes it.
        mean, std: per channel.
        interpolation: how images were resized when it was trained.
        heads: names of the layers that give the classes.
        labels: for each output the names that it goes by; empty if unknown.
        arguments: further arguments of the network.
    """

    architecture: str
    repo: str
    outputs: int
    channels: int
    size: tuple[int, int]
    resize_crop: ResizeCrop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    heads: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...] = ()
    arguments: Mapping[str, Any] | None = None

    def options(self) -> dict[str, Any]:
        """The options of :func:`build` that rebuild the network, with fresh weights and any number of classes."""
        said = {
            "architecture": self.architecture,
            "size": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
        }
        return said | ({"arguments": dict(self.arguments)} if self.arguments else {})


def library() -> Any:
    """The timm library.

    Raises:
        MachineError: it is not installed, or does not fit the installed torch.
    """
    try:
        with quiet():
            return importlib.import_module("timm")
    except ModuleNotFoundError as problem:
        raise MachineError("timm is not installed.", hint=f"Type: {INSTALL}") from problem
    except (ImportError, OSError, RuntimeError) as problem:  # mixed builds of torch and torchvision raise RuntimeError
        raise MachineError(f"timm cannot be imported: {_line(problem)}.", hint="See: patchcert doctor") from problem


def facts(name: str) -> Facts:
    """timm's facts about ``name``: an architecture, or one with the tag of published weights, such as ``resnet18.a1_in1k``.

    Raises:
        UnknownName: timm has no such network, or no such weights of it; says what is near.
        MachineError: timm is not installed.
    """
    timm = library()
    architecture, _, tag = name.partition(".")
    check(architecture)
    tags = [one.partition(".")[2] for one in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise unknown(f"weights of {architecture}", tag, tags)
    said = timm.models.get_pretrained_cfg(name)
    return described(architecture, {} if said is None else said.to_dict())


def check(architecture: str) -> None:
    """Raise :class:`UnknownName`, with what is near, unless timm has this network."""
    timm = library()
    if not timm.is_model(architecture):
        raise unknown("timm network", architecture, timm.list_models(), see="https://huggingface.co/timm")


def described(architecture: str, said: Mapping[str, Any], arguments: Mapping[str, Any] | None = None) -> Facts:
    """:class:`Facts` from the values of a ``pretrained_cfg``, as timm keeps it and as repositories on the Hub hold it.

    Raises:
        ValueError, TypeError: the values are none of such a configuration.
    """
    channels, height, width = (int(side) for side in said.get("input_size", (3, 224, 224)))
    heads, manner = said.get("classifier") or (), str(said.get("interpolation") or "bicubic")
    mean, std = (tuple(float(value) for value in said.get(key) or usual) for key, usual in USUAL.items())
    outputs = int(said.get("num_classes", 1000))
    return Facts(
        architecture=architecture,
        repo=str(said.get("hf_hub_id") or ""),
        outputs=outputs,
        channels=channels,
        size=(height, width),
        resize_crop=_framed(said, (height, width), manner, mean),
        mean=mean,
        std=std,
        interpolation=manner if manner in INTERPOLATIONS else "bicubic",
        heads=(heads,) if isinstance(heads, str) else tuple(heads),
        labels=_labels(said, outputs),
        arguments=dict(arguments) if arguments else None,
    )


def _framed(said: Mapping[str, Any], size: tuple[int, int], interpolation: str, mean: tuple[float, ...]) -> ResizeCrop:
    """How a ``pretrained_cfg`` wants images to be scaled and cropped: ``crop_pct`` and ``crop_mode``."""
    share, mode = float(said.get("crop_pct") or 0.875), str(said.get("crop_mode") or "center")
    scale = math.floor(size[0] / share), math.floor(size[1] / share)
    if interpolation not in resize_crop.INTERPOLATIONS:
        raise ValueError(f"unknown interpolation {interpolation}")
    if mode != "border":
        return ResizeCrop(size, scale, mode if mode == "squash" else "center", interpolation)
    red, green, blue = (round(255 * value) for value in (mean if len(mean) == 3 else (mean[0],) * 3))
    return ResizeCrop(size, scale, mode, interpolation, (red, green, blue))


def imagenet_labels(outputs: int = 1000) -> tuple[tuple[str, ...], ...]:
    """For each output of an ImageNet classifier its WordNet id and that synset's words; empty unless timm knows such a set."""
    library()
    infos = importlib.import_module("timm.data")
    subset = infos.infer_imagenet_subset({"num_classes": outputs})
    if subset is None:
        return ()
    info = infos.ImageNetInfo(subset)
    return tuple((wnid, *str(info.label_name_to_description(wnid)).split(", ")) for wnid in info.label_names())


def word(wnid: str) -> str:
    """The first word for a WordNet id, or the id itself where timm is not there to know it."""
    with contextlib.suppress(MachineError, KeyError):
        library()
        info = importlib.import_module("timm.data").ImageNetInfo()
        return str(info.label_name_to_description(wnid)).split(", ")[0]
    return wnid


def _labels(said: Mapping[str, Any], outputs: int) -> tuple[tuple[str, ...], ...]:
    """The names that come with the weights, else those of the ImageNet set with as many classes."""
    names, words = said.get("label_names"), said.get("label_descriptions") or {}
    if not names:
        return imagenet_labels(outputs)
    if isinstance(names, Mapping):  # by index; JSON makes text of it
        names = [names.get(at, names.get(str(at))) for at in range(outputs)]
    if len(names) != outputs or not all(isinstance(one, str) for one in names):
        return ()
    return tuple((one, str(words[one])) if one in words else (one,) for one in names)


def build(
    *,
    input_shape: Sequence[int],
    classes: int,
    architecture: str = "resnet18",
    size: Sequence[int] = (),
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    arguments: Mapping[str, Any] | None = None,
    weights: str = "",
    weights_sha256: str = "",
) -> Any:
    """A timm network with fresh weights and ``classes`` outputs after its preprocessing: [B, C, H, W] -> [B, classes].

    Args:
        input_shape: C, H and W of the images.
        classes: K.
        architecture: its name in timm, without a tag.
        size: what images are resized to, by default ``input_shape``; one number for a square.
        mean: per channel, of what the network takes.
        std: per channel.
        interpolation: how images are resized: bicubic, bilinear or nearest.
        arguments: further arguments of the network.
        weights: where the weights came from that training began with. Not used here: training fetches them, once.
        weights_sha256: of that file.
    """
    timm = library()
    check(architecture)
    sides = tuple(size) * (2 if len(size) == 1 else 1) or tuple(input_shape[1:])
    if len(sides) != 2 or min(sides) < 1:
        raise UsageError(f"size {list(size)} is not an image size.", hint="Give one number, or height and width.")
    channels, more = len(mean), _plain(arguments or {})
    said = timm.models.get_pretrained_cfg(architecture)
    made_for = None if said is None else tuple(said.input_size[1:])
    if said is not None and said.fixed_input_size and made_for != sides:
        more.setdefault("img_size", sides)
    if channels != 3:
        more.setdefault("in_chans", channels)
    with quiet():
        model = timm.create_model(architecture, pretrained=False, num_classes=classes, **more)
    return WithPreprocessing(
        model,
        size=sides,
        mean=mean,
        std=std,
        channels=channels,
        interpolation=interpolation,
        summary=f"timm {architecture} at {sides[0]}x{sides[1]}",
    )


def converted(source: Facts, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as today's timm names and shapes them; they may be older than the network's code.

    Raises:
        RuntimeError: they are not of this network.
    """
    overlay = {"state_dict": dict(tensors), "num_classes": source.outputs}
    with quiet():
        model = library().create_model(
            source.architecture,
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            num_classes=source.outputs,
            **_plain(source.arguments or {}),
        )
    return cast(dict[str, Tensor], cast(nn.Module, model).state_dict())


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a network, which may be untrusted, without those that would make timm look for weights."""
    wrong = [name for name in arguments if name.startswith("pretrained") or name in ("checkpoint_path", "cache_dir")]
    if wrong:
        raise ValueError(f"{wrong[0]} is not an argument of a network")
    return dict(arguments)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence timm's warnings about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(".")
