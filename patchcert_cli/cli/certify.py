"""``patchcert certify``."""

from __future__ import annotations

from patchcert_cli.cli import show
from patchcert_cli.cli.options import (
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
    threat_from,
)

EXAMPLES = "Examples:  patchcert certify --patch 5   |   patchcert certify mnist-ibp-k10 --threat sparse --k 10 --json -"


def certify(
    model: ModelArgument = None,
    patch: PatchOption = None,
    threat: ThreatOption = None,
    k: KOption = None,
    unit: UnitOption = None,
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
    """Prove how many predictions no allowed change can alter.

    The run folder holds result.json, records.jsonl (one line per image) and manifest.json.
    The same command resumes a stopped run.
    """
    chosen = threat_from(threat=threat, patch=patch, k=k, unit=unit)

    from patchcert_cli import evaluate, report

    plan = open_plan(
        model,
        chosen,
        threat=threat,
        unit=unit,
        dataset=dataset,
        data_dir=data_dir,
        download=download,
        limit=limit,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    if dry_run:
        value = evaluate.dry_run(plan, out or plan.folder("certify", {}))
        show.result(report.plain_rows(value), value, json)
        return
    with show.progress() as progress:
        found = evaluate.certify(plan, out, fresh=fresh, progress=progress)
    show.result(report.certify_rows(found), found, json)
