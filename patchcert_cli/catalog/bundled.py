"""The zoo: the folder of model folders that comes with the package."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from patchcert_cli.cards.card import Card
from patchcert_cli.cards.entries import valid_name
from patchcert_cli.cards.page import HUB_DATASETS
from patchcert_cli.errors import IntegrityError, UnknownName, UsageError, unknown
from patchcert_cli.threats import KINDS, parse_threat

ENVIRONMENT = "PATCHCERT_ZOO"  # a folder to use instead of the bundled zoo
DEFAULT_DATASET = "cifar10"
DEFAULT_MODELS = {"cifar10": "cifar-bagcert-rf7", "mnist": "mnist-ibp-p5"}


def folder() -> Path:
    """The zoo folder: ``PATCHCERT_ZOO`` if it is set, else the one that came with the package."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return Path(given)
    try:
        return Path(str(import_module("patchcert_cli.zoo").__file__)).parent
    except ModuleNotFoundError:  # a source tree that was never installed
        return Path(__file__).parents[2] / "zoo"


def names(zoo: Path | None = None) -> list[str]:
    """The names of all cards: the folders of the zoo."""
    zoo = zoo or folder()
    if not zoo.is_dir():
        return []
    return sorted(path.name for path in zoo.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))


def card(name: str, zoo: Path | None = None) -> Card:
    """The card of zoo model ``name``.

    Raises:
        UnknownName: there is none.
    """
    known = names(zoo)
    if not valid_name(name) or name not in known:
        raise unknown("model", name, known, see="patchcert zoo list")
    place = (zoo or folder()) / name
    read = Card.read(place)
    if read.name != name:
        raise IntegrityError(f"the card in '{place}' is of {read.name}.")
    return read


def cards(*, dataset: str | None = None, threat: str | None = None, zoo: Path | None = None) -> dict[str, Card]:
    """All cards by name, or those for a data set and a kind of threat (``patch``, ``sparse``) or one threat (``patch:5x5``)."""
    found = {name: card(name, zoo) for name in names(zoo)}
    if dataset is not None:
        known = {one.dataset for one in found.values()} | set(HUB_DATASETS)
        if dataset not in known:
            raise unknown("data set", dataset, known)
        found = {name: one for name, one in found.items() if one.dataset == dataset}
    if threat is None:
        return found
    if ":" in threat:
        wanted = parse_threat(threat)
        return {name: one for name, one in found.items() if one.threat == wanted}
    if threat not in KINDS:
        raise UsageError(f"invalid threat '{threat}'.", hint=f"Use {' or '.join(KINDS)}, or one threat such as patch:5x5.")
    return {name: one for name, one in found.items() if one.threat.kind == threat}


def default_model(dataset: str = DEFAULT_DATASET) -> str:
    """The model that a command takes for ``dataset`` when none is named."""
    if dataset not in DEFAULT_MODELS:
        raise UnknownName(
            f"no default model for data set '{dataset}'.",
            hint=f"List those that there are: patchcert zoo list --dataset {dataset}",
        )
    return DEFAULT_MODELS[dataset]
