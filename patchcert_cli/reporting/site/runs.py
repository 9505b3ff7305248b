"""The page about a user's own runs of certify and attack: counts, intervals, curves, and one line for management.

Every number is counted from the records of the run folders, finished or not; the weakest images are drawn by
:mod:`patchcert_cli.reporting.site.weakest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from patchcert_cli import defenses
from patchcert_cli.arithmetic import former, weakest
from patchcert_cli.certificate import ALERT, Tally
from patchcert_cli.errors import IntegrityError, UsageError
from patchcert_cli.evaluation import results, run_folder
from patchcert_cli.reporting import plots
from patchcert_cli.reporting.figure_style import Look
from patchcert_cli.reporting.numbers import interval, share
from patchcert_cli.reporting.site.charts import AXES, strength
from patchcert_cli.reporting.site.claimed import Claimed, management
from patchcert_cli.reporting.site.leaderboards import difficulty, title
from patchcert_cli.reporting.site.page import UNSHOWABLE, filled
from patchcert_cli.reporting.text import named
from patchcert_cli.storage import files
from patchcert_cli.threats import Guarantee, PatchPercent, Threat, parse_threat

if TYPE_CHECKING:
    from patchcert_cli.reporting.site.weakest import Weakest

Record = dict[str, Any]
GENERATOR = "patchcert report runs"
CERTIFY, ATTACK = "certify", "attack"
PERCENT = "percent"  # an axis besides those of the zoo
LABELS = {axis: label for axis, (label, _) in AXES.items()} | {PERCENT: "area of a square patch, % of the image"}


@dataclass(frozen=True)
class RunOnPage:
    """A run folder.

    Attributes:
        label: what it is called on the page: its model, and its folder if two runs have the same model.
        chosen: the threat that :attr:`main` is about; by default that of the first claim.
    """

    folder: Path
    manifest: Mapping[str, Any]
    records: Sequence[Record]
    label: str
    chosen: Threat | None = None

    @property
    def images(self) -> int:
        return int(self.manifest["images"])

    @property
    def missing(self) -> int:
        """How many images are not done yet."""
        return self.images - len(self.records)

    @property
    def attacks(self) -> bool:
        """Whether it is a run of attack."""
        return bool(self.manifest["kind"] == ATTACK)

    @property
    def dataset(self) -> str:
        """The data set as text."""
        return title(named(str(self.manifest["dataset"])))

    @cached_property
    def claims(self) -> tuple[Claimed, ...]:
        """What was certified, in the order of the records; of an attack's run nothing."""
        first = self.records[0]["claims"] if self.records and not self.attacks else []
        return tuple(self._claimed(at) for at in range(len(first)))

    def _claimed(self, at: int) -> Claimed:
        verdicts = [record["claims"][at] for record in self.records]
        own = [self.manifest.get("threat"), self.manifest.get("method")]
        threat, asked = self.manifest["claims"][at] if "claims" in self.manifest else own
        alarms = sum(record["prediction"] == ALERT for record in self.records)
        return Claimed(
            at,
            parse_threat(str(threat)),
            str(verdicts[0]["method"]),
            asked,
            weakest(one.get("arithmetic") or former(self.manifest["defense"]) for one in verdicts),
            self.guarantee,
            int(self.manifest.get("top", 1)),
            results.certified_tally(self.records, verdicts),
            alarms if self.guarantee is Guarantee.DETECTION else None,
        )

    @property
    def main(self) -> Claimed:
        """The claim that management reads, and whose weakest images are drawn."""
        return next((claim for claim in self.claims if claim.threat == self.chosen), self.claims[0])

    @property
    def for_management(self) -> str:
        """The run in plain sentences."""
        return management(self.main, self.claims)

    @cached_property
    def guarantee(self) -> Guarantee:
        """What its certificates promise."""
        if self.manifest["defense"] == "ensemble":
            return Guarantee.DETECTION if self.manifest["setting"]["rule"] == "cross" else Guarantee.RECOVERY
        return defenses.by_name(self.manifest["defense"]).guarantee

    @cached_property
    def attacked(self) -> dict[str, Any]:
        """Counts of a run of attack: right without it, right under it, and flipped certified images."""
        right = [one for one in self.records if one["prediction"] == one["label"]]
        survived = sum(not one["flipped"] for one in right)
        broken = sum(one["flipped"] and any(claim["certified"] for claim in one["claims"]) for one in self.records)
        tally = Tally(len(self.records), len(right), survived)  # the interval of a count is the same, whatever is counted
        return {"clean": len(right), "survived": survived, "broken": broken, "interval": tally.certified_interval}

    def to_dict(self) -> dict[str, Any]:
        """Its numbers as plain values."""
        common = {"run": str(self.folder), "model": self.manifest["model"], "images": len(self.records), "missing": self.missing}
        if self.attacks:
            return common | {"threat": self.manifest["threat"], **self.attacked}
        return common | {"management": self.for_management, "claims": [_plain(one) for one in self.claims]}


def _plain(claim: Claimed) -> dict[str, Any]:
    counts = {"images": claim.tally.images, "clean": claim.tally.clean, "certified": claim.tally.certified}
    words = {name: str(getattr(claim, name)) for name in ("threat", "method", "guarantee", "arithmetic")}
    return {**words, **counts, "certified_interval": list(claim.tally.certified_interval)}


def read(folders: Sequence[Path], chosen: Threat | None = None, say: Callable[[str], object] = str) -> list[RunOnPage]:
    """The runs in these folders, of certify before those of attack; ``chosen`` is the threat of their main claims.

    The folder of a training run means the runs that evaluate its weights, beside it and in ``runs/``; if these are about
    different images, those about the most. ``say`` receives a line about the others.

    Raises:
        UsageError: a folder is none of these, has no image yet, has no claim about ``chosen``, or the runs are about different
            images.
        IntegrityError: a file of a run is damaged.
    """
    found = [_read(folder) for given in dict.fromkeys(folders) for folder in _evaluations(given, say)]
    first = found[0]
    for other in found[1:]:
        _check_same_images(first, other)
    for run in found:
        if chosen is not None and not run.attacks and chosen not in (claim.threat for claim in run.claims):
            known = ", ".join(dict.fromkeys(str(claim.threat) for claim in run.claims))
            raise UsageError(f"'{run.folder}' has no certificates for {chosen}.", hint=f"It has some for {known}.")
    names = [run.label for run in found]
    found = [
        replace(run, chosen=chosen, label=f"{run.label} ({run.folder.name})" if names.count(run.label) > 1 else run.label)
        for run in found
    ]
    return sorted(found, key=lambda run: run.attacks)


def _evaluations(folder: Path, say: Callable[[str], object]) -> list[Path]:
    """The run folder itself, or of a folder of weights the runs that evaluate them."""
    hint = "Give folders of patchcert certify or patchcert attack, such as runs/certify-..."
    if not folder.is_dir():
        if folder.is_file() and (folder.parent / files.MANIFEST).is_file():
            raise UsageError(f"'{folder}' is a file of a run.", hint=f"Give its folder: {folder.parent}")
        raise UsageError(f"'{folder}' is neither a run folder nor another command of report.", hint=f"{hint} See: report --help")
    if (folder / files.MANIFEST).exists():
        return [folder]
    if not (folder / files.WEIGHTS).exists():
        raise UsageError(f"'{folder}' is not a run folder: it has no {files.MANIFEST}.", hint=hint)
    digest, groups = files.sha256(folder / files.WEIGHTS), dict[str, dict[Path, int]]()
    for path in (path for place in dict.fromkeys((folder.parent, Path("runs"))) for path in sorted(place.glob("*"))):
        manifest = files.read_json(path / files.MANIFEST) if (path / files.MANIFEST).is_file() else {}
        if manifest.get("model_sha256") == digest and manifest.get("kind") in (CERTIFY, ATTACK):
            groups.setdefault(str(manifest["data_sha256"]), {})[path] = int(manifest["images"])
    if not groups:
        problem = f"'{folder}' holds weights, and no run that evaluates them was found beside it or in runs/."
        raise UsageError(problem, hint=f"Type: patchcert certify {folder}")
    largest = max(groups.values(), key=lambda runs: max(runs.values()))
    others = sorted(str(path) for runs in groups.values() if runs is not largest for path in runs)
    say(f"left out, as they are about other images: {', '.join(others)}" if others else "")
    return list({path.resolve(): path for path in largest}.values())


def _read(folder: Path) -> RunOnPage:
    manifest, records = run_folder.read(folder)
    if manifest.get("kind") not in (CERTIFY, ATTACK):
        raise UsageError(f"'{folder}' is not a run of patchcert certify or patchcert attack.", hint="Give folders of these.")
    if not records:
        command = str(manifest.get("command", "patchcert certify"))
        raise UsageError(f"'{folder}' has no finished image yet.", hint=f"Go on with it: {command}")
    run = RunOnPage(folder, manifest, records, UNSHOWABLE.sub("\ufffd", named(str(manifest.get("model")))))
    try:
        run.to_dict()
    except (LookupError, TypeError, ValueError) as problem:
        raise IntegrityError(f"'{folder}' is not the folder of an intact run: {problem!r}.", hint="Run it again.") from problem
    return run


def _check_same_images(one: RunOnPage, other: RunOnPage) -> None:
    """Raise :class:`UsageError` unless two runs are about the same images with the same labels."""
    if one.manifest["data_sha256"] == other.manifest["data_sha256"]:
        return
    about = [f"'{run.folder}' ({named(str(run.manifest['dataset']))}, {run.images} images)" for run in (one, other)]
    raise UsageError(f"{about[0]} and {about[1]} are about different images.", hint="Write a page for each of them.")


def line_name(run: RunOnPage, method: str) -> str:
    """What a line of a curve is called: its run, and its proof if the run has several."""
    several = len({claim.method for claim in run.claims}) > 1
    return f"{run.label}, {method}" if several else run.label


def axis(threat: Threat) -> tuple[str, float] | None:
    """The axis of a threat and its position there; None if it is on no axis."""
    return (PERCENT, float(threat.percent)) if isinstance(threat, PatchPercent) else strength(threat)


@dataclass(frozen=True)
class Curve:
    """Certified accuracy over the attacker's strength, a line for each run and proof."""

    axis: str
    guarantee: Guarantee
    lines: tuple[plots.Series, ...]
    titles: Mapping[str, Sequence[str]]

    @property
    def shows_clean(self) -> bool:
        """Whether the clean accuracies are drawn too."""
        return len(self.lines) <= plots.MAX_CLEAN_LINES

    @property
    def about(self) -> str:
        """What is drawn, in one sentence."""
        return f"Certified accuracy over the {LABELS[self.axis].partition(',')[0]}, guarantee {self.guarantee}."

    def draw(self) -> str:
        """The chart as an SVG element."""
        salt = f"{self.axis} {self.guarantee}"
        return plots.model_curves(self.lines, xlabel=LABELS[self.axis], about=self.about, titles=self.titles, salt=salt)


def looks(runs: Sequence[RunOnPage]) -> dict[str, Look]:
    """The colour and the marker of each line of the curves, the same in the tables."""
    names = dict.fromkeys(line_name(run, claim.method) for run in runs for claim in run.claims)
    return {name: Look(at) for at, name in enumerate(names)}


def curves(runs: Sequence[RunOnPage]) -> Iterator[Curve]:
    """Every curve on which a line has two points or more."""
    groups: dict[tuple[str, Guarantee], dict[str, list[tuple[float, Claimed]]]] = {}
    for run in runs:
        for claim in run.claims:
            if (place := axis(claim.threat)) is not None:
                lines = groups.setdefault((place[0], claim.guarantee), {})
                lines.setdefault(line_name(run, claim.method), []).append((place[1], claim))
    look = looks(runs)
    for (where, guarantee), named_lines in groups.items():
        if max(len(points) for points in named_lines.values()) < 2:
            continue
        ordered = {name: sorted(points, key=lambda point: point[0]) for name, points in named_lines.items()}
        series = [plots.Series(name, look[name], tuple(_point(*one) for one in points)) for name, points in ordered.items()]
        titles = {name: [_tooltip(name, claim) for _, claim in points] for name, points in ordered.items()}
        yield Curve(where, guarantee, tuple(series), titles)


def _point(x: float, claim: Claimed) -> plots.Point:
    tally = claim.tally
    low, high = tally.certified_interval
    return plots.Point(x, 100 * tally.clean_accuracy, 100 * tally.certified_accuracy, 100 * low, 100 * high)


def _tooltip(name: str, claim: Claimed) -> str:
    tally = claim.tally
    return (
        f"{name}, {claim.threat}: certified {share(tally.certified, tally.images)},"
        f" 95 % interval {interval(tally.certified_interval)} %; clean {share(tally.clean, tally.images)}; proof {claim.method}"
    )


def by_guarantee(runs: Sequence[RunOnPage]) -> dict[Guarantee, list[tuple[RunOnPage, Claimed]]]:
    """The rows of each table of certificates: recovery and detection never share one."""
    rows: dict[Guarantee, list[tuple[RunOnPage, Claimed]]] = {}
    for run in runs:
        for claim in sorted(run.claims, key=lambda claim: difficulty(claim.threat)):
            rows.setdefault(claim.guarantee, []).append((run, claim))
    return rows


def render(runs: Sequence[RunOnPage], drawn: Sequence[tuple[RunOnPage, Weakest]] = ()) -> str:
    """The page about these runs; ``drawn`` are the weakest images of some of them."""
    certified = [run for run in runs if not run.attacks]
    return filled(
        "runs.html",
        GENERATOR,
        images=True,
        filters={"line_name": line_name, "draw_curve": lambda curve: Markup(curve.draw())},
        heading=f"{', '.join(dict.fromkeys(named(str(run.manifest['model'])) for run in runs))} on {runs[0].dataset}",
        runs=runs,
        looks=looks(certified),
        tables=by_guarantee(certified),
        curves=list(curves(certified)),
        weakest=drawn,
    )
