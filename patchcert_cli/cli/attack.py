"""``patchcert attack``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import launch, loading, several, show
from patchcert_cli.cli.groups import grouped
from patchcert_cli.cli.options import (
    RUN,
    ClassifierOptions,
    DataOptions,
    DryRunOption,
    ModelsArgument,
    OutputOptions,
    RunOptions,
    ThreatOptions,
)
from patchcert_cli.errors import UsageError

if TYPE_CHECKING:
    from patchcert_cli.attacks import Attack
    from patchcert_cli.evaluation.task import EvaluationTask
    from patchcert_cli.threats import Threat

EXAMPLES = (
    "Examples:  patchcert attack mnist-ibp-p5 --patch 5 --limit 500   |   patchcert attack runs/x --threat sparse --k 4"
    "   |   patchcert attack NAME --patch 50 --saved ./patches --data imagefolder:./val   |   patchcert attack --attack list"
)
OLD = {"--labels": "--precision"}  # spellings of earlier versions
ATTACK, SAVED = "Attack", "Images to paste"
COLUMNS = ("model", "threat", "right under attack", "certified", "flipped")  # where there is little room
LIST = "list"

AttackOption = Annotated[
    str | None,
    typer.Option(
        "--attack",
        metavar="NAME|list",
        help="Attack by name; list prints all names with the threats they know. Default: the documented one of the threat.",
        rich_help_panel=ATTACK,
    ),
]


@dataclass(frozen=True)
class SearchOptions:
    """Which attack searches, and how long."""

    attack: AttackOption = None
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Gradient steps.", rich_help_panel=ATTACK)] = None
    restarts: Annotated[
        int | None, typer.Option("--restarts", min=0, help="Random restarts per location (patch).", rich_help_panel=ATTACK)
    ] = None
    locations: Annotated[
        int | None,
        typer.Option(
            "--locations", min=1, help="How many of the most damaging locations to attack (patch).", rich_help_panel=ATTACK
        ),
    ] = None
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=0, help="Rounds of random search (sparse).", rich_help_panel=ATTACK)
    ] = None

    def settings(self) -> dict[str, Any]:
        """What is given of the attack's own options."""
        own = ("steps", "restarts", "locations", "iterations")
        return {name: value for name in own if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class SavedOptions:
    """Given images that are pasted in the place of a search."""

    saved: Annotated[
        Path | None,
        typer.Option("--saved", metavar="FOLDER", help="Paste these images at random places instead.", rich_help_panel=SAVED),
    ] = None
    places: Annotated[
        int | None,
        typer.Option("--places", min=1, help="How often each is pasted on an image. Default: 1.", rich_help_panel=SAVED),
    ] = None
    turn: Annotated[
        float | None,
        typer.Option("--turn", metavar="DEGREES", help="Turn each by up to DEGREES to either side.", rich_help_panel=SAVED),
    ] = None
    shrink: Annotated[
        float | None,
        typer.Option("--shrink", metavar="SHARE", help="Scale each by a factor between SHARE and 1.", rich_help_panel=SAVED),
    ] = None

    def settings(self) -> dict[str, Any]:
        """What is given of how they are pasted."""
        return {name: value for name in ("places", "turn", "shrink") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class JoinOptions:
    """How long, and whether certificates are checked against it."""

    join: Annotated[
        bool,
        typer.Option(
            "--certify/--no-certify", help="Certify the same images; exit 8 if a certified one is flipped.", rich_help_panel=RUN
        ),
    ] = True
    max_seconds: Annotated[
        float | None,
        typer.Option(
            "--max-seconds",
            metavar="S",
            help="Stop after S seconds and report which images are left; the same command goes on with them.",
            rich_help_panel=RUN,
        ),
    ] = None

    def check(self) -> None:
        """Refuse a time that is none."""
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise UsageError(f"--max-seconds {self.max_seconds:g} must be more than 0.")


@grouped
def attack(
    models: ModelsArgument = None,
    *,
    threat: ThreatOptions,
    search: SearchOptions,
    saved: SavedOptions,
    classifier: ClassifierOptions,
    data: DataOptions,
    run: RunOptions,
    join: JoinOptions,
    dry_run: DryRunOption = False,
    output: OutputOptions,
) -> None:
    """Try to flip predictions within the threat model, and compare with the certificates.

    An attack is empirical: one that fails proves nothing. A flipped certified image is a bug, with exit code 8.
    """
    if search.attack == LIST:
        print_attacks(output.json)
        return
    chosen = threat.one()
    request = classifier.request(dry_run=dry_run, download=data.download)
    several.alone(models or [], {"--out": run.out})
    join.check()
    _check_options(search, saved)
    launch.start(run.processes, dry_run=dry_run)

    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation import results
    from patchcert_cli.reporting import text

    def claims(own: Threat | None, shape: tuple[int, int, int]) -> list[Claim]:
        return [Claim(chosen or threat.own(own))]

    def one(model: str | None, command: str) -> several.Value:
        if dry_run:
            task, total = loading.open_sample(model, claims, data, run, command, request)
            return _estimate(task, total, *_attacker(task, search, saved, run.seed), run, join)
        task = loading.open_task(model, claims, data, run, command, request)
        return _attack(task, *_attacker(task, search, saved, run.seed), run, join)

    if dry_run:
        several.run(models, one, several.estimates, output.json, one_table=several.in_two_columns(text.plain_rows))
    else:
        several.run(
            models, one, _table, output.json, one_table=several.in_two_columns(text.attack_rows), check=results.check_claim
        )


def print_attacks(json_to: str | None) -> None:
    """Print the names of all attacks with the kinds of threat that each knows."""
    from patchcert_cli import attacks

    value = {name: {"threats": list(kinds), "default_for": attacks.default_for(name)} for name, kinds in attacks.kinds().items()}
    rows = [
        {"attack": name, "threats": ", ".join(one["threats"]), "default for": ", ".join(one["default_for"]) or "-"}
        for name, one in value.items()
    ]
    show.printed(lambda: show.table(rows), value, json_to)


def _attack(
    task: EvaluationTask, attacker: Attack, settings: dict[str, Any], run: RunOptions, join: JoinOptions
) -> several.Value:
    from patchcert_cli.evaluation import evaluate

    with show.progress() as progress:
        return evaluate.attack(
            task,
            attacker,
            settings,
            run.out,
            join=join.join,
            fresh=run.fresh,
            progress=progress,
            max_seconds=join.max_seconds,
        )


def _estimate(
    task: EvaluationTask, total: int, attacker: Attack, settings: dict[str, Any], run: RunOptions, join: JoinOptions
) -> several.Value:
    """What attacking ``total`` images would take, measured on the few of the task."""
    from patchcert_cli.evaluation import estimate

    folder = run.out or task.folder("attack", {"attack": settings, "joined": join.join})
    with show.progress() as progress:
        return estimate.evaluation(task, folder, attacker, total, join=join.join, progress=progress)


def _check_options(search: SearchOptions, saved: SavedOptions) -> None:
    """Refuse options of the attack that is not chosen, and unknown names."""
    if saved.saved is None:
        if saved.settings() or search.attack == "saved":
            flag = f"--{next(iter(saved.settings()))}" if saved.settings() else "--attack saved"
            raise UsageError(f"{flag} is about images to paste.", hint="Add --saved FOLDER.")
    elif search.settings() or search.attack not in (None, "saved"):
        flag = f"--{next(iter(search.settings()))}" if search.settings() else f"--attack {search.attack}"
        raise UsageError(f"{flag} is for an attack that searches, and --saved only pastes.", hint="Leave one of them out.")
    if search.attack is not None:
        from patchcert_cli import attacks

        attacks.check_name(search.attack)


def _attacker(task: EvaluationTask, search: SearchOptions, saved: SavedOptions, seed: int) -> tuple[Attack, dict[str, Any]]:
    """The attack that the options name, and its settings for the manifest."""
    from patchcert_cli import attacks

    if saved.saved is None:
        settings = search.settings()
        chosen = attacks.for_threat(task.threat, search.attack, seed=seed, **settings)
        return chosen, settings | {"name": type(chosen).__name__, "seed": seed}
    settings = saved.settings()
    shape = task.model.defense.input_shape
    pasted, pictures = attacks.pasted(saved.saved, task.threat, shape, seed=seed, **settings)
    return pasted, settings | {"name": type(pasted).__name__, "seed": seed, "pictures": pictures}


def _table(results: Sequence[several.Value]) -> None:
    """One row for each model."""
    from patchcert_cli.reporting.numbers import share

    rows = []
    for result in results:
        images, counts = result["images"], result["counts"]
        survived = round(result["attacked_accuracy"] * images)
        certified = [claim["counts"]["certified"] for claim in result["claims"]]
        rows.append(
            {
                "model": str(result["model"]),
                "threat": result["threat"],
                "clean": share(counts["clean"], images),
                "right under attack": share(survived, images),
                "certified": share(certified[0], images) if certified else "-",
                "flipped": f"{len(result['broken'])} certified images" if certified else f"{result['flipped']} images",
                "time": f"{result['seconds']:.1f} s",
            }
        )
    several.by_guarantee(rows, [result.get("guarantee", "recovery") for result in results], COLUMNS)
