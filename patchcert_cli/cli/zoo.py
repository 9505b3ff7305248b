"""``patchcert zoo``: list, show, pull and remove models; verify, add and push are in files of their own."""

from __future__ import annotations

import sys
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import sharing, verify
from patchcert_cli.cli import show as said
from patchcert_cli.cli.options import AsJson, print_json
from patchcert_cli.storage.files import file_size
from patchcert_cli.threats import Guarantee

if TYPE_CHECKING:
    from patchcert_cli.cards import Card

app = typer.Typer(name="zoo", help="List, show, pull, verify and publish models.", no_args_is_help=True)
COLUMNS = ("name", "defense", "threat", "clean", "certified", "published", "arithmetic", "size", "licence", "where")
FIRST = (
    "name",
    "threat",
    "clean",
    "certified",
    "defense",
    "published",
    "arithmetic",
    "size",
    "where",
    "licence",
)  # in little room
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
    from patchcert_cli.catalog import bundled

    zoo = bundled.folder()
    found = [(card, _where(card, zoo)) for card in bundled.cards(dataset=dataset, threat=threat).values()]
    if as_json:
        print_json([_summary(card, where) for card, where in found])
    elif not found:
        typer.echo("no model fits", err=True)
    else:
        for guarantee in Guarantee:  # never in one table
            rows = [_row(card, where) for card, where in found if card.guarantee is guarantee]
            if rows:
                if guarantee is not Guarantee.RECOVERY:
                    typer.echo(f"Certified {guarantee}: {guarantee.phrase}.")
                _print_table(rows)


@app.command("show", epilog="Examples:\n\n patchcert zoo show mnist-ibp-p5\n\n patchcert zoo show mnist-ibp-p5 --json")
def show(name: Annotated[str, typer.Argument(help="A model of the zoo.", metavar="NAME")], as_json: AsJson = False) -> None:
    """Show a model's card: facts, measured beside published accuracy, command, recipe, provenance, what is proven."""
    from patchcert_cli import cards
    from patchcert_cli.catalog import bundled

    card = bundled.card(name)
    if as_json:
        print_json(card.to_dict())
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(cards.prose(card)))
    else:
        typer.echo(cards.prose(card), nl=False)


@app.command(
    "pull",
    epilog="Examples:\n\n patchcert zoo pull mnist-ibp-p5\n\n patchcert zoo pull mnist-ibp-p5 --offline"
    "\n\n patchcert zoo pull org/model@COMMIT",
)
def pull(
    name: Annotated[str, typer.Argument(help="A model of the zoo, or anybody's: org/model@COMMIT.", metavar="NAME")],
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Another commit than the card's, checked against its own card.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use what is on this disk, without a network.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if it is in the cache.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch a model from the Hub at its pinned commit, or use the cached or bundled copy, and check the sha256 of every file."""
    from patchcert_cli.catalog import resolve

    found = resolve.pull(name, offline=offline, force=force, revision=revision)
    assert found.card is not None
    if as_json:
        print_json(resolve.facts(found))
        return
    typer.echo(found.note, err=True)
    typer.echo(str(found.folder))
    count = len(found.card.files)
    typer.echo(f"{count} files · {file_size(found.card.size)} · sha256 ok ({found.sha256[:12]}…) · licence {found.card.license}")


@app.command("remove", epilog="Examples:\n\n patchcert zoo remove mnist-ibp-p5\n\n patchcert zoo remove org/model")
def remove(
    name: Annotated[str, typer.Argument(help="A model of the zoo, or org/model.", metavar="NAME")], as_json: AsJson = False
) -> None:
    """Take a model, all its revisions, out of the Hub's cache. Copies that are bundled with patchcert stay."""
    from patchcert_cli.catalog import bundled, resolve
    from patchcert_cli.hub import client

    address = resolve.ADDRESS.fullmatch(name)
    card = None if address else bundled.card(name)
    repo = card.hub.repo if card else address["repo"] if address else name
    freed = client.remove(repo)
    if as_json:
        print_json({"name": name, "repo": repo, "freed": freed})
        return
    said = f"{repo}: freed {file_size(freed)}" if freed else f"{repo} is not in the Hub's cache: nothing to remove"
    typer.echo(said + ("; the bundled copy stays" if card and card.files else ""))


app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
app.command("add", epilog=sharing.ADD)(sharing.add)
app.command("push", epilog=sharing.PUSH)(sharing.push)


def _where(card: Card, zoo: Path) -> str:
    """Where the weights are: bundled, in the Hub's cache, on the Hub."""
    from patchcert_cli import cards
    from patchcert_cli.storage import hub_cache

    if not card.files:
        return card.status
    places = ["bundled"] if cards.weights_of(zoo / card.name) else []
    if card.hub.revision:
        places += ["cached"] if hub_cache.snapshot(card.hub.repo, card.hub.revision).is_dir() else []
        places += ["hub"]
    return "+".join(places) or "missing"


def _summary(card: Card, where: str) -> dict[str, Any]:
    measured, report = card.result(), card.report()
    return {
        "name": card.name,
        "status": card.status,
        "defense": card.defense,
        "dataset": card.dataset,
        "threat": str(card.threat),
        "guarantee": str(card.guarantee),
        "clean": measured.clean / measured.images if measured else None,
        "certified": measured.certified / measured.images if measured else None,
        "images": measured.images if measured else None,
        "arithmetic": str(card.arithmetic(measured)) if measured else None,
        "published": report.certified if report else None,
        "size": card.size,
        "licence": card.license,
        "where": where,
    }


def _row(card: Card, where: str) -> list[str]:
    facts = _summary(card, where)
    shares = [NONE if facts[key] is None else f"{facts[key]:.2%}" for key in ("clean", "certified", "published")]
    name = card.name if card.status != "unreliable" else f"{card.name} (unreliable)"
    return [
        name,
        card.defense,
        str(card.threat),
        *shares,
        facts["arithmetic"] or NONE,
        file_size(card.size) if card.size else NONE,
        card.license,
        where,
    ]


def _print_table(rows: list[list[str]]) -> None:
    """A table of the columns that the terminal has room for; elsewhere plain lines. No name is ever shortened."""
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Column, Table

        console = Console()
        room = accumulate(widths[COLUMNS.index(name)] + 2 for name in FIRST)
        shown = [name for name, end in zip(FIRST, room, strict=True) if end <= console.width] or FIRST[:1]
        at = [index for index, name in enumerate(COLUMNS) if name in shown]
        table = Table(*(Column(COLUMNS[index], no_wrap=True, overflow="ignore") for index in at), box=None)
        for row in rows:
            table.add_row(*(row[index] for index in at))
        console.width = max(console.width, widths[0] + 2)  # the terminal may break a line, but nothing is cut off
        console.print(table, crop=False)
        if len(at) < len(COLUMNS):
            left = ", ".join(name for name in COLUMNS if name not in shown)
            said.say(f"not shown: {left}; widen the terminal, or see --json")
        return
    for row in (list(COLUMNS), *rows):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
