from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from patchcert_cli.cli.main import app
from patchcert_cli.errors import UsageError


def test_linear_bounds_are_the_default_and_certify_all_that_intervals_do() -> None:
    found = {}
    for bounds in ("interval", "linear", "best", None):
        given = ["--bounds", bounds] if bounds else []
        done = CliRunner().invoke(app, ["certify", "mnist-ibp-p5", "--patch", "5", "--limit", "150", "--json", "-", *given])
        assert done.exit_code == 0, (done.output, done.exception)
        value = json.loads(done.stdout)
        (claim,) = value["claims"]
        found[bounds] = (claim["method"], claim["counts"]["certified"], value["records"])
    assert [found[name][0] for name in ("interval", "linear", "best", None)] == ["interval", "linear", "linear", "linear"]
    assert found["interval"][1] < found["linear"][1] == found["best"][1] == found[None][1]
    certified = [
        {row["index"] for row in map(json.loads, Path(found[name][2]).read_text().splitlines()) if row["claims"][0]["certified"]}
        for name in ("interval", "linear")
    ]
    assert certified[0] < certified[1]


def test_both_bounds_side_by_side() -> None:
    done = CliRunner().invoke(
        app, ["certify", "mnist-ibp-k4", "--threat", "sparse", "--limit", "20", "--bounds", "all", "--json", "-"]
    )
    claims = json.loads(done.stdout)["claims"]
    assert [claim["method"] for claim in claims] == ["interval", "linear"]
    assert claims[0]["counts"]["certified"] <= claims[1]["counts"]["certified"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mnist-ibp-p5", "--bounds", "tight"], "Use one of interval, linear, best, or all"),
        (["mnist-ibp-p5", "--bounds", "linear", "--condition", "3.2"], "Give one of them"),
        (["mnist-bagcert", "--bounds", "linear", "--limit", "5"], "this defense has no proof 'linear'"),
    ],
)
def test_bounds_that_cannot_be_meant(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["certify", *arguments])
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)
