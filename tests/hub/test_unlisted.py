"""Files that no card lists, such as those of repositories in timm's format: hashed as the Hub says, pinned, remembered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quick_process

from .faults import Fault, refused_endpoint
from .loopback import LoopbackHub, environment

REPO = "somebody/net"
FILES = {"config.json": b'{"architecture": "test_resnet"}', "model.safetensors": bytes(range(256)) * 90, "notes.txt": b"no"}
WANTED = ["config.json", "model.safetensors"]
PROGRAM = """
import json, sys
from patchcert_cli.hub import client
from patchcert_cli.errors import PatchcertError
repo, revision, names = json.loads(sys.argv[1])
try:
    commit, folder = client.fetch_unlisted(repo, revision, names, hint="Say --weights.")
    print(json.dumps([commit, str(folder)]))
except PatchcertError as problem:
    print(json.dumps([problem.code, str(problem)]))
"""


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        yield running


def fetch(variables: dict[str, str], revision: str | None, names: list[str] = WANTED) -> list[Any]:
    done = quick_process.run(["", json.dumps([REPO, revision, names])], variables, PROGRAM)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_what_is_named_is_fetched_at_the_commit_that_main_means(hub: LoopbackHub, tmp_path: Path) -> None:
    first = hub.add(REPO, FILES)
    home = hub.environment(tmp_path / "hf")
    commit, folder = fetch(home, None)
    assert commit == first and {path.name for path in Path(folder).iterdir()} == set(WANTED)
    assert all((Path(folder) / name).read_bytes() == FILES[name] for name in WANTED)
    second = hub.commit(REPO, {"model.safetensors": b"new" * 999})
    assert fetch(home, None)[0] == second and fetch(home, first) == [first, folder]
    hub.reset_log()
    assert fetch(home, first)[0] == first
    assert hub.requests == []
    gone = environment(refused_endpoint(), tmp_path / "hf")
    assert fetch({**gone, "HF_HUB_OFFLINE": "1"}, None)[0] == second  # what main meant when it was last asked
    assert fetch(gone, None)[0] == 4


def test_what_the_hub_does_not_vouch_for_is_not_used(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.add(REPO, FILES)
    home = hub.environment(tmp_path / "hf")
    fetched = Path(fetch(home, commit)[1])
    weights = fetched / "model.safetensors"
    Path(weights.resolve()).write_bytes(FILES["model.safetensors"][:-1] + b"x")  # as long, but another one
    assert fetch(home, commit) == [commit, str(fetched)]
    assert weights.read_bytes() == FILES["model.safetensors"]
    hub.faults.append(Fault("wrong_bytes", "resolve/.*safetensors"))
    code, said = fetch(hub.environment(tmp_path / "other"), commit)
    assert code == 5 and said.startswith(
        f"the Hub sent a damaged model.safetensors of {REPO} @ {commit[:7]}: not used, not kept."
    )
    assert not list((tmp_path / "other").rglob("snapshots/*/model.safetensors"))


def test_a_file_that_is_not_there_says_what_to_type(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    assert fetch(hub.environment(tmp_path / "hf"), commit) == [
        4,
        f"{REPO} @ {commit[:7]} holds no model.safetensors. Say --weights.",
    ]
    offline = {**hub.environment(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    code, said = fetch(offline, commit)
    assert code == 4 and "is not in the Hub's cache and HF_HUB_OFFLINE forbids fetching it" in said
