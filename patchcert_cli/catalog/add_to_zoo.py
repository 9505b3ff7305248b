"""A finished training run becomes a model of the zoo."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from patchcert_cli import cards
from patchcert_cli.cards import Card, File, Hub, Published
from patchcert_cli.catalog import bundled
from patchcert_cli.catalog.claims import Results, card_with_results, card_with_samples
from patchcert_cli.catalog.resolve import resolve
from patchcert_cli.errors import IntegrityError, MachineError, UsageError
from patchcert_cli.storage import files

PLACES = ("--out", "--plot", "--plot-thresholds", "--data-dir", "--json")  # options of certify that name places of one machine


def add(
    run: Path,
    name: str,
    results: Results,
    *,
    published: Sequence[Published] = (),
    notes: str | None = None,
    samples: Results | None = None,
    pictures: Mapping[str, str] | None = None,
    to: Path | None = None,
    force: bool = False,
) -> Card:
    """Copy a finished training run into the zoo as ``name``, with measured results and their records; returns its card.

    ``results`` are certify's results by the path of their file, in whose folder the records are. ``samples`` are such results on
    images that are not a test split; the card lists them apart, and ``pictures`` describes the images of each and their origin.
    ``to`` is the zoo folder, by default that of the source tree; ``force`` replaces an existing model, which keeps its Hub
    revision if its files are the same.

    Raises:
        ClaimError: a result is about other weights or a part of the test split, or has counts that its records do not have.
        IntegrityError: the run or a result is not complete.
    """
    zoo = to or source_zoo()
    files.check_folder(zoo / name, "--out")
    found = resolve(run)
    if found.card is None:
        raise IntegrityError(f"'{run}' has no model card ({files.CARD}).", hint="Train it again with the same command.")
    if not cards.valid_name(name):
        raise UsageError(f"'{name}' cannot name a model.", hint="Use lower-case letters, digits, '-' and '.'.")
    if (zoo / name).exists() and not force:
        raise UsageError(f"'{zoo / name}' exists.", hint="Replace it with --force, or use another --name.")
    card, packed = card_with_results(found, results)
    card, records = card_with_samples(replace(found, card=card), samples or {}, pictures or {})
    if packed is not None:
        records[files.PUBLISHED_RECORDS] = packed
    card = replace(
        card,
        name=name,
        results=tuple(replace(one, command=for_readers(one.command, run, name)) for one in card.results),
        samples=tuple(replace(one, command=for_readers(one.command, run, name)) for one in card.samples),
        hub=_hub(zoo, name, card.files),
        published=tuple(published) or card.published,
        notes=card.notes if notes is None else notes,
    )
    _copy(found.folder, zoo / name, card, card.render(), records)
    return card


def of_one_machine(card: Card, zoo: Path | None = None) -> list[str]:
    """The other models that the card's command names and that are folders of this machine, one sentence each."""
    known = bundled.names(zoo)
    return [
        f"the {role} of this run, '{card.recipe[role]}', is a folder of this machine: others cannot train the model again."
        f" Add it to the zoo first, and train with --{role} and its name there."
        for role in ("start", "teacher")
        if card.recipe.get(role) and card.recipe[role] not in known and "@" not in card.recipe[role]
    ]


def for_readers(command: str, run: Path, name: str) -> str:
    """The certify command that measured the model in the folder ``run``, as a reader can type it: the model by its ``name``, and
    no option that names a file or a folder of the machine that ran it."""
    words, folder = shlex.split(command), run.absolute().name
    kept: list[str] = []
    for at, word in enumerate(words):
        if word.split("=")[0] in PLACES or (at and words[at - 1] in PLACES):
            continue
        value = words[at - 1].startswith("-") and os.sep not in word  # of an option: --patch 5 names no folder called 5
        own = at > 1 and not word.startswith("-") and not value and Path(word).absolute().name == folder
        kept.append(name if own else word)
    return shlex.join(kept)


def source_zoo() -> Path:
    """The zoo folder of the source tree.

    Raises:
        UsageError: patchcert is installed without one.
    """
    zoo = bundled.folder()
    if os.environ.get(bundled.ENVIRONMENT) or (zoo.parent / "pyproject.toml").is_file():
        return zoo
    raise UsageError("patchcert is not installed from a source tree.", hint="Name the folder that gets the model with --out.")


def write_card(folder: Path, card: Card) -> None:
    """Replace the card of a model folder."""
    files.write_atomically(folder / files.CARD, card.render().encode())


def _hub(zoo: Path, name: str, made: Mapping[str, File]) -> Hub:
    """The model's place on the Hub; the revision is kept only for the files it was made for."""
    if (zoo / name / files.CARD).is_file():
        before = bundled.card(name, zoo)
        if before.files == made:
            return before.hub
    return Hub(f"patchcert/{name}")


def _copy(run: Path, target: Path, card: Card, text: str, records: Mapping[str, bytes]) -> None:
    """Write the model folder, the card's ``text`` last, each file whole or not at all."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in card.files:
            if file in records:
                files.write_atomically(target / file, records[file])
            else:
                files.copy_atomically(run / file, target / file)
        for path in target.iterdir():  # records or shards of the model that was here before
            if path.name not in (*card.files, files.CARD) and path.suffix in (".gz", ".safetensors", ".json"):
                path.unlink()
    except OSError as problem:
        raise MachineError(
            f"cannot write '{target}': {problem.strerror or problem}.", hint="Check the folder and its permissions."
        ) from problem
    files.write_atomically(target / files.CARD, text.encode())
    card.verify(target)
