"""Defenses by name: each module of this folder is one, and its file name is its name everywhere; ``_`` marks shared code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchcert_cli import registry
from patchcert_cli.defenses._base import Augment as Augment
from patchcert_cli.defenses._base import Claim as Claim
from patchcert_cli.defenses._base import Defense as Defense
from patchcert_cli.defenses._base import Options as Options
from patchcert_cli.defenses._base import Surrogate as Surrogate
from patchcert_cli.defenses._base import TrainingStep as TrainingStep
from patchcert_cli.defenses._cells import CellSurrogate as CellSurrogate
from patchcert_cli.defenses._cells import LocalFeatureDefense as LocalFeatureDefense
from patchcert_cli.defenses._cells import RegionDefense as RegionDefense
from patchcert_cli.defenses._cells import VotingDefense as VotingDefense


def names() -> list[str]:
    """All defense names."""
    return registry.module_names(__path__)


def by_name(name: str) -> type[Defense]:
    """The one :class:`Defense` class that the module ``name`` defines."""
    # mypy refuses an abstract class where a type is expected; the result is a concrete subclass of it
    return registry.only_class(registry.entry("defense", __name__, name, names()), Defense)  # type: ignore[type-abstract]


def build(config: Mapping[str, Any]) -> Defense:
    """Build the defense that a configuration names, with fresh weights, in eval mode."""
    return by_name(str(config.get("defense"))).from_config(config).eval()
