"""Defenses by name: each module of this folder is one, and its file name is its name everywhere; ``_`` marks shared code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from patchcert_cli import registry
from patchcert_cli.certificate import Claim as Claim
from patchcert_cli.certificate import Proof as Proof
from patchcert_cli.defenses._attackable import Attackable as Attackable
from patchcert_cli.defenses._attackable import Surrogate as Surrogate
from patchcert_cli.defenses._attackable import activations as activations
from patchcert_cli.defenses._attackable import surrogates as surrogates
from patchcert_cli.defenses._base import COMMON_ENTRIES as COMMON_ENTRIES
from patchcert_cli.defenses._base import Defense as Defense
from patchcert_cli.defenses._base import MarginMaps as MarginMaps
from patchcert_cli.defenses._base import WrapsClassifier as WrapsClassifier
from patchcert_cli.defenses._base import build_network as build_network
from patchcert_cli.defenses._base import own_entries as own_entries
from patchcert_cli.defenses._base import size_and_classes as size_and_classes
from patchcert_cli.defenses._cells import CellSurrogate as CellSurrogate
from patchcert_cli.defenses._cells import LocalFeatureDefense as LocalFeatureDefense
from patchcert_cli.defenses._cells import RegionDefense as RegionDefense
from patchcert_cli.defenses._cells import VotingDefense as VotingDefense
from patchcert_cli.defenses._empirical import EmpiricalDefense as EmpiricalDefense
from patchcert_cli.defenses._masked import MaskedClassifier as MaskedClassifier
from patchcert_cli.defenses._masked import MaskedOptions as MaskedOptions
from patchcert_cli.defenses._training import Augment as Augment
from patchcert_cli.defenses._training import AugmentedOptions as AugmentedOptions
from patchcert_cli.defenses._training import Options as Options
from patchcert_cli.defenses._training import TaughtOptions as TaughtOptions
from patchcert_cli.defenses._training import Trainable as Trainable
from patchcert_cli.defenses._training import TrainingStep as TrainingStep
from patchcert_cli.errors import UsageError


def names() -> list[str]:
    """All defense names."""
    return registry.names("defense", __path__)


def by_name(name: str) -> type[Defense]:
    """The one :class:`Defense` class that the module ``name`` defines."""
    # mypy refuses an abstract class where a type is expected; the result is a concrete subclass of it
    return registry.only_class(registry.entry("defense", __name__, name, __path__), Defense)  # type: ignore[type-abstract]


def trainable(name: str) -> type[Trainable]:
    """The class of defense ``name``, if ``patchcert train`` can train it."""
    found = by_name(name)
    if not issubclass(found, Trainable):
        raise UsageError(f"{name} cannot be trained.", hint=f"Allowed: {', '.join(trained())}.")
    return found


def trained() -> list[str]:
    """Defenses that ``patchcert train`` can train."""
    return _that_are(Trainable)


def taught() -> list[str]:
    """Defenses that can also learn from the answers of a teacher."""
    return [name for name in trained() if issubclass(trainable(name).options, TaughtOptions)]


def wrapping(name: str) -> type[WrapsClassifier]:
    """The class of defense ``name``, if it can be put around any classifier."""
    found = by_name(name)
    if not issubclass(found, WrapsClassifier):
        raise UsageError(f"{name} cannot be put around a classifier.", hint=f"Allowed: {', '.join(around())}.")
    return found


def around(*, masked: bool | None = None, proves: bool | None = None) -> list[str]:
    """Defenses that can be put around any classifier; only those that have masks, or certificates, or have none."""
    kinds = {name: wrapping(name) for name in _that_are(WrapsClassifier)}
    found = [name for name, kind in kinds.items() if masked is None or kind.masked is masked]
    return [name for name in found if proves is None or by_name(name).guarantee.proves is proves]


def _that_are(kind: type) -> list[str]:
    return [name for name in names() if issubclass(by_name(name), kind)]


def build_trainable(config: Mapping[str, Any]) -> Trainable:
    """Build what a configuration deploys, to train it."""
    trainable(str(config["deployed"]["defense"]))
    return cast(Trainable, build(config["deployed"]))


def build(deployed: Mapping[str, Any]) -> Defense:
    """Build the defense that section ``deployed`` of a configuration describes, with fresh weights, in eval mode."""
    return by_name(str(deployed.get("defense"))).from_config(deployed).eval()
