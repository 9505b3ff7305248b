"""``patchcert train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from patchcert_cli.cli import show
from patchcert_cli.cli.options import (
    RUN,
    DataDirOption,
    DeviceOption,
    DownloadOption,
    DryRunOption,
    FreshOption,
    JsonOption,
    KOption,
    PatchOption,
    ThreatOption,
    UnitOption,
    threat_from,
    typed_command,
)
from patchcert_cli.errors import UsageError

EXAMPLES = (
    "Examples:  patchcert train --threat sparse --k 10   |   patchcert train --threat patch --patch 5 --epochs 3 --out runs/p5"
)

RECIPE = "Recipe (default: the recipe of the threat model)"
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="NAME|PATH", help="Start from the recipe of this zoo model or run folder.", rich_help_panel=RECIPE
    ),
]

RECIPE_FIELDS = (  # options that go into the recipe under their own name
    "dataset",
    "defense",
    "network",
    "epochs",
    "batch_size",
    "learning_rate",
    "natural_epochs",
    "ramp_epochs",
    "decay",
    "decay_every",
    "locations",
    "natural",
    "bounded_epochs",
    "bounded_natural",
    "bounded_shift",
    "validation",
    "seed",
)


def _recipe_option(flag: str, text: str) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=RECIPE)


def train(
    patch: PatchOption = None,
    threat: ThreatOption = None,
    k: KOption = None,
    unit: UnitOption = None,
    recipe: RecipeOption = None,
    dataset: Annotated[str | None, _recipe_option("--dataset", "Data set; mnist unless the recipe says otherwise.")] = None,
    defense: Annotated[str | None, _recipe_option("--defense", "Defense to train.")] = None,
    network: Annotated[str | None, _recipe_option("--network", "Network: mlp or cnn.")] = None,
    hidden: Annotated[
        str | None, _recipe_option("--hidden", "Widths of the hidden dense layers, for example 255 or 512,256.")
    ] = None,
    epochs: Annotated[int | None, _recipe_option("--epochs", "Passes over the training images.")] = None,
    batch_size: Annotated[int | None, _recipe_option("--batch-size", "Images per step.")] = None,
    learning_rate: Annotated[float | None, _recipe_option("--learning-rate", "Adam's learning rate before it decays.")] = None,
    natural_epochs: Annotated[int | None, _recipe_option("--natural-epochs", "First epochs, with the clean loss only.")] = None,
    ramp_epochs: Annotated[
        int | None, _recipe_option("--ramp-epochs", "Epochs over which the attacker grows to full strength.")
    ] = None,
    decay: Annotated[str | None, _recipe_option("--decay", "Learning rate after the ramp: cosine or step.")] = None,
    decay_every: Annotated[int | None, _recipe_option("--decay-every", "Epochs between halvings with --decay step.")] = None,
    locations: Annotated[
        int | None, _recipe_option("--locations", "0: the exact worst location; N: N random locations per image.")
    ] = None,
    natural: Annotated[float | None, _recipe_option("--natural", "Weight of the clean loss after the ramp, in [0, 1).")] = None,
    bounded_epochs: Annotated[
        int | None, _recipe_option("--bounded-epochs", "Last epochs, in which an image's loss is bounded.")
    ] = None,
    bounded_natural: Annotated[
        float | None, _recipe_option("--bounded-natural", "Weight of the clean loss in those epochs, in [0, 1).")
    ] = None,
    bounded_shift: Annotated[
        int | None, _recipe_option("--bounded-shift", "Largest random translation in those epochs, in pixels.")
    ] = None,
    validation: Annotated[int | None, _recipe_option("--validation", "Training images held out.")] = None,
    seed: Annotated[int | None, _recipe_option("--seed", "Seed of everything random.")] = None,
    data_dir: DataDirOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="Run folder. Default: runs/NAME.", rich_help_panel=RUN)] = None,
    fresh: FreshOption = False,
    json: JsonOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Train a certified defense; the run folder has the shape of a zoo folder, and the same command resumes a stopped run."""
    chosen = threat_from(threat=threat, patch=patch, k=k, unit=unit)
    given: dict[str, Any] = {name: value for name, value in locals().items() if name in RECIPE_FIELDS and value is not None}
    if hidden is not None:
        given["network_options"] = {"hidden": _widths(hidden)}
    if recipe is not None and chosen is not None:
        given["threat"] = str(chosen)

    from patchcert_cli import report
    from patchcert_cli.training import recipe as recipes
    from patchcert_cli.training import session

    if recipe is not None:
        made = replace(session.recipe_of(recipe), **given)
    elif chosen is not None:
        made = replace(recipes.for_threat(chosen), **given)
    else:
        raise UsageError("no threat model given;", hint="use --patch 5, or --threat sparse --k 10, or --recipe NAME.")
    made = made.validate().fitted()
    folder = out or Path("runs") / made.name
    if dry_run:
        value = {**made.to_dict(), "out": str(folder)}
        show.result(report.plain_rows(value), value, json)
        return
    with show.progress() as progress:
        found = session.run(
            made,
            folder,
            data_dir=data_dir,
            download=download,
            device=device,
            fresh=fresh,
            fetch=f"{typed_command()} --download",
            progress=progress,
        )
    show.result(report.train_rows(found), found, json)


def _widths(text: str) -> list[int]:
    try:
        widths = [int(part) for part in text.split(",")]
    except ValueError:
        widths = []
    if not widths or min(widths) < 1:
        raise UsageError(f"invalid widths '{text}':", hint="use whole numbers with commas, for example 255 or 512,256.")
    return widths
