"""The Hugging Face Hub through its own client, and nothing believed that was not hashed.

The client compares sizes alone: wrong bytes of the right size stay in its cache for good. Here every file is hashed after it
came, what is wrong is taken out of the cache again, and only then is the folder given away. One process at a time fetches a
repository; those that waited find it in the cache. Whatever the client raises leaves this module as one line.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchcert_cli.cards import File
from patchcert_cli.errors import HubError, IntegrityError
from patchcert_cli.hub.failures import reason, translate_errors
from patchcert_cli.storage import checksum_cache, hub_cache, locks
from patchcert_cli.storage.files import CARD, write_atomically
from patchcert_cli.storage.hub_cache import repository, snapshot
from patchcert_cli.version import __version__

TRIES, PAUSE = 3, 0.5  # for the first answer of a Hub that has a problem of its own
AGENT: dict[str, Any] = {"library_name": "patchcert", "library_version": __version__}


@dataclass(frozen=True)
class Pushed:
    """A commit on the Hub: its id, the page to look at, and the pull request that holds it, if it is one."""

    commit: str
    url: str
    request: str | None = None


def wrong(folder: Path, expected: Mapping[str, File]) -> list[str]:
    """The files that are missing from ``folder`` or are not what they must be."""
    return [name for name, facts in expected.items() if not _is(folder / name, facts)]


def _is(path: Path, facts: File) -> bool:
    try:
        return path.stat().st_size == facts.size and checksum_cache.sha256(path) == facts.sha256
    except OSError:
        return False


def cached(repo: str, commit: str, expected: Mapping[str, File]) -> Path | None:
    """The folder of the cache with all these files, hashed, or None. Needs no network and no client."""
    folder = snapshot(repo, commit)
    return None if wrong(folder, expected) else folder


def fetch(repo: str, commit: str, expected: Mapping[str, File], *, offline: bool = False, force: bool = False) -> Path:
    """The folder of the cache that holds exactly these files of ``repo`` at ``commit``, fetched if need be.

    Raises:
        HubError: it is not in the cache, and the Hub is out of reach, refuses, or may not be asked.
        IntegrityError: the Hub sent something else; the cache does not keep it.
        MachineError: the cache cannot be written.
    """
    found = None if force and not offline else cached(repo, commit, expected)
    if found:
        return found
    _allowed(repo, offline)
    with translate_errors(repo), _alone(repo):
        found = None if force else cached(repo, commit, expected)  # another process may just have fetched it
        if found:
            return found
        folder = snapshot(repo, commit)
        for name in wrong(folder, expected):
            _discard(folder / name)
        _download(repo, commit, list(expected), force)
        bad = wrong(folder, expected)
        for name in bad:
            gone = not (folder / name).exists()
            _discard(folder / name)
            if gone:
                raise HubError(f"{repo} @ {commit[:7]} holds no {name}.", hint="Ask its author, or name another revision.")
        if bad:
            raise IntegrityError(
                f"the Hub sent {', '.join(bad)} of {repo} @ {commit[:7]} with another sha256 than its card says; not kept.",
                hint="Try again; if it stays so, tell the author.",
            )
    return folder


def fetch_card(repo: str, revision: str | None, *, offline: bool = False) -> tuple[str, Path]:
    """The commit that ``revision`` means, and the folder with its card; see :func:`fetch_unlisted`."""
    return fetch_unlisted(repo, revision, [CARD], offline=offline)


def fetch_unlisted(
    repo: str, revision: str | None, names: Sequence[str], *, offline: bool = False, hint: str = ""
) -> tuple[str, Path]:
    """The commit that ``revision`` means (a commit, branch or tag; by default main), and the folder that holds its ``names``.

    No hash of these files is known in advance: their bytes must have the hash that git or its large-file storage gave them, which
    the Hub tells apart from the files. It is remembered, so that what was checked once needs no network. ``hint`` is what an
    error says to type if the Hub has no such file.

    Raises:
        HubError: they are not in the cache, and the Hub is out of reach, refuses, has none, or may not be asked.
        IntegrityError: the Hub sent something else, or a model has no card; the cache does not keep it.
        MachineError: the cache cannot be written.
    """
    whole = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    commit = str(revision) if whole else _known_commit(repo, revision or "main")
    if commit and (whole or offline or _forbidden()) and all(_checked(repo, commit, name) for name in names):
        return commit, snapshot(repo, commit)
    _allowed(repo, offline)
    with translate_errors(repo), _alone(repo):
        if not whole:
            commit = _commit(repo, revision or "main")
            _remember(_note("refs", repo, revision or "main"), commit)
        for name in names:
            if not _checked(repo, commit, name):
                _fetch_checked(repo, commit, name, hint)
    return commit, snapshot(repo, commit)


def _fetch_checked(repo: str, commit: str, name: str, hint: str) -> None:
    """Download one file and hold it against the hash that the Hub tells of it."""
    path = snapshot(repo, commit) / name
    _discard(path)
    _download(repo, commit, [name], force=False)
    if not path.is_file():
        if name == CARD:
            raise IntegrityError(f"{repo} @ {commit[:7]} has no model card ({CARD}).", hint="Ask its author for one.")
        raise HubError(f"{repo} @ {commit[:7]} holds no {name}.", hint=hint or "Ask its author, or name another revision.")
    about = _api().get_paths_info(repo, [name], revision=commit)
    large = about[0].lfs if about else None
    actual = checksum_cache.sha256(path) if large else _names(path.read_bytes())[0]
    if not about or actual != (large.sha256 if large else about[0].blob_id):
        _discard(path)
        what = "card" if name == CARD else name
        raise IntegrityError(f"the Hub sent a damaged {what} of {repo} @ {commit[:7]}: not used, not kept.", hint="Try again.")
    _remember(_checked_note(repo, commit, name), checksum_cache.sha256(path))


def push(repo: str, files: Mapping[str, bytes | Path], message: str, *, create_pr: bool, private: bool) -> Pushed:
    """Commit these files to ``repo``, which is made if it is not there, and check what arrived.

    Raises:
        HubError: out of reach or refused.
        IntegrityError: the Hub holds something else than what was sent.
    """
    from huggingface_hub import CommitOperationAdd

    _allowed(repo, offline=False)
    with translate_errors(repo):
        api = _api()
        api.create_repo(repo, exist_ok=True, private=private or None)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(repo, operations, commit_message=message, create_pr=create_pr)
        held = {one.rfilename: one for one in api.model_info(repo, revision=done.oid, files_metadata=True).siblings or []}
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            there = held.get(name)
            if there is None or (there.lfs.sha256 if there.lfs else there.blob_id) not in _names(data):
                raise IntegrityError(f"{repo} @ {done.oid[:7]} holds another {name} than was sent.", hint="Push again.")
    return Pushed(done.oid, str(done.commit_url), str(done.pr_url) if done.pr_url else None)


def evaluation(entries: Sequence[Mapping[str, Any]]) -> str:
    """Entries for the Hub's ``.eval_results`` as YAML."""
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    made = eval_result_entries_to_yaml([EvalResultEntry(**entry) for entry in entries])
    return str(yaml.safe_dump(made, sort_keys=False, width=1000))


def remove(repo: str) -> int:
    """Take ``repo`` out of the cache, all revisions; returns the bytes freed."""
    import shutil

    folder = repository(repo)
    if not folder.is_dir():
        return 0
    with translate_errors(repo), _alone(repo):
        blobs = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        freed = sum(path.stat().st_size for path in blobs)
        for path in blobs:
            checksum_cache.forget(path)
        shutil.rmtree(folder)
    return freed


def reachable(timeout: float = 3.0) -> str:
    """Empty if the Hub answers, else why not, as the end of a sentence."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking it"
    try:
        get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=timeout)
    except Exception as problem:  # whatever a server, a proxy or a name service does
        return reason(problem, constants.ENDPOINT)
    return ""


def facts() -> dict[str, Any]:
    """What the client goes by, for ``patchcert doctor``; a token is never shown."""
    import huggingface_hub
    from huggingface_hub import constants, get_token

    return {
        "version": huggingface_hub.__version__,
        "endpoint": constants.ENDPOINT,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "token": _has_token(get_token),
    }


def _has_token(get_token: Callable[[], str | None]) -> bool:
    try:
        return bool(get_token())
    except OSError:  # a home that is no folder holds none
        return False


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(**AGENT)


def _download(repo: str, commit: str, names: list[str], force: bool) -> None:
    """One plain request says at once whether the Hub answers: the download itself would try for long."""
    from huggingface_hub import snapshot_download

    _commit(repo, commit)
    snapshot_download(repo, revision=commit, allow_patterns=names, force_download=force, **AGENT)


def _commit(repo: str, revision: str) -> str:
    """The commit that ``revision`` means on the Hub, which may take a moment to come to itself."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    for again in range(TRIES):
        try:
            return str(_api().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha or "")
        except HfHubHTTPError as problem:
            if problem.response.status_code < 500 or again + 1 == TRIES:
                raise
            time.sleep(PAUSE * 2**again)
    raise AssertionError("unreachable")


def _known_commit(repo: str, revision: str) -> str:
    """The commit that a branch or tag had when it was last looked up; empty if it never was."""
    path = _note("refs", repo, revision)
    return path.read_text().strip() if path.is_file() else ""


def _note(kind: str, repo: str, revision: str) -> Path:
    """Where it is remembered what a branch meant, or what a card that was checked is."""
    return hub_cache.home() / "patchcert" / kind / repo.replace("/", "--") / revision.replace("/", "--")


def _remember(note: Path, text: str) -> None:
    write_atomically(note, text.encode())


def _checked(repo: str, commit: str, name: str) -> bool:
    """Whether a file in the cache is the one that was checked when it came."""
    try:
        return checksum_cache.sha256(snapshot(repo, commit) / name) == _checked_note(repo, commit, name).read_text()
    except OSError:
        return False


def _checked_note(repo: str, commit: str, name: str) -> Path:
    """Where the sha256 of a file that was checked is remembered."""
    return _note("cards", repo, commit) if name == CARD else _note("files", repo, f"{commit}/{name}")


def _names(content: bytes) -> tuple[str, str]:
    """How git and its large-file storage call this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def _discard(path: Path) -> None:
    """Take a file out of the cache: what it points to first."""
    blob = Path(os.path.realpath(path))
    checksum_cache.forget(blob)
    for each in (blob, path):
        each.unlink(missing_ok=True)


def _forbidden() -> bool:
    """Whether the environment forbids asking the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _allowed(repo: str, offline: bool) -> None:
    if offline or _forbidden():
        said = "--offline" if offline else "HF_HUB_OFFLINE"
        raise HubError(f"{repo} is not in the Hub's cache and {said} forbids fetching it.", hint="Fetch it once while online.")


@contextmanager
def _alone(repo: str) -> Iterator[None]:
    """One process at a time fetches, or removes, a repository."""
    with locks.waiting(hub_cache.home() / "patchcert" / "locks" / f"{repo.replace('/', '--')}.lock"):
        yield
