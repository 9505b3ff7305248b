"""``patchcert train``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from patchcert_cli.errors import UsageError

if TYPE_CHECKING:
    from patchcert_cli.threats import Threat
    from patchcert_cli.training.recipe import Recipe

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
StartOption = Annotated[
    str | None,
    typer.Option("--start", metavar="NAME|PATH", help="Begin with this model's weights.", rich_help_panel=RECIPE),
]

FolderOption = Annotated[
    Path | None,
    typer.Option("--out", callback=folder_to_write("--out"), help="Run folder. Default: runs/NAME.", rich_help_panel=RUN),
]

FINE_TUNING: dict[str, Any] = {  # few, gentle steps: the published course of networks that were trained before
    "epochs": 10,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "optimizer": "sgd",
    "weight_decay": 0.0,
    "stored": "float32",
}
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
    "limit",
    "seed",
    "start",
)


def _recipe_option(*flags: str, text: str) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=RECIPE)


LimitOption = Annotated[int | None, _recipe_option("--limit", text="Only this many training images, the held-out ones included.")]


def train(
    patch: PatchOption = None,
    threat: ThreatOption = None,
    k: KOption = None,
    unit: UnitOption = None,
    recipe: RecipeOption = None,
    dataset: Annotated[
        str | None,
        _recipe_option("--data", "--dataset", text="Data set, or imagefolder:PATH; mnist unless the recipe says otherwise."),
    ] = None,
    defense: Annotated[str | None, _recipe_option("--defense", text="Defense to train.")] = None,
    model: Annotated[
        str | None,
        _recipe_option("--model", text="Begin with published weights: timm:NAME, or hf-hub:ORG/REPO@COMMIT; see --weights."),
    ] = None,
    weights: Annotated[
        str | None, _recipe_option("--weights", text="Safetensors for --model to begin with, or none for random ones.")
    ] = None,
    network: Annotated[
        str | None, _recipe_option("--network", text="Network; the defense's own unless the recipe says otherwise.")
    ] = None,
    network_option: Annotated[
        list[str] | None,
        _recipe_option("--network-option", text="NAME=VALUE for the network, for example hidden=512,256; repeatable."),
    ] = None,
    epochs: Annotated[int | None, _recipe_option("--epochs", text="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, _recipe_option("--batch-size", text="Images per step.")] = None,
    learning_rate: Annotated[float | None, _recipe_option("--learning-rate", text="The highest learning rate.")] = None,
    optimizer: Annotated[str | None, _recipe_option("--optimizer", text="adam, adamw, muon or sgd.")] = None,
    weight_decay: Annotated[float | None, _recipe_option("--weight-decay", text="Weight decay.")] = None,
    precision: Annotated[str | None, _recipe_option("--precision", text="float32, or bfloat16 for autocast in training.")] = None,
    stored: Annotated[
        str | None, _recipe_option("--stored", text="What finished weights are rounded to: float32, float16 or bfloat16.")
    ] = None,
    option: Annotated[
        list[str] | None,
        _recipe_option("--option", text="NAME=VALUE of the defense's own training; repeatable. --dry-run lists them."),
    ] = None,
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
    chosen = threat_from(threat=threat, patch=patch, k=k, unit=unit)
    given: dict[str, Any] = {name: value for name, value in locals().items() if name in RECIPE_FIELDS and value is not None}
    pairs = {"network_options": _pairs(network_option, "--network-option"), "options": _pairs(option, "--option")}
    made = _recipe(chosen, recipe, given, pairs, model, weights, fetch=not dry_run)

    from patchcert_cli import device as devices
    from patchcert_cli.reporting import text
    from patchcert_cli.training import estimate, run

    folder = out or Path("runs") / made.name
    if dry_run:
        run.check(made)
        cost = estimate.training(made, data_dir=data_dir, device=devices.resolve(device))
        value = {**made.to_dict(), **cost, "out": str(folder)}
        show.result(text.plain_rows(value), value, json)
        return
    with show.progress() as progress:
        found = run.train(
            made,
            folder,
            data_dir=data_dir,
            download=download,
            device=device,
            fresh=fresh,
            fetch=f"{typed_command()} --download",
            progress=progress,
        )
    show.result(text.train_rows(found), found, json)


def _recipe(
    threat: Threat | None,
    name: str | None,
    given: dict[str, Any],
    pairs: dict[str, dict[str, Any]],
    model: str | None,
    weights: str | None,
    *,
    fetch: bool,
) -> Recipe:
    """The recipe that the options name, whole and validated; ``given`` are its own fields, ``pairs`` what is in its tables."""
    from patchcert_cli.training import recipe as recipes
    from patchcert_cli.training import run

    if name is not None:
        basis = run.recipe_of(name)
        given |= {} if threat is None else {"threat": str(threat)}
    elif threat is not None:
        basis = recipes.for_threat(threat, given.get("defense") or _usual_defense(threat, given), given.get("dataset"))
    else:
        raise UsageError("no threat model given.", hint="Use --patch 5, or --threat sparse --k 10, or --recipe NAME.")
    basis = _begun(basis, given, model, weights, fetch=fetch)
    if given.get("limit") and "validation" not in given:
        given["validation"] = min(basis.validation, max(1, given["limit"] // 10))
    tables = {"network_options": basis.network_options, "options": basis.options}
    given |= {table: values | pairs[table] for table, values in tables.items()}
    given |= {"start_sha256": ""} if "start" in given else {}
    return run.started(replace(basis, **given).validate().fitted())


def _usual_defense(threat: Threat, given: dict[str, Any]) -> str:
    """The defense for a threat model on a data set; says so where it is another one than elsewhere."""
    from patchcert_cli import defenses
    from patchcert_cli.training import recipe as recipes

    usual, elsewhere = recipes.usual_defense(threat, given.get("dataset")), recipes.usual_defense(threat)
    if usual == elsewhere or given.get("network") not in (None, defenses.by_name(usual).default_network):
        return elsewhere
    show.say(
        f"{threat} on {given['dataset']}: {usual} is trained, which certifies more here than {elsewhere};"
        f" --defense {elsewhere} trains that"
    )
    return usual


def _begun(basis: Recipe, given: dict[str, Any], model: str | None, weights: str | None, *, fetch: bool) -> Recipe:
    """The recipe with a network of timm that begins with published weights, and with what own pictures mean for it.

    ``given`` is what the user says himself; the size of pictures in class folders is added to it.
    """
    from patchcert_cli import data
    from patchcert_cli.classifiers import addresses
    from patchcert_cli.data import datasets

    dataset = str(given.get("dataset", basis.dataset))
    if model is None and weights is not None:
        raise UsageError("--weights goes with --model.", hint="Name their network: --model timm:NAME.")
    if model is not None:
        if "network" in given:
            raise UsageError("--model and --network both name a network.", hint="Give one of them.")
        found = addresses.beginning(model, weights, fetch=fetch)
        dataset = data.open_dataset(dataset).resized(found.source.resize_crop).name
        basis = replace(basis, network="timm", network_options=found.options, **FINE_TUNING)
    if datasets.is_custom(dataset):
        images = data.open_dataset(dataset)
        given["dataset"] = images.name
        held = min(basis.validation, max(1, len(images.image_files("train")) // 10))
        basis = replace(basis, validation=held)
    return basis


def _pairs(texts: list[str] | None, flag: str) -> dict[str, Any]:
    """Read ``NAME=VALUE`` texts."""
    from patchcert_cli.training.recipe import read

    pairs = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{flag} '{text}' cannot be read.", hint=f"Use NAME=VALUE, for example {flag} epochs=3.")
        pairs[name.replace("-", "_")] = read(value)
    return pairs
