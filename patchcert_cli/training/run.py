"""A whole training run: data, loop, card. The folder it leaves has the shape of a zoo folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import cards, checkpoint, data, models
from patchcert_cli import device as devices
from patchcert_cli.catalog import resolve
from patchcert_cli.classifiers import addresses
from patchcert_cli.defenses import Trainable
from patchcert_cli.errors import IntegrityError, UsageError
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage import files, locks
from patchcert_cli.training import loop
from patchcert_cli.training.overrides import hash_of_start
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.state import Beginning
from patchcert_cli.version import __version__


def begin(recipe: Recipe) -> Beginning:
    """The fresh defense that a run starts with, and what loads the weights that the recipe names into it.

    Raises:
        UsageError: no network can be built from its options.
        IntegrityError: the weights to begin with are not those of the recipe, or those of another network.
    """
    try:
        beginning = Beginning.of(recipe)
    except IntegrityError as problem:  # of a file it would be; here it is what the user typed
        raise UsageError(problem.message, hint=problem.hint or "See --network-option.") from problem
    initial = None
    if recipe.start:
        hash_of_start(recipe.start, recipe.start_sha256)
        initial = checkpoint.weights_for(beginning.defense, resolve.resolve(recipe.start).folder)

    def load(defense: Trainable) -> None:
        if recipe.network_options.get("weights"):  # published ones, all but the layers that give the classes
            network: Any = defense.network
            addresses.begin_with(network, recipe.network_options)
        if initial is not None:
            defense.load_state_dict(initial, strict=True)

    return replace(beginning, load=load)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    device: str = "auto",
    fresh: bool = False,
    fetch: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train ``recipe`` into ``folder``, continuing a stopped run, and write its card; returns a summary of plain values.

    Raises:
        DataError: the training data is not there; the message names the command that fetches it.
        UsageError: the recipe is wrong, or the folder holds a run of another one.
        MachineError: another process uses the folder.
        Interrupted: stopped by Ctrl-C; whole epochs are kept.
    """
    progress = progress or Silent()
    place = devices.resolve(device)
    beginning = begin(recipe)
    images = data.open_dataset(recipe.dataset, data_dir=data_dir).load("train", download=download, fetch=fetch)
    images = images.limit(recipe.limit or None, recipe.seed).checked(progress)
    for remark in images.remarks:
        progress.note(remark)
    with locks.held(folder, files.CONFIG):
        made = loop.train(recipe, images, folder, device=place, fresh=fresh, progress=progress, beginning=beginning)
        return _described(recipe, folder, made, place, progress)


def _described(recipe: Recipe, folder: Path, made: loop.Trained, place: str, progress: Progress) -> dict[str, Any]:
    """Write the card of a trained model, and say what it is."""
    weights = cards.weights_sha256({name: cards.File.of(folder / name) for name in cards.weights_of(folder)})
    validation = {"images": made.validation.images, "clean": made.validation.clean, "certified": made.validation.certified}
    if made.epochs_run or not (folder / files.CARD).exists():
        card = cards.card_for_run(
            recipe.to_dict(),
            folder,
            network=models.describe(made.defense),
            kept=made.kept,
            validation=validation,
            trained={
                "seconds": round(made.seconds, 1),
                "device": place,
                "threads": torch.get_num_threads(),
                "torch": str(torch.__version__),
                "patchcert": __version__,
            },
            command=recipe.command,
            source=made.defense.source,
            guarantee=made.defense.guarantee,
        )
        files.write_atomically(folder / files.CARD, card.render().encode())
    else:
        progress.note(f"{folder} is finished; --fresh trains it again")
    return {
        "out": str(folder),
        "model_sha256": weights,
        "defense": recipe.defense,
        "dataset": recipe.dataset,
        "threat": str(recipe.threat),
        "guarantee": str(made.defense.guarantee),
        "epochs": recipe.epochs,
        "at_chance": made.at_chance,
        "chance": made.chance,
        "validation": {"images": made.validation.images, "counts": {k: validation[k] for k in ("clean", "certified")}},
        "seconds": made.seconds,
        "device": place,
    }
