"""``patchcert train``."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import complete, launch, show
from patchcert_cli.cli.groups import grouped
from patchcert_cli.cli.options import (
    RUN,
    DataDirOption,
    DeviceOption,
    DownloadOption,
    DryRunOption,
    FreshOption,
    OutputOptions,
    ProcessesOption,
    ThreatOptions,
    folder_to_write,
    typed_command,
)
from patchcert_cli.errors import UsageError
from patchcert_cli.parallel import workers

if TYPE_CHECKING:
    from patchcert_cli.threats import Threat
    from patchcert_cli.training.overrides import Overrides

EXAMPLES = (
    "Examples:  patchcert train --threat sparse --k 10   |   patchcert train --threat patch --patch 5 --epochs 3 --out runs/p5"
)

RECIPE = "Recipe (default: the recipe of the threat model)"
MOST_MINUTES = 525_600


def _recipe_option(*flags: str, text: str, **more: Any) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=RECIPE, **more)


@dataclass(frozen=True)
class RecipeOptions:
    """What is to be trained, and how."""

    recipe: Annotated[
        str | None,
        _recipe_option(
            "--recipe",
            autocompletion=complete.recipes,
            metavar="FILE.yaml|NAME|PATH",
            text="Begin with the recipe in this file, or of this model.",
        ),
    ] = None
    dataset: Annotated[
        str | None,
        _recipe_option(
            "--data",
            "--dataset",
            autocompletion=complete.datasets,
            text="Data set, or imagefolder:PATH. Default: the recipe's; else mnist for ibp, cifar10 for other defenses.",
        ),
    ] = None
    defense: Annotated[str | None, _recipe_option("--defense", autocompletion=complete.defenses, text="Defense to train.")] = None
    model: Annotated[
        str | None,
        _recipe_option("--model", text="Begin with published weights: timm:NAME, or hf-hub:ORG/REPO@COMMIT; see --weights."),
    ] = None
    weights: Annotated[
        str | None, _recipe_option("--weights", text="Safetensors for --model to begin with, or none for random ones.")
    ] = None
    network: Annotated[
        str | None,
        _recipe_option(
            "--network", autocompletion=complete.networks, text="Network; the defense's own unless the recipe says otherwise."
        ),
    ] = None
    network_option: Annotated[
        list[str] | None,
        _recipe_option("--network-option", text="NAME=VALUE for the network, for example hidden=512,256; repeatable."),
    ] = None
    epochs: Annotated[int | None, _recipe_option("--epochs", text="Passes over the training images.")] = None
    steps: Annotated[
        str | None,
        _recipe_option("--steps", metavar="N|LIST", text="Steps of each epoch, or of all alike; default: all images."),
    ] = None
    batch_size: Annotated[int | None, _recipe_option("--batch-size", text="Images per step.")] = None
    learning_rate: Annotated[float | None, _recipe_option("--learning-rate", text="The highest learning rate.")] = None
    optimizer: Annotated[str | None, _recipe_option("--optimizer", text="adam, adamw, muon or sgd.")] = None
    weight_decay: Annotated[float | None, _recipe_option("--weight-decay", text="Weight decay.")] = None
    precision: Annotated[str | None, _recipe_option("--precision", text="float32, or bfloat16 for autocast in training.")] = None
    stored: Annotated[
        str | None, _recipe_option("--stored", text="What finished weights are rounded to: float32, float16 or bfloat16.")
    ] = None
    option: Annotated[
        list[str] | None,
        _recipe_option("--option", text="NAME=VALUE of the defense's own training; repeatable. --dry-run lists them."),
    ] = None
    validation: Annotated[int | None, _recipe_option("--validation", text="Training images held out.")] = None
    limit: Annotated[
        int | None, _recipe_option("--limit", text="Only this many training images, the held-out ones included.")
    ] = None
    seed: Annotated[int | None, _recipe_option("--seed", text="Seed of everything random.")] = None
    start: Annotated[
        str | None,
        _recipe_option("--start", autocompletion=complete.models, metavar="NAME|PATH", text="Begin with this model's weights."),
    ] = None

    teacher: Annotated[
        str | None,
        _recipe_option(
            "--teacher",
            autocompletion=complete.models,
            metavar="NAME|PATH",
            text="Also learn from this model's class probabilities (bagcert, smoothing, masks; see --option teacher_weight=W).",
        ),
    ] = None

    def changes(self, threat: Threat | None) -> Overrides:
        """The entries of the recipe that the user changes, with the threat model that was given."""
        from patchcert_cli.training import overrides

        steps = None if self.steps is None else _steps(self.steps)
        same = {field.name: getattr(self, field.name) for field in fields(overrides.Overrides) if hasattr(self, field.name)}
        return overrides.Overrides(
            **{**same, "steps": steps},
            threat=threat,
            network_options=overrides.pairs(self.network_option, "--network-option"),
            options=overrides.pairs(self.option, "--option"),
        )


@dataclass(frozen=True)
class TrainingRunOptions:
    """Where the data is, and where and how the run computes."""

    data_dir: DataDirOption = None
    download: DownloadOption = False
    device: DeviceOption = "auto"
    out: Annotated[
        Path | None,
        typer.Option("--out", callback=folder_to_write("--out"), help="Run folder. Default: runs/NAME.", rich_help_panel=RUN),
    ] = None
    fresh: FreshOption = False
    dry_run: DryRunOption = False
    processes: ProcessesOption = None
    max_minutes: Annotated[
        float | None,
        typer.Option(
            "--max-minutes", metavar="M", help="Scale the schedule so that all of it takes M minutes.", rich_help_panel=RUN
        ),
    ] = None
    track: Annotated[
        list[str] | None,
        typer.Option(
            "--track",
            autocompletion=complete.trackers,
            metavar="tensorboard|wandb|trackio",
            help="Also show the metrics of each epoch there; repeatable.",
            rich_help_panel=RUN,
        ),
    ] = None

    def check(self) -> None:
        """Refuse a time that is not one, and trackers that cannot be used."""
        from patchcert_cli.training import trackers

        for name in self.track or ():
            trackers.by_name(name)
        if self.max_minutes is not None and not 0 < self.max_minutes <= MOST_MINUTES:
            allowed = f"more than 0, and at most {MOST_MINUTES:,}, a year"
            raise UsageError(f"--max-minutes {self.max_minutes:g} is not allowed.", hint=f"Allowed: {allowed}.")
        if self.max_minutes is not None and self.dry_run:
            raise UsageError("--dry-run measures the recipe as it is.", hint="Leave --max-minutes out.")


def _steps(text: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as problem:
        raise UsageError(f"--steps {text} is not a number or a list of them.", hint="Use --steps 100, or 100,90,80.") from problem


@grouped
def train(*, threats: ThreatOptions, recipe: RecipeOptions, where: TrainingRunOptions, output: OutputOptions) -> None:
    """Train a certified defense; the run folder has the shape of a zoo folder, and the same command resumes a stopped run."""
    began = time.perf_counter()

    from patchcert_cli import device as devices
    from patchcert_cli.reporting import text
    from patchcert_cli.training import estimate, overrides, run

    changes = recipe.changes(threats.one())
    where.check()
    if where.max_minutes is not None and recipe.steps is not None:
        raise UsageError("--max-minutes chooses the steps, and --steps gives them.", hint="Leave one of them out.")
    resolved = overrides.resolved(recipe.recipe, changes, fetch=not where.dry_run, say=show.say)
    folder = where.out or Path("runs") / resolved.name
    if where.dry_run:
        device = devices.resolve(where.device)
        beginning = run.begin(resolved)
        show.say("measuring a step of the first epoch and one of the last")
        cost = estimate.training(resolved, data_dir=where.data_dir, device=device, beginning=beginning)
        listing = {**resolved.to_dict(), "network_options": resolved.all_network_options(), "defaults": resolved.defaults()}
        value = {**listing, **cost, "out": str(folder)}
        show.result(_dry_rows(value), value, output.json)
        return
    launch.start(where.processes)
    with show.progress() as progress:
        result = run.train(
            resolved,
            folder,
            data_dir=where.data_dir,
            download=where.download,
            device=where.device,
            fresh=where.fresh,
            fetch=f"{typed_command()} --download",
            progress=progress,
            max_minutes=where.max_minutes,
            began=began,
            track=where.track or (),
        )
    if workers.current().first:
        show.result(text.train_rows(result), result, output.json)


def _dry_rows(value: dict[str, Any]) -> list[tuple[str, str]]:
    """A row for each entry, and one for each option of the network and of the defense, with its default where it differs."""
    from patchcert_cli.training.recipe import written

    rows: list[tuple[str, str]] = []
    for name, entry in value.items():
        if name in ("network_options", "options"):
            for option, chosen in entry.items():
                default = value["defaults"][name].get(option)
                note = "" if chosen == default else f" (default {written(default)})"
                rows.append((f"{name.removesuffix('s').replace('_', ' ')} {option}", written(chosen) + note))
        elif name != "defaults":
            rows.append((name.replace("_", " "), str(entry)))
    return rows
