"""One command for several models or image files: each is run as if alone, an error loses no other result, one table shows all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import typer

from patchcert_cli.cli import show
from patchcert_cli.cli.options import typed_command
from patchcert_cli.errors import Interrupted, PatchcertError, UsageError, of_code, on_all_ranks
from patchcert_cli.parallel import workers as jobs
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
    shared: bool = False,
) -> None:
    """Run a command for its models, or for what ``about`` says, and print what it found.

    ``one(model, command)`` computes a result; ``command`` is what would have been typed for that model alone.
    One model, or the default (None), prints ``one_table``; several print ``table`` and give a list as JSON. ``check`` raises the
    error that a result ends in; the result is still printed. With ``shared`` the processes of a job share them; otherwise they
    work on each of them together.

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

    def attempt(name: str) -> Value:
        value: Value = {about: name}
        try:
            value = one(name, typed_command(name, names))
            if check is not None:
                check(value)
        except PatchcertError as problem:
            if os.environ.get("PATCHCERT_DEBUG"):
                raise
            value = value | {"error": {"code": problem.code, "message": problem.message, "hint": problem.hint}}
        return value

    values, codes = [], []
    for value in _shared(names, attempt, about) if shared else map(attempt, names):
        values.append(value)
        if "error" in value:
            problem = value["error"]
            codes.append(int(problem["code"]))
            show.error(of_code(codes[-1])(problem["message"], hint=problem["hint"]), value[about])
            if codes[-1] == Interrupted.code:
                break
    complete = [value for value in values if set(value) - {about, "error"}]
    show.printed(lambda: table(complete) if complete else None, values, json_to)
    if codes:
        raise typer.Exit(codes[-1] if codes[-1] == Interrupted.code else codes[0])


def _shared(names: Sequence[str], attempt: Callable[[str], Value], about: str) -> Iterator[Value]:
    """What is found for each name, in their order, on the first rank of a job; each rank takes the next one that none has taken.

    Raises:
        UsageError: there are more ranks than names, or the ranks have other names or models.
    """
    workers = jobs.current().scope()
    if workers.size > len(names):
        hint = f"Use --processes {len(names)} or fewer."
        raise on_all_ranks(UsageError(f"{workers.size} processes are more than the {len(names)} {about}s.", hint=hint))
    workers.agree({f"{about}s": " ".join(names)})
    own = {}
    while (at := workers.add("taken", 1) - 1) < len(names):
        own[at] = attempt(names[at])
        workers.tell(f"found {at}", own[at])
        if workers.alone:
            yield own[at]
    if workers.alone or not workers.first:
        return
    model = None
    for at in range(len(names)):
        value = own.get(at) or workers.ask(f"found {at}", jobs.LONGEST)
        found = value.get("model_sha256")
        if found is not None and found != (model := model or found):
            raise UsageError(f"the ranks have other models: {model} and {found}.", hint="All ranks need the same models.")
        yield value


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
