"""Attacks by name: each module of this folder is one, and its file name is its name everywhere; ``_`` marks shared code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from patchcert_cli import registry
from patchcert_cli.attacks import saved
from patchcert_cli.attacks._base import Attack as Attack
from patchcert_cli.attacks._base import AttackResult as AttackResult
from patchcert_cli.attacks._base import Effort as Effort
from patchcert_cli.attacks._base import require as require
from patchcert_cli.attacks._combined import Combined as Combined
from patchcert_cli.attacks._target import LocalEvaluator as LocalEvaluator
from patchcert_cli.attacks._target import Start as Start
from patchcert_cli.attacks._target import Target as Target
from patchcert_cli.attacks._target import rows_at_once as rows_at_once
from patchcert_cli.defenses import Defense
from patchcert_cli.errors import UnknownName, UnsupportedThreat, UsageError, unknown
from patchcert_cli.threats import Patch, PatchPercent, Threat

DEFAULTS = {"patch": "patch_pgd", "sparse": "sparse"}  # the attack that is used where none is named, by the kind of threat
ALL = "all"
AnyAttack = Attack | Combined


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
    known = _options(attack)
    strange = sorted(set(options) - known)
    if strange:
        raise UsageError(
            f"the attack under {threat} has no option {', '.join(strange)}.", hint=f"It has {', '.join(sorted(known))}."
        )
    return attack(seed=seed, **options)


def _options(attack: type[Attack]) -> set[str]:
    return {item.name for item in fields(attack)}


def listed(text: str) -> list[str]:
    """The attacks of a list such as ``patch_pgd,patch_rs``; :data:`ALL` stands for itself. ``patch-rs`` is ``patch_rs`` too.

    Raises:
        UnknownName: there is no attack of such a name.
        UsageError: a name is missing, or given twice.
    """
    known = {name.replace("_", "-"): name for name in names()}
    chosen = [known.get(name.replace("_", "-"), name) for name in map(str.strip, text.split(","))]
    if chosen == [ALL]:
        return chosen
    for name in chosen:
        if not name or name == ALL:
            hint = f"Separate names by commas, as in patch_pgd,patch_rs, or give {ALL} alone."
            raise UsageError(f"--attack {text} is not a list of attacks.", hint=hint)
        check_name(name)
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"--attack {text} names an attack twice.", hint="Name each once.")
    return chosen


def combined(
    chosen: Sequence[str], threat: Threat, defense: Defense, *, hinted: bool = True, seed: int = 0, **options: Any
) -> Combined:
    """Several attacks as one, or with ``[ALL]`` every attack that searches under this threat and suits the defense.

    The default attack of the threat searches first, since it finds most for its queries; then the others, those of fewest
    queries first. Each gets those of ``options`` that it has.

    Raises:
        UnknownName: there is no attack of a name.
        UnsupportedThreat: one does not know this kind of threat, or none does.
        UsageError: an option is out of range, or none of them has such an option.
    """
    if list(chosen) == [ALL]:
        kinds_of = {name: by_name(name) for name in names()}
        chosen = [
            name for name, one in kinds_of.items() if threat.kind in one.kinds and not one.judges_each and one.suits(defense)
        ]
        if not chosen:
            raise UnsupportedThreat(f"no attack searches under {threat}.", hint="See: patchcert attack --attack list")
    made = {name: for_threat(threat, name, seed=seed) for name in chosen}
    strange = sorted(set(options) - set().union(*(_options(type(one)) for one in made.values())))
    if strange:
        raise UsageError(f"none of {', '.join(made)} has an option {', '.join(strange)}.", hint="See patchcert attack -h.")
    for name, one in made.items():
        own = {key: value for key, value in options.items() if key in _options(type(one))}
        made[name] = for_threat(threat, name, seed=seed, **own)

    def cost(name: str) -> tuple[bool, float, str]:
        effort = made[name].most(defense, threat, hinted=hinted)
        return DEFAULTS.get(threat.kind) != name, float("inf") if effort is None else effort.queries, name

    order = sorted(made, key=cost)
    return Combined(tuple(order), tuple(made[name] for name in order))


def identity(attacker: AnyAttack) -> dict[str, Any]:
    """What decides the records of an attack besides its options, as plain values: names, seed, and revisions after the first."""
    if isinstance(attacker, Combined):
        revisions = {name: one.revision for name, one in zip(attacker.names, attacker.attacks, strict=True) if one.revision > 1}
        named: dict[str, Any] = {"name": ",".join(attacker.names), "seed": attacker.attacks[0].seed}
        return named | ({"revisions": revisions} if revisions else {})
    revised = {"revision": attacker.revision} if attacker.revision > 1 else {}
    return {"name": type(attacker).__name__, "seed": attacker.seed} | revised


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
