"""The loopback hub as the real client sees it, unmocked: what it pulls and pushes, and what it makes of each fault."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import CommitOperationDelete, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import close_session, httpx  # type: ignore[attr-defined]  # httpx or httpx2, whichever the client uses

from .faults import KINDS, TARGETS, Fault, random_fault, refused_endpoint, silent_endpoint
from .loopback import LoopbackHub, environment

NAME = "org/small"
WEIGHTS = bytes(range(256)) * 1200
FILES = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# small\n",
    "config.json": b'{"a": 1}',
    "model.safetensors": WEIGHTS,
    "records/p2.jsonl.gz": b"\x1f\x8b" + b"0123" * 500,
}


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo ``HF_HUB_OFFLINE`` for the client of this process, which has read its variables long ago."""
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DOWNLOAD_TIMEOUT": 10}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    yield
    close_session()


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.add(NAME, FILES)
        yield running


def pull(hub: LoopbackHub, revision: str, cache: Path, *, token: str | bool = False, force: bool = False) -> dict[str, bytes]:
    folder = Path(
        snapshot_download(
            NAME,
            revision=revision,
            endpoint=hub.endpoint,
            cache_dir=cache,
            token=token,
            max_workers=1,
            etag_timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            force_download=force,
        )
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_commit_is_pulled_once(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.repositories[NAME].resolve()
    assert pull(hub, commit, tmp_path) == FILES
    assert [hub.downloads(path) for path in FILES] == [1] * len(FILES)
    asked = [(one.method, one.path, one.status) for one in hub.requests]
    assert asked[0] == ("GET", f"/api/models/{NAME}/tree/{commit}", 200)
    assert asked[1:3] == [(method, f"/{NAME}/resolve/{commit}/README.md", 200) for method in ("HEAD", "GET")]
    assert len(asked) == 1 + 2 * len(FILES)
    hub.reset_log()
    assert pull(hub, commit, tmp_path) == FILES
    assert hub.requests == []


def test_a_branch_moves_and_its_commits_stay(hub: LoopbackHub, tmp_path: Path) -> None:
    first = hub.repositories[NAME].resolve()
    assert pull(hub, "main", tmp_path) == FILES
    second = hub.commit(NAME, {"config.json": b'{"a": 2}'}, delete=["README.md"])
    request = hub.commit(NAME, {"config.json": b'{"a": 3}'}, "refs/pr/1")
    assert len({first, second, request}) == 3
    changed = {path: content for path, content in FILES.items() if path != "README.md"} | {"config.json": b'{"a": 2}'}
    assert hub.files(NAME) == changed
    assert hub.files(NAME, "refs/pr/1") == changed | {"config.json": b'{"a": 3}'}
    for revision in (first, "main", second, "refs/pr/1"):
        assert pull(hub, revision, tmp_path) == hub.files(NAME, revision)
    hub.reset_log()
    pull(hub, "main", tmp_path)
    assert [one.path for one in hub.requests] == [f"/api/models/{NAME}/revision/main"]
    again = LoopbackHub()
    assert again.add(NAME, FILES) == first
    again.close()


def test_what_the_api_tells_about_files(hub: LoopbackHub) -> None:
    api = HfApi(endpoint=hub.endpoint, token=False)
    info = api.model_info(NAME, files_metadata=True)
    assert (info.id, info.sha, info.private, info.gated) == (NAME, hub.repositories[NAME].resolve(), False, False)
    found = {one.rfilename: one for one in info.siblings or []}
    assert {path: one.size for path, one in found.items()} == {path: len(content) for path, content in FILES.items()}
    assert {path for path, one in found.items() if one.lfs} == {"model.safetensors", "records/p2.jsonl.gz"}
    assert {one.path for one in api.list_repo_tree(NAME)} == {"README.md", "config.json", "model.safetensors", "records"}
    assert [one.path for one in api.list_repo_tree(NAME, "records")] == ["records/p2.jsonl.gz"]
    assert [one.path for one in api.get_paths_info(NAME, ["records", "config.json", "absent"])] == ["records", "config.json"]
    hub.commit(NAME, {"config.json": b"{}"}, "refs/pr/1")
    refs = api.list_repo_refs(NAME, include_pull_requests=True)
    assert [one.name for one in [*refs.branches, *(refs.pull_requests or [])]] == ["main", "refs/pr/1"]
    assert [one.git_reference for one in api.get_repo_discussions(NAME)] == ["refs/pr/1"]


def get(hub: LoopbackHub, path: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    with closing(http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)) as connection:
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as answer:
            return answer.status, answer.read(), dict(answer.getheaders())


@pytest.mark.parametrize(
    ("asked", "status", "start", "stop"),
    [("5-9", 206, 5, 10), ("5-", 206, 5, 307200), ("-3", 206, 307197, 307200), ("307199-400000", 206, 307199, 307200)],
)
def test_ranges(hub: LoopbackHub, asked: str, status: int, start: int, stop: int) -> None:
    got = get(hub, f"/{NAME}/resolve/main/model.safetensors", Range=f"bytes={asked}")
    assert got[:2] == (status, WEIGHTS[start:stop])
    assert got[2]["Content-Range"] == f"bytes {start}-{stop - 1}/{len(WEIGHTS)}"
    assert got[2]["X-Repo-Commit"] == hub.repositories[NAME].resolve()


def test_ranges_beyond_the_end_are_refused(hub: LoopbackHub) -> None:
    status, _, headers = get(hub, f"/{NAME}/resolve/main/model.safetensors", Range="bytes=307200-")
    assert (status, headers["Content-Range"]) == (416, "bytes */307200")


def test_the_client_continues_a_cut_file_with_a_range(hub: LoopbackHub, tmp_path: Path) -> None:
    large = bytes(range(251)) * 88_000
    commit = hub.commit(NAME, {"model.safetensors": large})
    hub.faults.append(Fault("truncated", "weights"))
    assert pull(hub, commit, tmp_path)["model.safetensors"] == large
    sent = [(one.status, one.sent, one.complete) for one in hub.requests if one.method == "GET" and "safetensors" in one.path]
    kept = constants.DOWNLOAD_CHUNK_SIZE
    assert sent == [(200, len(large) // 2, False), (206, len(large) - kept, True)]


def test_what_is_missing_is_the_clients_own_exception(hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(hub_errors.RepositoryNotFoundError):
        snapshot_download("org/absent", token=False, endpoint=hub.endpoint, cache_dir=tmp_path)
    for revision in ("0" * 40, "absent"):
        with pytest.raises(hub_errors.RevisionNotFoundError):
            pull(hub, revision, tmp_path)
    with pytest.raises(hub_errors.RemoteEntryNotFoundError):
        hf_hub_download(NAME, "absent.json", token=False, endpoint=hub.endpoint, cache_dir=tmp_path)


def test_gated_and_private_repositories_need_a_token(tmp_path: Path) -> None:
    with LoopbackHub(token="hf_write", read_token="hf_read") as hub:
        for gated, refusal in ((True, hub_errors.GatedRepoError), (False, hub_errors.RepositoryNotFoundError)):
            hub.add(NAME, FILES, gated=gated, private=not gated)
            for stranger in (False, "hf_other"):
                with pytest.raises(hub_errors.RepositoryNotFoundError) as caught:
                    pull(hub, "main", tmp_path / "refused", token=stranger)
                assert type(caught.value) is refusal
            for reader in ("hf_write", "hf_read"):
                assert pull(hub, "main", tmp_path / reader, token=reader) == FILES
        hub.add(NAME, FILES, private=True, token="hf_own")
        with pytest.raises(hub_errors.RepositoryNotFoundError):
            pull(hub, "main", tmp_path / "refused", token="hf_write")
        assert pull(hub, "main", tmp_path / "own", token="hf_own") == FILES


def test_same_size_and_other_bytes_pass_the_client(hub: LoopbackHub, tmp_path: Path) -> None:
    """Why patchcert hashes what it pulls."""
    commit = hub.repositories[NAME].resolve()
    hub.faults.append(Fault("wrong_bytes", "weights"))
    assert pull(hub, commit, tmp_path)["model.safetensors"] != WEIGHTS
    assert pull(hub, commit, tmp_path)["model.safetensors"] != WEIGHTS
    api = HfApi(endpoint=hub.endpoint, token=False)
    found = api.verify_repo_checksums(NAME, revision=commit, cache_dir=tmp_path)
    assert [one["path"] for one in found.mismatches] == ["model.safetensors"]
    assert pull(hub, commit, tmp_path, force=True) == FILES
    assert api.verify_repo_checksums(NAME, revision=commit, cache_dir=tmp_path).mismatches == []


def test_a_wrong_etag_misnames_the_blob(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.repositories[NAME].resolve()
    hub.faults.append(Fault("wrong_etag", "weights"))
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    for cache, named in ((tmp_path / "wrong", False), (tmp_path / "right", True)):
        assert pull(hub, commit, cache) == FILES
        assert (cache / "models--org--small" / "blobs" / digest).is_file() == named


@pytest.mark.parametrize(
    ("fault", "asked"),
    [
        (Fault("status", "weights", "HEAD", status=500), 2),  # asked again at once, then with growing pauses
        (Fault("status", "api", status=503), 2),
        (Fault("status", "weights", status=429), 2),
        (Fault("truncated", "weights"), 2),
        (Fault("truncated", "api"), 2),
        (Fault("stall", "weights"), 2),
        (Fault("stall", "weights", "HEAD"), 2),
        (Fault("slow", "weights", pause=0.001), 1),
    ],
    ids=lambda value: f"{value.kind}-{value.target}-{value.method}" if isinstance(value, Fault) else "",
)
def test_faults_that_the_client_overcomes(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, asked: int
) -> None:
    fault = replace(fault)
    hub.faults.append(fault)
    if fault.kind == "stall":
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    assert pull(hub, hub.repositories[NAME].resolve(), tmp_path) == FILES
    assert fault.fired == 1
    assert (
        sum(one.method == fault.method and Fault("slow", fault.target).matches("GET", one.path) for one in hub.requests) == asked
    )


@pytest.mark.parametrize(
    ("fault", "kind", "cause"),
    [
        (Fault("status", "weights", status=500), hub_errors.HfHubHTTPError, httpx.HTTPStatusError),
        (Fault("status", "weights", status=401), hub_errors.HfHubHTTPError, httpx.HTTPStatusError),
        (Fault("status", "weights", status=403), hub_errors.HfHubHTTPError, httpx.HTTPStatusError),
        (Fault("status", "api", status=403), hub_errors.LocalEntryNotFoundError, hub_errors.HfHubHTTPError),
        (Fault("status", "weights", status=403, code="GatedRepo"), hub_errors.GatedRepoError, httpx.HTTPStatusError),
        (
            Fault("status", "weights", status=404, code="EntryNotFound"),
            hub_errors.RemoteEntryNotFoundError,
            httpx.HTTPStatusError,
        ),
        (Fault("truncated", "weights", "HEAD"), httpx.RemoteProtocolError, Exception),
        (Fault("reset", "weights"), httpx.ReadError, Exception),
        (Fault("reset", "weights", "HEAD"), httpx.ReadError, Exception),
        (Fault("wrong_size", "weights"), OSError, None),
        (Fault("wrong_size", "weights", "HEAD"), OSError, None),
        (Fault("html", "weights"), OSError, None),
        (Fault("html", "weights", "HEAD"), hub_errors.LocalEntryNotFoundError, hub_errors.FileMetadataError),
        (Fault("html", "api"), json.JSONDecodeError, None),
        (Fault("wrong_bytes", "api"), json.JSONDecodeError, None),
        (Fault("no_commit_header", "weights"), hub_errors.LocalEntryNotFoundError, hub_errors.FileMetadataError),
    ],
    ids=lambda value: (
        f"{value.kind}-{value.target}-{value.method}-{value.status}{value.code}" if isinstance(value, Fault) else ""
    ),
)
def test_faults_that_end_a_pull(
    hub: LoopbackHub, tmp_path: Path, fault: Fault, kind: type[Exception], cause: type[Exception] | None
) -> None:
    hub.faults.append(replace(fault))
    commit = hub.repositories[NAME].resolve()
    with pytest.raises(kind) as caught:  # a second try would succeed: the fault passes
        pull(hub, commit, tmp_path)
    assert type(caught.value) is kind
    assert caught.value.__cause__ is None if cause is None else isinstance(caught.value.__cause__, cause)
    assert pull(hub, commit, tmp_path) == FILES


def upload(hub: LoopbackHub, folder: Path, files: dict[str, bytes], *, create_pr: bool = False) -> str:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    api = HfApi(endpoint=hub.endpoint, token="hf_write")
    done = api.upload_folder(repo_id=NAME, folder_path=folder, create_pr=create_pr)
    return f"{done.pr_revision or 'main'} {done.oid}"


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own way to upload by LFS
@pytest.mark.parametrize("lfs", [False, True])
def test_what_is_pushed_is_pulled_back(tmp_path: Path, lfs: bool) -> None:
    with LoopbackHub(token="hf_write", lfs=lfs) as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_write")
        assert api.create_repo(NAME).repo_id == NAME
        assert api.create_repo(NAME, exist_ok=True) == f"{hub.endpoint}/{NAME}"
        with pytest.raises(hub_errors.HfHubHTTPError, match="already created"):
            api.create_repo(NAME)
        made = hub.repositories[NAME].resolve()
        first = upload(hub, tmp_path / "run", FILES).split()[1]
        assert hub.repositories[NAME].resolve() == first
        assert sum(one.method == "PUT" for one in hub.requests) == (2 if lfs else 0)
        attributes = {".gitattributes": hub.files(NAME, made)[".gitattributes"]}
        assert pull(hub, first, tmp_path / "hf") == FILES | attributes
        assert api.verify_repo_checksums(NAME, revision=first, cache_dir=tmp_path / "hf").mismatches == []
        assert upload(hub, tmp_path / "run", FILES) == f"main {first}"
        ref, proposed = upload(hub, tmp_path / "run", {"config.json": b"{}"}, create_pr=True).split()
        assert ref == "refs/pr/1"
        assert hub.repositories[NAME].resolve() == first
        assert pull(hub, ref, tmp_path / "hf") == hub.files(NAME, proposed) == FILES | attributes | {"config.json": b"{}"}
        gone = [CommitOperationDelete("records/"), CommitOperationDelete("README.md")]
        last = api.create_commit(NAME, gone, commit_message="less", parent_commit=first)
        assert set(hub.files(NAME, last.oid)) == {".gitattributes", "config.json", "model.safetensors"}
        with pytest.raises(hub_errors.HfHubHTTPError, match="A commit has happened since"):
            api.create_commit(NAME, [CommitOperationDelete("config.json")], commit_message="late", parent_commit=first)


def test_only_the_write_token_may_push(tmp_path: Path) -> None:
    with LoopbackHub(token="hf_write", read_token="hf_read") as hub:
        commit = hub.add(NAME, FILES)
        (tmp_path / "config.json").write_bytes(b"{}")
        for token, status in ((False, 401), ("hf_other", 401), ("hf_read", 403)):
            api = HfApi(endpoint=hub.endpoint, token=token)
            with pytest.raises(hub_errors.HfHubHTTPError) as created:
                api.create_repo("org/other")
            with pytest.raises(hub_errors.HfHubHTTPError) as pushed:
                api.upload_folder(repo_id=NAME, folder_path=tmp_path)
            assert created.value.response.status_code == pushed.value.response.status_code == status
        assert (list(hub.repositories), hub.repositories[NAME].refs) == ([NAME], {"main": commit})
        assert HfApi(endpoint=hub.endpoint, token="hf_read").whoami()["auth"]["accessToken"]["role"] == "read"
        with pytest.raises(hub_errors.HfHubHTTPError, match="Invalid user token"):
            HfApi(endpoint=hub.endpoint, token="hf_other").whoami()


def test_a_refused_commit_is_none_and_a_lost_answer_is_one(hub: LoopbackHub, tmp_path: Path) -> None:
    before = hub.repositories[NAME].resolve()
    hub.faults.append(Fault("status", "/commit/", "POST", status=503))
    with pytest.raises(hub_errors.HfHubHTTPError):
        upload(hub, tmp_path / "a", {"config.json": b"{}"})
    assert hub.repositories[NAME].resolve() == before
    hub.faults.append(Fault("reset", "/commit/", "POST"))
    with pytest.raises(httpx.ReadError):
        upload(hub, tmp_path / "b", {"config.json": b"{}"})
    assert hub.files(NAME) == FILES | {"config.json": b"{}"}


def test_processes_find_the_hub_through_their_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = f"from huggingface_hub import snapshot_download\nprint(snapshot_download({NAME!r}))"
    with LoopbackHub(token="hf_write") as hub:
        commit = hub.add(NAME, FILES, private=True)
        variables = hub.environment(tmp_path / "hf", HF_TOKEN="hf_write")
        done = subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / "hf" / "hub" / "models--org--small" / "snapshots" / commit)
        assert hub.downloads("records/p2.jsonl.gz") == 1
    assert environment("http://127.0.0.1:9", tmp_path)["HF_ENDPOINT"] == "http://127.0.0.1:9"


def test_a_hundred_clients_at_once(hub: LoopbackHub) -> None:
    with ThreadPoolExecutor(100) as clients:
        answers = list(clients.map(lambda _: get(hub, f"/{NAME}/resolve/main/model.safetensors")[:2], range(100)))
    assert answers == [(200, WEIGHTS)] * 100
    assert hub.downloads("model.safetensors") == 100


def test_a_stalled_client_is_logged_and_let_go(hub: LoopbackHub) -> None:
    hub.faults.append(Fault("stall", "weights"))
    with ThreadPoolExecutor(1) as clients:
        waiting = clients.submit(get, hub, f"/{NAME}/resolve/main/model.safetensors")
        while not hub.requests:
            time.sleep(0.01)
        assert [(one.status, one.sent, one.complete) for one in hub.requests] == [(200, len(WEIGHTS) // 2, False)]
        assert hub.downloads("model.safetensors") == 0
        hub.close()
        assert isinstance(waiting.exception(), http.client.IncompleteRead)


def test_a_client_that_leaves_in_the_middle_of_a_push_changes_nothing(hub: LoopbackHub) -> None:
    before = hub.repositories[NAME].resolve()
    with socket.create_connection(("127.0.0.1", urlsplit(hub.endpoint).port or 0)) as connection:
        connection.sendall(f"POST /api/models/{NAME}/commit/main HTTP/1.1\r\nContent-Length: 100\r\n\r\n{{}}".encode())
    while not hub.requests:
        time.sleep(0.01)
    assert [(one.method, one.status, one.complete) for one in hub.requests] == [("POST", 0, False)]
    assert hub.repositories[NAME].resolve() == before


def test_a_mistake_of_the_hub_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), LoopbackHub() as hub:  # noqa: PT012
        monkeypatch.setattr(hub, "answer", lambda call: 1 // 0)
        with suppress(ConnectionError):
            get(hub, "/")


def test_endpoints_that_do_not_answer() -> None:
    with pytest.raises(httpx.ConnectError):
        HfApi(endpoint=refused_endpoint(), token=False).model_info(NAME)
    with silent_endpoint() as endpoint, pytest.raises(httpx.ReadTimeout):
        HfApi(endpoint=endpoint, token=False).model_info(NAME, timeout=0.2)


def test_random_faults_are_those_of_their_seeds() -> None:
    drawn = [random_fault(seed) for seed in range(600)]
    assert drawn == [random_fault(seed) for seed in range(600)]
    faults = [one for one in drawn if one]
    assert {one.kind for one in faults} == set(KINDS)
    assert {one.target for one in faults} == set(TARGETS)
    assert 20 < drawn.count(None) < 120
    few = [random_fault(seed, kinds=["slow"], targets=["card"]) for seed in range(50)]
    assert {(one.kind, one.target) for one in few if one} == {("slow", "card")}


def test_a_fault_fires_as_often_as_it_says(hub: LoopbackHub) -> None:
    twice, always = Fault("status", "config", times=2, status=503), Fault("status", "config", "*", times=None, status=404)
    hub.faults += [twice, always]
    path = f"/{NAME}/resolve/main/config.json"
    assert [get(hub, path)[0] for _ in range(4)] == [503, 503, 404, 404]
    assert get(hub, f"/{NAME}/resolve/main/README.md")[0] == 200
    assert (twice.fired, always.fired) == (2, 2)
    with pytest.raises(ValueError, match="no fault 'loud'"):
        Fault("loud")
