"""patchcert: train, certify, attack and share certified defenses against adversarial patches and sparse attacks.

The public names are loaded when they are first used, so that ``import patchcert_cli`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchcert_cli.catalog.bundled import list_models as list_models
    from patchcert_cli.catalog.resolve import LoadedModel as LoadedModel
    from patchcert_cli.catalog.resolve import load as load
    from patchcert_cli.catalog.resolve import load_model as load_model
    from patchcert_cli.certificate import Certificate as Certificate
    from patchcert_cli.certificate import Tally as Tally
    from patchcert_cli.defenses import Defense as Defense
    from patchcert_cli.errors import PatchcertError as PatchcertError
    from patchcert_cli.threats import Guarantee as Guarantee
    from patchcert_cli.threats import Patch as Patch
    from patchcert_cli.threats import PatchPercent as PatchPercent
    from patchcert_cli.threats import Sparse as Sparse
    from patchcert_cli.threats import Threat as Threat
    from patchcert_cli.threats import parse_threat as parse_threat

from patchcert_cli.version import __version__

_HOMES = {
    "Certificate": "certificate",
    "Guarantee": "threats",
    "Tally": "certificate",
    "Defense": "defenses",
    "PatchcertError": "errors",
    "list_models": "catalog.bundled",
    "load": "catalog.resolve",
    "load_model": "catalog.resolve",
    "LoadedModel": "catalog.resolve",
    "Patch": "threats",
    "PatchPercent": "threats",
    "Sparse": "threats",
    "Threat": "threats",
    "parse_threat": "threats",
}
__all__ = ["__version__", *_HOMES]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
