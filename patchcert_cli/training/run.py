"""A whole training run: data, loop, card. The folder it leaves has the shape of a zoo folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import cards, checkpoint, data, defenses, models
from patchcert_cli import device as devices
from patchcert_cli.catalog import bundled, resolve
from patchcert_cli.classifiers import addresses
from patchcert_cli.defenses import Defense
from patchcert_cli.errors import IntegrityError, UsageError
from patchcert_cli.progress import Progress, Silent
from patchcert_cli.storage import files, locks
from patchcert_cli.training import loop
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.version import __version__


def recipe_of(name_or_path: str) -> Recipe:
    """The recipe of a zoo model, which may have no weights yet, or the one that a run folder was trained with."""
    if name_or_path in bundled.names():
        card = bundled.card(name_or_path)
        if card.classifier:
            raise UsageError(f"{card.name} is not trained: its weights are public.", hint=f"Measure them: {card.command}")
        return Recipe.from_dict(card.recipe)
    config = files.read_json(resolve.resolve(name_or_path).folder / files.CONFIG)
    if not isinstance(config.get("recipe"), dict):
        raise IntegrityError(f"'{name_or_path}' does not say how it was trained.", hint="Give --patch or --threat instead.")
    return Recipe.from_dict(config["recipe"])


def started(recipe: Recipe) -> Recipe:
    """The recipe with the digest of the weights that it starts from."""
    if not recipe.start:
        return recipe
    found = resolve.resolve(recipe.start)
    digest = cards.weights_sha256({name: cards.File.of(found.folder / name) for name in cards.weights_of(found.folder)})
    if recipe.start_sha256 not in ("", digest):
        raise IntegrityError(
            f"'{recipe.start}' has weights {digest[:12]}…, but the recipe starts from {recipe.start_sha256[:12]}….",
            hint="Name the model that it was started from with --start.",
        )
    return replace(recipe, start_sha256=digest)


def check(recipe: Recipe) -> Callable[[Defense], None]:
    """What gives a fresh defense the weights to begin with; raises what building and preparing the recipe's network raises.

    Raises:
        UsageError: no network can be built from its options.
        IntegrityError: the weights to begin with are not those of the recipe, or those of another network.
    """
    with torch.random.fork_rng():
        try:
            defense = defenses.build(recipe.config())
        except IntegrityError as problem:  # of a file it would be; here it is what the user typed
            raise UsageError(problem.message, hint=problem.hint or "See --network-option.") from problem
        defense.init_weights(recipe.training)
    initial = checkpoint.weights_for(defense, resolve.resolve(started(recipe).start).folder) if recipe.start else None

    def prepare(defense: Defense) -> None:
        if recipe.network_options.get("weights"):  # published ones, all but the layers that give the classes
            network: Any = defense.network
            addresses.begin_with(network, recipe.network_options)
        if initial is not None:
            defense.load_state_dict(initial, strict=True)

    return prepare


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
        MachineError: another process is at work in the folder.
        Interrupted: stopped by Ctrl-C; whole epochs are kept.
    """
    progress = progress or Silent()
    place = devices.resolve(device)
    prepare = check(recipe)
    images = data.open_dataset(recipe.dataset, data_dir=data_dir).load("train", download=download, fetch=fetch)
    images = images.limit(recipe.limit or None, recipe.seed).checked(progress)
    for remark in images.remarks:
        progress.note(remark)
    with locks.held(folder, files.CONFIG):
        made = loop.train(recipe, images, folder, device=place, fresh=fresh, progress=progress, prepare=prepare)
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
        "threat": recipe.threat,
        "guarantee": str(made.defense.guarantee),
        "epochs": recipe.epochs,
        "at_chance": made.at_chance,
        "chance": made.chance,
        "validation": {"images": made.validation.images, "counts": {k: validation[k] for k in ("clean", "certified")}},
        "seconds": made.seconds,
        "device": place,
    }
