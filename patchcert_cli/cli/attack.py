"""``patchcert attack``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from patchcert_cli.cli import show
from patchcert_cli.cli.options import (
    RUN,
    BatchOption,
    DataDirOption,
    DatasetOption,
    DeviceOption,
    DownloadOption,
    DryRunOption,
    FreshOption,
    JsonOption,
    KOption,
    LimitOption,
    ModelArgument,
    OutOption,
    PatchOption,
    SeedOption,
    ThreatOption,
    UnitOption,
    open_plan,
    own_threat,
    threat_from,
)

EXAMPLES = "Examples:  patchcert attack mnist-ibp-p5 --patch 5 --limit 500   |   patchcert attack runs/x --threat sparse --k 4"

ATTACK = "Attack"
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Gradient steps.", rich_help_panel=ATTACK)]
RestartsOption = Annotated[
    int | None, typer.Option("--restarts", min=0, help="Random restarts per location (patch).", rich_help_panel=ATTACK)
]
LocationsOption = Annotated[
    int | None,
    typer.Option("--locations", min=1, help="How many of the most damaging locations to attack (patch).", rich_help_panel=ATTACK),
]
IterationsOption = Annotated[
    int | None, typer.Option("--iterations", min=0, help="Rounds of random search (sparse).", rich_help_panel=ATTACK)
]
JoinOption = Annotated[
    bool,
    typer.Option(
        "--certify/--no-certify", help="Certify the same images; exit 8 if a certified one is flipped.", rich_help_panel=RUN
    ),
]


def attack(
    model: ModelArgument = None,
    patch: PatchOption = None,
    threat: ThreatOption = None,
    k: KOption = None,
    unit: UnitOption = None,
    steps: StepsOption = None,
    restarts: RestartsOption = None,
    locations: LocationsOption = None,
    iterations: IterationsOption = None,
    join: JoinOption = True,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    download: DownloadOption = False,
    limit: LimitOption = None,
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    out: OutOption = None,
    fresh: FreshOption = False,
    json: JsonOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Try to flip predictions within the threat model, and hold the result against the certificates.

    An attack is empirical: what it does not break is not thereby safe. What certify proves, no attack may break.
    """
    chosen = threat_from(threat=threat, patch=patch, k=k, unit=unit)

    from patchcert_cli import attacks, evaluate, report, results
    from patchcert_cli.defenses.base import Claim

    plan = open_plan(
        model,
        lambda own, _: [Claim(chosen or own_threat(own, threat=threat, unit=unit))],
        dataset=dataset,
        data_dir=data_dir,
        download=download,
        limit=limit,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    given: dict[str, Any] = {"steps": steps, "restarts": restarts, "locations": locations, "iterations": iterations}
    settings = {name: value for name, value in given.items() if value is not None}
    attacker = attacks.for_threat(plan.threat, seed=seed, **settings)
    settings |= {"name": type(attacker).__name__, "seed": seed}
    if dry_run:
        value = evaluate.dry_run(plan, out or plan.folder("attack", {"attack": settings, "joined": join}), attacker)
        show.result(report.plain_rows(value), value, json)
        return
    with show.progress() as progress:
        found = evaluate.attack(plan, attacker, settings, out, join=join, fresh=fresh, progress=progress)
    show.result(report.attack_rows(found), found, json)
    results.check_claim(found)
