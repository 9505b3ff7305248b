"""What may go wrong between a Hub and its client: replies spoiled on purpose, repeatably, and endpoints that never answer."""

from __future__ import annotations

import atexit
import hashlib
import json
import random
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

TARGETS = {
    "api": r"^/api/",
    "card": r"/resolve/.*README\.md$",
    "config": r"/resolve/.*config\.json$",
    "weights": r"/resolve/.*\.safetensors$",
    "records": r"/resolve/.*\.gz$",
}
HEADER_KINDS = ("wrong_etag", "no_commit_header")
BODY_KINDS = ("wrong_bytes", "slow")
CUT_KINDS = ("truncated", "stall", "reset")
REFUSAL_KINDS = ("status", "html")
KINDS = (*HEADER_KINDS, *BODY_KINDS, *CUT_KINDS, *REFUSAL_KINDS, "wrong_size")
STATUSES = (
    (401, ""),
    (401, "RepoNotFound"),
    (403, ""),
    (403, "GatedRepo"),
    (404, ""),
    (404, "RepoNotFound"),
    (404, "RevisionNotFound"),
    (404, "EntryNotFound"),
    (429, ""),
    (500, ""),
    (503, ""),
)
LOGIN_PAGE = b"<!DOCTYPE html><html><body><h1>Welcome to the guest network</h1><form>Password: <input></form></body></html>\n"


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def answer(value: object, status: int = 200, **headers: str) -> Reply:
    """A JSON reply; ``X_Error_Code="..."`` sets the header X-Error-Code."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **named})


def refuse(status: int, code: str = "", message: str = "", **headers: str) -> Reply:
    """An error as the Hub words it: a status, ``X-Error-Code`` and ``X-Error-Message``."""
    message = message or f"{code or 'refused'} ({status})"
    named = {"X_Error_Code": code} if code else {}
    return answer({"error": message}, status, X_Error_Message=message, **named, **headers)


@dataclass
class Fault:
    """Spoils the replies to the requests that it matches.

    Attributes:
        kind: one of ``KINDS``. After half of the announced body, ``truncated`` closes the connection, ``reset`` resets it and
            ``stall`` waits until the client gives up; HEAD requests and empty bodies get no answer at all from these three.
            ``wrong_bytes`` keeps the size, ``wrong_size`` adds a byte, ``slow`` sends all of it in pieces.
        target: a name in ``TARGETS`` or a pattern that is searched for in the path without its query; all paths by default.
        method: the HTTP method, ``*`` for any; by default HEAD for faults in headers and GET for the others.
        times: how often it fires, None for ever.
        status: of ``status``, with ``code`` as X-Error-Code and further ``headers``, such as Retry-After.
        pause: seconds between the pieces of ``slow``.
        fired: how often it has fired.
    """

    kind: str
    target: str = ""
    method: str = ""
    times: int | None = 1
    status: int = 500
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    pause: float = 0.02
    fired: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no fault '{self.kind}'; there are {', '.join(KINDS)}")
        self.method = self.method or ("HEAD" if self.kind in HEADER_KINDS else "GET")

    def matches(self, method: str, path: str) -> bool:
        if self.times is not None and self.fired >= self.times:
            return False
        return self.method in ("*", method) and re.search(TARGETS.get(self.target, self.target), path) is not None

    def spoil(self, reply: Reply) -> Reply:
        """The reply with other content; faults of the connection leave it as it is."""
        headers, body = dict(reply.headers), reply.body
        if self.kind == "status":
            return refuse(self.status, self.code, **self.headers)
        if self.kind == "html":
            return Reply(200, LOGIN_PAGE, {"Content-Type": "text/html; charset=utf-8"})
        if self.kind == "wrong_bytes":
            return Reply(reply.status, flipped(body), headers)
        if self.kind == "wrong_size":
            headers |= {name: str(int(headers[name]) + 1) for name in ("X-Linked-Size",) if name in headers}
            return Reply(reply.status, body + b"\n", headers)
        if self.kind == "wrong_etag":
            headers |= {name: other(headers[name]) for name in ("ETag", "X-Linked-ETag") if name in headers}
        if self.kind == "no_commit_header":
            headers.pop("X-Repo-Commit", None)
        return Reply(reply.status, body, headers)


def flipped(body: bytes) -> bytes:
    """As many bytes, up to three of them changed, the last one included."""
    changed = bytearray(body)
    for at in {len(body) // 3, len(body) // 2, len(body) - 1} if body else ():
        changed[at] ^= 1
    return bytes(changed)


def other(etag: str) -> str:
    """Another ETag of the same form."""
    plain = etag.strip('"')
    return f'"{hashlib.sha256(plain.encode()).hexdigest()[: len(plain)]}"'


def random_fault(seed: int, *, kinds: Sequence[str] = KINDS, targets: Sequence[str] = tuple(TARGETS)) -> Fault | None:
    """The fault of a seed, none in one of ten. Some fire for ever: those of ``api`` may keep a client waiting as long."""
    draw = random.Random(seed)
    pairs = [(kind, target) for kind in kinds for target in targets if target != "api" or kind not in HEADER_KINDS]
    if draw.random() < 0.1:
        return None
    kind, target = draw.choice(pairs)
    status, code = draw.choice(STATUSES)
    method = draw.choice(("GET", "HEAD"))
    times = draw.choice((1, 1, 2, None))
    if kind in HEADER_KINDS + BODY_KINDS or target == "api":
        method = ""
    return Fault(kind, target, method, times, status, code)


@cache
def _closed_port() -> int:
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    atexit.register(closed.close)
    return int(closed.getsockname()[1])


def refused_endpoint() -> str:
    """An endpoint whose port is taken by a socket that never listens: connections are refused at once."""
    return f"http://127.0.0.1:{_closed_port()}"


def dead_name() -> str:
    """An endpoint whose name resolves nowhere (RFC 2606)."""
    return "http://hub.invalid"


@contextmanager
def silent_endpoint() -> Iterator[str]:
    """An endpoint that takes connections and requests, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
