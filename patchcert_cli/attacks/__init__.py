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
from patchcert_cli.errors import UnknownName, UnsupportedThreat, UsageError, unknown
from patchcert_cli.threats import Patch, PatchPercent, Threat

DEFAULTS = {"patch": "patch_pgd", "sparse": "sparse"}  # the attack that is used where none is named, by the kind of threat


def names() -> list[str]:
    """All attack names."""
    return registry.names("attack", __path__)


def by_name(name: str) -> type[Attack]:
    """The one :class:`Attack` class that the module ``name`` defines."""
    # mypy refuses an abstract class where a type is expected; the result is a concrete subclass of it
    return registry.only_class(registry.entry("attack", __name__, name, __path__), Attack)  # type: ignore[type-abstract]


def kinds() -> dict[str, tuple[str, ...]]:
    """For each attack by name the kinds of threat that it knows."""
    return {name: by_name(name).kinds for name in names()}


def default_for(name: str) -> list[str]:
    """The kinds of threat whose default attack this is."""
    return [kind for kind, default in DEFAULTS.items() if default == name]


def check_name(name: str) -> None:
    """Raise :class:`UnknownName`, with suggestions, unless there is an attack of this name."""
    if name not in names():
        known = [f"{one} ({', '.join(threats)})" for one, threats in kinds().items()]
        problem = unknown("attack", name, names())
        raise UnknownName(problem.message, hint=problem.hint if "mean" in problem.hint else f"Known: {', '.join(known)}.")


def for_threat(threat: Threat, name: str | None = None, *, seed: int = 0, **options: Any) -> Attack:
    """The attack ``name``, by default that of :data:`DEFAULTS`, with its own defaults except for ``options``.

    Raises:
        UnknownName: there is no attack of this name.
        UnsupportedThreat: the attack does not know this kind of threat, or none does.
        UsageError: an option is out of range, or the attack has no such option.
    """
    able = [one for one, threats in kinds().items() if threat.kind in threats]
    if name is None:
        if threat.kind not in DEFAULTS:
            hint = f"Allowed: {', '.join(DEFAULTS)}." if not able else f"Choose one: --attack {able[0]}"
            raise UnsupportedThreat(f"there is no default attack under {threat}.", hint=hint)
        name = DEFAULTS[threat.kind]
    check_name(name)
    if name not in able:
        hint = f"Use one of {', '.join(able)}." if able else f"It knows: {', '.join(by_name(name).kinds)}."
        raise UnsupportedThreat(f"attack {name} does not know the threat {threat}.", hint=hint)
    attack = by_name(name)
    known = {item.name for item in fields(attack)}
    strange = sorted(set(options) - known)
    if strange:
        raise UsageError(
            f"the attack under {threat} has no option {', '.join(strange)}.", hint=f"It has {', '.join(sorted(known))}."
        )
    return attack(seed=seed, **options)


def pasted(
    folder: Path, threat: Threat, shape: tuple[int, int, int], *, seed: int = 0, **options: Any
) -> tuple[Attack, dict[str, str]]:
    """The attack that pastes the image files of a folder on images [C, H, W], and the sha256 of each file.

    Raises:
        UnsupportedThreat: the threat is not one patch.
        UsageError: an option is out of range, or an image file is larger than the threat.
        DataError: there are no image files, or one cannot be read.
    """
    if not isinstance(threat, Patch | PatchPercent):
        raise UnsupportedThreat(f"image files cannot be pasted under {threat}.", hint="Give their size: --patch 50.")
    pictures = saved.read(folder, shape[0])
    made = saved.SavedPatches(seed=seed, pictures=pictures, **options)
    made.check(threat.resolve(*shape[1:]), shape[0])
    return made, {picture.name: picture.sha256 for picture in pictures}
