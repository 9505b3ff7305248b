"""``patchcert reproduce``: the tables of papers, published beside measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import complete, loading, show
from patchcert_cli.cli.groups import grouped
from patchcert_cli.cli.options import (
    BatchOption,
    DataOptions,
    DeviceOption,
    FreshOption,
    OutputOptions,
    RunOptions,
    SeedOption,
    folder_to_write,
    typed_command,
)
from patchcert_cli.errors import DataError, Interrupted, PatchcertError, UsageError

if TYPE_CHECKING:
    from patchcert_cli.defenses import Claim
    from patchcert_cli.papers.fill import FilledPaper, Measurement, RunRequest
    from patchcert_cli.papers.paper import Row
    from patchcert_cli.threats import Threat

EXAMPLES = (
    "Examples:\n\n patchcert reproduce\n\n patchcert reproduce metzen-2021\n\n patchcert reproduce metzen-2021 --out site/"
    "\n\n patchcert reproduce xiang-2022 --table imagenet-masks --run --data imagefolder:./val --limit 1000"
)
PAPERS = "Papers"


@dataclass(frozen=True)
class PaperOptions:
    """What is shown and written."""

    table: Annotated[
        str | None,
        typer.Option(
            "--table",
            metavar="NAME",
            help="Only this table or figure.",
            autocompletion=complete.tables,
            rich_help_panel=PAPERS,
        ),
    ] = None
    run: Annotated[
        bool,
        typer.Option(
            "--run",
            help="Certify what has no record; stop and repeat it at will. Combine it with --limit.",
            rich_help_panel=PAPERS,
        ),
    ] = False
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            callback=folder_to_write("--out"),
            help="The folder that gets NAME.html, NAME.md and a NAME-TABLE.svg for each chart.",
            rich_help_panel=PAPERS,
        ),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Replace files in it that this command did not write.", rich_help_panel=PAPERS)
    ] = False


@dataclass(frozen=True)
class CertifyOptions:
    """How ``--run`` certifies."""

    batch_size: BatchOption = None
    device: DeviceOption = "auto"
    seed: SeedOption = 0
    fresh: FreshOption = False

    def options(self) -> RunOptions:
        """As those of certify, whose run folders are named after the run."""
        return RunOptions(batch_size=self.batch_size, device=self.device, seed=self.seed, fresh=self.fresh)


@grouped
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", autocompletion=complete.papers, help="A paper, or several. Default: list the papers."),
    ] = None,
    *,
    papers: PaperOptions,
    data: DataOptions,
    how: CertifyOptions,
    output: OutputOptions,
) -> None:
    """Show every table of a paper, published beside measured.

    Measured is what follows from the records of the zoo's models; nothing is trained, and no network is needed. Each row has its
    images, 95 % interval and difference, whether the paper's number is reached, and why not. With --run, what has no record is
    certified, in run folders of certify; --data imagefolder:PATH names the images of ImageNet rows.
    """
    from patchcert_cli import papers as known

    chosen = list(dict.fromkeys(names or ()))
    if not chosen:
        _list(papers, output.json)
        return
    found = [known.load(name) for name in chosen]
    if papers.table is not None and len(found) > 1:
        raise UsageError("--table is of one paper, and several are given.", hint="Name one paper, or leave --table out.")
    given = {"--data": data.dataset, "--limit": data.limit, "--download": data.download}
    unused = [flag for flag, value in {**given, "--fresh": how.fresh}.items() if value not in (None, False)]
    if unused and not papers.run:
        raise UsageError(f"{unused[0]} says how rows are certified.", hint="Add --run, or leave it out: records need no images.")
    if data.limit is not None and data.limit < 1:
        raise UsageError(f"--limit {data.limit} leaves no image.", hint="Allowed: 1 or more.")
    if papers.out is not None:
        from patchcert_cli.reporting import plots

        plots.require()
    _show(found, papers, data, how, output.json)


def _list(papers: PaperOptions, json_to: str | None) -> None:
    from patchcert_cli import papers as known

    if papers != PaperOptions():
        raise UsageError("no paper is named.", hint=f"Name one of {', '.join(known.names())}.")
    rows, values = [], []
    for name in known.names():
        one = known.load(name)
        tables = [table.id for table in one.tables]
        values.append({"name": name, "title": one.title, "authors": one.authors, "venue": one.venue, "tables": tables})
        rows.append({"name": name, "title": one.title, "venue": one.venue, "tables": ", ".join(tables)})
    show.printed(lambda: show.table(rows, ("name", "venue", "title")), values, json_to)


def _show(found: Sequence[Any], papers: PaperOptions, data: DataOptions, how: CertifyOptions, json_to: str | None) -> None:
    """Fill the papers, certify if asked, write and print them."""
    from patchcert_cli.papers import fill

    filled = [fill.fill(one, table=papers.table) for one in found]
    code = 0
    if papers.run:
        done, code = _run([request for one in filled for request in fill.requests(one)], data, how)
        filled = [fill.with_runs(one, done) for one in filled]
    written: list[Path] = []
    if papers.out is not None:
        from patchcert_cli.reporting.site import papers as pages

        written = pages.write(filled, papers.out, force=papers.force)
    value = {"papers": [one.to_dict() for one in filled], "written": [str(path) for path in written]}
    show.printed(lambda: _print(filled, written), value, json_to)
    if code:
        raise typer.Exit(code)


def _run(requests: Sequence[RunRequest], data: DataOptions, how: CertifyOptions) -> tuple[dict[Row, Measurement], int]:
    """Certify what is requested; an error of one is printed and loses no other. Returns also the exit code of the first error."""
    from patchcert_cli.papers.fill import FOLDERS

    if data.dataset is not None and not any(one.dataset == FOLDERS for one in requests):
        raise UsageError(
            f"--data {data.dataset} is for rows about ImageNet, and none of them has to be run.", hint="Leave --data out."
        )
    found: dict[Row, Measurement] = {}
    code = 0
    if not requests:
        show.say("every row of a model with weights has a record: there is nothing to run")
    for one in requests:
        try:
            found |= _certified(one, data, how)
        except Interrupted:
            raise
        except PatchcertError as problem:
            show.error(problem, one.model)
            code = code or problem.code
    return found, code


def _certified(request: RunRequest, data: DataOptions, how: CertifyOptions) -> dict[Row, Measurement]:
    """One run of certify."""
    from patchcert_cli.evaluation import evaluate
    from patchcert_cli.evaluation.models import DefenseRequest
    from patchcert_cli.papers import fill

    dataset = data.dataset if request.dataset == fill.FOLDERS else request.dataset
    if dataset is None:
        raise DataError(
            f"{request.model}: no images for its rows about ImageNet.",
            hint="Name them: --data imagefolder:./val (class folders).",
        )

    def claims(own: Threat | None, shape: tuple[int, int, int]) -> list[Claim]:
        from patchcert_cli.defenses import Claim

        return [Claim(threat, method or None) for threat, method in request.claims]

    show.say(f"certifying {len(request.claims)} claim{'s' * (len(request.claims) != 1)} of {request.model}")
    where = DataOptions(dataset, data.data_dir, data.download, data.limit)
    wanted = DefenseRequest(masks=request.masks or None, mask_shape=request.mask_shape or None, download=data.download)
    options = how.options()
    task = loading.open_task(request.model, claims, where, options, typed_command(), wanted)
    with show.progress() as progress:
        result = evaluate.certify(task, fresh=options.fresh, progress=progress)
    return fill.from_result(result, request)


def _print(filled: Sequence[FilledPaper], written: Sequence[Path]) -> None:
    """The tables with their notes, then the files that were written."""
    from patchcert_cli.reporting import papers as texts

    for paper in filled:
        typer.echo(f"{paper.paper.title}\n{paper.paper.authors}, {paper.paper.venue}\nread: {paper.paper.read}\n{texts.ABOUT}")
        for table in paper.tables:
            typer.echo(f"\n{texts.heading(table)}")
            if table.table.about:
                typer.echo(table.table.about)
            show.table([texts.cells(row, table) for row in table.rows], texts.FIRST)
            for gap in table.table.gaps:
                typer.echo(texts.gap(gap, table))
            for names, text in texts.notes(paper, table):
                typer.echo(f"  {names}: {text}")
    for path in written:
        typer.echo(str(path))
