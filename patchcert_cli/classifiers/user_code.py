"""A user's own classifier: a function in a module, imported because its address was typed, and for no other reason.

The function takes no arguments and returns a :class:`torch.nn.Module`, images [B, C, H, W] to logits [B, K]. The module may
declare its preprocessing as attributes: ``mean`` and ``std`` per channel, ``size`` (a number, or height and width), and
``classes``, the names of its outputs. Steps that are not declared are skipped: images come in [0, 1] and in their own size.
"""

from __future__ import annotations

import functools
import importlib
import math
import site
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from patchcert_cli.data.class_names import Names
from patchcert_cli.errors import FOREIGN, UnknownName, UsageError, unknown
from patchcert_cli.storage import files

SHOW = "Set PATCHCERT_DEBUG=1 to see where."
WRAPPERS = {"OptimizedModule": ("_orig_mod", "torch.compile"), "DataParallel": ("module", "DataParallel")}  # around a network

_loaded: dict[str, set[str]] = {}  # for each module that was imported here the modules that came with it
_read: dict[str, tuple[ModuleType, str]] = {}  # what was read of a module when it was loaded


@dataclass(frozen=True)
class Stated:
    """What a user's module says of itself; None, or no names, where it says nothing."""

    size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    names: Names


NOTHING = Stated(None, None, None, ())


def call(module: str, function: str) -> nn.Module:
    """The network that ``function`` of ``module`` returns. The current folder is looked through too.

    Raises:
        UnknownName: no such module or function.
        UsageError: importing or calling it fails, or it returns something else.
    """
    before = set(sys.modules)
    home, address = _imported(module), f"{module}:{function}"
    found = getattr(home, function, None)
    if not callable(found):
        known = [name for name, value in vars(home).items() if callable(value) and not name.startswith("_")]
        raise unknown(f"function in {module}", function, known)
    try:
        made = found()
    except FOREIGN as problem:
        raise UsageError(f"{address} fails: {line(problem)}.", hint=f"It is called without arguments. {SHOW}") from problem
    finally:
        _remember(module, set(sys.modules) - before)
    if not isinstance(made, nn.Module):
        raise UsageError(f"{address} returns {type(made).__name__}.", hint="It must return a torch.nn.Module, images to logits.")
    lazy = [name for name, value in made.named_parameters() if is_lazy(value)]
    if lazy:
        raise UsageError(f"{address} returns a network whose {lazy[0]} has no values.", hint="Run it once inside the function.")
    return made


def unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """The network inside what compiles it or spreads it over devices, which computes the same; and what was taken off."""
    taken: list[str] = []
    while type(module).__name__ in WRAPPERS:
        name, meaning = WRAPPERS[type(module).__name__]
        taken.append(meaning)
        module = getattr(module, name)
    return module, taken


def stated(address: str, module: nn.Module) -> Stated:
    """What a module says of itself.

    Raises:
        UsageError: it is invalid.
    """
    size, mean, std = (_numbers(address, module, name) for name in ("size", "mean", "std"))
    if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
        raise UsageError(f"{address} must state mean and std together, one number per channel.", hint="Or state neither.")
    names = getattr(module, "classes", None)
    listed = isinstance(names, list | tuple) and all(isinstance(one, str) for one in names)
    return Stated(
        size=None if size is None else (int(size[0]), int(size[-1])),
        mean=mean,
        std=std,
        names=tuple((one,) for one in names) if listed and names else (),
    )


def digest(module: str) -> dict[str, str]:
    """sha256 of the source of all modules that came with ``module``, itself included: a run of other code is another run.

    Modules of Python itself, of installed packages and of this package are left out.
    """
    found = {name: _digest_of(name) for name in sorted({module, *_loaded.get(module, ())})}
    return {name: value for name, value in found.items() if value}


def _remember(module: str, new: set[str]) -> None:
    """Note what an import loaded, and read it now: it is what runs, whatever becomes of the files."""
    _loaded.setdefault(module, set()).update(new)
    for name in (module, *new):
        _digest_of(name)


def _digest_of(name: str) -> str:
    """sha256 of a loaded module's file as it was when it was loaded; empty if it has none, or is not user code."""
    loaded = sys.modules.get(name)
    if loaded is None:
        return ""
    known = _read.get(name)
    if known is None or known[0] is not loaded:
        known = _read[name] = (loaded, _source(loaded))
    return known[1]


def _source(module: ModuleType) -> str:
    where = Path(getattr(module, "__file__", None) or "")
    installed = {"site-packages", "dist-packages"} & set(where.parts)
    if installed or not where.is_file() or any(where.resolve().is_relative_to(one) for one in _installed()):
        return ""
    return files.sha256(where)


@functools.cache
def _installed() -> list[Path]:
    """Folders whose modules are not user code: Python's library, installed packages, this package."""
    places = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parent)]
    return [Path(one).resolve() for one in places]


def line(problem: BaseException) -> str:
    """The error that user code raised, in one line."""
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
        raise UnknownName(f"no module '{missing}'.", hint="Install it, or go to the folder that holds it.") from problem
    except FOREIGN as problem:
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
            f"{address} states {name} {value!r}.", hint="State mean and std per channel, size as a number or (height, width)."
        )
    return tuple(float(one) for one in listed)
