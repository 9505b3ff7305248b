"""``patchcert zoo verify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import complete, launch, loading, several, show
from patchcert_cli.cli.groups import grouped
from patchcert_cli.cli.options import DATA, DataOptions, OutputOptions, RunOptions, ThreatOptions

if TYPE_CHECKING:
    from patchcert_cli.cards.published import PublishedRecords
    from patchcert_cli.threats import Threat

EXAMPLES = "Examples:  patchcert zoo verify cifar-bagcert-rf7 --limit 500   |   patchcert zoo verify org/model@COMMIT"
OLD = {"--sample": "--limit", "--no-attack": "--attack none"}  # spellings of earlier versions
ATTACK, NO_ATTACK = "Attack", "none"
COLUMNS = ("model", "verdict", "agree", "flipped", "claim")  # where there is little room


@dataclass(frozen=True)
class VerifyOptions:
    """What is compared, and which attack tries the certified images."""

    records: Annotated[
        Path | None,
        typer.Option(
            "--records", metavar="FILE", help="Compare with this file, not with the model's records.", rich_help_panel=DATA
        ),
    ] = None
    attack: Annotated[
        str | None,
        typer.Option(
            "--attack",
            autocompletion=complete.one_attack,
            metavar="NAME|none",
            help="Attack the certified images with this attack, or with none. Default: the documented one of the threat.",
            rich_help_panel=ATTACK,
        ),
    ] = None
    attack_limit: Annotated[
        int | None,
        typer.Option("--attack-limit", min=1, metavar="N", help="Attack at most N of them.", rich_help_panel=ATTACK),
    ] = None


@grouped
def verify(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Models of the zoo, org/model@COMMIT, or folders. Several give one table.",
            metavar="NAME",
            autocompletion=complete.models,
        ),
    ],
    *,
    threat: ThreatOptions,
    verification: VerifyOptions,
    data: DataOptions,
    run: RunOptions,
    output: OutputOptions,
) -> None:
    """Certify again, compare image by image with the published records, and attack what is certified.

    Exit code 0: every record agrees and no certified image was flipped. Exit code 8: the claim does not reproduce.
    Where nothing was claimed, exit code 6 (no records for this) or 5 (records of other weights).
    """
    chosen = threat.one()
    several.alone(names, {"--out": run.out, "--records": verification.records})
    if verification.attack not in (None, NO_ATTACK):
        from patchcert_cli import attacks

        attacks.check_name(verification.attack)
    launch.start(run.processes)

    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation import reproduce
    from patchcert_cli.reporting import text

    def claims(own: Threat | None, shape: tuple[int, int, int]) -> list[Claim]:
        return [Claim(chosen or threat.own(own))]

    def one(name: str | None, command: str) -> several.Value:
        assert name is not None
        published = _published(name, verification.records)
        task = loading.open_task(name, claims, data, run, command)
        attacker, settings = None, dict[str, Any]()
        if verification.attack != NO_ATTACK:
            from patchcert_cli import attacks

            attacker = attacks.for_threat(task.threat, verification.attack, seed=run.seed)
            settings = attacks.identity(attacker)
        with show.progress() as progress:
            limit = verification.attack_limit
            return reproduce.reproduce(
                task, published, attacker, settings, run.out, limit=limit, fresh=run.fresh, progress=progress
            )

    several.run(names, one, _table, output.json, one_table=several.in_two_columns(text.verify_rows), check=reproduce.check)


def _published(name: str, records: Path | None) -> PublishedRecords:
    """The records to compare with, checked against the card that they come with."""
    from patchcert_cli.cards.published import PublishedRecords
    from patchcert_cli.catalog import resolve
    from patchcert_cli.catalog.claims import check_results
    from patchcert_cli.errors import DataError
    from patchcert_cli.storage import files

    found = resolve.resolve(name)
    if records is not None:
        return PublishedRecords.read(records)
    if found.card is None or files.PUBLISHED_RECORDS not in found.card.files:
        raise DataError(f"{name} publishes no records to compare with.", hint="Name a file of them: --records FILE.")
    check_results(found.card, found.folder)
    return PublishedRecords.read(found.folder / files.PUBLISHED_RECORDS)


def _table(outcomes: Sequence[several.Value]) -> None:
    """One row for each model."""
    show.table(
        [
            {
                "model": str(outcome["model"]),
                "claim": str(outcome["claim"]),
                "agree": f"{outcome['agree']}/{outcome['images']}",
                "attacked": str(outcome["attacked"]),
                "flipped": str(len(outcome["broken"])),
                "verdict": "consistent" if outcome["holds"] else "does not reproduce",
                "time": f"{outcome['seconds']:.1f} s",
            }
            for outcome in outcomes
        ],
        COLUMNS,
    )
