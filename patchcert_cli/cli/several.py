"""One command for several models or image files: each is run as if alone, an error loses no other result, one table shows all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from patchcert_cli.cli import show
from patchcert_cli.cli.options import typed_command
from patchcert_cli.errors import Interrupted, PatchcertError, UsageError
from patchcert_cli.threats import Guarantee

Value = dict[str, Any]


def alone(models: Sequence[str], given: Mapping[str, object]) -> None:
    """Refuse options of one model, by flag, where there are several models.

    Raises:
        UsageError: names the first of them.
    """
    flags = [flag for flag, value in given.items() if value not in (None, False)]
    if len(models) > 1 and flags:
        raise UsageError(
            f"{flags[0]} is for one model, and {len(models)} are given.", hint=f"Name one model, or leave {flags[0]} out."
        )


def run(
    models: Sequence[str] | None,
    one: Callable[[str | None, str], Value],
    table: Callable[[list[Value]], None],
    json_to: str | None,
    *,
    one_table: Callable[[Value], None],
    check: Callable[[Value], None] | None = None,
    about: str = "model",
) -> None:
    """Run a command for its models, or for what ``about`` says, and print what it found.

    ``one(model, command)`` computes a result; ``command`` is what would have been typed for that model alone.
    One model, or the default (None), prints ``one_table``; several print ``table`` and give a list as JSON. ``check`` raises the
    error that a result ends in; the result is still printed.

    Raises:
        PatchcertError: of one model alone.
        typer.Exit: with the exit code of the first error, which was printed when it occurred.
    """
    names = list(dict.fromkeys(models or []))
    if len(names) < 2:
        value = one(names[0] if names else None, typed_command())
        show.printed(lambda: one_table(value), value, json_to)
        if check is not None:
            check(value)
        return
    values: list[Value] = []
    codes: list[int] = []
    for name in names:
        value = {about: name}
        try:
            value = one(name, typed_command(name, names))
            if check is not None:
                check(value)
        except PatchcertError as problem:
            if os.environ.get("PATCHCERT_DEBUG"):
                raise
            show.error(problem, name)
            value = value | {"error": {"code": problem.code, "message": problem.message, "hint": problem.hint}}
            codes.append(problem.code)
        values.append(value)
        if codes and codes[-1] == Interrupted.code:
            break
    complete = [value for value in values if set(value) - {about, "error"}]
    show.printed(lambda: table(complete) if complete else None, values, json_to)
    if codes:
        raise typer.Exit(codes[-1] if codes[-1] == Interrupted.code else codes[0])


def in_two_columns(rows: Callable[[Value], Sequence[tuple[str, str]]]) -> Callable[[Value], None]:
    """How to print the ``rows`` of one result."""
    return lambda value: show.pairs(rows(value))


def estimates(values: Sequence[Value]) -> None:
    """Print what each dry run found, one below the other: their entries differ."""
    from patchcert_cli.reporting import text

    for value in values:
        show.pairs(text.plain_rows(value))
        typer.echo()


def by_guarantee(rows: Sequence[Mapping[str, str]], guarantees: Sequence[str], first: Sequence[str]) -> None:
    """Print rows in one table for each guarantee: recovery, detection, and what proves nothing, are never in one."""
    for guarantee in Guarantee:
        part = [row for row, of in zip(rows, guarantees, strict=True) if of == guarantee]
        if part and guarantee is not Guarantee.RECOVERY:
            promised = f"Certified {guarantee}" if guarantee.proves else "No certificates"
            typer.echo(f"{promised}: {guarantee.phrase}.")
        if part:
            show.table(part, first)
