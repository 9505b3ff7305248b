"""Every flag has one meaning in all commands, old spellings still work, and help is quick and in groups."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from refusals import check_refused
from typer.testing import CliRunner

from patchcert_cli.cli import attack, certify, convert, launch, main, sharing, verify
from patchcert_cli.cli.groups import command, grouped
from patchcert_cli.errors import UsageError

# What a flag says besides its one meaning, where commands differ in more than a default.
DIFFERENT = {
    "--image": "certify takes several files, attack one",
    "--force": "replace what is there",
    "--out": "what is written on this disk, a folder or, of convert, a file",
    "--seed": "the recipe's seed, in train, is a default that may be left open",
}


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from leaves(one, (*path, name))
    else:
        yield " ".join(path), command


COMMANDS = dict(leaves(typer.main.get_command(main.app)))


def test_a_flag_has_one_type_everywhere() -> None:
    kinds: dict[str, dict[tuple[str, bool, bool], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, one in COMMANDS.items():
        for option in one.params:
            for flag in (*option.opts, *option.secondary_opts):
                if flag.startswith("-"):
                    kind = (str(getattr(option, "bare_type", "")), bool(getattr(option, "is_flag", False)), bool(option.multiple))
                    kinds[flag][kind].append(name)
    assert len(kinds) > 50
    clashes = {flag: dict(found) for flag, found in kinds.items() if len(found) > 1 and flag not in DIFFERENT}
    assert clashes == {}


def test_every_command_can_print_json_and_be_quiet() -> None:
    for name, one in COMMANDS.items():
        flags = {flag for option in one.params for flag in option.opts}
        assert "--json" in flags, name
        assert "--quiet" in flags, name


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("certify", certify.OLD),
        ("attack", attack.OLD),
        ("convert", convert.OLD),
        ("zoo verify", verify.OLD),
        ("zoo add", sharing.OLD),
    ],
)
def test_old_spellings_lead_to_options_that_exist(name: str, old: dict[str, str]) -> None:
    flags = {flag for option in COMMANDS[name].params for flag in option.opts}
    assert not set(old) & flags
    assert {new.split()[0] for new in old.values()} <= flags


@dataclass(frozen=True)
class Both:
    size: Annotated[int, typer.Option("--size")] = 3
    json: Annotated[str | None, typer.Option("--json")] = None


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        ("", (3, None)),
        ("--size 4", (4, None)),
        ("--large 4", (4, None)),
        ("--large=4 --json", (4, "-")),
        ("--json --size 2", (2, "-")),
        ("--json - --size 2", (2, "-")),
        ("--json file", (3, "file")),
        ("--small", (1, None)),
    ],
)
def test_groups_become_options_and_come_back_as_objects(words: str, seen: tuple[int, str | None]) -> None:
    app, found = typer.Typer(), []

    @app.command(cls=command({"--large": "--size", "--small": "--size 1"}))
    @grouped
    def one(*, both: Both) -> None:
        """Do it."""
        found.append(both)

    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 0, done.output
    assert found == [Both(*seen)]


def test_help_of_every_command_is_in_panels_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom patchcert_cli.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    done = CliRunner().invoke(main.app, [*words.split(), '--help'])\n"
        "    assert done.exit_code == 0 and 'Output' in done.output, words\n"
        "assert not {'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    panels = {option.rich_help_panel for option in COMMANDS["certify"].params}
    assert {"Threat model", "Proof", "Plain classifiers and masks", "Data", "Image files, and plots", "Run", "Output"} <= panels


def test_the_version_has_a_short_flag() -> None:
    long, short = (CliRunner().invoke(main.app, [flag]).output for flag in ("--version", "-V"))
    assert long == short and long.startswith("patchcert ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("certify --processes 0", "--processes 0 is not a number of processes"),
        ("attack --patch 5 --processes 1.5", "--processes 1.5 is not a number of processes"),
        ("zoo verify mnist-ibp-p2 --processes many", "--processes many is not a number of processes"),
        ("certify --processes 100000", "--processes 100000 is more than 8 for each of"),
        ("attack --image x.png --patch 5 --processes 2", "--processes does not go with --image"),
        ("train --max-minutes 0", "--max-minutes 0 is not allowed"),
        ("train --max-minutes nan", "--max-minutes nan is not allowed"),
        ("train --max-minutes 1e300", "Allowed: more than 0, and at most 525,600, a year"),
        ("train --max-minutes 5 --steps 3", "--max-minutes chooses the steps, and --steps gives them"),
        ("train --max-minutes 5 --dry-run", "--dry-run measures the recipe as it is"),
        ("train --patch 5 --epochs 3 --steps 3,4", "steps has 2 numbers, neither 1 nor one for each of 3 epochs"),
        ("train --patch 5 --epochs 2 --steps 3,", "--steps 3, is not a number or a list of them"),
    ],
)
def test_processes_and_times_that_cannot_be(patchcert: Any, words: str, message: str) -> None:
    done = patchcert(*words.split())
    assert (done.code, done.out) == (2, "")
    check_refused(done.err, 2, message)


def test_processes_within_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"torchrun has started this one\. Leave --processes out\."):
        launch.start("2")
