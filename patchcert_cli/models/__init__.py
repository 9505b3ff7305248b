"""Networks by name: each module of this folder with a ``build`` function is one, found by its file name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from patchcert_cli.errors import IntegrityError, unknown


def names() -> list[str]:
    """All network names."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "layers")


def build(name: str, options: Mapping[str, Any]) -> nn.Sequential:
    """Build network ``name`` with freshly initialized weights; every option is a keyword of its ``build``."""
    if name not in names():
        raise unknown("network", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    try:
        return cast(nn.Sequential, module.build(**options))
    except (TypeError, ValueError, RuntimeError) as problem:
        raise IntegrityError(f"network '{name}' cannot be built from its options: {problem}") from problem
