"""Which curves the page shows: certified accuracy over the attacker's strength, a line for each model.

Square patches are drawn over their side, sparse attacks over their budget; other threats are on no axis.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from patchcert_cli.cards import Card, Measured
from patchcert_cli.reporting import plots
from patchcert_cli.reporting.figure_style import Look
from patchcert_cli.reporting.numbers import interval, share
from patchcert_cli.reporting.site.leaderboards import Entry, Leaderboard, title
from patchcert_cli.threats import Guarantee, Patch, Sparse, Threat

AXES = {
    "side": ("side of a square patch, pixels", "the side of a square patch"),
    "pixel": ("pixels that may change", "the number of pixels that may change"),
    "value": ("channel values that may change", "the number of channel values that may change"),
}


@dataclass(frozen=True)
class Line:
    """A model's measurements on one chart, in rising order of the attacker's strength."""

    card: Card
    look: Look
    points: tuple[tuple[int, Entry], ...]


@dataclass(frozen=True)
class Chart:
    """Lines that may be compared: one data set, split, guarantee and axis; ``doubtful`` names the unreliable models left out."""

    dataset: str
    split: str
    guarantee: Guarantee
    axis: str
    lines: tuple[Line, ...]
    doubtful: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The kind of threat."""
        return "patch" if self.axis == "side" else "sparse"

    @property
    def about(self) -> str:
        """What is drawn, in one sentence."""
        over = AXES[self.axis][1]
        return f"Certified accuracy over {over}: {title(self.dataset)}, {self.split} split, guarantee {self.guarantee}."

    @property
    def shows_clean(self) -> bool:
        """Whether the clean accuracies are drawn too."""
        return len(self.lines) <= plots.MAX_CLEAN_LINES

    def draw(self) -> str:
        """The chart as an SVG element."""
        return plots.model_curves(
            [
                plots.Series(line.card.name, line.look, tuple(_point(strength, entry.result) for strength, entry in line.points))
                for line in self.lines
            ],
            xlabel=AXES[self.axis][0],
            about=self.about,
            titles={line.card.name: [_tooltip(entry) for _, entry in line.points] for line in self.lines},
            salt=self.about,
        )


def strength(threat: Threat) -> tuple[str, int] | None:
    """The axis of a threat and its position there; None if it is on no axis."""
    if isinstance(threat, Patch):
        return ("side", threat.height) if threat.height == threat.width else None
    return (threat.unit, threat.k) if isinstance(threat, Sparse) else None


def looks(cards: Iterable[Card]) -> dict[str, Look]:
    """The look of each measured model, by its name: different within a data set, and the same in every chart and table."""
    by_dataset: dict[str, list[str]] = {}
    for card in cards:
        if card.results:
            by_dataset.setdefault(card.dataset, []).append(card.name)
    return {name: Look(i) for names in by_dataset.values() for i, name in enumerate(sorted(names))}


def charts(boards: Iterable[Leaderboard]) -> list[Chart]:
    """Every chart with two points or more."""
    groups: dict[tuple[str, str, Guarantee, str], dict[str, list[tuple[int, Entry]]]] = {}
    cards: dict[str, Card] = {}
    for board in boards:
        cards |= {entry.card.name: entry.card for entry in board.entries}
        place = strength(board.threat)
        if place is not None:
            models = groups.setdefault((board.dataset, board.split, board.guarantee, place[0]), {})
            for entry in (one for one in board.entries if one.result.threat == board.threat):
                models.setdefault(entry.card.name, []).append((place[1], entry))
    found, look = [], looks(cards.values())
    for key, models in groups.items():
        doubtful = sorted(name for name in models if cards[name].status == "unreliable")
        reliable = sorted(models.keys() - set(doubtful))
        if sum(len(models[name]) for name in reliable) >= 2:
            lines = (Line(cards[name], look[name], tuple(sorted(models[name], key=lambda point: point[0]))) for name in reliable)
            found.append(Chart(*key, lines=tuple(lines), doubtful=tuple(doubtful)))
    return sorted(found, key=_order)


def _order(chart: Chart) -> tuple[str, int, str, int]:
    return chart.dataset, list(AXES).index(chart.axis), chart.split, list(Guarantee).index(chart.guarantee)


def _point(strength: int, result: Measured) -> plots.Point:
    low, high = result.certified_interval
    clean, certified = result.clean / result.images, result.certified / result.images
    return plots.Point(strength, 100 * clean, 100 * certified, 100 * low, 100 * high)


def _tooltip(entry: Entry) -> str:
    one = entry.result
    return (
        f"{entry.card.name}, {one.threat}: certified {share(one.certified, one.images)},"
        f" 95 % interval {interval(one.certified_interval)} %; clean {share(one.clean, one.images)}; proof {one.method}"
    )
