"""Wrapper of the Hugging Face Hub's client: every downloaded file is verified by its hash.

The client itself compares sizes only: wrong bytes of the right size would stay in its cache. Here every file is hashed after the
download, and a wrong one is removed from the cache before the folder is returned. One process at a time fetches a repository;
processes that waited find the files in the cache. Exceptions of the client become errors of this package.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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

MAX_TRIES, FIRST_PAUSE = 3, 0.5  # of the first request if the server answers with an error; seconds, doubled each time
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
    """The folder of the cache with all these files, verified by hash, or None. Uses neither network nor client."""
    folder = snapshot(repo, commit)
    return None if wrong(folder, expected) else folder


def fetch(repo: str, commit: str, expected: Mapping[str, File], *, offline: bool = False, force: bool = False) -> Path:
    """The folder of the cache that holds exactly these files of ``repo`` at ``commit``, fetched if necessary.

    Raises:
        HubError: it is not in the cache, and the Hub is out of reach, refuses, or must not be used.
        IntegrityError: the Hub sent files with another hash; the cache does not keep them.
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
                hint="Try again; if it fails again, ask the author.",
            )
    return folder


def fetch_card(repo: str, revision: str | None, *, offline: bool = False) -> tuple[str, Path]:
    """The commit that ``revision`` means, and the folder with its card; see :func:`fetch_unlisted`."""
    return fetch_unlisted(repo, revision, [CARD], offline=offline)


def fetch_unlisted(
    repo: str, revision: str | None, names: Sequence[str], *, offline: bool = False, hint: str = ""
) -> tuple[str, Path]:
    """The commit that ``revision`` means (a commit, branch or tag; by default main), and the folder that holds its ``names``.

    No hash of these files is known in advance: their bytes must have the hash of git or its large-file storage, which the Hub
    lists. The sha256 is remembered, so that files that were checked once need no network. ``hint`` is for the error if the Hub
    has no such file.

    Raises:
        HubError: they are not in the cache, and the Hub is out of reach, refuses, has none, or must not be used.
        IntegrityError: the Hub sent files with another hash, or a model has no card; the cache does not keep them.
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
            write_atomically(_note("refs", repo, revision or "main"), commit.encode())
        for name in names:
            if not _checked(repo, commit, name):
                _fetch_checked(repo, commit, name, hint)
    return commit, snapshot(repo, commit)


def _fetch_checked(repo: str, commit: str, name: str, hint: str) -> None:
    """Download one file and compare it with the hash that the Hub lists."""
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
    write_atomically(_checked_note(repo, commit, name), checksum_cache.sha256(path).encode())


def push(repo: str, files: Mapping[str, bytes | Path], message: str, *, create_pr: bool, private: bool) -> Pushed:
    """Commit these files to ``repo``, which is created if it does not exist, and check what arrived.

    Raises:
        HubError: out of reach or refused.
        IntegrityError: the Hub holds other content than was sent.
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
    """Remove all revisions of ``repo`` from the cache; returns the bytes freed."""
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
    """Settings of the client, for ``patchcert doctor``; a token is never shown."""
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
    except OSError:  # a home that is not a folder holds none
        return False


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(**AGENT)


def _download(repo: str, commit: str, names: list[str], force: bool) -> None:
    """Download files into the cache; one plain request first, since the download itself would retry for a long time."""
    from huggingface_hub import snapshot_download

    _commit(repo, commit)
    snapshot_download(repo, revision=commit, allow_patterns=names, force_download=force, **AGENT)


def _commit(repo: str, revision: str) -> str:
    """The commit that ``revision`` means on the Hub; retries server errors (5xx)."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(MAX_TRIES):
        try:
            return str(_api().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha or "")
        except HfHubHTTPError as problem:
            if problem.response.status_code < 500 or attempt + 1 == MAX_TRIES:
                raise
            time.sleep(FIRST_PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _known_commit(repo: str, revision: str) -> str:
    """The commit of a branch or tag when it was last looked up; empty if it never was."""
    path = _note("refs", repo, revision)
    return path.read_text().strip() if path.is_file() else ""


def _note(kind: str, repo: str, revision: str) -> Path:
    """The file that remembers the commit of a branch, or the sha256 of a checked file."""
    return hub_cache.home() / "patchcert" / kind / repo.replace("/", "--") / revision.replace("/", "--")


def _checked(repo: str, commit: str, name: str) -> bool:
    """Whether a file in the cache is the one that was checked after its download."""
    try:
        return checksum_cache.sha256(snapshot(repo, commit) / name) == _checked_note(repo, commit, name).read_text()
    except OSError:
        return False


def _checked_note(repo: str, commit: str, name: str) -> Path:
    """The file that remembers the sha256 of a checked file."""
    return _note("cards", repo, commit) if name == CARD else _note("files", repo, f"{commit}/{name}")


def _names(content: bytes) -> tuple[str, str]:
    """The hashes by which git and its large-file storage name this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def _discard(path: Path) -> None:
    """Remove a file from the cache: the blob that it links to first."""
    blob = Path(os.path.realpath(path))
    checksum_cache.forget(blob)
    for each in (blob, path):
        each.unlink(missing_ok=True)


def _forbidden() -> bool:
    """Whether the environment forbids requests to the Hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _allowed(repo: str, offline: bool) -> None:
    if offline or _forbidden():
        said = "--offline" if offline else "HF_HUB_OFFLINE"
        raise HubError(f"{repo} is not in the Hub's cache and {said} forbids fetching it.", hint="Fetch it once while online.")


def _alone(repo: str) -> AbstractContextManager[None]:
    """One process at a time fetches, or removes, a repository."""
    return locks.waiting(hub_cache.folder() / "patchcert" / "locks" / f"{repo.replace('/', '--')}.lock")
