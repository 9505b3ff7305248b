"""One claim of a user's run, counted, and in plain sentences for readers who do not know the field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.certificate import Tally
from patchcert_cli.reporting.numbers import plural
from patchcert_cli.threats import Guarantee, Patches, PatchPercent, Sparse, Threat


@dataclass(frozen=True)
class Claimed:
    """One claim over the images of a run.

    Attributes:
        at: its position in the records.
        method: the proof in the records; ``asked`` is the one that was requested, None for the defense's best.
        tally: counts over the images that are done.
        alarms: of certified detection, images that raise an alarm without an attack; else None.
    """

    at: int
    threat: Threat
    method: str
    asked: str | None
    arithmetic: Arithmetic
    guarantee: Guarantee
    top: int
    tally: Tally
    alarms: int | None


def management(claim: Claimed, every: Sequence[Claimed] = ()) -> str:
    """What a claim says, in one plain sentence; in a second, what ``every`` claim of its run counts under other threats.

    Of more than 100 images it counts to 100, the certified rounded down.
    """
    tally, exact = claim.tally, claim.tally.images <= 100
    certified, wrong = tally.certified, tally.images - tally.clean
    whole = tally.images if exact else 100
    if not exact:
        certified, wrong = 100 * certified // tally.images, -(-100 * wrong // tally.images)
    rest = max(whole - certified - wrong, 0)

    def is_right(count: int) -> str:
        if claim.top == 1:
            return f"{'is' if count == 1 else 'are'} classified right"
        return f"{'has' if count == 1 else 'have'} the right class among the first {claim.top}"

    without = "" if claim.alarms is None else " without an alarm"
    one = wrong == 1
    is_wrong = f"{'is' if one else 'are'} classified wrong" if claim.top == 1 else f"{'does' if one else 'do'} not have it"
    others = "not one" if exact else "fewer than one"
    among = f"{whole} images, {certified}" if exact else f"every 100 images, about {certified}"
    return (
        f"Of {among} {is_right(certified)} and {nothing(claim.threat)} can change that{without}{_doubt(claim)};"
        f" {rest or others} more {is_right(rest or 1)}, without such a proof;"
        f" {wrong} {is_wrong}{' or raise an alarm' if without else ''}.{_elsewhere(claim, every)}"
    )


def _elsewhere(claim: Claimed, every: Sequence[Claimed]) -> str:
    """`` Certified under other threats, of 40: 14 (2x2), 0 (10x10).``; empty if there are none."""
    others = [one for one in every if one.method == claim.method and one.threat != claim.threat]
    whole = min(claim.tally.images, 100)
    counts = (f"{whole * one.tally.certified // one.tally.images} ({str(one.threat).removeprefix('patch:')})" for one in others)
    return f" Certified under other threats, of {whole}: {', '.join(counts)}." if others else ""


def _doubt(claim: Claimed) -> str:
    measured = claim.arithmetic is Arithmetic.MEASURED
    return " (that rounding in the computer cannot change it either was measured, not proven)" if measured else ""


def nothing(threat: Threat) -> str:
    """What is proven to do no harm, for readers who do not know the field: ``no 5x5 sticker anywhere``."""
    if isinstance(threat, Patches):
        return f"no {threat.number} stickers, each {nothing(threat.each).removeprefix('no ')},"
    if isinstance(threat, PatchPercent):
        return f"no square sticker of {str(threat).partition(':')[2][:-1]} % of the image anywhere"
    if isinstance(threat, Sparse):
        changed = plural(threat.budget, "colour value" if threat.unit == "value" else "pixel")
        return f"no change of {'any ' if threat.budget > 1 else ''}{changed}"
    return f"no {str(threat).partition(':')[2]} sticker anywhere"
