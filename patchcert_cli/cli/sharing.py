"""``patchcert zoo add`` and ``patchcert zoo push``: from a finished run to the zoo, and to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchcert_cli.cli import complete, show
from patchcert_cli.cli.groups import grouped
from patchcert_cli.cli.options import OutputOptions, folder_to_write

if TYPE_CHECKING:
    from patchcert_cli.cards import Published
    from patchcert_cli.catalog.publish import Release

ADD = (
    "Examples:\n\n patchcert zoo add runs/p5 --name mnist-ibp-p5 --result runs/certify-p5/result.json"
    " --published patch:5x5=0.92/0.60 --source 'Author et al., Venue 2020, table 1'"
)
OLD = {"--to": "--out"}  # of zoo add, in earlier versions
PUSH = "Examples:\n\n patchcert zoo push runs/x --to org/name --dry-run\n\n patchcert zoo push runs/x --to org/name --create-pr"


@grouped
def add(
    run: Annotated[
        Path,
        typer.Argument(
            help="The folder of a finished training run, or of a model of the zoo, which keeps its other results.", metavar="RUN"
        ),
    ],
    *,
    name: Annotated[str, typer.Option("--name", help="Its name in the zoo.")],
    result: Annotated[
        list[Path] | None, typer.Option("--result", help="A result.json of certify on the full test split; repeatable.")
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(
            "--sample",
            metavar="FILE=IMAGES",
            help="A result.json of certify on images that are not a test split, and what they are and come from; repeatable.",
        ),
    ] = None,
    published: Annotated[
        list[str] | None,
        typer.Option("--published", help="THREAT=CLEAN/CERTIFIED of a paper, as fractions; repeatable."),
    ] = None,
    source: Annotated[str | None, typer.Option("--source", help="Where these were published. Default: the run's source.")] = None,
    notes: Annotated[str | None, typer.Option("--notes", help="A paragraph for the card.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", callback=folder_to_write("--out"), help="The zoo folder. Default: that of the source tree."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a model of this name.")] = False,
    output: OutputOptions,
) -> None:
    """Copy a finished training run into the zoo, with a card that states what certify measured."""
    from patchcert_cli import cards
    from patchcert_cli.catalog import add_to_zoo
    from patchcert_cli.storage import files

    if published and not source:
        source = cards.Card.read(run).source
    pictures = dict(_pictures(text) for text in sample or [])
    card = add_to_zoo.add(
        run,
        name,
        {str(path): files.read_json(path) for path in result or []},
        published=[_published(text, source or "") for text in published or []],
        notes=notes,
        samples={path: files.read_json(Path(path)) for path in pictures},
        pictures=pictures,
        to=out,
        force=force,
    )
    for remark in add_to_zoo.of_one_machine(card, out):
        show.say(remark)
    counts = f"{len(card.results)} results" + (f", {len(card.samples)} on other images" if card.samples else "")
    line = f"{card.name}: {card.status}, {counts}, sha256 {cards.weights_sha256(card.files)[:12]}…"
    show.printed(lambda: typer.echo(line), card.to_dict(), output.json)


def _pictures(text: str) -> tuple[str, str]:
    """Read ``FILE=IMAGES``."""
    from patchcert_cli.errors import UsageError

    path, _, words = text.partition("=")
    if not path or not words.strip():
        hint = "Use FILE=IMAGES, such as result.json='100 photographs of birds, example.org/birds'."
        raise UsageError(f"--sample '{text}' does not say what the images are.", hint=hint)
    return path, words.strip()


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
            f"--published '{text}' cannot be read.", hint="Use THREAT=CLEAN/CERTIFIED, such as patch:5x5=0.92/0.60."
        ) from problem
    if not 0 <= certified <= clean <= 1:
        raise UsageError(f"--published '{text}'.", hint="Give fractions with 0 <= CERTIFIED <= CLEAN <= 1.")
    if not source:
        raise UsageError("--published needs a source.", hint="Name where the numbers are published with --source.")
    return Published(parse_threat(threat), clean, certified, source)


@grouped
def push(
    model: Annotated[
        str,
        typer.Argument(
            help="The folder of a finished run, or a model of the zoo.", metavar="RUN|NAME", autocompletion=complete.models
        ),
    ],
    *,
    to: Annotated[
        str | None, typer.Option("--to", metavar="ORG/NAME", help="The repository. Default: the one that the card names.")
    ] = None,
    result: Annotated[
        list[Path] | None,
        typer.Option(
            "--result", help="A result.json of certify on the full test split; repeatable. Default: those found under runs/."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report what would be sent; do not use the network.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing to main.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it has to be made.")] = False,
    output: OutputOptions,
) -> None:
    """Publish a model on the Hub: card, weights, configuration, records of every test image, evaluation metadata.

    Refused unless certify covered the full test split with these very weights and every count follows from its records.
    """
    from patchcert_cli.catalog import publish, resolve
    from patchcert_cli.storage import files

    found = resolve.resolve(Path(model) if Path(model).is_dir() else model)
    given = {str(path): files.read_json(path) for path in result or []}
    release = publish.prepare(found, to, given, [Path("runs"), found.folder.parent])
    plan = {**release.preview(), "create_pr": create_pr, "dry_run": dry_run}
    if output.json != "-":
        _print_plan(release, create_pr)
    if dry_run:
        show.say("dry run: nothing was sent")
        show.printed(lambda: None, plan, output.json)
        return
    done = publish.publish(release, create_pr=create_pr, private=private)
    value = {**plan, "commit": done.commit, "url": done.url, "pull_request": done.request}
    line = f"pull request {done.request}" if done.request else f"pushed {release.repo} @ {done.commit}"
    show.printed(lambda: typer.echo(line), value, output.json)
    if not done.request and output.json != "-":
        show.say(f"the commit is written into {release.source / files.CARD}; anyone can now type:")
        show.say(f"  patchcert zoo pull {release.repo}@{done.commit}")


def _print_plan(release: Release, create_pr: bool) -> None:
    plan = release.preview()
    typer.echo(f"to {plan['repo']}, {'as a pull request' if create_pr else 'branch main'}: model {plan['model']}")
    for name, facts in plan["files"].items():
        typer.echo(f"  {name:<28} {facts['size']:>12} bytes  sha256 {facts['sha256']}")
    for one in plan["claims"]:
        typer.echo(
            f"  claims {one['threat']} ({one['method']}, {one['guarantee']}, {one['arithmetic']}):"
            f" clean {one['clean']}/{one['images']}, certified {one['certified']}/{one['images']}"
        )
    for where in plan["evidence"]:
        typer.echo(f"  evidence {where}")
