"""``patchcert zoo``: list, show, pull and remove models; verify, add and push are in files of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import complete, several, sharing, verify
from patchcert_cli.cli import show as terminal
from patchcert_cli.cli.groups import command, grouped
from patchcert_cli.cli.options import DatasetFilter, OfflineOption, OutputOptions
from patchcert_cli.storage.files import file_size

if TYPE_CHECKING:
    from patchcert_cli.cards import Card

app = typer.Typer(name="zoo", help="List, show, pull, verify and publish models.", no_args_is_help=True)
COLUMNS = ("name", "threat", "clean", "certified", "defense", "published", "arithmetic", "size", "where")  # in little room
NONE = "-"
LIST = "Examples:\n\n patchcert zoo list\n\n patchcert zoo list --data mnist --threat patch --json -"
SHOW = "Examples:\n\n patchcert zoo show mnist-ibp-p5\n\n patchcert zoo show mnist-ibp-p5 --json -"


@app.command("list", cls=command(), epilog=LIST)
@grouped
def list_(
    *,
    dataset: DatasetFilter = None,
    threat: Annotated[
        str | None, typer.Option("--threat", help="Only models for this threat: patch, sparse, or one such as patch:5x5.")
    ] = None,
    output: OutputOptions,
) -> None:
    """List the models of the zoo, from their cards alone.

    Accuracies are measured under the threat that the model was trained against; published is the paper's certified accuracy.
    """
    from patchcert_cli.catalog import bundled

    zoo = bundled.folder()
    found = [(card, _where(card, zoo)) for card in bundled.cards(dataset=dataset, threat=threat).values()]
    value = [_summary(card, where) for card, where in found]
    if not found:
        terminal.say("no model fits")
    rows, guarantees = [_row(card, where) for card, where in found], [card.guarantee for card, _ in found]
    terminal.printed(lambda: several.by_guarantee(rows, guarantees, COLUMNS), value, output.json)


@app.command("show", cls=command(), epilog=SHOW)
@grouped
def show(
    name: Annotated[str, typer.Argument(help="A model of the zoo.", metavar="NAME", autocompletion=complete.models)],
    *,
    output: OutputOptions,
) -> None:
    """Show a model's card: facts, measured beside published accuracy, command, recipe, provenance, what is proven."""
    from patchcert_cli import cards
    from patchcert_cli.catalog import bundled

    card = bundled.card(name)

    def prose() -> None:
        if not sys.stdout.isatty():
            typer.echo(cards.prose(card), nl=False)
            return
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(cards.prose(card)))

    terminal.printed(prose, card.to_dict(), output.json)


@app.command(
    "pull",
    cls=command(),
    epilog="Examples:\n\n patchcert zoo pull mnist-ibp-p5 cifar-bagcert-rf7\n\n patchcert zoo pull mnist-ibp-p5 --offline"
    "\n\n patchcert zoo pull org/model@COMMIT",
)
@grouped
def pull(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Models of the zoo, or of the Hub: org/model@COMMIT. Several give one table.",
            metavar="NAME",
            autocompletion=complete.models,
        ),
    ],
    *,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="COMMIT", help="Another commit than the card's, checked against its own card."),
    ] = None,
    offline: OfflineOption = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if it is in the cache.")] = False,
    output: OutputOptions,
) -> None:
    """Fetch models from the Hub at pinned commits, or use cached or bundled copies, and check the sha256 of every file."""
    several.alone(names, {"--revision": revision})

    from patchcert_cli.catalog import resolve

    def one(name: str | None, _: str) -> several.Value:
        assert name is not None
        found = resolve.pull(name, offline=offline, force=force, revision=revision)
        assert found.card is not None
        terminal.say(found.note)
        return {**resolve.facts(found), "licence": found.card.license}

    def lines(value: several.Value) -> None:
        facts = _pulled(value)
        typer.echo(value["folder"])
        typer.echo(f"{facts['files']} files · {facts['size']} · sha256 ok ({facts['sha256']}) · licence {value['licence']}")

    several.run(names, one, lambda values: terminal.table([_pulled(value) for value in values]), output.json, one_table=lines)


@app.command("remove", cls=command(), epilog="Examples:\n\n patchcert zoo remove mnist-ibp-p5\n\n patchcert zoo remove org/model")
@grouped
def remove(
    name: Annotated[
        str, typer.Argument(help="A model of the zoo, or org/model.", metavar="NAME", autocompletion=complete.models)
    ],
    *,
    output: OutputOptions,
) -> None:
    """Take a model, all its revisions, out of the Hub's cache. Copies that are bundled with patchcert stay."""
    from patchcert_cli.catalog import bundled, resolve
    from patchcert_cli.hub import client

    address = resolve.ADDRESS.fullmatch(name)
    card = None if address else bundled.card(name)
    repo = card.hub.repo if card else address["repo"] if address else name
    freed = client.remove(repo)
    text = f"{repo}: freed {file_size(freed)}" if freed else f"{repo} is not in the Hub's cache: nothing to remove"
    text += "; the bundled copy stays" if card and card.files else ""
    terminal.printed(lambda: typer.echo(text), {"name": name, "repo": repo, "freed": freed}, output.json)


app.command("verify", cls=command(verify.OLD), epilog=verify.EXAMPLES)(verify.verify)
app.command("add", cls=command(sharing.OLD), epilog=sharing.ADD)(sharing.add)
app.command("push", cls=command(), epilog=sharing.PUSH)(sharing.push)


def _pulled(value: several.Value) -> dict[str, str]:
    """A row about a model that was pulled."""
    files = value["files"]
    return {
        "model": str(value["name"]),
        "files": str(len(files)),
        "size": file_size(sum(file["size"] for file in files.values())),
        "sha256": f"{value['sha256'][:12]}…",
        "folder": str(value["folder"]),
    }


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


def _row(card: Card, where: str) -> dict[str, str]:
    facts = _summary(card, where)
    clean, certified, published = (
        NONE if facts[key] is None else f"{facts[key]:.2%}" for key in ("clean", "certified", "published")
    )
    return {
        "name": card.name if card.status != "unreliable" else f"{card.name} (unreliable)",
        "defense": card.defense,
        "threat": str(card.threat),
        "clean": clean,
        "certified": certified,
        "published": published,
        "arithmetic": facts["arithmetic"] or NONE,
        "size": file_size(card.size) if card.size else NONE,
        "licence": card.license,
        "where": where,
    }
