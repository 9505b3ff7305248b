"""Options that several commands share: each flag has one meaning, one type and one help text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchcert_cli.cli import complete, show
from patchcert_cli.cli.groups import without
from patchcert_cli.cli.threat_options import own_threat, threat_from, threats_from
from patchcert_cli.errors import UsageError
from patchcert_cli.schema import LARGEST_SEED
from patchcert_cli.storage import files

if TYPE_CHECKING:
    from patchcert_cli.evaluation.models import DefenseRequest
    from patchcert_cli.threats import Threat

THREAT, DATA, RUN, OUTPUT, CLASSIFIER = "Threat model", "Data", "Run", "Output", "Plain classifiers and masks"
PRECISIONS = ("float32", "bfloat16")
PROCESSES = "--processes"


def file_to_write(flag: str) -> Callable[[Any], Any]:
    """Callback of an option that names a file to write: it is refused before anything is computed; - means stdout."""

    def check(value: Path | str | None) -> Path | str | None:
        if value is not None and value != "-":
            files.check_file(Path(value), flag)
        return value

    return check


def folder_to_write(flag: str) -> Callable[[Any], Any]:
    """Callback of an option that names a folder to write into: it is refused before anything is computed."""

    def check(value: Path | None) -> Path | None:
        if value is not None:
            files.check_folder(value, flag)
        return value

    return check


MODEL_HELP = (
    "Zoo model, run folder, or a plain classifier: timm:NAME, torchvision:NAME, hf-hub:ORG/REPO@COMMIT, "
    "onnx:FILE, PACKAGE.MODULE:FUNCTION. Several give one table. Default: the documented default model of the data set."
)
ModelsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="NAME|PATH|ADDRESS", help=MODEL_HELP, autocompletion=complete.models)
]
PatchOption = Annotated[
    str | None,
    typer.Option(
        "--patch", metavar="N|HxW|P%", help="One patch of this size in pixels, or share of the image.", rich_help_panel=THREAT
    ),
]
PatchesOption = Annotated[
    str | None,
    typer.Option(
        "--patch",
        metavar="N|HxW|P%|N..M|LIST",
        help="One patch of this size in pixels, or share of the image. Several from one pass: 1..10, or 1,2,5, or 2x5,5x2.",
        rich_help_panel=THREAT,
    ),
]
AreaOption = Annotated[
    int | None,
    typer.Option("--patch-area", metavar="N", help="Every aspect ratio of a patch of at most N pixels.", rich_help_panel=THREAT),
]
ThreatOption = Annotated[
    str | None,
    typer.Option(
        "--threat",
        metavar="patch|sparse|KIND:...",
        help="Threat kind, or a full threat such as patches:2:5x5. Default: from --patch or --k, else the model's own.",
        rich_help_panel=THREAT,
    ),
]
KOption = Annotated[
    str | None,
    typer.Option("--k", metavar="K", help="How many pixels or values a sparse attack changes.", rich_help_panel=THREAT),
]
BudgetsOption = Annotated[
    str | None,
    typer.Option(
        "--k",
        metavar="K|N..M|LIST",
        help="How many pixels or values a sparse attack changes. Several from one pass: 1..10, or 1,2,4.",
        rich_help_panel=THREAT,
    ),
]
UnitOption = Annotated[
    str | None,
    typer.Option(
        "--unit",
        metavar="pixel|value",
        help="What --k counts: pixels with all channels (default), or single channel values.",
        rich_help_panel=THREAT,
    ),
]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        "--dataset",
        metavar="NAME|imagefolder:PATH",
        autocompletion=complete.datasets,
        help="Data set, or a folder of class folders; add @SIDE or @HxW for images of that size. "
        "Default: the model's own, else cifar10.",
        rich_help_panel=DATA,
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", envvar="PATCHCERT_DATA", help="Folder in torchvision's layout. Default: ./data.", rich_help_panel=DATA
    ),
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Fetch the data set into the data directory first.", rich_help_panel=DATA)
]
LimitOption = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="Only N images: a fixed subset chosen by --seed.", rich_help_panel=DATA),
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", help="At most N images at a time; no result depends on it.", rich_help_panel=RUN),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute.", rich_help_panel=RUN)
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of everything random.", rich_help_panel=RUN)
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        callback=folder_to_write("--out"),
        help="Run folder. Default: a folder under runs/ named after the run.",
        rich_help_panel=RUN,
    ),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming the run folder.", rich_help_panel=RUN)]
ProcessesOption = Annotated[
    str | None,
    typer.Option(
        PROCESSES,
        metavar="N|auto",
        help="Share the work among N processes, as torchrun would start them; auto: one per GPU, or per 2 cores.",
        rich_help_panel=RUN,
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Report what would be done and how long it takes; write nothing.", rich_help_panel=RUN),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="PATH|-",
        callback=file_to_write("--json"),
        help="Also write the result as JSON to a file; - means stdout, and then nothing else is printed there.",
        rich_help_panel=OUTPUT,
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=show.set_quiet, help="No progress and no remarks; errors are printed.", rich_help_panel=OUTPUT
    ),
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use what is on this disk; ask no network.")]
DatasetFilter = Annotated[
    str | None,
    typer.Option("--data", "--dataset", metavar="NAME", help="Only models for this data set.", autocompletion=complete.datasets),
]


@dataclass(frozen=True)
class ThreatOptions:
    """One threat model."""

    patch: PatchOption = None
    threat: ThreatOption = None
    k: KOption = None
    unit: UnitOption = None

    def one(self) -> Threat | None:
        """The threat model that is given; None for the model's own."""
        return threat_from(threat=self.threat, patch=self.patch, k=self.k, unit=self.unit)

    def own(self, meant: Threat | None) -> Threat:
        """The threat model that a model was trained for, if it is of the requested kind."""
        return own_threat(meant, threat=self.threat, unit=self.unit)


@dataclass(frozen=True)
class ThreatsOptions(ThreatOptions):
    """One threat model or several, certified from one pass."""

    patch: PatchesOption = None
    k: BudgetsOption = None
    patch_area: AreaOption = None

    def several(self) -> list[Threat]:
        """The threat models that are given; empty for the model's own, and with ``--patch-area``, whose shapes need an image."""
        if self.patch_area is None:
            return threats_from(threat=self.threat, patch=self.patch, k=self.k, unit=self.unit)
        if self.patch is not None or self.k is not None or self.threat not in (None, "patch"):
            raise UsageError("--patch-area describes every shape itself.", hint="Leave --patch, --threat and --k out.")
        return []


@dataclass(frozen=True)
class ClassifierOptions:
    """Which defense is put around a plain classifier, and how."""

    defense: Annotated[
        str | None,
        typer.Option(
            "--defense",
            autocompletion=complete.defenses,
            help="Put this defense around the classifier, such as patchcleanser.",
            rich_help_panel=CLASSIFIER,
        ),
    ] = None
    masks: Annotated[
        int | None,
        typer.Option("--masks", metavar="N", help="At most N masks along each axis. Default: 6.", rich_help_panel=CLASSIFIER),
    ] = None
    passes: Annotated[
        int | None,
        typer.Option(
            "--passes",
            metavar="N",
            help="The largest mask set whose pairs of masks take at most N passes of the network.",
            rich_help_panel=CLASSIFIER,
        ),
    ] = None
    mask_shape: Annotated[
        str | None,
        typer.Option(
            "--mask-shape",
            metavar="square|column|row|any",
            help="column: strips over the whole height, which cover patches of any height; row: over the width; any, with"
            " --passes: the shape that hides the fewest pixels.",
            rich_help_panel=CLASSIFIER,
        ),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="FILE|none",
            help="Safetensors in place of the published weights; none: random ones, to measure the cost with --dry-run.",
            rich_help_panel=CLASSIFIER,
        ),
    ] = None
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="FILE|imagenet",
            help="What the model's outputs are called: a text file, one line per output.",
            rich_help_panel=CLASSIFIER,
        ),
    ] = None
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="float32|bfloat16",
            help="Precision of masked predictions; those of low margin are computed again in higher precision.",
            rich_help_panel=CLASSIFIER,
        ),
    ] = None
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            metavar="P",
            help="Certified detection: confidence in [0, 1] by which alarms are raised; default: the model's.",
            rich_help_panel=CLASSIFIER,
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="A setting of a defense without masks, such as threshold=0.2 of lgs. Repeatable.",
            rich_help_panel=CLASSIFIER,
        ),
    ] = None

    def request(self, *, dry_run: bool, download: bool, compare: bool = False) -> DefenseRequest:
        """What is to be made of the model.

        Raises:
            UsageError: a value is out of range, or two options contradict each other.
        """
        if self.masks is not None and self.passes is not None:
            raise UsageError("--masks and --passes both choose how many masks there are.", hint="Give one of them.")
        for flag, value in (("--masks", self.masks), ("--passes", self.passes)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} is {value}.", hint="Allowed: 1 or more.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold:g} is not a confidence.", hint="Allowed: from 0 to 1.")
        if self.precision not in (None, *PRECISIONS):
            raise UsageError(f"invalid --precision '{self.precision}'.", hint=f"Use {' or '.join(PRECISIONS)}.")
        if self.weights == "none" and not dry_run:
            raise UsageError("--weights none means random weights, whose answers mean nothing.", hint="Add --dry-run.")

        from patchcert_cli.certifiers.masks.mask_sets import ANY, SHAPES
        from patchcert_cli.evaluation.models import DefenseRequest

        if self.mask_shape not in (None, *SHAPES, ANY):
            raise UsageError(f"invalid --mask-shape '{self.mask_shape}'.", hint=f"Use {', '.join(SHAPES)} or {ANY}.")
        if self.mask_shape == ANY and self.passes is None:
            hint = "Say how many passes, for example --passes 105, or choose a shape."
            raise UsageError("--mask-shape any is chosen for a number of passes.", hint=hint)
        made = (self.defense, self.masks, self.passes, self.weights, self.classes, self.precision)
        settings = {}
        if self.option:
            from patchcert_cli.training import overrides

            settings = overrides.pairs(self.option, "--option")
        return DefenseRequest(*made, download, self.threshold, compare, self.mask_shape, settings)


@dataclass(frozen=True)
class DataOptions:
    """Which images."""

    dataset: DatasetOption = None
    data_dir: DataDirOption = None
    download: DownloadOption = False
    limit: LimitOption = None


@dataclass(frozen=True)
class RunOptions:
    """How and where an evaluation runs."""

    batch_size: BatchOption = None
    device: DeviceOption = "auto"
    seed: SeedOption = 0
    out: OutOption = None
    fresh: FreshOption = False
    processes: ProcessesOption = None


@dataclass(frozen=True)
class OutputOptions:
    """What is printed."""

    json: JsonOption = None
    quiet: QuietOption = False


def typed_command(model: str | None = None, models: Sequence[str] = ()) -> str:
    """What the user typed, for manifests and cards; of several models as if only ``model`` had been typed.

    It does not say how many processes there were: nothing depends on it.
    """
    others = set(models) - {model}
    return shlex.join(["patchcert", *(word for word in without(sys.argv[1:], PROCESSES) if word not in others)])
