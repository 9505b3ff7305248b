"""patchcert: train, certify, attack and share certified defenses against adversarial patches and sparse attacks.

The public names (``docs/python.md``) are loaded when they are first used, so that ``import patchcert_cli`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchcert_cli.version import __version__

if TYPE_CHECKING:
    from patchcert_cli.attacks import Attack as Attack
    from patchcert_cli.attacks import AttackResult as AttackResult
    from patchcert_cli.catalog.bundled import list_models as list_models
    from patchcert_cli.catalog.resolve import LoadedModel as LoadedModel
    from patchcert_cli.catalog.resolve import load as load
    from patchcert_cli.catalog.resolve import load_model as load_model
    from patchcert_cli.certificate import Certificate as Certificate
    from patchcert_cli.certificate import Tally as Tally
    from patchcert_cli.certifiers.masks.mask_sets import MaskSpec as MaskSpec
    from patchcert_cli.defenses import Claim as Claim
    from patchcert_cli.defenses import Defense as Defense
    from patchcert_cli.defenses.ibp import IntervalDefense as IntervalDefense
    from patchcert_cli.defenses.patchcleanser import PatchCleanser as PatchCleanser
    from patchcert_cli.errors import ClaimError as ClaimError
    from patchcert_cli.errors import DataError as DataError
    from patchcert_cli.errors import HubError as HubError
    from patchcert_cli.errors import IntegrityError as IntegrityError
    from patchcert_cli.errors import Interrupted as Interrupted
    from patchcert_cli.errors import MachineError as MachineError
    from patchcert_cli.errors import PatchcertError as PatchcertError
    from patchcert_cli.errors import UnknownName as UnknownName
    from patchcert_cli.errors import UnsupportedThreat as UnsupportedThreat
    from patchcert_cli.errors import UsageError as UsageError
    from patchcert_cli.threats import Guarantee as Guarantee
    from patchcert_cli.threats import Patch as Patch
    from patchcert_cli.threats import Patches as Patches
    from patchcert_cli.threats import PatchPercent as PatchPercent
    from patchcert_cli.threats import Sparse as Sparse
    from patchcert_cli.threats import Threat as Threat
    from patchcert_cli.threats import parse_threat as parse_threat
    from patchcert_cli.training.recipe import Recipe as Recipe

_NAMES = {
    "attacks": ("Attack", "AttackResult"),
    "catalog.bundled": ("list_models",),
    "catalog.resolve": ("LoadedModel", "load", "load_model"),
    "certificate": ("Certificate", "Tally"),
    "certifiers.masks.mask_sets": ("MaskSpec",),
    "defenses": ("Claim", "Defense"),
    "defenses.ibp": ("IntervalDefense",),
    "defenses.patchcleanser": ("PatchCleanser",),
    "errors": (
        "ClaimError",
        "DataError",
        "HubError",
        "IntegrityError",
        "Interrupted",
        "MachineError",
        "PatchcertError",
        "UnknownName",
        "UnsupportedThreat",
        "UsageError",
    ),
    "threats": ("Guarantee", "Patch", "PatchPercent", "Patches", "Sparse", "Threat", "parse_threat"),
    "training.recipe": ("Recipe",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_HOMES]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
