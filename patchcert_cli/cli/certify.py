"""``patchcert certify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import loading, show
from patchcert_cli.cli.loading import (
    ClassesOption,
    DefenseOption,
    LabelsOption,
    MasksOption,
    PassesOption,
    ThresholdOption,
    WeightsOption,
    open_sample,
    open_task,
    wish_of,
)
from patchcert_cli.cli.options import (
    RUN,
    THREAT,
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
    SeedOption,
    ThreatOption,
    UnitOption,
    file_to_write,
    own_threat,
    threat_from,
)
from patchcert_cli.errors import UsageError
from patchcert_cli.threats import Threat, parse_patches, patches_of_area

if TYPE_CHECKING:
    from patchcert_cli.cli.loading import Claims
    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation.models import DefenseRequest

EXAMPLES = (
    "Examples:  patchcert certify --patch 5   |   patchcert certify --patch 1..10 --plot curve.png"
    "   |   patchcert certify --image cat.png --patch 5 --map map.png"
)
CONDITIONS = ("exact", "3.1", "3.2", "3.3")
BOUNDS = ("interval", "linear", "best")
PICTURE = "One picture, and plots"

PatchesOption = Annotated[
    str | None,
    typer.Option(
        "--patch",
        metavar="N|HxW|P%|N..M",
        help="One patch of this size in pixels, or share of the image; N..M for every size.",
        rich_help_panel=THREAT,
    ),
]
AreaOption = Annotated[
    int | None,
    typer.Option("--patch-area", help="Every aspect ratio of a patch of at most this many pixels.", rich_help_panel=THREAT),
]
ConditionOption = Annotated[
    str | None,
    typer.Option(
        "--condition",
        metavar="exact|3.1|3.2|3.3|all",
        help="Proof for votes: exact, or a published looser condition, or all side by side.",
        rich_help_panel=RUN,
    ),
]
BoundsOption = Annotated[
    str | None,
    typer.Option(
        "--bounds",
        metavar="interval|linear|best|all",
        help="Bounds for networks: interval, or linear ones added where they leave something open (best, the default).",
        rich_help_panel=RUN,
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        callback=file_to_write("--plot"),
        help="Draw accuracy over patch sizes or shapes into this file.",
        rich_help_panel=PICTURE,
    ),
]
PlotThresholdsOption = Annotated[
    Path | None,
    typer.Option(
        "--plot-thresholds",
        callback=file_to_write("--plot-thresholds"),
        help="Certified detection: draw alarms on unattacked images and certified answers over the threshold into this file.",
        rich_help_panel=PICTURE,
    ),
]
ImageOption = Annotated[
    Path | None, typer.Option("--image", help="Certify this one picture instead of test images.", rich_help_panel=PICTURE)
]
MapOption = Annotated[
    Path | None,
    typer.Option(
        "--map",
        callback=file_to_write("--map"),
        help="Draw its margin at every location of the patch into this file.",
        rich_help_panel=PICTURE,
    ),
]
ResizeOption = Annotated[
    bool, typer.Option("--resize", help="Make the picture fit, as the pictures of a folder are.", rich_help_panel=PICTURE)
]


def certify(
    model: ModelArgument = None,
    patch: PatchesOption = None,
    patch_area: AreaOption = None,
    threat: ThreatOption = None,
    k: KOption = None,
    unit: UnitOption = None,
    condition: ConditionOption = None,
    bounds: BoundsOption = None,
    defense: DefenseOption = None,
    masks: MasksOption = None,
    passes: PassesOption = None,
    weights: WeightsOption = None,
    classes: ClassesOption = None,
    labels: LabelsOption = None,
    threshold: ThresholdOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    download: DownloadOption = False,
    limit: LimitOption = None,
    image: ImageOption = None,
    resize: ResizeOption = False,
    map_: MapOption = None,
    plot: PlotOption = None,
    plot_thresholds: PlotThresholdsOption = None,
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
    claims = _claims(_methods(condition, bounds), patch, patch_area, threat, k, unit)
    wanted: Any = {"defense": defense, "masks": masks, "passes": passes, "weights": weights, "classes": classes}
    compare = plot_thresholds is not None
    request = wish_of(**wanted, labels=labels, dry_run=dry_run, download=download, threshold=threshold, compare=compare)
    _check_pictures(image, {"--plot": plot, "--plot-thresholds": plot_thresholds}, map_)
    if image is None and resize:
        raise UsageError("--resize goes with --image.", hint="The pictures of a folder are always made to fit.")
    if image is not None:
        folder = {"--limit": limit, "--batch-size": batch_size, "--out": out}
        switches = {"--dry-run": dry_run, "--fresh": fresh}
        _check_alone(
            *(flag for flag, value in folder.items() if value is not None), *(flag for flag, on in switches.items() if on)
        )
        _certify_picture(model, claims, request, dataset, device, image, resize, map_, json)
        return

    from patchcert_cli.evaluation import estimate, evaluate
    from patchcert_cli.reporting import plots, text

    given: Any = {"dataset": dataset, "data_dir": data_dir, "limit": limit, "batch_size": batch_size, "device": device}
    if dry_run:
        task, total = open_sample(model, claims, request, seed=seed, **given)
        with show.progress() as progress:
            value = estimate.evaluation(task, out or task.folder("certify", {}), None, total, progress=progress)
        show.result(text.plain_rows(value), value, json)
        return
    task = open_task(model, claims, request, seed=seed, download=download, **given)
    with show.progress() as progress:
        found = evaluate.certify(task, out, fresh=fresh, progress=progress)
    show.say("\n".join(filter(None, dict.fromkeys(task.model.defense.note(claim.threat) for claim in task.claims))))
    found |= {} if patch_area is None else {"patch_area": patch_area}
    if plot is not None:
        plots.plot(text.claim_list(found), plot, title=text.plot_title(found), area=patch_area)
        show.say(f"drew {plot}")
    if plot_thresholds is not None:
        plots.thresholds(text.compared(found), plot_thresholds, title=text.plot_title(found))
        show.say(f"drew {plot_thresholds}")
    show.result(text.certify_rows(found), found, json)


def _claims(
    methods: list[str | None], patch: str | None, area: int | None, threat: str | None, k: int | None, unit: str | None
) -> Claims:
    """What is to be certified of a model, made from its own threat and the shape of its images."""
    given = _threats(patch, area, threat, k, unit)

    def claims(own: str, shape: tuple[int, int, int]) -> list[Claim]:
        from patchcert_cli.defenses import Claim

        shapes = [] if area is None else patches_of_area(area, *shape[1:])
        threats = [*given, *shapes] or [own_threat(own, threat=threat, unit=unit)]
        return [Claim(one, method) for one in threats for method in methods]

    return claims


def _certify_picture(
    model: str | None,
    claims: Claims,
    request: DefenseRequest,
    dataset: str | None,
    device: str,
    image: Path,
    resize: bool,
    map_to: Path | None,
    json: str | None,
) -> None:
    from patchcert_cli import device as devices
    from patchcert_cli.evaluation import single_image
    from patchcert_cli.reporting import margin_maps, text

    place = devices.resolve(device)
    candidate = loading.found(model, dataset, request, place)
    resize_crop = candidate.meant(dataset or "", image)
    shape = (candidate.channels, *resize_crop.size)
    meant = claims(candidate.threat, shape)
    evaluated = candidate.evaluated(shape, [claim.threat for claim in meant], place)
    show.say("\n".join(evaluated.notes))
    with show.progress() as progress:
        more: Any = {"resize_crop": resize_crop, "resize": resize, "mapped": map_to is not None, "progress": progress}
        found = single_image.certify(evaluated, image, meant, **more)
    values = found.values
    if map_to is not None and found.margins is not None:
        margin_maps.single_map(values, found.pixels, found.margins, map_to, unit=evaluated.defense.unit)
        values |= {"map": str(map_to)}
        found.notes.append(f"drew {map_to}")
    show.say("\n".join(found.notes))
    show.result(text.single_rows(values), values, json)


def _methods(condition: str | None, bounds: str | None) -> list[str | None]:
    """The proofs that --condition or --bounds names; None is the defense's best."""
    if bounds is not None:
        if condition is not None:
            raise UsageError("--condition is for votes and --bounds for networks.", hint="Give one of them.")
        if bounds not in (*BOUNDS, "all"):
            raise UsageError(f"no bounds '{bounds}'.", hint=f"Use one of {', '.join(BOUNDS)}, or all.")
        return ["interval", "linear"] if bounds == "all" else [bounds]
    if condition is None:
        return [None]
    if condition not in (*CONDITIONS, "all"):
        raise UsageError(f"no condition '{condition}'.", hint=f"Use one of {', '.join(CONDITIONS)}, or all.")
    return list(CONDITIONS) if condition == "all" else [condition]


def _threats(patch: str | None, area: int | None, threat: str | None, k: int | None, unit: str | None) -> list[Threat]:
    """What --patch, --threat and --k name; empty if --patch-area or the model's own threat is meant."""
    if area is not None:
        if patch is not None or k is not None or threat not in (None, "patch"):
            raise UsageError("--patch-area describes every shape itself.", hint="Leave --patch, --threat and --k out.")
        if area < 1:
            raise UsageError(f"--patch-area {area} must be 1 or more.")
        return []
    if patch is not None and ".." in patch:
        threat_from(threat=threat, patch="1", k=k, unit=unit)
        return list(parse_patches(patch))
    one = threat_from(threat=threat, patch=patch, k=k, unit=unit)
    return [] if one is None else [one]


def _check_alone(*given: str) -> None:
    """Refuse options of a whole data set that were given with one picture."""
    if given:
        raise UsageError(f"{given[0]} does not go with --image.", hint="It is about one picture: leave one of them out.")


def _check_pictures(image: Path | None, drawings: dict[str, Path | None], map_: Path | None) -> None:
    """Refuse what cannot be drawn before anything is computed."""
    from patchcert_cli.reporting import plots

    if map_ is not None and image is None:
        raise UsageError("--map draws one picture.", hint="Add --image FILE.")
    if image is not None:
        _check_alone(*(flag for flag, path in drawings.items() if path is not None))
    for path in filter(None, (*drawings.values(), map_)):
        plots.require()
        plots.check_path(path)
