"""The bundled zoo: the folder of model folders that is installed with the package. Neither torch nor a network is needed."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from patchcert_cli.cards.card import Card
from patchcert_cli.cards.entries import valid_name
from patchcert_cli.cards.page import HUB_DATASETS
from patchcert_cli.errors import IntegrityError, UnknownName, UsageError, unknown
from patchcert_cli.storage.files import CARD
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
    """The names of all models: the folders of the zoo."""
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
    try:
        state = (place / CARD).stat()
        read = _read(place.resolve(), state.st_mtime_ns, state.st_size)
    except OSError:
        read = Card.read(place)  # raises what is wrong
    if read.name != name:
        raise IntegrityError(f"the card in '{place}' is of {read.name}.", hint="A folder of the zoo has the name of its model.")
    return read


@lru_cache(maxsize=256)
def _read(place: Path, changed: int, size: int) -> Card:
    """The card in ``place``, decoded once for each state of its file."""
    return Card.read(place)


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


def list_models(
    pattern: str = "*", *, dataset: str | None = None, threat: str | None = None, zoo: Path | None = None
) -> list[str]:
    """The names of the bundled models that match a pattern, for example ``cifar*``; no torch is imported.

    Args:
        pattern: a name, with ``*`` for any text, ``?`` for one character and ``[...]`` for one of several.
        dataset: only models of this data set, for example ``mnist``.
        threat: only models that were trained against this kind of threat (``patch``, ``sparse``) or this one (``patch:5x5``).
        zoo: used instead of the bundled zoo.

    Raises:
        UnknownName: no model has this data set.
        UsageError: the threat is invalid.
    """
    found = names(zoo) if dataset is None and threat is None else list(cards(dataset=dataset, threat=threat, zoo=zoo))
    return [name for name in found if fnmatchcase(name, pattern)]


def default_model(dataset: str = DEFAULT_DATASET) -> str:
    """The model that a command takes for ``dataset`` when none is named."""
    if dataset not in DEFAULT_MODELS:
        raise UnknownName(
            f"no default model for data set '{dataset}'.",
            hint=f"List those that there are: patchcert zoo list --data {dataset}",
        )
    return DEFAULT_MODELS[dataset]
