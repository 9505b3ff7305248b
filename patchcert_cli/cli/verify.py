"""``patchcert zoo verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchcert_cli.cli import show
from patchcert_cli.cli.loading import open_task
from patchcert_cli.cli.options import (
    DATA,
    RUN,
    BatchOption,
    DataDirOption,
    DeviceOption,
    DownloadOption,
    FreshOption,
    JsonOption,
    KOption,
    OutOption,
    PatchOption,
    SeedOption,
    ThreatOption,
    UnitOption,
    own_threat,
    threat_from,
)

EXAMPLES = "Examples:  patchcert zoo verify cifar-bagcert-rf7 --sample 500   |   patchcert zoo verify org/model@COMMIT"


def verify(
    name: Annotated[str, typer.Argument(help="A model of the zoo, org/model@COMMIT, or a folder.", metavar="NAME")],
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Only this many images: a fixed subset chosen by --seed. Default: all.", rich_help_panel=DATA),
    ] = None,
    patch: PatchOption = None,
    threat: ThreatOption = None,
    k: KOption = None,
    unit: UnitOption = None,
    records: Annotated[
        Path | None, typer.Option(help="Compare with this file instead of the model's own records.", rich_help_panel=DATA)
    ] = None,
    attack: Annotated[
        bool, typer.Option("--attack/--no-attack", help="Attack the certified images.", rich_help_panel=RUN)
    ] = True,
    attack_limit: Annotated[
        int | None, typer.Option(min=1, help="Attack at most this many of them.", rich_help_panel=RUN)
    ] = None,
    data_dir: DataDirOption = None,
    download: DownloadOption = False,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    fresh: FreshOption = False,
    json: JsonOption = None,
) -> None:
    """Certify again, compare image by image with the published records, and attack what is certified.

    Exit code 0: every record agrees and no certified image was flipped. Exit code 8: the claim does not reproduce.
    Where nothing was claimed, exit code 6 (no records for this) or 5 (records of other weights).
    """
    chosen = threat_from(threat=threat, patch=patch, k=k, unit=unit)

    from patchcert_cli import attacks
    from patchcert_cli.cards.published import PublishedRecords
    from patchcert_cli.catalog import resolve
    from patchcert_cli.catalog.claims import check_results
    from patchcert_cli.defenses import Claim
    from patchcert_cli.errors import DataError
    from patchcert_cli.evaluation import reproduce
    from patchcert_cli.reporting import text
    from patchcert_cli.storage import files

    found = resolve.resolve(name)
    if records is not None:
        published = PublishedRecords.read(records)
    elif found.card is None or files.PUBLISHED_RECORDS not in found.card.files:
        raise DataError(f"{name} publishes no records to compare with.", hint="Name a file of them: --records FILE.")
    else:
        check_results(found.card, found.folder)
        published = PublishedRecords.read(found.folder / files.PUBLISHED_RECORDS)
    task = open_task(
        name,
        lambda own, _: [Claim(chosen or own_threat(own, threat=threat, unit=unit))],
        dataset=None,
        data_dir=data_dir,
        download=download,
        limit=sample,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    attacker = attacks.for_threat(task.threat, seed=seed) if attack else None
    settings = {"name": type(attacker).__name__, "seed": seed}
    with show.progress() as progress:
        outcome = reproduce.reproduce(
            task, published, attacker, settings, out, limit=attack_limit, fresh=fresh, progress=progress
        )
    show.result(text.verify_rows(outcome), outcome, json)
    reproduce.check(outcome)
