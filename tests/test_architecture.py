"""Which wing may import which, read from the source with ``ast``; the reference is ``docs/architecture.md``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import patchcert_cli

PACKAGE = "patchcert_cli"
ROOT = Path(patchcert_cli.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "__pycache__" not in path.parts)
LONGEST_FILE, LONGEST_FUNCTION, MOST_AT_THE_ROOT = 380, 80, 12

# From the ground up. A wing imports from itself and from lines above its own, never from its own line or from one below it.
WINGS = [
    ("errors", "version", "progress"),
    ("arithmetic", "schema", "registry", "threats", "parallel", "storage", "notebook"),
    ("device",),
    ("layers", "certificate", "cards", "data"),
    ("models", "certifiers", "hub"),
    ("defenses",),
    ("checkpoint", "attacks"),
    ("catalog",),
    ("classifiers", "papers"),
    ("training", "evaluation"),
    ("reporting",),
    ("cli",),
    ("__main__",),
]
FLOOR = {wing: floor for floor, wings in enumerate(WINGS) for wing in wings}
FAMILIES = ("cells", "masks", "bounds")  # of proofs: they import nothing of each other
FACES = {"__init__.py"}  # of the whole package: its public names, loaded when they are first used


@dataclass(frozen=True)
class Rule:
    """Files under ``where`` ("" for all, but not under ``but``) never import anything that begins with ``what``."""

    where: str
    what: tuple[str, ...]
    but: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where or 'all'}-{'-'.join(name.removeprefix(PACKAGE + '.') for name in self.what)}"


RULES = [
    *(Rule(f"{wing}/", (f"{PACKAGE}.{other}",)) for wing, other in (("training", "evaluation"), ("evaluation", "training"))),
    Rule("attacks/", (f"{PACKAGE}.certifiers",)),
    Rule("models/", (f"{PACKAGE}.threats",)),
    *(
        Rule(f"certifiers/{mine}/", tuple(f"{PACKAGE}.certifiers.{other}" for other in FAMILIES if other != mine))
        for mine in FAMILIES
    ),
    Rule("", ("huggingface_hub",), ("hub/client.py", "hub/failures.py")),
    Rule("", ("typer", "rich"), ("cli/",)),
    Rule("", ("click",)),
    Rule("", ("pickle", "dill", "joblib", "cloudpickle")),
]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(module: ast.Module, path: Path) -> Iterator[str]:
    """Absolute names of everything imported, inside functions too, with ``from a import b`` as ``a.b``."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = [PACKAGE, *path.relative_to(ROOT).parts[:-1]]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            yield from (f"{source}.{alias.name}" for alias in node.names)


def breaches(rule: Rule, files: list[tuple[str, list[str]]]) -> list[str]:
    return [
        f"{where} imports {name}"
        for where, names in files
        if where.startswith(rule.where) and not where.startswith(rule.but or ("\0",))
        for name in names
        if any(name == banned or name.startswith(banned + ".") for banned in rule.what)
    ]


@pytest.fixture(scope="module")
def imports() -> list[tuple[str, list[str]]]:
    return [(label(path), list(imported(tree(path), path))) for path in FILES]


def test_the_package_was_read() -> None:
    names = {label(path) for path in FILES}
    assert {
        "threats.py",
        "certifiers/bounds/intervals.py",
        "defenses/ibp/defense.py",
        "models/mlp.py",
        "attacks/__init__.py",
    } <= names
    assert len(names) >= 20


def wing(where: str) -> str:
    return where.split("/")[0].removesuffix(".py")


def climbs(files: list[tuple[str, list[str]]]) -> list[str]:
    """Imports from a wing's own floor, outside itself, or from above it."""
    return [
        f"{where} imports {name}"
        for where, names in files
        if where not in FACES
        for name in names
        if name.startswith(f"{PACKAGE}.")
        if (other := name.split(".")[1]) in FLOOR and other != wing(where) and FLOOR[other] >= FLOOR[wing(where)]
    ]


def test_every_file_is_in_a_wing() -> None:
    assert {wing(label(path)) for path in FILES} - {"__init__"} == set(FLOOR)
    assert len([path for path in FILES if path.parent == ROOT]) <= MOST_AT_THE_ROOT


def test_no_wing_imports_upwards(imports: list[tuple[str, list[str]]]) -> None:
    assert climbs(imports) == []


def test_a_climb_would_be_caught() -> None:
    above = [
        (f"{lower}/some.py", [f"{PACKAGE}.{upper}.thing"]) for lower in FLOOR for upper in FLOOR if FLOOR[lower] < FLOOR[upper]
    ]
    assert len(climbs(above)) == len(above) > 100
    beside = [("training/some.py", [f"{PACKAGE}.evaluation.results"])]
    assert climbs(beside) and not climbs([("training/some.py", [f"{PACKAGE}.training.loop", f"{PACKAGE}.errors", "torch"])])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_imports_go_one_way(rule: Rule, imports: list[tuple[str, list[str]]]) -> None:
    assert breaches(rule, imports) == []


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_rule_would_catch_a_breach(rule: Rule) -> None:
    where = rule.where if rule.where.endswith(".py") else f"{rule.where}some.py"
    assert breaches(rule, [(where, [f"{rule.what[0]}.thing"])]) == [f"{where} imports {rule.what[0]}.thing"]
    assert breaches(rule, [(where, ["torch.nn"])]) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import a.b as c", "a.b"),
        ("from a import b", "a.b"),
        ("def f():\n    from a.b import c", "a.b.c"),
        ("from . import _base", f"{PACKAGE}.attacks._base"),
        ("from ..certifiers import geometry", f"{PACKAGE}.certifiers.geometry"),
        ("if True:\n    import pickle", "pickle"),
    ],
)
def test_every_form_of_import_is_read(text: str, name: str) -> None:
    assert list(imported(ast.parse(text), ROOT / "attacks" / "some.py")) == [name]


def calls(module: ast.Module) -> list[str]:
    return [ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)]


def test_only_the_command_line_prints() -> None:
    found = [label(path) for path in FILES if not label(path).startswith("cli/") and "print" in calls(tree(path))]
    assert found == []


def test_nothing_is_ever_unpickled() -> None:
    banned = {"torch.load", "torch.save", "pickle.load", "pickle.loads", "eval", "exec", "np.load", "numpy.load"}
    found = [f"{label(path)}: {name}" for path in FILES for name in calls(tree(path)) if name in banned]
    assert found == ["classifiers/convert.py: torch.load"]  # of tensors alone
    (load,) = [
        node
        for node in ast.walk(tree(ROOT / "classifiers" / "convert.py"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [ast.unparse(one.value) for one in load.keywords if one.arg == "weights_only"] == ["True"]


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [label(path) for path in FILES if path.stem in ("utils", "util", "helpers", "misc", "common")] == []


def test_files_and_functions_stay_short() -> None:
    long = [f"{label(path)}: {lines} lines" for path in FILES if (lines := len(path.read_text().splitlines())) > LONGEST_FILE]
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                    long.append(f"{label(path)}: {node.name} has {lines} lines")
    assert long == []
