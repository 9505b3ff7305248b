"""Finding things by file name: each module or package in a folder is an entry, except names that begin with ``_``."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

from patchcert_cli.errors import unknown

Base = TypeVar("Base")


def module_names(path: Iterable[str]) -> list[str]:
    """The entries in a package's ``__path__``."""
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def entry(kind: str, package: str, name: str, known: list[str]) -> ModuleType:
    """Import module ``name`` of ``package``; an unknown name raises with suggestions."""
    if name not in known:
        raise unknown(kind, name, known)
    return importlib.import_module(f"{package}.{name}")


def only_class(module: ModuleType, base: type[Base]) -> type[Base]:
    """The one subclass of ``base`` that a module or package defines itself."""
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and f"{value.__module__}.".startswith(f"{module.__name__}.")
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one {base.__name__}"
    return found[0]
