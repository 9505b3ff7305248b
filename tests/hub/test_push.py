"""Pushes through the real client to a Hub on the loopback interface: only a claim with all its records leaves the machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import quick_process
import yaml
from model_folders import make_run, make_zoo, write_result

from patchcert_cli.cards import Card
from patchcert_cli.cards.published import PublishedRecords
from patchcert_cli.catalog import bundled
from patchcert_cli.storage import files

from .faults import Fault, refused_endpoint
from .loopback import LoopbackHub, environment

TO = "org/name"
TOKEN = "hf_right"
OWN = ".gitattributes"  # which the Hub itself puts into a new repository
SENT = ["README.md", "config.json", "model.safetensors", "records.jsonl.gz", ".eval_results/patchcert.yaml"]


@pytest.fixture(params=[False, True], ids=["regular", "lfs"])
def hub(request: pytest.FixtureRequest) -> Iterator[LoopbackHub]:
    with LoopbackHub(token=TOKEN, read_token="hf_read", lfs=request.param) as one:
        yield one


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "x")
    return tmp_path / "runs" / "x"


def patchcert(variables: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return quick_process.run(["patchcert", *map(str, arguments)], variables)


def push(hub: LoopbackHub, run: Path, *arguments: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    variables = hub.environment(run.parents[1] / "hf", HF_TOKEN=token) if token else hub.environment(run.parents[1] / "hf")
    return patchcert(variables, "zoo", "push", run, "--to", TO, *arguments)


def held(hub: LoopbackHub, repo: str = TO, revision: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.files(repo, revision).items() if name != OWN}


def refused(done: subprocess.CompletedProcess[str], code: int, said: str) -> None:
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert any(line.startswith(f"error[{code}]: ") for line in done.stderr.splitlines()[-2:])
    assert "Traceback" not in done.stderr
    assert said in done.stderr


def test_what_is_pushed_can_be_pulled_by_its_commit(hub: LoopbackHub, run: Path) -> None:
    write_result(run.parent / "certify-x", run)
    done = push(hub, run, "--json")
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert sorted(held(hub)) == sorted(SENT) == sorted(value["files"])
    pulled = patchcert(hub.environment(run.parents[1] / "other"), "zoo", "pull", f"{TO}@{value['commit']}")
    assert pulled.returncode == 0, pulled.stderr
    folder = Path(pulled.stdout.splitlines()[0])
    assert (folder / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    card = Card.read(folder)
    assert (card.status, card.results[0].certified, card.hub.repo, card.hub.revision) == ("measured", 6000, TO, None)
    assert PublishedRecords.read(folder / files.PUBLISHED_RECORDS).counts(0) == (9300, 6000)
    entries = yaml.safe_load(hub.files(TO)[".eval_results/patchcert.yaml"])
    assert sorted(entry["value"] for entry in entries) == [0.6, 0.93]


def test_the_commit_is_written_back_and_a_second_push_needs_no_result(hub: LoopbackHub, run: Path) -> None:
    result = write_result(run.parent / "certify-x", run)
    assert push(hub, run).returncode == 0
    card = Card.read(run)
    assert (card.hub.repo, card.status) == (TO, "measured")
    assert card.hub.revision in hub.repositories[TO].commits
    card.verify(run)
    result.unlink()
    assert push(hub, run).returncode == 0


def test_a_dry_run_prints_the_exact_plan_and_asks_no_network(hub: LoopbackHub, run: Path) -> None:
    write_result(run.parent / "certify-x", run)
    variables = environment(refused_endpoint(), run.parents[1] / "hf")
    done = patchcert(variables, "zoo", "push", run, "--to", TO, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)["files"]
    before = Card.read(run)
    told = patchcert(variables, "zoo", "push", run, "--to", TO, "--dry-run").stdout
    assert Card.read(run) == before
    assert not hub.requests
    assert push(hub, run).returncode == 0
    for name, content in held(hub).items():
        assert plan[name] == {"size": len(content), "sha256": files.sha256_of(content)}
        assert plan[name]["sha256"] in told
    assert "claims patch:2x2 (interval, recovery, bounded): clean 9300/10000, certified 6000/10000" in told


def test_a_pull_request_leaves_main_and_the_card_alone(hub: LoopbackHub, run: Path) -> None:
    hub.add(TO, {"README.md": b"before"})
    write_result(run.parent / "certify-x", run)
    done = push(hub, run, "--create-pr")
    assert done.returncode == 0, done.stderr
    assert "pull request http" in done.stdout
    assert hub.files(TO) == {"README.md": b"before"}
    assert sorted(held(hub, revision="refs/pr/1")) == sorted(SENT)
    assert Card.read(run).hub.revision is None


def test_dirty_claims_are_refused_before_anything_is_sent(hub: LoopbackHub, run: Path) -> None:
    refused(push(hub, run), 8, "hint: Make one: patchcert certify")
    sample = write_result(run.parent / "certify-x", run, full_split=False, images=200)
    refused(push(hub, run), 8, "full test split (only 200 images of test)")
    refused(push(hub, run, "--result", sample), 8, "not about the full test split")
    result = write_result(run.parent / "certify-x", run, model_sha256="0" * 64)
    refused(push(hub, run), 8, "no result of these weights")
    refused(push(hub, run, "--result", result), 8, "other weights")
    write_result(run.parent / "certify-x", run)
    records = run.parent / "certify-x" / "records.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines).replace('"certified": true', '"certified": false', 1))
    refused(push(hub, run), 8, "6000 certified of 10000 images, but its records have")
    records.write_text("".join(lines[:-1]))
    refused(push(hub, run), 8, "records of 9999 images")
    records.unlink()
    refused(push(hub, run), 8, "a result counts only with its records")
    assert not hub.requests


def test_a_zoo_model_whose_records_say_otherwise_is_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    card = make_zoo(tmp_path / "zoo")
    folder = tmp_path / "zoo" / card.name
    variables = hub.environment(tmp_path / "hf", HF_TOKEN=TOKEN, PATCHCERT_ZOO=str(tmp_path / "zoo"))
    better = replace(card, results=(replace(card.results[0], certified=6001), *card.results[1:]))
    (folder / files.CARD).write_text(better.render())
    refused(patchcert(variables, "zoo", "push", card.name), 8, "but its records have 9300 and 6000")
    (folder / files.CARD).write_text(card.render())
    done = patchcert(variables, "zoo", "push", card.name)
    assert done.returncode == 0, done.stderr
    assert sorted(held(hub, f"patchcert/{card.name}")) == sorted(SENT)
    pinned = bundled.card(card.name, tmp_path / "zoo").hub.revision
    pulled = patchcert(variables, "zoo", "pull", card.name)
    assert f"patchcert/{card.name} @ {str(pinned)[:7]}, fetched from the Hub" in pulled.stderr


def test_damage_and_unknown_places_are_refused(hub: LoopbackHub, run: Path) -> None:
    write_result(run.parent / "certify-x", run)
    refused(
        patchcert(hub.environment(run.parents[1] / "hf"), "zoo", "push", run, "--to", "no repository"), 2, "organization/name"
    )
    content = bytearray((run / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (run / "model.safetensors").write_bytes(bytes(content))
    refused(push(hub, run), 5, "sha256")


@pytest.mark.parametrize(("token", "said"), [("", "HF_TOKEN"), ("hf_read", "status 403")])
def test_a_push_needs_a_token_that_may_write(hub: LoopbackHub, run: Path, token: str, said: str) -> None:
    write_result(run.parent / "certify-x", run)
    refused(push(hub, run, token=token), 4, said)
    assert TO not in hub.repositories


def test_a_push_that_fails_writes_nothing_back(hub: LoopbackHub, run: Path) -> None:
    write_result(run.parent / "certify-x", run)
    hub.faults.append(Fault("status", "/commit/", "POST", None, 500))
    refused(push(hub, run), 4, "status 500")
    assert Card.read(run).status == "trained"
    hub.faults[:] = [Fault("status", "/api/", "*", None, 429)]
    refused(push(hub, run), 4, "too many requests")
    hub.faults.clear()
    assert push(hub, run).returncode == 0
