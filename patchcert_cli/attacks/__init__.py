"""Attacks by name: each module of this folder but ``base`` is one, and its file name is its name everywhere."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from patchcert_cli import registry
from patchcert_cli.attacks.base import Attack
from patchcert_cli.errors import UnsupportedThreat, UsageError
from patchcert_cli.threats import Threat


def names() -> list[str]:
    """All attack names."""
    return registry.module_names(__path__, but=("base",))


def by_name(name: str) -> type[Attack]:
    """The one :class:`Attack` class that the module ``name`` defines."""
    # mypy refuses an abstract class where a type is expected; the result is a concrete subclass of it
    return registry.only_class(registry.entry("attack", __name__, name, names()), Attack)  # type: ignore[type-abstract]


def for_threat(threat: Threat, *, seed: int = 0, **options: Any) -> Attack:
    """The first attack by name that knows the threat's kind, with its defaults except for ``options``.

    Raises:
        UnsupportedThreat: no attack knows this kind of threat.
        UsageError: an option is out of range, or the attack has no such option.
    """
    for name in names():
        attack = by_name(name)
        if threat.kind in attack.kinds:
            known = {item.name for item in fields(attack)}
            strange = sorted(set(options) - known)
            if strange:
                raise UsageError(
                    f"the attack under {threat} has no option {', '.join(strange)};", hint=f"it has {', '.join(sorted(known))}."
                )
            return attack(seed=seed, **options)
    kinds = sorted({kind for name in names() for kind in by_name(name).kinds})
    raise UnsupportedThreat(f"there is no attack under {threat};", hint=f"allowed: {', '.join(kinds)}.")
