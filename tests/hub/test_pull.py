"""Pulls through the real client from a Hub that may be hostile: nothing unverified is served, and every error is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import quick_process
from model_folders import make_zoo
from refusals import check_refused

from patchcert_cli.cards import Card, Hub
from patchcert_cli.storage import files

from .faults import Fault, dead_name, refused_endpoint, silent_endpoint
from .loopback import LoopbackHub, environment

NAME = "small-ibp-p2"
REPO = f"patchcert/{NAME}"
FOREIGN = "somebody/small"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as one:
        yield one


@pytest.fixture
def zoo(tmp_path: Path, hub: LoopbackHub) -> Path:
    """A zoo whose only model is on the Hub, at the commit that its card names, and not bundled."""
    folder = tmp_path / "zoo" / NAME
    card = make_zoo(tmp_path / "zoo")
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = hub.add(REPO, content)
    hub.add(FOREIGN, content)
    for name in card.files:
        shutil.move(folder / name, tmp_path / name)
    card = replace(card, hub=Hub(REPO, commit))
    (folder / files.CARD).write_text(card.render(), encoding="utf-8")
    return tmp_path / "zoo"


def bundle(zoo: Path) -> None:
    """Put the weights beside the card, as in the zoo that comes with the package."""
    for name in Card.read(zoo / NAME).files:
        shutil.copy(zoo.parent / name, zoo / NAME / name)


def patchcert(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return quick_process.run(["patchcert", *arguments], variables)


def pull(hub: LoopbackHub, zoo: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return patchcert(hub.environment(zoo.parent / "hf", PATCHCERT_ZOO=str(zoo), **variables), "zoo", "pull", *arguments)


def served(done: subprocess.CompletedProcess[str], zoo: Path) -> Path:
    """The folder that a pull printed; it must hold exactly what the card says."""
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.splitlines()[0])
    card = Card.read(zoo / NAME)
    assert {name: files.sha256(folder / name) for name in card.files} == {name: one.sha256 for name, one in card.files.items()}
    return folder


def refused(done: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    """One clear line, the right exit code, nothing on stdout."""
    assert (done.returncode, done.stdout) == (code, ""), (done.returncode, done.stdout, done.stderr)
    check_refused(done.stderr, code, *said)


def nothing_unverified(zoo: Path) -> None:
    """Whatever the cache keeps under a name of the card is what the card says."""
    card = Card.read(zoo / NAME)
    for path in (zoo.parent / "hf").rglob("snapshots/*/*"):
        if path.name in card.files and path.is_file():
            assert files.sha256(path) == card.files[path.name].sha256


def test_a_pull_fetches_the_pinned_commit_and_a_second_one_asks_nothing(hub: LoopbackHub, zoo: Path) -> None:
    first = pull(hub, zoo, NAME)
    folder = served(first, zoo)
    assert "fetched from the Hub" in first.stderr
    assert {path.name for path in folder.iterdir()} == set(
        Card.read(zoo / NAME).files
    )  # an explicit list, not the whole repository
    hub.reset_log()
    second = pull(hub, zoo, NAME)
    assert served(second, zoo) == folder
    assert "from the Hub's cache" in second.stderr
    assert hub.requests == []
    hub_gone = patchcert(
        environment(refused_endpoint(), zoo.parent / "hf", PATCHCERT_ZOO=str(zoo)), "zoo", "pull", NAME, "--offline"
    )
    assert served(hub_gone, zoo) == folder


def test_the_cache_comes_before_the_hub_and_the_hub_before_the_bundled_copy(hub: LoopbackHub, zoo: Path) -> None:
    bundle(zoo)
    assert "fetched from the Hub" in pull(hub, zoo, NAME).stderr
    assert "from the Hub's cache" in pull(hub, zoo, NAME).stderr
    variables = environment(refused_endpoint(), zoo.parent / "empty", PATCHCERT_ZOO=str(zoo))
    done = patchcert(variables, "zoo", "pull", NAME)
    assert served(done, zoo) == zoo / NAME
    assert "the copy that is bundled with patchcert, for the Hub is out of reach" in done.stderr


def test_force_fetches_again_and_remove_empties_the_cache(hub: LoopbackHub, zoo: Path) -> None:
    pull(hub, zoo, NAME)
    hub.reset_log()
    served(pull(hub, zoo, NAME, "--force"), zoo)
    assert hub.downloads(files.WEIGHTS) == 1
    variables = hub.environment(zoo.parent / "hf", PATCHCERT_ZOO=str(zoo))
    assert "freed" in patchcert(variables, "zoo", "remove", NAME).stdout
    assert not list((zoo.parent / "hf").rglob(files.WEIGHTS))
    assert "nothing to remove" in patchcert(variables, "zoo", "remove", NAME).stdout
    refused(patchcert(variables, "zoo", "remove", "small-ibp-p3"), 3, NAME)
    refused(pull(hub, zoo, NAME, "--offline"), 4, "--offline forbids fetching it")


def test_damage_in_the_cache_is_found_and_mended(hub: LoopbackHub, zoo: Path) -> None:
    folder = served(pull(hub, zoo, NAME), zoo)
    weights = folder / files.WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    refused(pull(hub, zoo, NAME, "--offline"), 4, "not in the Hub's cache")
    served(pull(hub, zoo, NAME), zoo)


@pytest.mark.parametrize("address", [FOREIGN, f"{FOREIGN}@main", f"{FOREIGN}@COMMIT"])
def test_anybodys_model_is_held_against_its_own_card(hub: LoopbackHub, zoo: Path, address: str) -> None:
    commit = Card.read(zoo / NAME).hub.revision
    assert commit is not None
    done = pull(hub, zoo, address.replace("COMMIT", commit))
    served(done, zoo)
    assert f"{FOREIGN} @ {commit[:7]}" in done.stderr
    served(pull(hub, zoo, address.replace("COMMIT", commit), "--offline"), zoo)
    if "COMMIT" in address:
        hub.reset_log()
        served(pull(hub, zoo, f"{FOREIGN}@{commit}"), zoo)
        assert hub.requests == []
        loaded = f"import patchcert_cli; print(type(patchcert_cli.load('{FOREIGN}@{commit}')).__name__)"
        variables = hub.environment(zoo.parent / "hf", PATCHCERT_ZOO=str(zoo))
        ran = subprocess.run(
            [sys.executable, "-c", loaded], env=variables, capture_output=True, text=True, check=True, timeout=300
        )
        assert ran.stdout == "IntervalDefense\n"


def test_another_revision_is_held_against_the_card_of_that_revision(hub: LoopbackHub, zoo: Path) -> None:
    make_zoo(zoo.parent / "other")
    card = replace(Card.read(zoo.parent / "other" / NAME), notes="A second version.")
    commit = hub.commit(REPO, {files.CARD: card.render().encode()})
    done = pull(hub, zoo, NAME, "--revision", commit, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == "hub"
    refused(pull(hub, zoo, NAME, "--revision", "main"), 2, "not a full commit", "40 hex digits")
    refused(pull(hub, zoo, NAME, "--revision", "0" * 40), 4, "no such revision")


REFUSALS = [
    (Fault("wrong_bytes", "weights", times=None), 5, "another sha256 than its card says"),
    (Fault("wrong_bytes", "config", times=None), 5, "config.json"),
    (Fault("wrong_bytes", "records", times=None), 5, "records.jsonl.gz"),
    (Fault("wrong_size", "weights", times=None), 5, "whose size is not"),
    (Fault("truncated", "weights", times=None), 4, "broke off"),
    (Fault("reset", "weights", times=None), 4, "broke off"),
    (Fault("status", "weights", "*", None, 401), 4, "status 401: log in with hf auth login"),
    (Fault("status", "weights", "*", None, 403, "GatedRepo"), 4, "is gated"),
    (Fault("status", "api", "*", None, 403), 4, "status 403"),
    (Fault("status", "api", "*", None, 404, "RepoNotFound"), 4, "is not on the Hub, or is private"),
    (Fault("status", "weights", "*", None, 404, "EntryNotFound"), 4, "missing on the Hub"),
    (Fault("status", "api", "*", None, 404, "RevisionNotFound"), 4, "no such revision"),
    (Fault("status", "api", "*", None, 500), 4, "status 500"),
    (Fault("html", "api", times=None), 4, "not a Hub"),
    (Fault("no_commit_header", "weights", times=None), 4, "not a Hub"),
    (Fault("stall", "api", times=None), 4, "did not answer in time"),
]


@pytest.mark.parametrize(
    ("fault", "code", "said"), REFUSALS, ids=lambda one: f"{one.kind}-{one.target}" if isinstance(one, Fault) else None
)
def test_every_fault_is_one_line_and_leaves_nothing_unverified(
    hub: LoopbackHub, zoo: Path, fault: Fault, code: int, said: str
) -> None:
    fault.fired = 0
    hub.faults.append(fault)
    refused(pull(hub, zoo, NAME), code, said)
    nothing_unverified(zoo)
    hub.faults.clear()
    served(pull(hub, zoo, NAME), zoo)  # and the next pull, of a healthy Hub, is none the worse for it


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", "weights", "*", 1, 500),
        Fault("status", "api", "*", 1, 503),
        Fault("slow", "weights", times=None, pause=0.1),
        Fault("stall", "/tree/", times=1),  # the client alone would wait for ever
        Fault("status", "weights", "GET", 1, 429, headers={"Retry-After": "3600"}),  # and here for an hour
        Fault("truncated", "weights", times=1),
        Fault("wrong_etag", "weights", times=None),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.target}",
)
def test_a_fault_that_passes_is_survived(hub: LoopbackHub, zoo: Path, fault: Fault) -> None:
    fault.fired = 0
    hub.faults.append(fault)
    served(pull(hub, zoo, NAME), zoo)
    assert fault.fired


def test_wrong_bytes_of_the_right_size_never_become_a_card(hub: LoopbackHub, zoo: Path) -> None:
    hub.faults.append(Fault("wrong_bytes", "card", times=None))
    refused(pull(hub, zoo, FOREIGN), 5, "damaged card")
    hub.faults.clear()
    served(pull(hub, zoo, FOREIGN), zoo)


@pytest.mark.parametrize(
    ("endpoint", "said"), [(refused_endpoint, "out of reach"), (dead_name, "out of reach")], ids=["refused", "no-such-name"]
)
def test_a_hub_that_is_not_there_is_said_at_once(zoo: Path, endpoint: Callable[[], str], said: str) -> None:
    variables = environment(endpoint(), zoo.parent / "hf", PATCHCERT_ZOO=str(zoo))
    refused(patchcert(variables, "zoo", "pull", NAME), 4, said, endpoint())


def test_a_hub_that_never_answers_is_given_up(zoo: Path) -> None:
    with silent_endpoint() as endpoint:
        refused(patchcert(environment(endpoint, zoo.parent / "hf", PATCHCERT_ZOO=str(zoo)), "zoo", "pull", NAME), 4, "in time")


def test_a_full_disk_is_one_line(hub: LoopbackHub, zoo: Path) -> None:
    """The limit on the size of a file stands for the end of the disk: writing fails in the middle of the records."""
    largest = max(one.size for one in Card.read(zoo / NAME).files.values())
    limited = f"""
import resource, runpy, sys
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, {largest // 2}))
runpy.run_module("patchcert_cli", run_name="__main__", alter_sys=True)
"""
    variables = hub.environment(zoo.parent / "hf", PATCHCERT_ZOO=str(zoo))
    refused(quick_process.run(["patchcert", "zoo", "pull", NAME], variables, limited), 7, "Free some space")
    nothing_unverified(zoo)
    served(pull(hub, zoo, NAME), zoo)


def test_private_models_need_the_token_of_the_environment(zoo: Path, hub: LoopbackHub) -> None:
    content = hub.files(REPO)
    commit = hub.add("company/secret", content, private=True, token="hf_right")
    refused(pull(hub, zoo, f"company/secret@{commit}"), 4, "not on the Hub, or is private", "HF_TOKEN")
    served(pull(hub, zoo, f"company/secret@{commit}", HF_TOKEN="hf_right"), zoo)


@pytest.mark.parametrize("name", ["../small", "small/../../etc", "..", "/etc/passwd", "a/b/c", "Small_Model", ""])
def test_names_are_no_paths(hub: LoopbackHub, zoo: Path, name: str) -> None:
    done = pull(hub, zoo, name)
    assert done.returncode in (2, 3), done.stderr
    check_refused(done.stderr, done.returncode)
    assert hub.requests == []
