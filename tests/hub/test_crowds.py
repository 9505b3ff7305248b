"""Many pulls at once, and many faults in a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_folders import make_zoo

from patchcert_cli.cards import Card
from patchcert_cli.storage import files

from .loopback import LoopbackHub

NAME = "small-ibp-p2"
REPO = f"patchcert/{NAME}"
PULL = f"from patchcert_cli.catalog import resolve; print(resolve.pull('{NAME}').folder)"


def publish(hub: LoopbackHub, zoo: Path) -> Card:
    """Put the zoo's only model on the hub; its card alone stays."""
    card = make_zoo(zoo)
    folder = zoo / NAME
    commit = hub.add(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
    for name in card.files:
        (folder / name).unlink()
    card = Card.from_dict({**card.to_dict(), "hub": {"repo": REPO, "revision": commit}})
    (folder / files.CARD).write_text(card.render(), encoding="utf-8")
    return card


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_pulls_of_one_model_at_once_fetch_it_once(tmp_path: Path, count: int) -> None:
    with LoopbackHub() as hub:
        card = publish(hub, tmp_path / "zoo")
        variables = hub.environment(tmp_path / "hf", PATCHCERT_ZOO=str(tmp_path / "zoo"))
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", PULL], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for _ in range(count)
        ]
        done = [process.communicate(timeout=600) for process in processes]
        assert [process.returncode for process in processes] == [0] * count, done
        assert [err for _, err in done] == [""] * count
        folders = {out.strip() for out, _ in done}
        assert len(folders) == 1
        for name, facts in card.files.items():
            assert hub.downloads(name) == 1
            assert files.sha256(Path(*folders) / name) == facts.sha256


DRIVER = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hub.faults import random_fault
from hub.loopback import LoopbackHub
from hub.test_crowds import NAME, REPO, publish
from patchcert_cli.cli import main

assert "huggingface_hub" not in sys.modules  # it reads its environment when it is imported
shares = json.loads(sys.argv[3])
for place, seeds in enumerate(shares):
    if not os.fork():
        break
else:
    sys.exit(any([os.wait()[1] for _ in shares]))
home = Path(sys.argv[2], str(place))
with LoopbackHub() as hub, open(f"{home}.jsonl", "w") as rows:
    os.environ |= hub.environment(home / "hf", PATCHCERT_ZOO=str(home / "zoo"), HF_HUB_DOWNLOAD_TIMEOUT="1")
    os.environ["HF_HUB_ETAG_TIMEOUT"] = "1"
    card = publish(hub, home / "zoo")
    for seed in seeds:
        fault = random_fault(seed)
        hub.faults[:] = [fault] if fault else []
        out, err, code = io.StringIO(), io.StringIO(), 0
        name = NAME if seed % 3 else REPO + "@" + card.hub.revision
        sys.argv = ["patchcert", "zoo", "pull", name]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main.run()
            except SystemExit as stop:
                code = stop.code or 0
        print(json.dumps([seed, str(fault), code, out.getvalue(), err.getvalue()]), file=rows)
        if seed % 2:
            shutil.rmtree(home / "hf", ignore_errors=True)
"""


def pulls(home: Path, shares: list[list[int]]) -> Iterator[tuple[int, str, int, str, str]]:
    """Pull under one fault per seed; each share of the seeds in a process with a Hub of its own, every other time from an empty
    cache.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).parents[1]), str(home), json.dumps(shares)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    for place in range(len(shares)):
        yield from (tuple(json.loads(line)) for line in (home / f"{place}.jsonl").read_text().splitlines())


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_fault_ever_serves_wrong_content_or_a_traceback(tmp_path: Path, count: int) -> None:
    workers = 10 if count < 100 else 40  # most of the time is the patience of the client
    told = list(pulls(tmp_path, [[*range(first, count, workers)] for first in range(workers)]))
    assert sorted(row[0] for row in told) == list(range(count))
    codes: Counter[int] = Counter()
    for seed, fault, code, out, err in told:
        codes[code] += 1
        assert "Traceback" not in err, (seed, fault, err)
        assert code in (0, 4, 5), (seed, fault, code, err)
        home = tmp_path / str(seed % workers)
        card = Card.read(home / "zoo" / NAME)
        if code == 0:
            assert "sha256 ok" in out, (seed, fault)
        else:
            assert (out, err.count("\n")) == ("", 2), (seed, fault, err)  # the error and its hint
        for path in (home / "hf").rglob("snapshots/*/*"):
            if path.name in card.files and path.is_file():
                assert files.sha256(path) == card.files[path.name].sha256, (seed, fault)
    print(f"{count} pulls, {len({fault for _, fault, *_ in told})} faults: exit codes {dict(codes)}")
    assert codes[0]
    assert codes[4]
    assert codes[5]
