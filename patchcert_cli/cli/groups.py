"""Options in groups, each defined once: a frozen dataclass whose fields are options of every command that takes the group.

    @dataclass(frozen=True)
    class RunOptions:
        seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = 0

    @grouped
    def certify(model: str, *, run: RunOptions) -> None: ...

Typer sees ``certify(model: str, *, seed: ...)``; the function gets a ``RunOptions``, which mypy knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from patchcert_cli.errors import Interrupted, UsageError


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """The function as Typer should see it: the fields of each option group in the place of the group."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if not is_dataclass(parameter.annotation):
            parameters.append(parameter)
            continue
        groups[parameter.name] = parameter.annotation
        hints = get_type_hints(parameter.annotation, include_extras=True)
        parameters += [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
            for field in fields(parameter.annotation)
        ]
    own = set(inspect.signature(function).parameters) - set(groups)

    def command(**values: Any) -> None:
        built = {name: group(**{field.name: values[field.name] for field in fields(group)}) for name, group in groups.items()}
        function(**{name: value for name, value in values.items() if name in own}, **built)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, function.__module__
    return command


def command(old: Mapping[str, str] | None = None) -> type[TyperCommand]:
    """The class of a command that also reads ``--json`` without a value, as ``--json -``, and ``old`` spellings of options."""
    spelled = dict(old or {})

    class Command(TyperCommand):
        def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
            return super().parse_args(ctx, _current(args, spelled))

    return Command


def group(default: str) -> type[TyperGroup]:
    """The class of a group whose command ``default`` may be left out: what does not begin with a command's name is for it."""

    class Group(TyperGroup):
        def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
            named = not args or args[0] in self.commands or args[0] in ctx.help_option_names
            near = [] if named or Path(args[0]).exists() else get_close_matches(args[0], self.commands, 1)
            if near:
                raise UsageError(
                    f"{ctx.command_path} has no '{args[0]}', and there is no such path.", hint=f"Did you mean {near[0]}?"
                )
            return super().parse_args(ctx, args if named else [default, *args])

    return Group


def interruptible() -> type[TyperGroup]:
    """The class of a group whose commands end with one line at Ctrl-C, wherever they are."""

    class Group(TyperGroup):
        def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as problem:
                hint = "The same command goes on where a run folder has results, or else begins again."
                raise Interrupted("interrupted.", hint=hint) from problem

    return Group


def _current(words: list[str], old: Mapping[str, str]) -> list[str]:
    """What was typed, in the spelling of today."""
    current: list[str] = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        current += f"{old.get(name, name)}{equals}{value}".split(" ") if name in old else [word]
        if word == "--json" and following != "-" and (not following or following.startswith("-")):
            current.append("-")
    return current


def without(words: Sequence[str], flag: str) -> list[str]:
    """What was typed, without a flag and its value."""
    kept: list[str] = []
    value = False
    for word in words:
        if not value and word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
        value = word == flag and not value
    return kept
