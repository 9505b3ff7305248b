"""``patchcert attack``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import show
from patchcert_cli.cli.loading import (
    ClassesOption,
    DefenseOption,
    LabelsOption,
    MasksOption,
    PassesOption,
    ThresholdOption,
    WeightsOption,
    open_sample,
    open_task,
    wish_of,
)
from patchcert_cli.cli.options import (
    RUN,
    BatchOption,
    DataDirOption,
    DatasetOption,
    DeviceOption,
    DownloadOption,
    DryRunOption,
    FreshOption,
    JsonOption,
    KOption,
    LimitOption,
    ModelArgument,
    OutOption,
    PatchOption,
    SeedOption,
    ThreatOption,
    UnitOption,
    own_threat,
    threat_from,
)
from patchcert_cli.errors import UsageError

if TYPE_CHECKING:
    from patchcert_cli.attacks import Attack
    from patchcert_cli.evaluation.task import EvaluationTask

EXAMPLES = (
    "Examples:  patchcert attack mnist-ibp-p5 --patch 5 --limit 500   |   patchcert attack runs/x --threat sparse --k 4"
    "   |   patchcert attack NAME --patch 50 --saved ./patches --data imagefolder:./val"
)

ATTACK = "Attack"
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Gradient steps.", rich_help_panel=ATTACK)]
RestartsOption = Annotated[
    int | None, typer.Option("--restarts", min=0, help="Random restarts per location (patch).", rich_help_panel=ATTACK)
]
LocationsOption = Annotated[
    int | None,
    typer.Option("--locations", min=1, help="How many of the most damaging locations to attack (patch).", rich_help_panel=ATTACK),
]
IterationsOption = Annotated[
    int | None, typer.Option("--iterations", min=0, help="Rounds of random search (sparse).", rich_help_panel=ATTACK)
]
MaxSecondsOption = Annotated[
    float | None,
    typer.Option(
        "--max-seconds",
        metavar="S",
        help="Stop after so many seconds, and say which images are left; the same command goes on with them.",
        rich_help_panel=RUN,
    ),
]
SAVED = "Pictures to paste"
SavedOption = Annotated[
    Path | None,
    typer.Option("--saved", metavar="FOLDER", help="Paste these pictures at random places instead.", rich_help_panel=SAVED),
]
PlacesOption = Annotated[
    int | None, typer.Option("--places", min=1, help="How often each is pasted on an image. Default: 1.", rich_help_panel=SAVED)
]
TurnOption = Annotated[
    float | None,
    typer.Option("--turn", metavar="DEGREES", help="Turn each by up to so much to either side.", rich_help_panel=SAVED),
]
ShrinkOption = Annotated[
    float | None,
    typer.Option("--shrink", metavar="SHARE", help="Scale each by a factor between this and 1.", rich_help_panel=SAVED),
]
JoinOption = Annotated[
    bool,
    typer.Option(
        "--certify/--no-certify", help="Certify the same images; exit 8 if a certified one is flipped.", rich_help_panel=RUN
    ),
]


def attack(
    model: ModelArgument = None,
    patch: PatchOption = None,
    threat: ThreatOption = None,
    k: KOption = None,
    unit: UnitOption = None,
    steps: StepsOption = None,
    restarts: RestartsOption = None,
    locations: LocationsOption = None,
    iterations: IterationsOption = None,
    saved: SavedOption = None,
    places: PlacesOption = None,
    turn: TurnOption = None,
    shrink: ShrinkOption = None,
    join: JoinOption = True,
    max_seconds: MaxSecondsOption = None,
    defense: DefenseOption = None,
    masks: MasksOption = None,
    passes: PassesOption = None,
    weights: WeightsOption = None,
    classes: ClassesOption = None,
    labels: LabelsOption = None,
    threshold: ThresholdOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    download: DownloadOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    fresh: FreshOption = False,
    json: JsonOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Try to flip predictions within the threat model, and hold the result against the certificates.

    An attack is empirical: what it does not break is not thereby safe. What certify proves, no attack may break.
    """
    chosen = threat_from(threat=threat, patch=patch, k=k, unit=unit)
    wanted: Any = {"defense": defense, "masks": masks, "passes": passes, "weights": weights, "classes": classes}
    request = wish_of(**wanted, labels=labels, dry_run=dry_run, download=download, threshold=threshold)
    if max_seconds is not None and not max_seconds > 0:
        raise UsageError(f"--max-seconds {max_seconds:g} must be more than 0.")

    searching: dict[str, Any] = {"steps": steps, "restarts": restarts, "locations": locations, "iterations": iterations}
    pasting: dict[str, Any] = {"places": places, "turn": turn, "shrink": shrink}
    _check_options(saved, searching, pasting)

    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation import estimate, evaluate, results
    from patchcert_cli.reporting import text

    def claims(own: str, shape: tuple[int, int, int]) -> list[Claim]:
        return [Claim(chosen or own_threat(own, threat=threat, unit=unit))]

    given: Any = {"dataset": dataset, "data_dir": data_dir, "limit": limit, "batch_size": batch_size, "device": device}
    if dry_run:
        task, total = open_sample(model, claims, request, seed=seed, **given)
        attacker, settings = _attacker(task, saved, pasting if saved else searching, seed)
        folder = out or task.folder("attack", {"attack": settings, "joined": join})
        with show.progress() as progress:
            value = estimate.evaluation(task, folder, attacker, total, join=join, progress=progress)
        show.result(text.plain_rows(value), value, json)
        return
    task = open_task(model, claims, request, seed=seed, download=download, **given)
    attacker, settings = _attacker(task, saved, pasting if saved else searching, seed)
    with show.progress() as progress:
        more: Any = {"join": join, "fresh": fresh, "progress": progress, "max_seconds": max_seconds}
        found = evaluate.attack(task, attacker, settings, out, **more)
    show.result(text.attack_rows(found), found, json)
    results.check_claim(found)


def _check_options(saved: Path | None, searching: dict[str, Any], pasting: dict[str, Any]) -> None:
    """Refuse options of the attack that is not meant."""
    strange = [name for name, value in (searching if saved else pasting).items() if value is not None]
    if strange and saved:
        raise UsageError(
            f"--{strange[0]} is for an attack that searches, and --saved only pastes.", hint="Leave one of them out."
        )
    if strange:
        raise UsageError(f"--{strange[0]} is about pictures to paste.", hint="Add --saved FOLDER.")


def _attacker(task: EvaluationTask, saved: Path | None, asked: dict[str, Any], seed: int) -> tuple[Attack, dict[str, Any]]:
    """The attack that the options name, and what a manifest says of it."""
    from patchcert_cli import attacks

    settings = {name: value for name, value in asked.items() if value is not None}
    if saved is None:
        made = attacks.for_threat(task.threat, seed=seed, **settings)
        return made, settings | {"name": type(made).__name__, "seed": seed}
    pasted, pictures = attacks.pasted(saved, task.threat, task.model.defense.input_shape, seed=seed, **settings)
    return pasted, settings | {"name": type(pasted).__name__, "seed": seed, "pictures": pictures}
