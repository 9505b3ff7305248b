"""From a name or a folder to weights whose sha256 was checked: the bundled zoo, the Hub's cache, the Hub.

A download is pinned to a commit and every file is hashed against the bundled card: the Hub client itself compares sizes alone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchcert_cli import __version__, cards
from patchcert_cli.cards import Card, File, Published
from patchcert_cli.errors import ClaimError, HubError, IntegrityError, MachineError, UnknownName, UsageError
from patchcert_cli.files import refuse_pickle

if TYPE_CHECKING:
    from patchcert_cli.defenses.base import Defense

TIMEOUT = 10.0  # seconds that the Hub has for its first answer


@dataclass(frozen=True)
class Resolved:
    """A model whose files are on the disk.

    Attributes:
        folder: holds config.json and model.safetensors.
        card: None for a folder without one.
        source: ``folder``, ``bundled`` or ``hub``.
        note: one line saying what served the files and why.
        sha256: of the weights.
    """

    folder: Path
    card: Card | None
    source: str
    note: str
    sha256: str

    @property
    def name(self) -> str:
        """The card's name, else the folder's."""
        return self.card.name if self.card else self.folder.resolve().name


def resolve(
    name_or_path: str | Path, *, offline: bool = False, force: bool = False, revision: str | None = None, zoo: Path | None = None
) -> Resolved:
    """The files of a zoo model or of a folder that ``patchcert train`` made.

    What is on the disk is used as it is if its sha256 is the card's; otherwise, or with ``force`` or a ``revision``, :func:`pull`
    asks the Hub. ``zoo`` is used instead of the bundled folder.

    Raises:
        UnknownName: no such model or folder.
        IntegrityError: a pickle, a damaged card, or files that are not what the card says.
        HubError: the weights are not bundled and the Hub is out of reach.
    """
    text = os.fspath(name_or_path)
    refuse_pickle(Path(text))
    if isinstance(name_or_path, Path) or os.sep in text or "/" in text or (text and Path(text).exists()):
        return _folder(Path(text))
    card = cards.bundled_card(text, zoo)
    folder = (zoo or cards.bundled_folder()) / text
    if force or revision or not (folder / cards.WEIGHTS).is_file():
        return pull(text, offline=offline, force=force, revision=revision, zoo=zoo)
    return Resolved(folder, card, "bundled", f"{text}: the copy that is bundled with patchcert", card.verify(folder))


def pull(
    name: str, *, offline: bool = False, force: bool = False, revision: str | None = None, zoo: Path | None = None
) -> Resolved:
    """The files of zoo model ``name`` from the Hub at its card's commit, else the bundled copy; the note says which and why.

    Raises:
        UnknownName: no such model.
        IntegrityError: files that are not what the card says, from wherever they came.
        HubError: the weights are not bundled and the Hub is out of reach or refuses.
    """
    card = cards.bundled_card(name, zoo)
    if cards.WEIGHTS not in card.files:
        raise IntegrityError(f"{name} is a recipe without weights;", hint=f"train it: {card.command}")
    commit = revision or card.hub.revision
    if commit is None:
        reason = "it is not published on the Hub yet"
    elif not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise UsageError(f"revision '{commit}' is not a full commit;", hint="give its 40 hex digits.")
    else:
        found = _snapshot(card, commit, offline=offline, force=force)
        if isinstance(found, Path):
            digest = card.verify(found)
            return Resolved(found, card, "hub", f"{name}: {card.hub.repo} @ {commit[:7]}, in the Hub's cache", digest)
        reason = found
    folder = (zoo or cards.bundled_folder()) / name
    if not (folder / cards.WEIGHTS).is_file():
        raise HubError(f"{name} is not bundled, and {reason}.", hint=f"Try again with: patchcert zoo pull {name}")
    return Resolved(
        folder, card, "bundled", f"{name}: the copy that is bundled with patchcert, for {reason}", card.verify(folder)
    )


def load(
    name_or_path: str | Path,
    device: str = "cpu",
    *,
    offline: bool = False,
    force: bool = False,
    revision: str | None = None,
    zoo: Path | None = None,
) -> Defense:
    """The defense of a zoo model or folder, in eval mode; arguments and errors are those of :func:`resolve`."""
    from patchcert_cli import checkpoint

    found = resolve(name_or_path, offline=offline, force=force, revision=revision, zoo=zoo)
    return checkpoint.load_defense(found.folder, device=device, expected_sha256=found.sha256)[0]


def _folder(path: Path) -> Resolved:
    if path.is_file():
        if path.name != cards.WEIGHTS:
            raise IntegrityError(f"'{path}' is a file;", hint=f"give the folder that holds {cards.WEIGHTS} and {cards.CONFIG}.")
        path = path.parent
    if not path.is_dir():
        raise UnknownName(f"no folder '{path}'.", hint="Train one with patchcert train, or take a name from: patchcert zoo list")
    weights = path / cards.WEIGHTS
    if not weights.is_file():
        for candidate in sorted(path.iterdir()):
            refuse_pickle(candidate)
        raise IntegrityError(f"'{path}' holds no {cards.WEIGHTS};", hint="give a folder that patchcert train or zoo pull made.")
    if not (path / cards.CARD).exists():
        return Resolved(path, None, "folder", f"{path}: a folder without a card to check it against", cards.sha256(weights))
    card = Card.read(path)
    return Resolved(path, card, "folder", f"{path}: a folder, as its card says", card.verify(path))


def _snapshot(card: Card, commit: str, *, offline: bool, force: bool) -> Path | str:
    """The folder of the Hub's cache that holds the card's files at ``commit``, or why there is none.

    The cache is asked first. Then one plain request says at once whether the Hub answers: the download itself would try for 23 s.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionResolutionError, XetDownloadError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, whichever the client uses

    failures = (OSError, ValueError, EntryNotFoundError, RevisionResolutionError, XetDownloadError, httpx.HTTPError)
    agent: dict[str, Any] = {"library_name": "patchcert", "library_version": __version__}
    fetch = partial(snapshot_download, card.hub.repo, revision=commit, allow_patterns=list(card.files), **agent)
    if offline or not force:
        try:
            folder = Path(fetch(local_files_only=True))
        except failures as problem:
            if offline:
                return _reason(problem, card.hub.repo, offline)
        else:
            missing = _missing(card, folder)
            if not missing:
                return folder
            if offline:
                return f"{missing} of {card.hub.repo} is not in the Hub's cache and --offline forbids fetching it"
    try:
        HfApi(**agent).model_info(card.hub.repo, revision=commit, timeout=TIMEOUT)
        folder = Path(fetch(force_download=force))
    except failures as problem:
        return _reason(problem, card.hub.repo, offline)
    missing = _missing(card, folder)
    return f"{card.hub.repo} @ {commit[:7]} holds no {missing}" if missing else folder


def _missing(card: Card, folder: Path) -> str:
    return ", ".join(name for name in card.files if not (folder / name).is_file())


def _reason(problem: Exception, repo: str, offline: bool) -> str:
    """What went wrong on the way to the Hub, as the end of a sentence."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, whichever the client uses

    if isinstance(problem, errors.GatedRepoError):  # a RepositoryNotFoundError too: asked first
        return f"{repo} is gated on the Hub; log in with: hf auth login"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return f"{repo} is not on the Hub, or is private"
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"{repo} has no such revision on the Hub"
    if isinstance(problem, errors.RemoteEntryNotFoundError):
        return f"a file of {repo} is missing on the Hub"
    if isinstance(problem, errors.HfHubHTTPError):
        return f"the Hub refused {repo} ({problem.response.status_code})"
    nothing_cached = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, errors.OfflineModeIsEnabled)
    if isinstance(problem, (*nothing_cached, httpx.ConnectError, httpx.TimeoutException)):
        if offline or constants.HF_HUB_OFFLINE:
            return f"{repo} is not in the Hub's cache and {'--offline' if offline else 'HF_HUB_OFFLINE'} forbids fetching it"
        return f"the Hub is out of reach ({constants.ENDPOINT})"
    lines = str(problem).splitlines()
    return f"fetching {repo} failed ({type(problem).__name__}{': ' + lines[0] if lines else ''})"


def add(
    run: Path,
    name: str,
    results: Mapping[str, Mapping[str, Any]],
    *,
    published: Sequence[Published] = (),
    notes: str | None = None,
    to: Path | None = None,
    force: bool = False,
) -> Card:
    """Copy a finished training run into the zoo as ``name``, with measured results; returns its card.

    ``results`` are certify's results by the file they come from; ``to`` is the zoo folder, by default that of the source tree;
    ``force`` replaces a model that is there, which keeps its Hub revision if its files are the same.

    Raises:
        ClaimError: a result is about other weights, or not about every image of the test split.
        IntegrityError: the run or a result is not complete.
    """
    zoo = to or _source_zoo()
    found = _folder(run)
    if found.card is None:
        raise IntegrityError(f"'{run}' has no model card ({cards.CARD}).", hint="Train it again with the same command.")
    if not cards.valid_name(name):
        raise UsageError(f"'{name}' cannot name a model;", hint="use lower-case letters, digits, '-' and '.'.")
    if (zoo / name).exists() and not force:
        raise UsageError(f"'{zoo / name}' exists;", hint="replace it with --force, or use another --name.")
    entries = [entry for where, result in results.items() for entry in _entries(result, where, found)]
    files = {file: File.of(found.folder / file) for file in (cards.WEIGHTS, cards.CONFIG)}
    card = replace(
        found.card,
        name=name,
        status="measured" if entries else "trained",
        hub=_hub(zoo, name, files),
        files=files,
        published=tuple(published),
    )
    card = Card.from_dict(
        {**card.to_dict(), "results": entries, "notes": found.card.notes if notes is None else notes}, where=name
    )
    _copy(found.folder, zoo / name, card)
    return card


def _source_zoo() -> Path:
    zoo = cards.bundled_folder()
    if os.environ.get(cards.ENVIRONMENT) or (zoo.parent / "pyproject.toml").is_file():
        return zoo
    raise UsageError("patchcert is not installed from a source tree;", hint="say with --to which folder gets the model.")


def _hub(zoo: Path, name: str, files: Mapping[str, File]) -> cards.Hub:
    """The model's place on the Hub; the revision is kept only for the files it was made for."""
    if (zoo / name / cards.CARD).is_file():
        before = cards.bundled_card(name, zoo)
        if before.files == files:
            return before.hub
    return cards.Hub(f"patchcert/{name}")


def _entries(result: Mapping[str, Any], where: str, found: Resolved) -> list[dict[str, Any]]:
    """A certify result as the card tells it, one entry for each claim, after holding it against the weights."""
    common = {key: value for key, value in result.items() if key != "claims"}
    return [_entry({**common, **claim}, where, found) for claim in result.get("claims", [{}])]


def _entry(result: Mapping[str, Any], where: str, found: Resolved) -> dict[str, Any]:
    assert found.card is not None
    if "attack" in result or "certified" not in (result.get("counts") or {}):
        raise IntegrityError(f"'{where}' is not a result of patchcert certify.")
    if result.get("model_sha256") != found.sha256:
        raise ClaimError(
            f"'{where}' is about other weights (sha256 {str(result.get('model_sha256'))[:12]}…, not {found.sha256[:12]}…).",
            hint="Certify this run.",
        )
    if result.get("split") != "test" or result.get("full_split") is not True:
        raise ClaimError(
            f"'{where}' is about {result.get('images')} images of {result.get('split')}, not about the full test split.",
            hint="Certify it without --limit.",
        )
    if result.get("dataset") != found.card.dataset:
        raise ClaimError(f"'{where}' is about {result.get('dataset')}, but the model was trained on {found.card.dataset}.")
    counts = result["counts"]
    for key in ("clean", "certified"):
        if result.get(f"{key}_accuracy") != counts.get(key, -1) / (result.get("images") or 1):
            raise ClaimError(f"'{where}': {key}_accuracy is not its count over its images.")
    same = ("dataset", "split", "images", "threat", "certified_interval", "method", "date", "command", "patchcert", "guarantee")
    return {**{key: result[key] for key in same if key in result}, "clean": counts.get("clean"), "certified": counts["certified"]}


def _copy(run: Path, target: Path, card: Card) -> None:
    """Write the model folder, the card last, each file whole or not at all."""
    text = card.render()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in card.files:
            partial = target / f"{file}.partial"
            shutil.copyfile(run / file, partial)
            os.replace(partial, target / file)
        partial = target / f"{cards.CARD}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target / cards.CARD)
    except OSError as problem:
        raise MachineError(f"cannot write '{target}': {problem.strerror or problem}.") from problem
    card.verify(target)


def facts(found: Resolved) -> dict[str, Any]:
    """What a pull found, as plain values for JSON."""
    files = {name: asdict(file) for name, file in found.card.files.items()} if found.card else {}
    return {
        "name": found.name,
        "folder": str(found.folder),
        "source": found.source,
        "note": found.note,
        "sha256": found.sha256,
        "files": files,
    }
