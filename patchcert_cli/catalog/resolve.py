"""From a name, a folder or an address on the Hub to files whose sha256 was checked.

A zoo model is looked for in the Hub's cache, on the Hub at its card's commit, and in the bundled zoo, in this order; each file
must have the sha256 of the bundled card. A third-party model, ``org/name`` or ``org/name@revision``, is checked against its own
card.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchcert_cli import cards
from patchcert_cli.cards import Card
from patchcert_cli.catalog import bundled
from patchcert_cli.errors import HubError, IntegrityError, UnknownName, UsageError
from patchcert_cli.hub import client
from patchcert_cli.storage import files
from patchcert_cli.storage.files import refuse_pickle

if TYPE_CHECKING:
    from patchcert_cli.defenses import Defense

ADDRESS = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class ResolvedModel:
    """A model whose files are on the disk and have the right sha256.

    Attributes:
        folder: holds the files of the card.
        card: None for a folder without one.
        source: ``folder``, ``bundled``, ``cache`` or ``hub``.
        note: one line: where the files came from and why.
        sha256: of the weights, see :func:`patchcert_cli.cards.weights_sha256`.
        revision: the commit on the Hub that the files are of; None for those of a folder or of the bundled zoo.
    """

    folder: Path
    card: Card | None
    source: str
    note: str
    sha256: str
    revision: str | None = None

    @property
    def config_sha256(self) -> str | None:
        """Sha256 of the configuration by the card; None without a card."""
        listed = self.card.files.get(files.CONFIG) if self.card else None
        return listed.sha256 if listed else None

    @property
    def name(self) -> str:
        """The card's name, else the folder's."""
        return self.card.name if self.card else self.folder.resolve().name


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to certify, with the card of its weights.

    Attributes:
        defense: in eval mode, on the device that was asked for.
        files: where the weights came from and their sha256.
    """

    defense: Defense
    files: ResolvedModel

    @property
    def name(self) -> str:
        """The card's name, else the folder's."""
        return self.files.name

    @property
    def card(self) -> Card | None:
        """What is claimed about the weights; None for a folder without a card."""
        return self.files.card

    @property
    def revision(self) -> str | None:
        """The commit on the Hub that the weights are of; None for those of a folder or of the bundled zoo."""
        return self.files.revision


def resolve(
    name_or_path: str | Path, *, offline: bool = False, force: bool = False, revision: str | None = None, zoo: Path | None = None
) -> ResolvedModel:
    """The files of a zoo model, of ``org/name@revision`` on the Hub, or of a folder that ``patchcert train`` made.

    ``zoo`` is used instead of the bundled folder; ``force`` fetches again what is in the cache.

    Raises:
        UnknownName: no such model or folder.
        IntegrityError: a pickle, a damaged card, or files with another sha256 than in the card.
        HubError: the weights are not on this disk and the Hub is out of reach or refuses.
    """
    text = os.fspath(name_or_path)
    refuse_pickle(Path(text))
    if isinstance(name_or_path, Path) or (text and Path(text).exists()):
        return _folder(Path(text))
    address = ADDRESS.fullmatch(text)
    if ("/" in text or os.sep in text) and not (address and address["revision"]):  # what is computed with has a revision
        return _folder(Path(text))
    return pull(text, offline=offline, force=force, revision=revision, zoo=zoo)


def pull(
    name: str, *, offline: bool = False, force: bool = False, revision: str | None = None, zoo: Path | None = None
) -> ResolvedModel:
    """As :func:`resolve`, of names and addresses only. Files of another ``revision`` are checked against the card there.

    Raises:
        UnknownName: no such model.
        UsageError: the revision of a zoo model is not a full commit.
        IntegrityError: files have another sha256 than in the card.
        HubError: the weights are not on this disk and the Hub is out of reach or refuses.
        MachineError: the cache cannot be written.
    """
    address = ADDRESS.fullmatch(name)
    if address:
        return _foreign(address["repo"], revision or address["revision"], offline=offline, force=force)
    card = bundled.card(name, zoo)
    if revision is not None and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UsageError(f"revision '{revision}' is not a full commit.", hint="Give its 40 hex digits.")
    if revision not in (None, card.hub.revision):
        return _foreign(card.hub.repo, revision, offline=offline, force=force)
    if not card.files:
        if card.classifier:
            said = f"{name}: its weights are those of {card.classifier}."
            raise UnknownName(said, hint=f"They are fetched by: patchcert certify {name}")
        raise UnknownName(f"{name}: no weights are published yet.", hint=f"Train it: patchcert train --recipe {name}")
    folder = (zoo or bundled.folder()) / name
    reason = "it is not published on the Hub yet"
    if card.hub.revision is not None:
        try:
            return _from_hub(card, card.hub.repo, card.hub.revision, name, offline=offline, force=force)
        except HubError as problem:
            if not cards.weights_of(folder):
                raise
            reason = problem.message.rstrip(".")
    note = f"{name}: the copy that is bundled with patchcert, for {reason}"
    return ResolvedModel(folder, card, "bundled", note, card.verify(folder))


def _from_hub(card: Card, repo: str, commit: str, name: str, *, offline: bool, force: bool) -> ResolvedModel:
    digest = cards.weights_sha256(card.files)
    found = None if force and not offline else client.cached(repo, commit, card.files)
    if found:
        return ResolvedModel(found, card, "cache", f"{name}: {repo} @ {commit[:7]}, from the Hub's cache", digest, commit)
    found = client.fetch(repo, commit, card.files, offline=offline, force=force)
    return ResolvedModel(found, card, "hub", f"{name}: {repo} @ {commit[:7]}, fetched from the Hub", digest, commit)


def _foreign(repo: str, revision: str | None, *, offline: bool, force: bool) -> ResolvedModel:
    """A model without a bundled card: its own card lists the sha256 of its files."""
    commit, folder = client.fetch_card(repo, revision, offline=offline)
    card = Card.read(folder)
    if not card.files:
        raise UnknownName(f"{repo} @ {commit[:7]} publishes no weights.", hint=f"Train it: {card.command}")
    return _from_hub(card, repo, commit, repo, offline=offline, force=force)


def load_model(
    name_or_path: str | Path,
    device: str = "cpu",
    *,
    offline: bool = False,
    force: bool = False,
    revision: str | None = None,
    zoo: Path | None = None,
) -> LoadedModel:
    """A model of the zoo, of the Hub or of a folder, with its card.

    Args:
        name_or_path: a name that :func:`patchcert_cli.list_models` returns, ``org/name@revision`` on the Hub, or the folder of a
            finished training run.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        offline: do not use the network.
        force: fetch again what is in the Hub's cache.
        revision: a commit of the Hub instead of the one that the card names.
        zoo: used instead of the bundled zoo.

    Raises:
        UnknownName, UsageError, HubError, MachineError: as :func:`resolve`.
        IntegrityError: the files are not those of the card, or no defense can be built from them.
    """
    from patchcert_cli import checkpoint

    found = resolve(name_or_path, offline=offline, force=force, revision=revision, zoo=zoo)
    defense, _ = checkpoint.load_defense(
        found.folder, device=device, expected_sha256=found.sha256, expected_config=found.config_sha256
    )
    return LoadedModel(defense, found)


def load(name_or_path: str | Path, device: str = "cpu", **options: Any) -> Defense:
    """The defense of :func:`load_model`, without its card."""
    return load_model(name_or_path, device, **options).defense


def _folder(path: Path) -> ResolvedModel:
    if path.is_file():
        if path.name != files.WEIGHTS:
            raise IntegrityError(f"'{path}' is a file.", hint=f"Give the folder that holds {files.WEIGHTS} and {files.CONFIG}.")
        path = path.parent
    if not path.is_dir():
        hint = "Train one with patchcert train, take a name from patchcert zoo list, or name the Hub's: org/model@COMMIT."
        raise UnknownName(f"no folder '{path}'.", hint=hint)
    weights = cards.weights_of(path)
    if not weights:
        for candidate in sorted(path.iterdir()):
            refuse_pickle(candidate)
        raise IntegrityError(f"'{path}' holds no {files.WEIGHTS}.", hint="Give a folder that patchcert train or zoo pull made.")
    if not (path / files.CARD).exists():
        digest = cards.weights_sha256({name: cards.File.of(path / name) for name in weights})
        return ResolvedModel(path, None, "folder", f"{path}: a folder without a card to check it against", digest)
    card = Card.read(path)
    return ResolvedModel(path, card, "folder", f"{path}: a folder, as its card says", card.verify(path))


def facts(found: ResolvedModel) -> dict[str, Any]:
    """A resolved model as plain values for JSON."""
    files = {name: asdict(file) for name, file in found.card.files.items()} if found.card else {}
    return {
        "name": found.name,
        "folder": str(found.folder),
        "source": found.source,
        "note": found.note,
        "sha256": found.sha256,
        "files": files,
    }
