"""A Hub on the loopback interface for the real client: repositories in memory, pulls, pushes, tokens, and faults on demand.

with LoopbackHub() as hub:
    commit = hub.add("org/name", {"config.json": b"{}"})
    hub.faults.append(Fault("status", "config", status=503))
    subprocess.run([...], env=hub.environment(tmp_path / "hf"))
    assert hub.downloads("config.json") == 1
"""

from __future__ import annotations

import os
import re
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

from .api import Api, Call, Repository
from .faults import CUT_KINDS, REFUSAL_KINDS, Fault, Reply

PIECES = 8


class Request(NamedTuple):
    """A line of the log: ``path`` as it was sent, without its query; ``sent`` bytes of the body; ``complete`` if that was all."""

    method: str
    path: str
    status: int
    sent: int
    complete: bool


class LoopbackHub(Api):
    """The server, a context manager; what the handlers raised is raised when it ends.

    Attributes:
        endpoint: for ``HF_ENDPOINT``.
        faults: the first that matches a request spoils its reply.
    """

    def __init__(self, *, token: str | None = None, read_token: str | None = None, lfs: bool = False) -> None:
        super().__init__(token=token, read_token=read_token, lfs=lfs)
        self.faults: list[Fault] = []
        self.problems: list[BaseException] = []
        self._log: list[Request] = []
        self._unlogged = 0
        self._changed = threading.Condition(threading.RLock())
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()
        if self.problems and kind is None:
            raise self.problems[0]

    def add(
        self, name: str, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False, token: str | None = None
    ) -> str:
        """Make a repository with one commit, whose id is returned; ``token`` replaces the hub's for it."""
        with self._changed:
            self.repositories[name] = Repository(name, private, gated, token)
            return self.repositories[name].commit(files)

    def commit(self, name: str, files: Mapping[str, bytes], revision: str = "main", *, delete: Collection[str] = ()) -> str:
        """Add and delete files on a branch or on ``refs/pr/N``, which starts at main if it is new; returns the commit."""
        with self._changed:
            return self.repositories[name].commit(files, revision, delete=delete)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        with self._changed:
            repository = self.repositories[name]
            return dict(repository.commits[repository.resolve(revision)])

    @property
    def requests(self) -> list[Request]:
        """The log; waits a while for what is being answered, but not for clients that a fault keeps waiting."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unlogged, timeout=5)
            return list(self._log)

    def reset_log(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._unlogged, timeout=5)
            self._log.clear()

    def downloads(self, path: str) -> int:
        """How often the reply to a GET of this file was sent whole, be it a file or a range."""
        tail = re.compile(f"/resolve/[^/]+/{re.escape(path)}$")
        return sum(
            one.method == "GET" and one.status in (200, 206) and one.complete and tail.search(one.path) is not None
            for one in self.requests
        )

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """The variables of a process whose client is to use this hub."""
        return environment(self.endpoint, home, **extra)

    def close(self) -> None:
        """Stop answering and let all clients go, as if the machine had gone."""
        self._server.stop()

    def begin(self) -> None:
        with self._changed:
            self._unlogged += 1

    def reply(self, call: Call) -> tuple[Reply, Fault | None]:
        """The reply to a request, spoiled by the first fault that matches; what a fault refuses is not done either."""
        with self._changed:
            fault = next((one for one in self.faults if one.matches(call.method, call.path)), None)
            if fault is None:
                return self.answer(call), None
            fault.fired += 1
            return fault.spoil(Reply() if fault.kind in REFUSAL_KINDS else self.answer(call)), fault

    def log(self, request: Request) -> None:
        with self._changed:
            self._log.append(request)
            self._unlogged -= 1
            self._changed.notify_all()


def environment(endpoint: str, home: Path, **extra: str) -> dict[str, str]:
    """The variables of a process whose client is to use ``endpoint`` and keep all it stores in ``home``."""
    foreign = re.compile("(HF|HUGGINGFACE|HUGGING_FACE)_.*|TRANSFORMERS_OFFLINE|.*_proxy", re.IGNORECASE)
    return {
        **{name: value for name, value in os.environ.items() if not foreign.fullmatch(name)},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 512

    def __init__(self, hub: LoopbackHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()
        self.running = False

    def start(self) -> None:
        self.running = True
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """End the connections, those of waiting clients too, and wait a while for their threads."""
        if self.running:
            self.running = False
            self.shutdown()
        self.server_close()
        until = time.monotonic() + 2
        while self.connections and time.monotonic() < until:
            for one in list(self.connections):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            time.sleep(0.002)

    def handle_error(self, request: Any, client_address: Any) -> None:
        problem = sys.exception()
        if problem is not None and not isinstance(problem, ConnectionError):
            self.hub.problems.append(problem)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        self.server.connections.add(self.request)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.server.connections.discard(self.request)

    def log_message(self, *_: object) -> None:
        pass

    def serve(self) -> None:
        hub, target = self.server.hub, urlsplit(self.path)
        status, sent, complete, kind = 0, 0, False, ""
        hub.begin()
        try:
            reply, fault = hub.reply(Call(self.command, target.path, parse_qs(target.query), self.headers, self._body()))
            status, kind = reply.status, fault.kind if fault else ""
            body = b"" if self.command == "HEAD" else reply.body
            if kind not in CUT_KINDS or body:
                self.wfile.write(_head(reply))
            for piece in _pieces(body, kind):
                self.wfile.write(piece)
                sent += len(piece)
                time.sleep(fault.pause if fault and kind == "slow" else 0)
            complete = kind not in CUT_KINDS
        except ConnectionError:
            self.close_connection = True
        finally:
            hub.log(Request(self.command, target.path, status, sent, complete))
        if kind in CUT_KINDS:
            self._cut(kind)

    def do_GET(self) -> None:
        self.serve()

    def do_HEAD(self) -> None:
        self.serve()

    def do_POST(self) -> None:
        self.serve()

    def do_PUT(self) -> None:
        self.serve()

    def _body(self) -> bytes:
        size = int(self.headers.get("Content-Length", "0"))
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionResetError("the client left in the middle of its request")
        return content

    def _cut(self, kind: str) -> None:
        """End the connection, or let the client end it."""
        self.close_connection = True
        with suppress(OSError):
            while kind == "stall" and self.connection.recv(65536):
                pass
            if kind == "reset":
                time.sleep(0.02)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.connection.close()


def _head(reply: Reply) -> bytes:
    headers = {**reply.headers, "Content-Length": str(len(reply.body))}
    lines = [
        f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def _pieces(body: bytes, kind: str) -> list[bytes]:
    """What is sent of the body: half of it before a cut, pieces if it is slow."""
    if kind in CUT_KINDS:
        body = body[: len(body) // 2]
    size = -(-len(body) // PIECES) if kind == "slow" else len(body)
    return [body[start : start + size] for start in range(0, len(body), size or 1)]
