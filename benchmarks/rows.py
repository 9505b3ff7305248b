"""Rows of papers without a model in the zoo: trained with the command of the row, certified, and kept as verdicts.

    python benchmarks/rows.py PAPER [--table ID] [--rows REGEX] [--limit N] [--runs DIR] [--data-dir DIR] [--fresh]

Each row whose command is a ``patchcert train`` gets its entry in ``patchcert_cli/papers/trained.json``: the verdict on every test
image, or on those of ``certify --limit N``. Rows that have an entry are skipped without ``--fresh``. A training that was stopped
goes on. The weights stay in ``--runs``.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchcert_cli import papers
from patchcert_cli.arithmetic import former
from patchcert_cli.cards import Card, slug
from patchcert_cli.cards.results import CertifyResult, read_records
from patchcert_cli.papers import fill, trained
from patchcert_cli.papers.paper import Row
from patchcert_cli.storage import files
from patchcert_cli.threats import as_options

TRAIN = "patchcert train "
DATA = ("mnist", "cifar10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=papers.names())
    parser.add_argument("--table", help="only this table")
    parser.add_argument("--rows", default="", help="only rows whose name has this regular expression")
    parser.add_argument("--limit", type=int, default=0, help="test images to certify; 0 for all")
    parser.add_argument("--runs", type=Path, default=Path("runs/rows"))
    parser.add_argument("--data-dir", type=Path, help="sets PATCHCERT_DATA")
    parser.add_argument("--fresh", action="store_true", help="certify again what has an entry")
    options = parser.parse_args()
    if options.data_dir:
        os.environ["PATCHCERT_DATA"] = str(options.data_dir.resolve())
    for row in chosen(options.paper, options.table, options.rows):
        known = {(one.command, one.threat) for one in trained.read()}
        if (row.command, row.threat) in known and not options.fresh:
            print(f"{row.name}: has an entry", flush=True)
            continue
        one = measure(row, options.runs, options.limit)
        others = [old for old in trained.read() if (old.command, old.threat) != (one.command, one.threat)]
        trained.write([*others, one], trained.FILE)
        print(f"{row.name}: {one.clean} right, {one.certified} certified of {one.images}", flush=True)


def chosen(paper: str, table: str | None, pattern: str) -> list[Row]:
    """Rows without a model whose command trains one."""
    found = papers.load(paper)
    tables = [found.table(table)] if table else found.tables
    rows = [row for one in tables for row in one.rows if row.dataset in DATA and not row.model and row.command.startswith(TRAIN)]
    return [row for row in rows if re.search(pattern, row.name)]


def measure(row: Row, runs: Path, limit: int) -> trained.TrainedRow:
    """Train the row's model unless that is done, and certify it."""
    run = runs / trained.folder_name(row.command)
    if not (run / files.CARD).is_file():
        patchcert(*shlex.split(row.command)[1:], "--out", str(run))
    card = Card.read(run)
    out = runs / f"{run.name}-{slug(str(row.threat))}-{limit or 'all'}"
    words = as_options(row.threat) + fill.method_option(row.method) + (f" --limit {limit}" if limit else "")
    patchcert("certify", str(run), *shlex.split(words), "--out", str(out))
    result = CertifyResult.from_dict(files.read_json(out / files.RESULT), str(out / files.RESULT))
    at = max(range(len(result.claims)), key=lambda at: result.claims[at].counts.certified)
    claim = result.claims[at]
    records = sorted(read_records(out / files.RECORDS), key=lambda record: int(record["index"]))
    assert card.trained is not None
    assert result.full_split or limit
    found = trained.TrainedRow(
        command=row.command,
        threat=row.threat,
        dataset=result.dataset,
        method=claim.method,
        arithmetic=claim.arithmetic or former(result.defense),
        model_sha256=result.model_sha256,
        network=card.network,
        trained=card.trained,
        limit=0 if result.full_split else limit,
        seed=files.read_json(out / files.MANIFEST)["subset_seed"] or 0,
        verdicts="".join(verdict(record, at) for record in records),
    )
    assert (found.clean, found.certified) == (claim.counts.clean, claim.counts.certified)
    return found


def verdict(record: Mapping[str, Any], at: int) -> str:
    """Of claim number ``at`` about one image, as in ``trained.json``."""
    if record["prediction"] != record["label"]:
        return trained.WRONG
    return trained.CERTIFIED if record["claims"][at]["certified"] else trained.RIGHT


def patchcert(*words: str) -> None:
    """Run a command; end with its exit code if it fails."""
    print("patchcert", shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "patchcert_cli", *words])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
