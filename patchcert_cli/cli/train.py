"""``patchcert train``."""

from __future__ import annotations

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
    folder_to_write,
    threat_from,
    typed_command,
)

EXAMPLES = (
    "Examples:  patchcert train --threat sparse --k 10   |   patchcert train --threat patch --patch 5 --epochs 3 --out runs/p5"
)

RECIPE = "Recipe (default: the recipe of the threat model)"
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE.yaml|NAME|PATH",
        help="Begin with the recipe in this file, or of this model.",
        rich_help_panel=RECIPE,
    ),
]
StartOption = Annotated[
    str | None,
    typer.Option("--start", metavar="NAME|PATH", help="Begin with this model's weights.", rich_help_panel=RECIPE),
]

FolderOption = Annotated[
    Path | None,
    typer.Option("--out", callback=folder_to_write("--out"), help="Run folder. Default: runs/NAME.", rich_help_panel=RUN),
]


def _recipe_option(*flags: str, text: str) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=RECIPE)


LimitOption = Annotated[int | None, _recipe_option("--limit", text="Only this many training images, the held-out ones included.")]
DatasetOption = Annotated[
    str | None,
    _recipe_option("--data", "--dataset", text="Data set, or imagefolder:PATH; mnist unless the recipe says otherwise."),
]
StartModelOption = Annotated[
    str | None,
    _recipe_option("--model", text="Begin with published weights: timm:NAME, or hf-hub:ORG/REPO@COMMIT; see --weights."),
]
WeightsOption = Annotated[
    str | None, _recipe_option("--weights", text="Safetensors for --model to begin with, or none for random ones.")
]
NetworkOption = Annotated[
    str | None, _recipe_option("--network", text="Network; the defense's own unless the recipe says otherwise.")
]
NetworkOptionsOption = Annotated[
    list[str] | None,
    _recipe_option("--network-option", text="NAME=VALUE for the network, for example hidden=512,256; repeatable."),
]
StoredOption = Annotated[
    str | None, _recipe_option("--stored", text="What finished weights are rounded to: float32, float16 or bfloat16.")
]
OptionsOption = Annotated[
    list[str] | None,
    _recipe_option("--option", text="NAME=VALUE of the defense's own training; repeatable. --dry-run lists them."),
]


def train(
    patch: PatchOption = None,
    threat: ThreatOption = None,
    k: KOption = None,
    unit: UnitOption = None,
    recipe: RecipeOption = None,
    dataset: DatasetOption = None,
    defense: Annotated[str | None, _recipe_option("--defense", text="Defense to train.")] = None,
    model: StartModelOption = None,
    weights: WeightsOption = None,
    network: NetworkOption = None,
    network_option: NetworkOptionsOption = None,
    epochs: Annotated[int | None, _recipe_option("--epochs", text="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, _recipe_option("--batch-size", text="Images per step.")] = None,
    learning_rate: Annotated[float | None, _recipe_option("--learning-rate", text="The highest learning rate.")] = None,
    optimizer: Annotated[str | None, _recipe_option("--optimizer", text="adam, adamw, muon or sgd.")] = None,
    weight_decay: Annotated[float | None, _recipe_option("--weight-decay", text="Weight decay.")] = None,
    precision: Annotated[str | None, _recipe_option("--precision", text="float32, or bfloat16 for autocast in training.")] = None,
    stored: StoredOption = None,
    option: OptionsOption = None,
    validation: Annotated[int | None, _recipe_option("--validation", text="Training images held out.")] = None,
    limit: LimitOption = None,
    seed: Annotated[int | None, _recipe_option("--seed", text="Seed of everything random.")] = None,
    start: StartOption = None,
    data_dir: DataDirOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "auto",
    out: FolderOption = None,
    fresh: FreshOption = False,
    json: JsonOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Train a certified defense; the run folder has the shape of a zoo folder, and the same command resumes a stopped run."""
    from patchcert_cli import device as devices
    from patchcert_cli.reporting import text
    from patchcert_cli.training import estimate, overrides, run

    changes = overrides.Overrides(
        threat=threat_from(threat=threat, patch=patch, k=k, unit=unit),
        dataset=dataset,
        defense=defense,
        network=network,
        network_options=overrides.pairs(network_option, "--network-option"),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        weight_decay=weight_decay,
        precision=precision,
        stored=stored,
        validation=validation,
        limit=limit,
        seed=seed,
        start=start,
        options=overrides.pairs(option, "--option"),
        model=model,
        weights=weights,
    )
    resolved = overrides.resolved(recipe, changes, fetch=not dry_run, say=show.say)
    folder = out or Path("runs") / resolved.name
    if dry_run:
        cost = estimate.training(resolved, data_dir=data_dir, device=devices.resolve(device), beginning=run.begin(resolved))
        listing = {**resolved.to_dict(), "network_options": resolved.all_network_options(), "defaults": resolved.defaults()}
        value = {**listing, **cost, "out": str(folder)}
        show.result(_dry_rows(value), value, json)
        return
    with show.progress() as progress:
        result = run.train(
            resolved,
            folder,
            data_dir=data_dir,
            download=download,
            device=device,
            fresh=fresh,
            fetch=f"{typed_command()} --download",
            progress=progress,
        )
    show.result(text.train_rows(result), result, json)


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
