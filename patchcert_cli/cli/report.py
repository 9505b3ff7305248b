"""``patchcert report``: pages made from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchcert_cli.cli.groups import command, grouped
from patchcert_cli.cli.options import DatasetFilter, OutputOptions, folder_to_write
from patchcert_cli.cli.show import printed

EXAMPLES = "Examples:\n\n patchcert report zoo\n\n patchcert report zoo --out site/ --data cifar10"
app = typer.Typer(name="report", help="Make pages from what was measured.", no_args_is_help=True)


@app.callback()
def report() -> None:
    """Make pages from what was measured."""


@app.command("zoo", cls=command(), epilog=EXAMPLES)
@grouped
def zoo(
    *,
    out: Annotated[
        Path, typer.Option("--out", callback=folder_to_write("--out"), help="The folder that gets index.html.")
    ] = Path("site"),
    dataset: DatasetFilter = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an index.html that this command did not write.")] = False,
    output: OutputOptions,
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
    written = str(site.write(found.values(), out, force=force))
    printed(lambda: typer.echo(written), {"page": written, "models": list(found)}, output.json)
