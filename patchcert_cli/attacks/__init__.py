"""Attacks by name: each module of this folder is one, and its file name is its name everywhere; ``_`` marks shared code."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from patchcert_cli import registry
from patchcert_cli.attacks import saved
from patchcert_cli.attacks._base import Attack as Attack
from patchcert_cli.attacks._base import AttackResult as AttackResult
from patchcert_cli.attacks._base import Effort as Effort
from patchcert_cli.attacks._base import require as require
from patchcert_cli.attacks._target import LocalEvaluator as LocalEvaluator
from patchcert_cli.attacks._target import Start as Start
from patchcert_cli.attacks._target import Target as Target
from patchcert_cli.attacks._target import rows_at_once as rows_at_once
from patchcert_cli.errors import UnsupportedThreat, UsageError
from patchcert_cli.threats import Patch, PatchPercent, Threat


def names() -> list[str]:
    """All attack names."""
    return registry.module_names(__path__)


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
                    f"the attack under {threat} has no option {', '.join(strange)}.", hint=f"It has {', '.join(sorted(known))}."
                )
            return attack(seed=seed, **options)
    kinds = sorted({kind for name in names() for kind in by_name(name).kinds})
    raise UnsupportedThreat(f"there is no attack under {threat}.", hint=f"Allowed: {', '.join(kinds)}.")


def pasted(
    folder: Path, threat: Threat, shape: tuple[int, int, int], *, seed: int = 0, **options: Any
) -> tuple[Attack, dict[str, str]]:
    """The attack that pastes the pictures of a folder on images [C, H, W], and the sha256 of each of them.

    Raises:
        UnsupportedThreat: the threat is not one patch.
        UsageError: an option is out of range, or a picture is larger than the threat.
        DataError: there are no pictures, or one that cannot be read.
    """
    if not isinstance(threat, Patch | PatchPercent):
        raise UnsupportedThreat(f"pictures cannot be pasted under {threat}.", hint="Give their size: --patch 50.")
    pictures = saved.read(folder, shape[0])
    made = saved.SavedPatches(seed=seed, pictures=pictures, **options)
    made.check(threat.resolve(*shape[1:]), shape[0])
    return made, {picture.name: picture.sha256 for picture in pictures}
