"""``patchcert report``: pages made from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchcert_cli.cli.options import folder_to_write

app = typer.Typer(name="report", help="Make pages from what was measured.", no_args_is_help=True)


@app.callback()
def report() -> None:
    """Make pages from what was measured."""


@app.command("zoo", epilog="Examples:\n\n patchcert report zoo\n\n patchcert report zoo --out site/ --dataset cifar10")
def zoo(
    out: Annotated[
        Path, typer.Option("--out", callback=folder_to_write("--out"), help="The folder that gets index.html.")
    ] = Path("site"),
    dataset: Annotated[str | None, typer.Option(help="Only models for this data set.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an index.html that this command did not write.")] = False,
) -> None:
    """Write the zoo as one web page: leaderboards, curves and cards.

    It is made from the model cards alone. The page stands for itself: it loads nothing, and opens without a server.
    """
    from patchcert_cli.catalog import bundled
    from patchcert_cli.errors import UsageError
    from patchcert_cli.reporting import site

    found = bundled.cards(dataset=dataset)
    if not found:
        raise UsageError("there is no model to report on.", hint="See: patchcert zoo list")
    typer.echo(site.write(found.values(), out, force=force))
