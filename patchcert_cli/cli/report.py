"""``patchcert report``: pages and plots made from what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchcert_cli.cli.groups import command, group, grouped
from patchcert_cli.cli.options import (
    DataDirOption,
    DatasetFilter,
    DeviceOption,
    OutputOptions,
    ThreatOptions,
    file_to_write,
    folder_to_write,
)
from patchcert_cli.cli.show import printed, progress, say

ATTACKS = "Example:\n\n patchcert report attacks runs/pgd runs/random --plot queries.png"
EXAMPLES = "Examples:\n\n patchcert report zoo\n\n patchcert report zoo --out site/ --data cifar10"
RUNS = (
    "Examples:\n\n patchcert report runs/certify-cifar-bagcert-rf7-patch-5x5-0a1b2c3d --out page/"
    "\n\n patchcert report runs/one runs/other --weakest 12 --data-dir data"
)
HELP = """Make pages and plots from what was measured.

Without one of these commands, what follows are run folders: patchcert report runs/one --out page/. A command's name is always the
command; a folder of that name is ./zoo.
"""
app = typer.Typer(name="report", cls=group("runs"), help=HELP, no_args_is_help=True)
PageForce = Annotated[bool, typer.Option("--force", help="Replace an index.html that this command did not write.")]


@app.callback(help=HELP)
def report() -> None:
    """Make pages and plots from what was measured."""


@app.command("runs", cls=command(), epilog=RUNS)
@grouped
def runs(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders of patchcert certify and patchcert attack, or of train.")
    ],
    *,
    out: Annotated[
        Path, typer.Option("--out", callback=folder_to_write("--out"), help="The folder that gets index.html.")
    ] = Path("page"),
    threat: ThreatOptions,
    weakest: Annotated[int, typer.Option("--weakest", metavar="N", min=0, help="Draw the N weakest images of each run.")] = 6,
    data_dir: DataDirOption = None,
    device: DeviceOption = "auto",
    force: PageForce = False,
    output: OutputOptions,
) -> None:
    """Write your own runs as one web page: numbers, curves, the weakest images with their margins.

    The runs are about the same images. Unfinished runs are shown as far as they are. The folder of patchcert train means the runs
    that evaluate its weights. Of runs with several threats, --patch or --k says which one the first line and the weakest images
    are about; by default it is the first.
    """
    from patchcert_cli.reporting import figure_style
    from patchcert_cli.reporting.site import page_path
    from patchcert_cli.reporting.site import runs as own_runs
    from patchcert_cli.reporting.site import weakest as weak_images
    from patchcert_cli.storage.files import write_named

    figure_style.require()
    path, found = page_path(out, own_runs.GENERATOR, force=force), own_runs.read(runs, threat.one(), say)
    with progress() as shown:
        drawn = [
            (run, weak_images.weakest(run, weakest, data_dir=data_dir, device=device, progress=shown))
            for run in found
            if weakest and not run.attacks
        ]
    write_named(path, own_runs.render(found, drawn).encode())
    value = {"page": str(path), "runs": [run.to_dict() for run in found]}
    printed(lambda: typer.echo(str(path)), value, output.json)


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
    force: PageForce = False,
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
