"""A user's own classifier: a function in a module, imported because its address was typed, and for no other reason.

The function takes no arguments and returns a :class:`torch.nn.Module`, images [B, C, H, W] to logits [B, K]. The module may
state as attributes what it wants in front of it: ``mean`` and ``std`` per channel, ``size`` (a number, or height and width), and
``classes``, the names of its outputs. What it does not state is not done: images come in [0, 1] and in their own size.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchcert_cli import files
from patchcert_cli.errors import UnknownName, UsageError, unknown
from patchcert_cli.labels import Names

SHOW = "PATCHCERT_DEBUG=1 shows where."


@dataclass(frozen=True)
class Stated:
    """What a user's module says of itself; None, or no names, where it says nothing."""

    size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    names: Names


def call(module: str, function: str) -> nn.Module:
    """The network that ``function`` of ``module`` returns. The current folder is looked through too.

    Raises:
        UnknownName: no such module or function.
        UsageError: importing or calling it fails, or it returns something else.
    """
    home, address = _imported(module), f"{module}:{function}"
    found = getattr(home, function, None)
    if not callable(found):
        known = [name for name, value in vars(home).items() if callable(value) and not name.startswith("_")]
        raise unknown(f"function in {module}", function, known)
    try:
        made = found()
    except Exception as problem:  # anybody's code can raise anything
        raise UsageError(f"{address} fails: {line(problem)}.", hint=f"It is called without arguments; {SHOW}") from problem
    if not isinstance(made, nn.Module):
        raise UsageError(f"{address} returns {type(made).__name__};", hint="it must return a torch.nn.Module, images to logits.")
    return made


def stated(address: str, module: nn.Module) -> Stated:
    """What a module says of itself.

    Raises:
        UsageError: it cannot be meant so.
    """
    size, mean, std = (_numbers(address, module, name) for name in ("size", "mean", "std"))
    if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
        raise UsageError(f"{address} must state mean and std together, one number per channel;", hint="or neither.")
    names = getattr(module, "classes", None)
    listed = isinstance(names, list | tuple) and all(isinstance(one, str) for one in names)
    return Stated(
        size=None if size is None else (int(size[0]), int(size[-1])),
        mean=mean,
        std=std,
        names=tuple((one,) for one in names) if listed and names else (),
    )


def digest(module: str) -> str:
    """sha256 of the text of a module that was imported, so that a run of other code is another run; empty if it has none."""
    try:
        return files.sha256_of(inspect.getsource(sys.modules[module]).encode())
    except (OSError, TypeError):
        return ""


def line(problem: BaseException) -> str:
    """What somebody's code raised, in one line."""
    first = (str(problem).splitlines() or [""])[0].rstrip(".")
    return f"{type(problem).__name__}: {first}" if first else type(problem).__name__


def _imported(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        missing = problem.name or ""
        if not f"{name}.".startswith(f"{missing}."):  # the module is there, and needs another one
            raise UsageError(f"module '{name}' cannot be imported: {line(problem)}.", hint="Install what it needs.") from problem
        raise UnknownName(f"no module '{missing}';", hint="install it, or go to the folder that holds it.") from problem
    except Exception as problem:  # anybody's code can raise anything
        raise UsageError(f"module '{name}' cannot be imported: {line(problem)}.", hint=SHOW) from problem


def _numbers(address: str, module: nn.Module, name: str) -> tuple[float, ...] | None:
    """An attribute as numbers, or None if there is none: ``size`` is one or two, the others are one per channel."""
    value: Any = getattr(module, name, None)
    if value is None:
        return None
    listed = value.flatten().tolist() if isinstance(value, Tensor) else [value] if isinstance(value, int | float) else value
    good = isinstance(listed, list | tuple) and all(isinstance(one, int | float) and math.isfinite(one) for one in listed)
    if not good or not listed or (name != "mean" and min(listed) <= 0) or (name == "size" and len(listed) > 2):
        raise UsageError(
            f"{address} states {name} {value!r};", hint="state mean and std per channel, size as a number or (height, width)."
        )
    return tuple(float(one) for one in listed)
