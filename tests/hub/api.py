"""What a Hub answers: repositories in memory behind the paths that the real client asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any, Concatenate
from urllib.parse import parse_qs, unquote

from .faults import Reply, answer, refuse

DATE = "2026-01-31T00:00:00.000Z"
OWNER = "tester"


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        super().__init__(message)
        self.reply = refuse(status, code, message, **headers)


def is_lfs(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".gz")) or size > 10_000


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(content: bytes) -> bytes:
    """What git keeps in the place of an LFS file."""
    digest = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()


def content_id(path: str, content: bytes) -> str:
    """The ETag: sha256 of an LFS file, git's sha1 of any other."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else git_id(content)


@dataclass
class Repository:
    """Commits are dictionaries of files; ``refs`` holds ``main`` and ``refs/pr/N``; ``token`` replaces the hub's if it is set."""

    id: str
    private: bool = False
    gated: bool = False
    token: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str = "main") -> str:
        """The commit of a commit, a branch or a pull request."""
        commit = self.refs.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def commit(
        self, files: Mapping[str, bytes], revision: str = "main", *, delete: Collection[str] = (), base: str | None = None
    ) -> str:
        """Add and delete files on ``revision``; a new one starts at commit ``base``, else at main. The id depends on content."""
        parent = self.refs.get(revision) or base or self.refs.get("main", "")
        kept = {path: content for path, content in self.commits.get(parent, {}).items() if path not in delete}
        tree = dict(sorted({**kept, **files}.items()))
        described = "".join(f"{path} {hashlib.sha256(content).hexdigest()}\n" for path, content in tree.items())
        commit = hashlib.sha1(f"{parent}\n{described}".encode()).hexdigest()
        self.commits[commit] = tree
        self.refs[revision] = commit
        return commit

    def pull_requests(self) -> list[str]:
        return [name for name in self.refs if name.startswith("refs/pr/")]


@dataclass
class Call:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes

    @property
    def bearer(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def asks(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("1", "true")


class Api:
    """Repositories and the replies about them; ``endpoint`` is what links start with.

    Attributes:
        token: needed to push, if any; ``read_token`` may read private and gated repositories as well, but not push.
        lfs: take ``.safetensors``, ``.gz`` and large files by LFS instead of inside the commit.
    """

    def __init__(self, *, token: str | None = None, read_token: str | None = None, lfs: bool = False) -> None:
        self.token, self.read_token, self.lfs = token, read_token, lfs
        self.endpoint = ""
        self.repositories: dict[str, Repository] = {}
        self._uploads: dict[str, bytes] = {}

    def answer(self, call: Call) -> Reply:
        try:
            return self._route(call)
        except Refusal as refusal:
            return refusal.reply

    def _route(self, call: Call) -> Reply:
        for methods, pattern, function in ROUTES:
            if call.method in methods and (match := re.fullmatch(pattern, call.path)):
                return function(self, call, **{name: unquote(value or "") for name, value in match.groupdict().items()})
        raise Refusal(404, message="Sorry, we can't find the page you are looking for.")

    def _readers(self, repository: Repository) -> set[str | None]:
        return {repository.token} if repository.token else {self.token, self.read_token} - {None}

    def _repository(self, call: Call, name: str, *, write: bool = False) -> Repository:
        repository = self.repositories.get(name)
        if repository is None:
            raise Refusal(404 if call.bearer else 401, "RepoNotFound", "Repository not found")
        if repository.private and call.bearer not in self._readers(repository):
            raise Refusal(401, "RepoNotFound", "Repository not found")
        if write:
            self._may_write(call, repository)
        return repository

    def _may_write(self, call: Call, repository: Repository | None = None) -> None:
        needed = (repository.token if repository else None) or self.token
        if needed and call.bearer != needed:
            if call.bearer and call.bearer == self.read_token:
                raise Refusal(403, message="You don't have the rights to write with this token.")
            raise Refusal(401, message="Invalid username or password.")

    def _file(self, call: Call, name: str, revision: str, path: str) -> Reply:
        repository = self._repository(call, name)
        if repository.gated and call.bearer not in self._readers(repository):
            raise Refusal(403, "GatedRepo", f"Access to model {name} is restricted.")
        commit = repository.resolve(revision)
        content = repository.commits[commit].get(path)
        if content is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        etag = f'"{content_id(path, content)}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if is_lfs(path, len(content)):
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content))}
        return _ranged(content, headers, call.headers.get("Range", ""))

    def _info(self, call: Call, name: str, revision: str = "main") -> Reply:
        repository = self._repository(call, name)
        commit = repository.resolve(revision)
        tree = repository.commits[commit]
        names = [_sibling(path, content) if call.asks("blobs") else {"rfilename": path} for path, content in tree.items()]
        gated = "manual" if repository.gated else False
        value = {"id": name, "sha": commit, "private": repository.private, "gated": gated, "disabled": False, "siblings": names}
        return answer({**value, "author": name.split("/")[0], "lastModified": DATE, "createdAt": DATE, "tags": []})

    def _tree(self, call: Call, name: str, revision: str, path: str) -> Reply:
        repository = self._repository(call, name)
        tree = repository.commits[repository.resolve(revision)]
        within = f"{path}/" if path else ""
        below = {one: content for one, content in tree.items() if one.startswith(within)}
        if path and not below:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        folders = {one[: slash.start()] for one in below for slash in re.finditer("/", one) if slash.start() >= len(within)}
        entries = [_folder(one, tree) for one in sorted(folders)] + [_entry(*one) for one in below.items()]
        if not call.asks("recursive"):
            entries = [one for one in entries if "/" not in one["path"][len(within) :]]
        return answer(entries)

    def _paths(self, call: Call, name: str, revision: str) -> Reply:
        repository = self._repository(call, name)
        tree = repository.commits[repository.resolve(revision)]
        json_body = call.headers.get("Content-Type", "").startswith("application/json")
        asked = json.loads(call.body)["paths"] if json_body else parse_qs(call.body.decode()).get("paths", [])
        folders = [path for path in asked if any(one.startswith(f"{path}/") for one in tree)]
        return answer([_folder(path, tree) for path in folders] + [_entry(path, tree[path]) for path in asked if path in tree])

    def _refs(self, call: Call, name: str) -> Reply:
        repository = self._repository(call, name)
        requests = repository.pull_requests() if call.asks("include_prs") else []

        def described(name: str, ref: str) -> dict[str, str]:
            return {"name": name, "ref": ref, "targetCommit": repository.refs[name]}

        branches = [described(one, f"refs/heads/{one}") for one in repository.refs if not one.startswith("refs/")]
        return answer(
            {"branches": branches, "converts": [], "tags": [], "pullRequests": [described(one, one) for one in requests]}
        )

    def _discussions(self, call: Call, name: str) -> Reply:
        shared = {"author": {"name": OWNER}, "createdAt": DATE, "status": "draft", "isPullRequest": True}
        requests = self._repository(call, name).pull_requests()
        found = [
            {**shared, "num": int(one.split("/")[-1]), "title": one, "repo": {"name": name, "type": "model"}} for one in requests
        ]
        return answer({"discussions": found, "count": len(found), "start": 0})

    def _whoami(self, call: Call) -> Reply:
        if self.token and call.bearer not in (self.token, self.read_token):
            raise Refusal(401, message="Invalid username or password.")
        role = "read" if call.bearer == self.read_token else "write"
        auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": role}}
        return answer({"type": "user", "name": OWNER, "fullname": OWNER, "orgs": [], "auth": auth})

    def _create(self, call: Call) -> Reply:
        self._may_write(call)
        asked = json.loads(call.body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = f"{self.endpoint}/{name}"
        if name in self.repositories:
            return answer({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("private", False) or asked.get("visibility") == "private"
        repository = self.repositories[name] = Repository(name, private=private)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return answer({"url": url, "name": name, "id": name})

    def _yaml(self, call: Call) -> Reply:
        return answer({"errors": [], "warnings": []})

    def _preupload(self, call: Call, name: str, revision: str) -> Reply:
        repository = self._repository(call, name, write=True)
        tree = repository.commits[repository.resolve(revision)]
        modes = []
        for file in json.loads(call.body)["files"]:
            path = file["path"]
            mode = "lfs" if self.lfs and is_lfs(path, file["size"]) else "regular"
            known = None
            if path in tree:
                known = hashlib.sha256(tree[path]).hexdigest() if mode == "lfs" else git_id(tree[path])
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return answer({"files": modes})

    def _batch(self, call: Call, name: str) -> Reply:
        self._repository(call, name, write=True)
        objects = []
        for one in json.loads(call.body)["objects"]:
            links = {"upload": f"/lfs/{one['oid']}", "verify": f"/{name}.git/info/lfs/verify"}
            actions = {action: {"href": self.endpoint + link} for action, link in links.items()}
            objects.append({**one, **({} if one["oid"] in self._uploads else {"actions": actions})})
        return answer({"transfer": "basic", "objects": objects})

    def _upload(self, call: Call, digest: str) -> Reply:
        if hashlib.sha256(call.body).hexdigest() != digest:
            raise Refusal(400, message="the content is not what its oid says")
        self._uploads[digest] = call.body
        return Reply()

    def _verify(self, call: Call, name: str) -> Reply:
        self._repository(call, name, write=True)
        asked = json.loads(call.body)
        if len(self._uploads.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, message="no such object")
        return answer({})

    def _commit(self, call: Call, name: str, revision: str) -> Reply:
        repository = self._repository(call, name, write=True)
        base = repository.resolve(revision)
        tree = repository.commits[base]
        added: dict[str, bytes] = {}
        deleted: set[str] = set()
        for line in call.body.splitlines():
            key, value = (part := json.loads(line))["key"], part["value"]
            if key == "header" and value.get("parentCommit", base) != base:
                raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
            if key == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            if key == "lfsFile":
                if value["oid"] not in self._uploads:
                    raise Refusal(400, message=f"LFS pointer pointed to a file that does not exist: {value['path']}")
                added[value["path"]] = self._uploads[value["oid"]]
            if key == "deletedFile" and value["path"] not in tree:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
            if key.startswith("deleted"):
                inside = value["path"].rstrip("/") + "/"
                deleted |= {path for path in tree if path == value["path"] or path.startswith(inside)}
        number = len(repository.pull_requests()) + 1
        ref = f"refs/pr/{number}" if call.asks("create_pr") else revision
        commit = repository.commit(added, ref, delete=deleted, base=base)
        request = {"pullRequestUrl": f"{self.endpoint}/{name}/discussions/{number}"} if call.asks("create_pr") else {}
        return answer({"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{name}/commit/{commit}", **request})


def _ranged(content: bytes, headers: dict[str, str], asked: str) -> Reply:
    """The file, or the part of it that a Range header with one range asks for."""
    if not (match := re.fullmatch(r"bytes=(\d*)-(\d*)", asked)) or asked == "bytes=-":
        return Reply(200, content, headers)
    first, last = match.groups()
    size = len(content)
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= stop:
        raise Refusal(416, message="Range Not Satisfiable", Content_Range=f"bytes */{size}")
    return Reply(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def _entry(path: str, content: bytes) -> dict[str, Any]:
    size = len(content)
    if not is_lfs(path, size):
        return {"type": "file", "path": path, "size": size, "oid": git_id(content)}
    lfs = {"oid": content_id(path, content), "size": size, "pointerSize": len(pointer(content))}
    return {"type": "file", "path": path, "size": size, "oid": git_id(pointer(content)), "lfs": lfs}


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    entry = _entry(path, content)
    lfs = {"lfs": {"sha256": entry["lfs"].pop("oid"), **entry["lfs"]}} if "lfs" in entry else {}
    return {"rfilename": path, "size": entry["size"], "blobId": entry["oid"], **lfs}


def _folder(path: str, tree: Mapping[str, bytes]) -> dict[str, Any]:
    inside = "".join(f"{one} {git_id(content)}\n" for one, content in tree.items() if one.startswith(f"{path}/"))
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(inside.encode()).hexdigest()}


NAME = r"(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
MODEL = f"/api/models/{NAME}"
ROUTES: list[tuple[tuple[str, ...], str, Callable[Concatenate[Api, Call, ...], Reply]]] = [
    (("GET", "HEAD"), f"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Api._file),
    (("GET",), MODEL, Api._info),
    (("GET",), f"{MODEL}/revision/{REVISION}", Api._info),
    (("GET",), f"{MODEL}/tree/{REVISION}(?:/(?P<path>.+))?", Api._tree),
    (("POST",), f"{MODEL}/paths-info/{REVISION}", Api._paths),
    (("GET",), f"{MODEL}/refs", Api._refs),
    (("GET",), f"{MODEL}/discussions", Api._discussions),
    (("GET",), "/api/whoami-v2", Api._whoami),
    (("POST",), "/api/repos/create", Api._create),
    (("POST",), "/api/validate-yaml", Api._yaml),
    (("POST",), f"{MODEL}/preupload/{REVISION}", Api._preupload),
    (("POST",), f"{MODEL}/commit/{REVISION}", Api._commit),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Api._batch),
    (("POST",), rf"/{NAME}\.git/info/lfs/verify", Api._verify),
    (("PUT",), "/lfs/(?P<digest>[0-9a-f]{64})", Api._upload),
]
