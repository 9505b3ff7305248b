"""``patchcert report``: pages and plots made from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchcert_cli.cli.groups import command, grouped
from patchcert_cli.cli.options import DatasetFilter, OutputOptions, file_to_write, folder_to_write
from patchcert_cli.cli.show import printed

ATTACKS = "Example:\n\n patchcert report attacks runs/pgd runs/random --plot queries.png"
EXAMPLES = "Examples:\n\n patchcert report zoo\n\n patchcert report zoo --out site/ --data cifar10"
app = typer.Typer(name="report", help="Make pages and plots from what was measured.", no_args_is_help=True)


@app.callback()
def report() -> None:
    """Make pages and plots from what was measured."""


@app.command("attacks", cls=command(), epilog=ATTACKS)
@grouped
def attacks(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of patchcert attack.")],
    *,
    plot: Annotated[Path, typer.Option("--plot", callback=file_to_write("--plot"), help="Draw it into this file.")] = Path(
        "queries.png"
    ),
    output: OutputOptions,
) -> None:
    """Draw accuracy under attack over the queries spent on an image, a line for each run.

    All runs are attacks on the same images under the same threat.
    """
    from patchcert_cli.cards.results import read_result
    from patchcert_cli.errors import UsageError
    from patchcert_cli.reporting import attack_plots, plots
    from patchcert_cli.storage.files import RESULT

    plots.require()
    plots.check_path(plot)
    found = [read_result(folder / RESULT) for folder in runs]
    strange = [folder for folder, one in zip(runs, found, strict=True) if one.get("method") != "attack"]
    if strange:
        raise UsageError(f"'{strange[0]}' is not a run of patchcert attack.", hint="Give folders such as runs/attack-...")
    attack_plots.queries(found, plot)
    printed(lambda: typer.echo(str(plot)), {"plot": str(plot), "runs": [str(folder) for folder in runs]}, output.json)


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
