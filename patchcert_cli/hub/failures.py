"""Limits for the Hub's client, and its exceptions as errors of this package.

Within :func:`translate_errors` every request has a timeout, and the client is silent. Afterwards its log level, progress bars and
HTTP client are what they were before.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from patchcert_cli.errors import HubError, IntegrityError, MachineError, PatchcertError, first_line
from patchcert_cli.storage import hub_cache

UPLOAD_TIMEOUT = 120.0  # seconds for a request that sends something
NO_ROOM = {errno.ENOSPC: "full", errno.EDQUOT: "over its quota", errno.EFBIG: "full", errno.EROFS: "read-only"}
NO_ROOM |= {errno.EACCES: "not writable", errno.EPERM: "not writable"}


@contextmanager
def translate_errors(repo: str) -> Iterator[None]:
    """Run requests about ``repo`` with timeouts and in silence, and turn exceptions of the client into errors of this package."""
    from huggingface_hub import constants

    with ExitStack() as stack:
        for limits in (_timeouts(), _silence()):
            stack.enter_context(limits)
        try:
            yield
        except PatchcertError:
            raise
        except Exception as problem:  # with an unknown server the client can raise anything
            if isinstance(problem, OSError) and problem.errno in NO_ROOM:
                raise MachineError(
                    f"the Hub's cache '{hub_cache.folder()}' is {NO_ROOM[problem.errno]}: {problem.strerror}.",
                    hint="Free some space, or put it elsewhere with HF_HOME.",
                ) from problem
            if isinstance(problem, OSError) and str(problem).startswith("Consistency check failed"):
                message = f"the Hub sent a file of {repo} whose size is not the one that it lists; not kept."
                raise IntegrityError(message, hint="Type the command again.") from problem
            raise HubError(
                f"{reason(problem, repo)} ({constants.ENDPOINT}).",
                hint=_advice(problem, repo),
            ) from problem


@contextmanager
def _silence() -> Iterator[None]:
    """No log messages below errors, unless PATCHCERT_DEBUG is set; no progress bars where stderr is not a terminal."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    if not os.environ.get("PATCHCERT_DEBUG"):
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


class _Factory:
    """Which function makes the HTTP client of this process, and how many blocks need one with timeouts."""

    lock = threading.Lock()
    users = 0
    former: Callable[[], Any]


@contextmanager
def _timeouts() -> Iterator[None]:
    """A timeout for every request: the client itself lists a repository without one, and waits as long as a server asks it to."""
    from huggingface_hub import set_client_factory

    with _Factory.lock:
        if _Factory.users == 0:
            _Factory.former = _client_factory()
            set_client_factory(_limited(_Factory.former))
        _Factory.users += 1
    try:
        yield
    finally:
        with _Factory.lock:
            _Factory.users -= 1
            if _Factory.users == 0:
                set_client_factory(_Factory.former)


def _client_factory() -> Callable[[], Any]:
    """What makes the HTTP client now; the client has a public function to set it, but none to read it."""
    from huggingface_hub.utils import _http

    return getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)


def _limited(factory: Callable[[], Any]) -> Callable[[], Any]:
    """A factory of the same clients with timeouts."""
    from huggingface_hub import constants

    def limit(request: Any) -> None:
        longest = constants.HF_HUB_DOWNLOAD_TIMEOUT if request.method in ("GET", "HEAD") else UPLOAD_TIMEOUT
        given = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            kind: min(given.get(kind) or longest, longest) for kind in ("connect", "read", "write", "pool")
        }

    def ignore_retry_after(response: Any) -> None:
        for name in ("Retry-After", "RateLimit"):
            response.headers.pop(name, None)

    def client() -> Any:
        made = factory()
        hooks = made.event_hooks
        made.event_hooks = {
            "request": [*hooks.get("request", ()), limit],
            "response": [*hooks.get("response", ()), ignore_retry_after],
        }
        return made

    return client


def reason(problem: BaseException, repo: str) -> str:
    """Why a request to the Hub failed, as the end of a sentence."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or httpx2, whichever the client uses

    if isinstance(problem, errors.GatedRepoError):  # a subclass of RepositoryNotFoundError: tested first
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
        return f"'{repo}' is not a valid repository name"
    if isinstance(problem, httpx.TimeoutException):
        return "the Hub did not answer in time"
    if isinstance(problem, httpx.ConnectError):
        return "the Hub is out of reach"
    if isinstance(problem, errors.FileMetadataError):
        return "the server is not a Hub"
    if isinstance(problem, httpx.HTTPError):
        return f"the connection broke off while fetching {repo}"
    deeper = problem.__cause__ or problem.__context__
    if deeper is not None and not isinstance(problem, ValueError):
        return reason(deeper, repo)
    if isinstance(problem, ValueError):
        return "the server is not a Hub"
    message, kind = first_line(problem), type(problem).__name__
    return f"fetching {repo} failed: {kind}{'' if message == kind else ': ' + message}"


def _advice(problem: BaseException, repo: str) -> str:
    """What to do next."""
    from huggingface_hub import constants, errors

    if isinstance(problem, errors.HfHubHTTPError | errors.HFValidationError):  # the Hub was reached, or the name is wrong
        return f"Look at {constants.ENDPOINT}/{repo}."
    return "Check the network, then type the command again: what was fetched is kept."


def _refusal(repo: str, status: int) -> str:
    why = {
        401: "log in with hf auth login, or set HF_TOKEN",
        403: "your token does not allow it",
        404: "it is not there",
        429: "too many requests; try again later",
    }
    default = "Hub server error; try again later" if status >= 500 else "no reason given"
    return f"the Hub refused {repo} with status {status}: {why.get(status, default)}"
