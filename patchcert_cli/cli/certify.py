"""``patchcert certify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import launch, loading, several, show
from patchcert_cli.cli.groups import grouped
from patchcert_cli.cli.options import (
    ClassifierOptions,
    DataOptions,
    DryRunOption,
    ModelsArgument,
    OutputOptions,
    RunOptions,
    ThreatsOptions,
    file_to_write,
)
from patchcert_cli.cli.proof_options import ProofOptions
from patchcert_cli.errors import UsageError
from patchcert_cli.parallel import workers
from patchcert_cli.threats import patches_of_area

if TYPE_CHECKING:
    from patchcert_cli.cli.loading import Claims
    from patchcert_cli.data.resize_crop import ResizeCrop
    from patchcert_cli.defenses import Claim
    from patchcert_cli.evaluation.models import DefenseRequest
    from patchcert_cli.evaluation.task import EvaluatedModel
    from patchcert_cli.threats import Threat

EXAMPLES = (
    "Examples:  patchcert certify --patch 5   |   patchcert certify cifar-bagcert-rf7 cifar-smoothing-column --patch 5"
    "   |   patchcert certify --patch 1..10 --plot curve.png   |   patchcert certify --image cat.png --patch 5 --map map.png"
)
OLD = {"--labels": "--precision"}  # spellings of earlier versions
PROOF, IMAGE = "Proof", "Image files, and plots"
COLUMNS = ("model", "threat", "certified", "clean", "95 % interval")  # where there is little room
IMAGE_COLUMNS = ("image", "prediction", "certified", "threat")


@dataclass(frozen=True)
class ImageOptions:
    """Image files in the place of test images, and what is drawn."""

    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", help="Certify this image file instead of test images; repeatable, for one table.", rich_help_panel=IMAGE
        ),
    ] = None
    resize: Annotated[
        bool, typer.Option("--resize", help="Resize and crop it, as the images of a folder are.", rich_help_panel=IMAGE)
    ] = False
    map_: Annotated[
        Path | None,
        typer.Option(
            "--map",
            callback=file_to_write("--map"),
            help="Draw its margin at every location of the patch into this file.",
            rich_help_panel=IMAGE,
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            callback=file_to_write("--plot"),
            help="Draw accuracy over patch sizes or shapes into this file.",
            rich_help_panel=IMAGE,
        ),
    ] = None
    plot_thresholds: Annotated[
        Path | None,
        typer.Option(
            "--plot-thresholds",
            callback=file_to_write("--plot-thresholds"),
            help="Certified detection: draw alarms on unattacked images and certified ones over the threshold into this file.",
            rich_help_panel=IMAGE,
        ),
    ] = None

    @property
    def drawn(self) -> dict[str, Path | None]:
        """Files to draw into, by flag."""
        return {"--plot": self.plot, "--plot-thresholds": self.plot_thresholds, "--map": self.map_}

    def check(self, data: DataOptions, run: RunOptions, dry_run: bool) -> None:
        """Refuse what does not go together, and what cannot be drawn, before anything is computed."""
        if not self.image and self.map_ is not None:
            raise UsageError("--map draws one image.", hint="Add --image FILE.")
        if not self.image and self.resize:
            raise UsageError("--resize goes with --image.", hint="The images of a folder are always resized and cropped.")
        if self.image and len(self.image) > 1 and self.map_ is not None:
            raise UsageError(
                f"--map draws one image, and {len(self.image)} are given.", hint="Give one --image, or leave --map out."
            )
        if self.image:
            of_many: dict[str, Any] = {"--limit": data.limit, "--batch-size": run.batch_size, "--out": run.out}
            of_many |= {
                "--dry-run": dry_run,
                "--fresh": run.fresh,
                "--processes": run.processes if len(self.image) == 1 else None,
                "--plot": self.plot,
                "--plot-thresholds": self.plot_thresholds,
            }
            given = [flag for flag, value in of_many.items() if value not in (None, False)]
            if given:
                hint = "It is about image files: leave one of them out."
                raise UsageError(f"{given[0]} does not go with --image.", hint=hint)
        for path in filter(None, self.drawn.values()):
            from patchcert_cli.reporting import plots

            plots.require()
            plots.check_path(path)


@grouped
def certify(
    models: ModelsArgument = None,
    *,
    threat: ThreatsOptions,
    proof: ProofOptions,
    classifier: ClassifierOptions,
    data: DataOptions,
    image: ImageOptions,
    run: RunOptions,
    dry_run: DryRunOption = False,
    output: OutputOptions,
) -> None:
    """Prove how many predictions no allowed change can alter.

    The run folder holds result.json, records.jsonl (one line per image) and manifest.json.
    The same command resumes a stopped run.
    """
    claims, models = _claims(threat, proof), proof.combined(models)
    request = classifier.request(dry_run=dry_run, download=data.download, compare=image.plot_thresholds is not None)
    several.alone(models or [], {"--out": run.out, "--image": image.image or None, **image.drawn})
    if request.defense is not None:
        from patchcert_cli import defenses

        defenses.by_name(request.defense).check_proves()  # before anything is loaded
    image.check(data, run, dry_run)
    launch.start(run.processes, dry_run=dry_run)

    from patchcert_cli.reporting import text

    def one(model: str | None, command: str) -> several.Value:
        if dry_run:
            return _estimate(model, claims, request, data, run, command)
        return _certify(model, claims, request, data, run, command, image, threat.patch_area)

    if dry_run:
        several.run(models, one, several.estimates, output.json, one_table=several.in_two_columns(text.plain_rows))
    elif image.image:
        _certify_images(models[0] if models else None, claims, request, data.dataset, run.device, image, output.json)
    else:
        several.run(models, one, _table, output.json, one_table=several.in_two_columns(text.certify_rows))


def _claims(threat: ThreatsOptions, proof: ProofOptions) -> Claims:
    """What is to be certified of a model, made from its own threat and the shape of its images."""
    given, methods = threat.several(), proof.methods()

    def claims(own: Threat | None, shape: tuple[int, int, int]) -> list[Claim]:
        from patchcert_cli.defenses import Claim

        shapes = [] if threat.patch_area is None else patches_of_area(threat.patch_area, *shape[1:])
        threats = [*given, *shapes] or [threat.own(own)]
        return [Claim(one, method, top=proof.top) for one in threats for method in methods]

    return claims


def _certify(
    model: str | None,
    claims: Claims,
    request: DefenseRequest,
    data: DataOptions,
    run: RunOptions,
    command: str,
    image: ImageOptions,
    area: int | None,
) -> several.Value:
    """Certify test images, and draw the requested plots."""
    from patchcert_cli.evaluation import evaluate
    from patchcert_cli.reporting import plots, text

    task = loading.open_task(model, claims, data, run, command, request)
    with show.progress() as progress:
        found = evaluate.certify(task, run.out, fresh=run.fresh, progress=progress)
    show.say("\n".join(filter(None, dict.fromkeys(task.model.defense.note(claim.threat) for claim in task.claims))))
    found |= {} if area is None else {"patch_area": area}
    if not workers.current().first:
        return found
    if image.plot is not None:
        plots.plot(text.claim_list(found), image.plot, title=text.plot_title(found), area=area)
        show.say(f"drew {image.plot}")
    if image.plot_thresholds is not None:
        plots.thresholds(text.compared(found), image.plot_thresholds, title=text.plot_title(found))
        show.say(f"drew {image.plot_thresholds}")
    return found


def _estimate(
    model: str | None, claims: Claims, request: DefenseRequest, data: DataOptions, run: RunOptions, command: str
) -> several.Value:
    """What certifying would take, measured on a few images."""
    from patchcert_cli.evaluation import estimate

    task, total = loading.open_sample(model, claims, data, run, command, request)
    with show.progress() as progress:
        return estimate.evaluation(task, run.out or task.folder("certify", {}), None, total, progress=progress)


def _certify_images(
    model: str | None,
    claims: Claims,
    request: DefenseRequest,
    dataset: str | None,
    device: str,
    image: ImageOptions,
    json_to: str | None,
) -> None:
    """Certify image files, each as if alone, and print what was found: one result, or one table."""
    from patchcert_cli.reporting import text

    opened = loading.image_opener(model, claims, request, dataset, device)

    def one(name: str | None, _: str) -> several.Value:
        path = Path(name or "")
        return _certify_image(path, *opened(path), image)

    rows = several.in_two_columns(text.single_rows)
    several.run([str(path) for path in image.image or ()], one, _image_table, json_to, one_table=rows, about="image", shared=True)


def _certify_image(
    path: Path, model: EvaluatedModel, claims: Sequence[Claim], resize_crop: ResizeCrop, image: ImageOptions
) -> several.Value:
    """Certify one image, and draw its map if asked."""
    from patchcert_cli.evaluation import single_image
    from patchcert_cli.reporting import margin_maps

    with show.progress() as progress:
        found = single_image.certify(
            model,
            path,
            claims,
            resize_crop=resize_crop,
            resize=image.resize,
            mapped=image.map_ is not None,
            progress=progress,
        )
    values = found.values
    if image.map_ is not None and found.margins is not None:
        margin_maps.single_map(values, found.pixels, found.margins, image.map_, unit=found.unit)
        values |= {"map": str(image.map_)}
        found.notes.append(f"drew {image.map_}")
    show.say("\n".join(found.notes))
    return values


def _image_table(results: Sequence[several.Value]) -> None:
    """One row for each image and claim."""
    claims = [(result, claim) for result in results for claim in result["claims"]]
    rows = [
        {
            "image": str(result["image"]),
            "prediction": str(result["class"]),
            "threat": claim["threat"],
            "proof": claim["method"],
            "certified": "yes" if claim["certified"] else "no",
            "margin": f"{claim['margin']:g}",
            "arithmetic": claim["arithmetic"],
        }
        for result, claim in claims
    ]
    several.by_guarantee(rows, [claim["guarantee"] for _, claim in claims], IMAGE_COLUMNS)


def _share_of(name: str, claim: dict[str, Any]) -> str:
    """A count of a claim as a share of its images; results of older versions do not have all counts."""
    from patchcert_cli.reporting.numbers import share

    return share(claim[name], claim["images"]) if name in claim else "-"


def _table(results: Sequence[several.Value]) -> None:
    """One row for each model and claim."""
    from patchcert_cli.reporting import text
    from patchcert_cli.reporting.numbers import interval, share

    claims = [(result, claim) for result in results for claim in text.claim_list(result)]
    methods = len({claim["method"] for _, claim in claims}) > 1
    rows = [
        {
            "model": str(result["model"]),
            "threat": claim["threat"],
            **({"proof": claim["method"]} if methods else {}),
            f"clean{text.ranked(claim)}": share(claim["clean"], claim["images"]),
            f"certified{text.ranked(claim)}": share(claim["certified"], claim["images"]),
            **({"published metric": _share_of("or_alarm", claim)} if claim["guarantee"] == "detection" else {}),
            "95 % interval": interval(claim["certified_interval"]),
            "arithmetic": claim["arithmetic"],
            "time": f"{result['seconds']:.1f} s",
        }
        for result, claim in claims
    ]
    among = {name: f"{name}{text.ranked(claims[0][1])}" for name in ("clean", "certified")}  # --top is the same for all
    several.by_guarantee(rows, [claim["guarantee"] for _, claim in claims], [among.get(name, name) for name in COLUMNS])
