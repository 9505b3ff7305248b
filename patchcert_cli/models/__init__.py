"""Networks by name: each module of this folder with a ``build`` function is one, found by its file name."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, cast, get_args, get_origin, get_type_hints

from torch import nn

from patchcert_cli import registry, schema
from patchcert_cli.errors import IntegrityError, UsageError, first_line

SIZES = ("input_shape", "classes")  # what build takes from the data set: no options
GIVEN = (*SIZES, "mean", "std")  # what it always gets
CORRECT = "Correct network.options in its config.json."


def _module(name: str) -> ModuleType:
    """The module of network ``name``.

    Raises:
        UsageError: it has no ``build``.
    """
    module = registry.entry("network", __name__, name, __path__)
    if not callable(getattr(module, "build", None)):
        hint = "It needs a function build(*, input_shape, classes, mean, std) with its options as further keywords."
        raise UsageError(f"{module.__name__} does not define network '{name}'.", hint=hint)
    return module


def names() -> list[str]:
    """All network names."""
    return registry.names("network", __path__)


def build(name: str, options: Mapping[str, Any]) -> nn.Sequential:
    """Build network ``name`` with freshly initialized weights; every option is a keyword of its ``build``."""
    module = _module(name)
    if wrong := problems(name, {key: value for key, value in options.items() if key not in GIVEN}):
        raise IntegrityError(f"network '{name}' cannot be built from its options: {' '.join(wrong)}", hint=CORRECT)
    try:
        return cast(nn.Sequential, module.build(**listed(name, options)))
    except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as problem:
        raise IntegrityError(
            f"network '{name}' cannot be built from its options: {first_line(problem)}", hint=CORRECT
        ) from problem


def listed(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of network ``name``, with a single whole number where a list is wanted made a list: ``hidden=255``."""
    kinds = get_type_hints(_module(name).build)
    return {
        key: [value] if type(value) is int and get_origin(kinds.get(key)) is Sequence else value for key, value in options.items()
    }


def shorthands(name: str) -> dict[str, str]:
    """Further options of network ``name``, each with the option of ``build`` that follows from it: ``rf`` gives ``kernels``."""
    return dict(getattr(_module(name), "SHORTHANDS", {}))


def expanded(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of network ``name`` with every shorthand replaced by what follows from it.

    Raises:
        UsageError: nothing follows from a shorthand, or it contradicts another option.
    """
    if not shorthands(name).keys() & options.keys():
        return dict(options)
    module = _module(name)
    return cast(dict[str, Any], module.expanded({**defaults(name), **listed(name, options)}, listed(name, options)))


def problems(name: str, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with options of network ``name``: unknown ones, and values of another type or beyond their limits."""
    build_function = _module(name).build
    parameters, kinds = inspect.signature(build_function).parameters, get_type_hints(build_function, include_extras=True)
    named = {key: one for key, one in parameters.items() if key not in SIZES and one.kind is not one.VAR_KEYWORD}
    shown = ", ".join(sorted((named.keys() - set(GIVEN)) | shorthands(name).keys()))
    found: list[str] = []
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        found = [f"network '{name}' has no option '{key}'; known: {shown}." for key in options if key not in named]
    defaults_ = defaults(name)
    for key, value in listed(name, options).items():
        kind = _as_tuple(kinds.get(key, Any))
        if key in named and schema.knows(kind) and not (key in defaults_ and value == defaults_[key]):
            try:
                schema.read(kind, value, f"network option {key}")
            except schema.Invalid as invalid:
                found += [f"{text}." for text in invalid.problems]
    return found


def _as_tuple(kind: Any) -> Any:
    """An annotated list as what a file's list is read as."""
    return types.GenericAlias(tuple, (*get_args(kind), ...)) if get_origin(kind) is Sequence else kind


def defaults(name: str) -> dict[str, Any]:
    """The options of network ``name`` that have a default, each with it."""
    options = inspect.signature(_module(name).build).parameters
    given = {key: option.default for key, option in options.items() if option.default is not option.empty}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}


def describe(network: nn.Module) -> str:
    """Short text such as ``MLP 784-255-10`` or ``CNN 16-16-32-32, dense 100-10``: the widths of all layers.

    A network that has a ``summary`` of its own is described by that, and by its number of parameters.
    """
    for part in network.modules():
        if isinstance(getattr(part, "summary", None), str):
            return f"{part.summary}, {sum(weight.numel() for weight in part.parameters()) / 1e6:.2f}M parameters"
    dense = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    convolutions = [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    widths = [str(layer.out_features) for layer in dense]
    if not convolutions:
        return "-".join(["MLP " + str(dense[0].in_features), *widths]) if dense else type(network).__name__
    return f"CNN {'-'.join(map(str, convolutions))}" + (f", dense {'-'.join(widths)}" if widths else "")
