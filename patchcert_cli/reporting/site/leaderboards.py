"""The ranking of models: one leaderboard for each data set, split, threat and guarantee that was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from patchcert_cli.cards import Card, Measured, Published
from patchcert_cli.reporting.numbers import plural
from patchcert_cli.threats import KINDS, UNITS, Guarantee, Patch, Patches, PatchPercent, Sparse, Threat

TITLES = {"cifar10": "CIFAR-10", "mnist": "MNIST"}


@dataclass(frozen=True)
class Entry:
    """A model in a leaderboard: its best measurement there, and the numbers that the paper reports for its own weights.

    ``result`` may be about a stronger threat than the leaderboard's (:func:`covers`), if the model was not measured on that one.
    ``rank`` is None if the model was found unreliable. Equal certified accuracies share a rank.
    """

    card: Card
    result: Measured
    paper: Published | None
    rank: int | None = None

    @property
    def certified(self) -> Fraction:
        """Certified accuracy, exactly."""
        return Fraction(self.result.certified, self.result.images)


@dataclass(frozen=True)
class Leaderboard:
    """Comparable measurements, the best first. ``own``: shown by default, as a model was trained against this threat."""

    dataset: str
    split: str
    threat: Threat
    guarantee: Guarantee
    entries: tuple[Entry, ...]
    own: bool


def covers(strong: Threat, weak: Threat) -> bool:
    """Whether every change that ``weak`` allows is allowed by ``strong``, so that certificates against it hold for ``weak``.

    A patch lies inside a larger one that is wholly inside the image; pixels are all values of these pixels.
    """
    if isinstance(strong, Patch) and isinstance(weak, Patch):
        return strong.height >= weak.height and strong.width >= weak.width
    if isinstance(strong, Sparse) and isinstance(weak, Patch):
        return strong.unit == "pixel" and strong.k >= weak.height * weak.width
    if isinstance(strong, Sparse) and isinstance(weak, Sparse):
        return strong.k >= weak.k and strong.unit in ("pixel", weak.unit)
    return strong == weak


Key = tuple[str, str, Threat, Guarantee]  # data set, split, threat, guarantee


def leaderboards(cards: Iterable[Card]) -> list[Leaderboard]:
    """All leaderboards, by data set, threat, split and guarantee; recovery and detection are never in one.

    What has no certificates is in none.
    """
    cards, found = list(cards), dict[Key, list[Entry]]()
    for card in cards:
        best: dict[Key, Measured] = {}
        for one in (result for result in card.results if result.guarantee.proves):
            key = (one.dataset, one.split, one.threat, one.guarantee)
            if key not in best or _share(one) > _share(best[key]):
                best[key] = one
        for key, one in best.items():
            found.setdefault(key, []).append(Entry(card, one, paper_for(card, one)))
    keys = sorted(found, key=lambda key: (key[0], difficulty(key[2]), key[1], list(Guarantee).index(key[3])))
    owned = {key for key in keys if any(entry.card.threat == key[2] for entry in found[key])}
    for dataset in {key[0] for key in keys} - {key[0] for key in owned}:
        owned.add(max((key for key in keys if key[0] == dataset), key=lambda key: len(found[key])))
    for key in owned:
        found[key] += _of_stronger_threats(key, cards)
    return [Leaderboard(*key, entries=_ranked(found[key]), own=key in owned) for key in keys]


def _of_stronger_threats(key: Key, cards: Iterable[Card]) -> list[Entry]:
    """For each model that was not measured under a threat its best result about one that includes it."""
    entries = []
    for card in cards:
        same = [one for one in card.results if (one.dataset, one.split, one.guarantee) == (key[0], key[1], key[3])]
        stronger = [one for one in same if covers(one.threat, key[2])]
        if stronger and not any(one.threat == key[2] for one in same):
            entries.append(Entry(card, max(stronger, key=_share), None))
    return entries


def paper_for(card: Card, result: Measured) -> Published | None:
    """The published numbers to show beside a measurement, if any.

    Papers do not say their guarantee, so none are shown if the card has measurements of both for this threat.
    """
    promised = {one.guarantee for one in card.results if one.threat == result.threat}
    return card.report(result.threat) if promised == {result.guarantee} and result.dataset == card.dataset else None


def _share(one: Measured) -> Fraction:
    return Fraction(one.certified, one.images)


def _ranked(entries: list[Entry]) -> tuple[Entry, ...]:
    def order(entry: Entry) -> tuple[bool, Fraction, Fraction, str]:
        clean = Fraction(entry.result.clean, entry.result.images)
        return entry.card.status == "unreliable", -entry.certified, -clean, entry.card.name

    ranked: list[Entry] = []
    for entry in sorted(entries, key=order):
        better = sum(other.certified > entry.certified for other in ranked)
        rank = None if entry.card.status == "unreliable" else better + 1
        ranked.append(Entry(entry.card, entry.result, entry.paper, rank))
    return tuple(ranked)


def difficulty(threat: Threat) -> tuple[int, int, Fraction, str]:
    """An order of threats: patches before pixels, small before large."""
    kind = list(KINDS).index(threat.kind)
    if isinstance(threat, Patch):
        return kind, 0, Fraction(threat.height * threat.width), f"{threat.height:06}"
    if isinstance(threat, PatchPercent):
        return kind, 1, threat.percent, ""
    return kind, UNITS.index(threat.unit) if isinstance(threat, Sparse) else 0, Fraction(threat.budget), str(threat)


def describe(threat: Threat) -> str:
    """A threat as text for readers."""
    if isinstance(threat, Patch):
        return f"one patch of {threat.height}x{threat.width} pixels, anywhere in the image"
    if isinstance(threat, PatchPercent):
        return f"one square patch of {str(threat).partition(':')[2][:-1]} % of the image, anywhere in it"
    if isinstance(threat, Patches):
        return f"{threat.number} at once, each {describe(threat.each)}"
    thing = "single channel value" if isinstance(threat, Sparse) and threat.unit == "value" else "pixel"
    return f"any {plural(threat.budget, thing)}"


def title(dataset: str) -> str:
    """A data set's name in headings."""
    return TITLES.get(dataset, dataset)


def own(card: Card) -> str:
    """The canonical name of the threat that a model was trained against."""
    return str(card.threat)
