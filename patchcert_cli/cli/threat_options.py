"""From ``--threat``, ``--patch``, ``--k`` and ``--unit`` to threat models."""

from __future__ import annotations

from patchcert_cli.errors import UnsupportedThreat, UsageError
from patchcert_cli.threats import KINDS, UNITS, Sparse, Threat, parse_budgets, parse_patches, parse_threat


def threats_from(*, threat: str | None, patch: str | None, k: str | None, unit: str | None) -> list[Threat]:
    """The threat models that the options name, without repetitions; empty if the model's own is meant.

    Raises:
        UsageError: an option is invalid, or two options contradict each other.
    """
    _check(threat, patch, k, unit)
    if threat is not None and ":" in threat:
        return [parse_threat(threat)]
    given: list[Threat] = []
    if patch is not None:
        given += parse_patches(patch)
    elif k is not None:
        given += parse_budgets(k, unit or "pixel")
    return list(dict.fromkeys(given))


def threat_from(*, threat: str | None, patch: str | None, k: str | None, unit: str | None) -> Threat | None:
    """The one threat model that the options name, or None if the model's own is meant.

    Raises:
        UsageError: as :func:`threats_from`, or the options name several.
    """
    found = threats_from(threat=threat, patch=patch, k=k, unit=unit)
    if len(found) > 1:
        flag, text = ("--patch", patch) if patch is not None else ("--k", k)
        one = (text or "").replace("..", ",").split(",")[0]
        hint = f"Give one, such as {flag} {one}. Only patchcert certify takes several."
        raise UsageError(f"{flag} {text} names {len(found)} threat models, and this command takes one.", hint=hint)
    return found[0] if found else None


def own_threat(own: Threat | None, *, threat: str | None, unit: str | None) -> Threat:
    """The threat model that a model was trained for, if it is of the kind asked for."""
    if own is None:
        raise UsageError("a plain classifier is made for no threat.", hint="Choose one: --patch 32, or --patch 2%.")
    if (threat is not None and own.kind != threat) or (unit is not None and not isinstance(own, Sparse)):
        raise UsageError(f"this model's own threat is {own}.", hint="Choose one: --patch 5, or --threat sparse --k 10.")
    return Sparse(own.k, unit) if unit is not None and isinstance(own, Sparse) else own


def _check(threat: str | None, patch: str | None, k: str | None, unit: str | None) -> None:
    """Refuse options that contradict each other."""
    if threat is not None and ":" in threat:
        if patch is not None or k is not None or unit is not None:
            raise UsageError(f"--threat {threat} is complete.", hint="Leave --patch, --k and --unit out.")
        return
    if threat is not None and threat not in KINDS:
        raise UnsupportedThreat(f"no threat '{threat}'.", hint=f"Use one of: {', '.join(KINDS)}.")
    if threat == "patches":
        raise UsageError("--threat patches does not say how many, or how large.", hint="Use --threat patches:2:5x5.")
    if unit is not None and unit not in UNITS:
        raise UsageError(f"invalid unit '{unit}'.", hint=f"Use one of {', '.join(UNITS)}.")
    if patch is not None and (threat == "sparse" or k is not None):
        raise UsageError("--patch and --k describe different attackers.", hint="Give one of them.")
    if k is not None and threat == "patch":
        raise UsageError("--k does not go with --threat patch.", hint="Use --threat sparse, or --patch.")
    if unit is not None and (patch is not None or threat == "patch"):
        raise UsageError("--unit goes with --k only.", hint="A patch always changes whole pixels.")
