"""Finding defenses, attacks and networks by name: files of this package, and entry points of installed ones.

Each module or package in a folder is an entry under its file name, except names that begin with ``_``. An outside package names
its modules in its ``pyproject.toml``, in the groups ``patchcert.defenses``, ``patchcert.attacks``, ``patchcert.networks``,
``patchcert.datasets`` and ``patchcert.trackers``.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TypeVar

from patchcert_cli.errors import FOREIGN, UsageError, first_line, unknown

Base = TypeVar("Base")


def module_names(path: Iterable[str]) -> list[str]:
    """The entries in a package's ``__path__``."""
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def names(kind: str, path: Iterable[str]) -> list[str]:
    """All entries of a kind (``defense``, ``attack``, ``network``): those in the folder, and those of installed packages."""
    return sorted({*module_names(path), *(point.name for point in _outside(kind))})


def entry(kind: str, package: str, name: str, path: Iterable[str]) -> ModuleType:
    """Import the module of entry ``name``, from the folder of ``package`` if it is there, else from an installed package.

    Raises:
        UnknownName: there is none; with suggestions.
        UsageError: two packages have one of this name, or the module cannot be imported.
    """
    path = list(path)
    if name in module_names(path):
        return importlib.import_module(f"{package}.{name}")
    found = [point for point in _outside(kind) if point.name == name]
    if not found:
        raise unknown(kind, name, names(kind, path))
    if len({point.value for point in found}) > 1:
        places = " and ".join(sorted(point.value for point in found))
        raise UsageError(f"two installed packages have {kind} '{name}': {places}.", hint="Uninstall one of them.")
    try:
        module = found[0].load()
    except FOREIGN as problem:
        said = f"{kind} '{name}' of an installed package cannot be imported: {first_line(problem)}"
        raise UsageError(said, hint=f"Repair or uninstall the package of {found[0].value}.") from problem
    if not isinstance(module, ModuleType):
        raise UsageError(f"the entry point of {kind} '{name}' is {found[0].value}.", hint="Name the module alone, without ':'.")
    return module


def only_class(module: ModuleType, base: type[Base]) -> type[Base]:
    """The one subclass of ``base`` that a module or package defines itself.

    Raises:
        UsageError: there is none, or more than one.
    """
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and f"{value.__module__}.".startswith(f"{module.__name__}.")
    ]
    if len(found) != 1:
        named = ", ".join(one.__name__ for one in found) or "none"
        raise UsageError(
            f"{module.__name__} must define exactly one {base.__name__}, not {len(found)} ({named}).",
            hint=f"Define one subclass of patchcert_cli.{base.__name__} in it.",
        )
    return found[0]


def _outside(kind: str) -> tuple[EntryPoint, ...]:
    return _entry_points(f"patchcert.{kind}s", tuple(sys.path))


@lru_cache
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """What installed packages name in a group; ``path`` is where they are looked for."""
    return tuple(entry_points(group=group))
