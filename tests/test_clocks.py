"""No test asserts how long something takes, which depends on the machine: it counts calls, requests or passes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CLOCKS = {"perf_counter", "perf_counter_ns", "time", "time_ns", "monotonic", "monotonic_ns", "process_time", "thread_time"}


def reads_clock(node: ast.AST, timed: set[str]) -> bool:
    """Whether an expression calls a clock of ``time``, or has a variable that was made from one."""
    return any(
        (isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and ast.unparse(one.func) in CALLS)
        or (isinstance(one, ast.Name) and one.id in timed)
        for one in ast.walk(node)
    )


CALLS = {f"time.{name}" for name in CLOCKS}


def timed_asserts(module: ast.Module) -> list[int]:
    """Lines of asserts about times, for each function that has some."""
    lines: set[int] = set()
    for function in ast.walk(module):
        if not isinstance(function, ast.FunctionDef):
            continue
        timed: set[str] = set()
        for _ in range(3):  # variables made from variables made from a clock
            for node in ast.walk(function):
                match node:
                    case ast.Assign(targets=targets, value=value) if reads_clock(value, timed):
                        timed |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
                    case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=values):
                        timed |= {name for value in values if reads_clock(value, timed)}
        lines |= {node.lineno for node in ast.walk(function) if isinstance(node, ast.Assert) and reads_clock(node.test, timed)}
    return sorted(lines)


def test_no_test_asserts_a_time() -> None:
    files = Path(__file__).parent.rglob("*.py")
    found = [f"{path.name}:{line}" for path in files for line in timed_asserts(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == []


@pytest.mark.parametrize(
    ("body", "caught"),
    [
        ("a = time.monotonic()\n f()\n assert time.monotonic() - a < 5", True),
        ("a = time.time()\n b = time.time() - a\n assert b < 5", True),
        ("a, b = 0, time.perf_counter()\n c = []\n c.append(time.perf_counter() - b)\n assert min(c) < 0.02", True),
        ("end = time.monotonic() + 10\n while f() and time.monotonic() < end:\n  g()\n assert f()", False),
        ("now = time.time() + 10\n patch(lambda: now)\n assert calls == 1", False),
    ],
)
def test_asserts_of_times_are_found(body: str, caught: bool) -> None:
    assert bool(timed_asserts(ast.parse(f"def test():\n {body}"))) == caught
