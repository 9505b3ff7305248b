"""Finding things by file name: a module in a folder is an entry of that folder's registry, under its own name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import TypeVar

from patchcert_cli.errors import unknown

Base = TypeVar("Base")


def module_names(path: Iterable[str], *, but: tuple[str, ...]) -> list[str]:
    """The modules of a package's ``__path__``, without those that hold what they share."""
    return sorted(module.name for module in pkgutil.iter_modules(path) if module.name not in but)


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
