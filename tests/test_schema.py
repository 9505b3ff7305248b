"""The validator: what it reads, what it refuses, and that every problem is listed at once with the path of its entry."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal

import pytest

from patchcert_cli import schema
from patchcert_cli.schema import Count, Fraction, Must, Parsed, Positive, Rule
from patchcert_cli.threats import Patch, Threat, parse_threat


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


def _ordered(low: int, high: int) -> Iterator[str]:
    if low > high:
        yield f"low is {low}, more than high, {high}"


@dataclass(frozen=True)
class Inner:
    low: Count
    high: Positive = 3
    rules: ClassVar[tuple[Rule, ...]] = (_ordered,)


@dataclass(frozen=True)
class Outer:
    name: str
    share: Fraction
    threat: Annotated[Threat, Parsed(parse_threat)]
    kind: Literal["fast", "slow"] = "fast"
    colour: Colour = Colour.RED
    flag: bool = False
    even: Annotated[int, Must(lambda n: n % 2 == 0, "even")] = 0
    inner: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    table: dict[str, Inner] = field(default_factory=dict)
    perhaps: Inner | None = None
    anything: Any = None


GOOD: dict[str, Any] = {"name": "a", "share": 0, "threat": "patch:5x5"}


def wrong(**changes: Any) -> tuple[str, ...]:
    with pytest.raises(schema.Invalid) as caught:
        schema.read(Outer, GOOD | changes)
    return caught.value.problems


def test_values_become_objects_and_defaults_are_filled_in() -> None:
    values = GOOD | {"colour": "blue", "inner": [{"low": 1}], "pair": [4, 5], "table": {"x": {"low": 0}}, "perhaps": {"low": 3}}
    read = schema.read(Outer, values)
    assert read.threat == Patch(5, 5) and read.colour is Colour.BLUE and read.kind == "fast" and read.share == 0.0
    assert read.inner == (Inner(1, 3),) and read.table == {"x": Inner(0)} and read.perhaps == Inner(3)
    assert read.pair == (4, 5.0) and isinstance(read.share, float) and isinstance(read.pair[1], float)


def test_plain_values_are_the_inverse() -> None:
    read = schema.read(Outer, GOOD | {"inner": [{"low": 1}], "perhaps": {"low": 2}})
    plain = schema.plain(read)
    assert plain["threat"] == "patch:5x5" and plain["colour"] == "red" and plain["pair"] == [1, 2.0]
    assert schema.read(Outer, plain) == read


def test_objects_are_taken_as_they_are() -> None:
    assert schema.read(Outer, GOOD | {"threat": Patch(2, 3), "perhaps": Inner(1)}).threat == Patch(2, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"even": True}, ("even", "whole number")),
        ({"share": False}, ("share", "number")),
        ({"share": math.nan}, ("share", "nan")),
        ({"share": math.inf}, ("share", "inf")),
        ({"share": 1}, ("share", "[0, 1)")),
        ({"even": 2.0}, ("even", "whole number")),
        ({"even": 3}, ("even", "even")),
        ({"flag": 1}, ("flag", "true or false")),
        ({"name": 3}, ("name", "text")),
        ({"kind": "quick"}, ("kind", "fast or slow")),
        ({"colour": "green"}, ("colour", "red or blue")),
        ({"threat": "patch:0"}, ("threat", "patch:0")),
        ({"threat": 5}, ("threat", "text")),
        ({"inner": "a"}, ("inner", "list")),
        ({"inner": [3]}, ("inner[0]", "table")),
        ({"pair": [1]}, ("pair", "entries")),
        ({"table": [1]}, ("table", "table")),
        ({"table": {"x": {"low": -1}}}, ("table.x.low", "0 or more")),
        ({"perhaps": {"low": 5}}, ("perhaps.low", "high")),
        ({"nme": 1}, ("nme", "known")),
    ],
    ids=str,
)
def test_each_wrong_value_is_named_with_its_path_and_what_is_allowed(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    (problem,) = wrong(**changes)
    assert problem.startswith(words[0]) and all(word in problem for word in words)


def test_all_problems_are_listed_rules_of_valid_fields_included() -> None:
    problems = wrong(name=1, share="x", inner=[{"low": 9, "high": 1}, {}], extra=0)
    assert [problem.split()[0] for problem in problems] == ["extra", "name", "share", "inner[0].low", "inner[1].low"]


def test_missing_fields_and_the_whole() -> None:
    with pytest.raises(schema.Invalid, match="name is missing; share is missing; threat is missing"):
        schema.read(Outer, {})
    with pytest.raises(schema.Invalid, match="the whole"):
        schema.read(Outer, [1])
    with pytest.raises(schema.Invalid, match=r"card\.inner\.low is missing"):
        schema.read(Inner, {}, "card.inner")


def test_a_long_value_is_cut() -> None:
    (problem,) = wrong(kind="x" * 500)
    assert len(problem) < 120


def test_entries_say_what_is_allowed() -> None:
    listed = {entry.name: entry for entry in schema.entries(Outer)}
    assert listed["name"].required and not listed["even"].required and listed["even"].default == 0
    assert listed["even"].allowed == "a whole number, even" and listed["kind"].allowed == "fast or slow"
    assert listed["colour"].default == "red" and listed["pair"].default == [1, 2.0]
    assert listed["threat"].allowed and listed["inner"].allowed == "a list of a table"
