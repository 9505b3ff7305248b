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
    "optimizer",
    "weight_decay",
    "precision",
    "stored",
    "validation",
    "seed",
    "start",
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
    network: Annotated[
        str | None, _recipe_option("--network", "Network; the defense's own unless the recipe says otherwise.")
    ] = None,
    network_option: Annotated[
        list[str] | None,
        _recipe_option("--network-option", "NAME=VALUE for the network, for example hidden=512,256; repeatable."),
    ] = None,
    epochs: Annotated[int | None, _recipe_option("--epochs", "Passes over the training images.")] = None,
    batch_size: Annotated[int | None, _recipe_option("--batch-size", "Images per step.")] = None,
    learning_rate: Annotated[float | None, _recipe_option("--learning-rate", "The highest learning rate.")] = None,
    optimizer: Annotated[str | None, _recipe_option("--optimizer", "adam, adamw or sgd.")] = None,
    weight_decay: Annotated[float | None, _recipe_option("--weight-decay", "Weight decay.")] = None,
    precision: Annotated[str | None, _recipe_option("--precision", "float32, or bfloat16 for autocast while it trains.")] = None,
    stored: Annotated[
        str | None, _recipe_option("--stored", "What finished weights are rounded to: float32, float16 or bfloat16.")
    ] = None,
    option: Annotated[
        list[str] | None,
        _recipe_option("--option", "NAME=VALUE of the defense's own training; repeatable. --dry-run lists them."),
    ] = None,
    validation: Annotated[int | None, _recipe_option("--validation", "Training images held out.")] = None,
    seed: Annotated[int | None, _recipe_option("--seed", "Seed of everything random.")] = None,
    start: Annotated[
        str | None,
        typer.Option("--start", metavar="NAME|PATH", help="Begin with this model's weights.", rich_help_panel=RECIPE),
    ] = None,
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
    if recipe is not None and chosen is not None:
        given["threat"] = str(chosen)

    from patchcert_cli import report
    from patchcert_cli.training import recipe as recipes
    from patchcert_cli.training import session

    if recipe is not None:
        basis = session.recipe_of(recipe)
    elif chosen is not None:
        basis = recipes.for_threat(chosen, defense or "ibp")
    else:
        raise UsageError("no threat model given;", hint="use --patch 5, or --threat sparse --k 10, or --recipe NAME.")
    given["network_options"] = basis.network_options | _pairs(network_option, "--network-option")
    given["options"] = basis.options | _pairs(option, "--option")
    given |= {"start_sha256": ""} if start is not None else {}
    made = session.started(replace(basis, **given).validate().fitted())
    folder = out or Path("runs") / made.name
    if dry_run:
        session.check(made)
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


def _pairs(texts: list[str] | None, flag: str) -> dict[str, Any]:
    """Read ``NAME=VALUE`` texts."""
    from patchcert_cli.training.recipe import read

    pairs = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{flag} '{text}' cannot be read;", hint=f"use NAME=VALUE, for example {flag} epochs=3.")
        pairs[name.replace("-", "_")] = read(value)
    return pairs
