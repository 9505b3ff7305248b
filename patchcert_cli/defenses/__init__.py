"""Defenses by name: each module of this folder but ``base`` is one, and its file name is its name everywhere."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from patchcert_cli.defenses.base import Defense
from patchcert_cli.errors import unknown


def names() -> list[str]:
    """All defense names."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def by_name(name: str) -> type[Defense]:
    """The one :class:`Defense` class that the module ``name`` defines."""
    if name not in names():
        raise unknown("defense", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Defense) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one Defense"
    return found[0]


def build(config: Mapping[str, Any]) -> Defense:
    """Build the defense that a configuration names, with fresh weights, in eval mode."""
    return by_name(str(config.get("defense"))).from_config(config).eval()
