"""``patchcert zoo``: list, show and pull models, and add a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from patchcert_cli.cards import Card, Published

app = typer.Typer(name="zoo", help="List, show and pull models, and add a finished run.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
COLUMNS = ("name", "defense", "threat", "clean", "certified", "published", "size", "licence", "where")
NONE = "-"


@app.command("list", epilog="Examples:\n\n patchcert zoo list\n\n patchcert zoo list --dataset mnist --threat patch --json")
def list_(
    dataset: Annotated[str | None, typer.Option(help="Only models for this data set.")] = None,
    threat: Annotated[str | None, typer.Option(help="Only models for this kind of threat: patch or sparse.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the models of the zoo, from their cards alone.

    Accuracies are measured under the threat that the model was trained against; published is the paper's certified accuracy.
    """
    from patchcert_cli import cards

    zoo = cards.bundled_folder()
    found = [(card, _where(card, zoo)) for card in cards.bundled(dataset=dataset, threat=threat).values()]
    if as_json:
        _print_json([_summary(card, where) for card, where in found])
    elif not found:
        typer.echo("no model fits", err=True)
    else:
        _print_table([_row(card, where) for card, where in found])


@app.command("show", epilog="Examples:\n\n patchcert zoo show mnist-ibp-p5\n\n patchcert zoo show mnist-ibp-p5 --json")
def show(name: Annotated[str, typer.Argument(help="A model of the zoo.", metavar="NAME")], as_json: AsJson = False) -> None:
    """Show a model's card: facts, measured beside published accuracy, command, recipe, provenance, what is proven."""
    from patchcert_cli import cards

    card = cards.bundled_card(name)
    if as_json:
        _print_json(card.to_dict())
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(cards.prose(card)))
    else:
        typer.echo(cards.prose(card), nl=False)


@app.command("pull", epilog="Examples:\n\n patchcert zoo pull mnist-ibp-p5\n\n patchcert zoo pull mnist-ibp-p5 --offline")
def pull(
    name: Annotated[str, typer.Argument(help="A model of the zoo.", metavar="NAME")],
    offline: Annotated[bool, typer.Option("--offline", help="Use what is on this disk, without a network.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if it is in the cache.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a model from the Hub at its pinned commit, or use the bundled copy, and check its sha256."""
    from patchcert_cli import hub

    found = hub.pull(name, offline=offline, force=force)
    assert found.card is not None
    if as_json:
        _print_json(hub.facts(found))
        return
    typer.echo(found.note, err=True)
    typer.echo(str(found.folder))
    typer.echo(f"{_size(found.card.size)} · sha256 ok ({found.sha256[:12]}…) · licence {found.card.license}")


@app.command(
    "add",
    epilog="Examples:\n\n patchcert zoo add runs/p5 --name mnist-ibp-p5 --result runs/certify-p5/result.json"
    " --published patch:5x5=0.92/0.60 --source 'Author et al., Venue 2020, table 1'",
)
def add(
    run: Annotated[Path, typer.Argument(help="The folder of a finished training run.", metavar="RUN")],
    name: Annotated[str, typer.Option(help="Its name in the zoo.")],
    result: Annotated[
        list[Path] | None, typer.Option(help="A result.json of certify on the full test split; repeatable.")
    ] = None,
    published: Annotated[
        list[str] | None, typer.Option(help="THREAT=CLEAN/CERTIFIED that a paper reports, as fractions; repeatable.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Where --published numbers stand; the run's own source by default.")] = None,
    notes: Annotated[str | None, typer.Option(help="A paragraph for the card.")] = None,
    to: Annotated[Path | None, typer.Option(help="The zoo folder; that of the source tree by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model of this name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy a finished training run into the zoo, with a card that tells what certify measured."""
    from patchcert_cli import cards, files, hub

    if published and not source:
        source = cards.Card.read(run).source
    card = hub.add(
        run,
        name,
        {str(path): files.read_json(path) for path in result or []},
        published=[_published(text, source or "") for text in published or []],
        notes=notes,
        to=to,
        force=force,
    )
    if as_json:
        _print_json(card.to_dict())
    else:
        typer.echo(f"{card.name}: {card.status}, {len(card.results)} results, sha256 {card.files[cards.WEIGHTS].sha256[:12]}…")


def _published(text: str, source: str) -> Published:
    """Read ``THREAT=CLEAN/CERTIFIED``."""
    from patchcert_cli.cards import Published
    from patchcert_cli.errors import UsageError
    from patchcert_cli.threats import parse_threat

    threat, _, shares = text.partition("=")
    try:
        clean, certified = (float(share) for share in shares.split("/"))
    except ValueError as problem:
        raise UsageError(
            f"--published '{text}' cannot be read;", hint="use THREAT=CLEAN/CERTIFIED, such as patch:5x5=0.92/0.60."
        ) from problem
    if not 0 <= certified <= clean <= 1:
        raise UsageError(f"--published '{text}':", hint="give fractions with 0 <= CERTIFIED <= CLEAN <= 1.")
    if not source:
        raise UsageError("--published needs a source;", hint="say with --source where the numbers stand.")
    return Published(str(parse_threat(threat)), clean, certified, source)


def _where(card: Card, zoo: Path) -> str:
    from patchcert_cli.cards import WEIGHTS

    if not card.files:
        return "recipe only"
    places = ["bundled"] if (zoo / card.name / WEIGHTS).is_file() else []
    return "+".join(places + (["hub"] if card.hub.revision else [])) or "missing"


def _summary(card: Card, where: str) -> dict[str, Any]:
    measured, report = card.result(), card.report()
    return {
        "name": card.name,
        "status": card.status,
        "defense": card.defense,
        "dataset": card.dataset,
        "threat": card.threat,
        "clean": measured.clean / measured.images if measured else None,
        "certified": measured.certified / measured.images if measured else None,
        "images": measured.images if measured else None,
        "published": report.certified if report else None,
        "size": card.size,
        "licence": card.license,
        "where": where,
    }


def _row(card: Card, where: str) -> list[str]:
    facts = _summary(card, where)
    shares = [NONE if facts[key] is None else f"{facts[key]:.2%}" for key in ("clean", "certified", "published")]
    name = card.name if card.status != "unreliable" else f"{card.name} (unreliable)"
    return [name, card.defense, card.threat, *shares, _size(card.size), card.license, where]


def _size(count: int) -> str:
    if not count:
        return NONE
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{max(count / 1e3, 0.1):.1f} kB"


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _print_table(rows: list[list[str]]) -> None:
    """A table for a terminal; elsewhere plain lines, which nothing shortens."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*COLUMNS, box=None)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (list(COLUMNS), *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
