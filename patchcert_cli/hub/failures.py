"""The Hub's client kept within limits: no request waits for ever, and whatever the client raises becomes one line."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from patchcert_cli.errors import HubError, IntegrityError, MachineError, PatchcertError, first_line
from patchcert_cli.storage import hub_cache

UPLOAD_TIMEOUT = 120.0  # seconds that the Hub has to take in what was sent
NO_ROOM = {errno.ENOSPC: "full", errno.EDQUOT: "over its quota", errno.EFBIG: "full", errno.EROFS: "read-only"}
NO_ROOM |= {errno.EACCES: "not writable", errno.EPERM: "not writable"}


@contextmanager
def translate_errors(repo: str) -> Iterator[None]:
    """Turn what the client raises into one of our errors, and keep it from talking."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    _set_timeouts()
    if not os.environ.get("PATCHCERT_DEBUG"):
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except PatchcertError:
        raise
    except Exception as problem:  # a stranger's server can make the client raise anything
        if isinstance(problem, OSError) and problem.errno in NO_ROOM:
            raise MachineError(
                f"the Hub's cache '{hub_cache.folder()}' is {NO_ROOM[problem.errno]}: {problem.strerror}.",
                hint="Free some space, or put it elsewhere with HF_HOME.",
            ) from problem
        if isinstance(problem, OSError) and str(problem).startswith("Consistency check failed"):
            raise IntegrityError(f"the Hub sent a file of {repo} with another size than it says; not kept.") from problem
        raise HubError(f"{reason(problem, repo)} ({constants.ENDPOINT}).") from problem


@cache
def _set_timeouts() -> None:
    """No request of this process waits for ever: the client itself lists a repository without any limit of time.

    Nor does it wait as long as a stranger's server asks it to.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import get_session, httpx  # type: ignore[attr-defined]

    hooks = get_session().event_hooks

    def limit(request: Any) -> None:
        most = constants.HF_HUB_DOWNLOAD_TIMEOUT if request.method in ("GET", "HEAD") else UPLOAD_TIMEOUT
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            kind: min(given.get(kind) or most, most) for kind in ("connect", "read", "write", "pool")
        }

    def ignore_retry_after(response: Any) -> None:
        for name in ("Retry-After", "RateLimit"):
            response.headers.pop(name, None)

    def client() -> Any:
        both: dict[str, Any] = {"request": [*hooks["request"], limit], "response": [*hooks["response"], ignore_retry_after]}
        return httpx.Client(event_hooks=both, follow_redirects=True, timeout=None)

    set_client_factory(client)


def reason(problem: BaseException, repo: str) -> str:
    """What went wrong on the way to the Hub, as the end of a sentence."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, whichever the client uses

    if isinstance(problem, errors.GatedRepoError):  # a RepositoryNotFoundError too: asked first
        return f"{repo} is gated: ask for access on its page and log in with hf auth login"
    if isinstance(problem, errors.RepositoryNotFoundError):
        return f"{repo} is not on the Hub, or is private: log in with hf auth login, or set HF_TOKEN"
    if isinstance(problem, errors.RevisionNotFoundError):
        return f"{repo} has no such revision on the Hub"
    if isinstance(problem, errors.RemoteEntryNotFoundError):
        return f"a file of {repo} is missing on the Hub"
    if isinstance(problem, errors.HfHubHTTPError):
        return _refusal(repo, problem.response.status_code)
    if isinstance(problem, errors.HFValidationError):
        return f"'{repo}' is no name on the Hub"
    if isinstance(problem, httpx.TimeoutException):
        return "the Hub did not answer in time"
    if isinstance(problem, httpx.ConnectError):
        return "the Hub is out of reach"
    if isinstance(problem, errors.FileMetadataError):
        return "what answers is not a Hub"
    if isinstance(problem, httpx.HTTPError):
        return f"the connection broke off while fetching {repo}"
    deeper = problem.__cause__ or problem.__context__
    if deeper is not None and not isinstance(problem, ValueError):
        return reason(deeper, repo)
    if isinstance(problem, ValueError):
        return "what answers is not a Hub"
    message, kind = first_line(problem), type(problem).__name__
    return f"fetching {repo} failed: {kind}{'' if message == kind else ': ' + message}"


def _refusal(repo: str, status: int) -> str:
    why = {
        401: "log in with hf auth login, or set HF_TOKEN",
        403: "your token does not allow it",
        404: "it is not there",
        429: "too many requests; try again later",
    }
    default = "the Hub has a problem of its own; try again later" if status >= 500 else "no reason given"
    return f"the Hub refused {repo} with status {status}: {why.get(status, default)}"
