"""Errors: a message and a hint, each a full sentence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import patchcert_cli
from patchcert_cli import errors
from patchcert_cli.errors import PatchcertError, UsageError, first_line, unknown

PACKAGE = Path(patchcert_cli.__file__).parent


def raised() -> Iterator[tuple[str, ast.expr, ast.expr]]:
    """Every message of the package that has a hint, that hint, and where."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            hints = [each.value for each in node.keywords if each.arg == "hint"] if isinstance(node, ast.Call) else []
            if hints and isinstance(node, ast.Call) and node.args:
                yield f"{path.name}:{node.lineno}", node.args[0], hints[0]


def ends(node: ast.expr) -> tuple[str, str]:
    """The fixed text at the beginning and at the end of a literal; empty where a value stands."""
    pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
    first, last = (piece.value if isinstance(piece, ast.Constant) else "" for piece in (pieces[0], pieces[-1]))
    return str(first), str(last)


def test_messages_and_hints_are_sentences() -> None:
    found = list(raised())
    assert len(found) > 200
    glued = [where for where, message, _ in found if ends(message)[1].endswith((";", ":", ",", " "))]
    small = [
        where for where, _, hint in found if ends(hint)[0][:1].islower() and not ends(hint)[0].startswith(("patchcert", "float"))
    ]
    assert (glued, small) == ([], [])


def test_every_error_has_a_hint() -> None:
    kinds = {kind.__name__ for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PatchcertError)}
    kinds, bare = kinds - {"Interrupted"}, []
    for path in (one for one in sorted(PACKAGE.rglob("*.py")) if one.name != "errors.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in kinds]
        hints = [[each.value for each in call.keywords if each.arg == "hint"] for call in made]
        empty = [not hint or (isinstance(hint[0], ast.Constant) and not hint[0].value) for hint in hints]
        bare += [
            f"{path.name}:{call.lineno}" for call, none in zip(made, empty, strict=True) if none and path.name != "errors.py"
        ]
    assert not bare


def test_an_error_reads_well_with_and_without_its_hint() -> None:
    assert str(UsageError("no model is given.", hint="Name one.")) == "no model is given. Name one."
    bare = PatchcertError("no model is given.")
    assert (str(bare), bare.message, bare.hint, bare.code) == ("no model is given.", "no model is given.", "", 1)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("smal", "Did you mean small? See: patchcert zoo list"),
        ("zzzz", "Known: large, small. See: patchcert zoo list"),
    ],
)
def test_unknown_names_come_with_suggestions(given: str, hint: str) -> None:
    problem = unknown("model", given, ["small", "large"], see="patchcert zoo list")
    assert (problem.message, problem.hint, problem.code) == (f"no model '{given}'.", hint, 3)


def test_many_names_are_not_all_listed_but_a_hint_is_never_empty() -> None:
    many = [f"name-{at:02d}" for at in range(30)]
    assert unknown("model", "zzzz", many, see="patchcert zoo list").hint == "See: patchcert zoo list"
    assert unknown("model", "zzzz", many).hint == f"Known: {', '.join(many[:24])} and 6 more."


def test_the_first_line_of_an_exception() -> None:
    assert first_line(ValueError("bad shape.\nmore")) == "bad shape"
    assert first_line(KeyError()) == "KeyError"
