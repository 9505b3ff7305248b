"""Options that several subcommands share, and what they mean together."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from patchcert_cli.errors import UnsupportedThreat, UsageError
from patchcert_cli.schema import LARGEST_SEED
from patchcert_cli.storage import files
from patchcert_cli.threats import KINDS, UNITS, Sparse, Threat, parse_patch, parse_sparse, parse_threat

THREAT, DATA, RUN = "Threat model", "Data", "Run"


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


PatchOption = Annotated[
    str | None,
    typer.Option(
        "--patch", metavar="N|HxW|P%", help="One patch of this size in pixels, or share of the image.", rich_help_panel=THREAT
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME|PATH|ADDRESS",
        help="Zoo model, run folder, or a plain classifier: timm:NAME, torchvision:NAME, hf-hub:ORG/REPO@COMMIT, "
        "onnx:FILE, PACKAGE.MODULE:FUNCTION. "
        "Default: the data set's documented default.",
    ),
]
ThreatOption = Annotated[
    str | None,
    typer.Option(
        "--threat",
        metavar="patch|sparse|KIND:...",
        help="Kind of attacker, or all of it, such as patches:2:5x5. Default: what the other options say, else the model's own.",
        rich_help_panel=THREAT,
    ),
]
KOption = Annotated[
    int | None, typer.Option("--k", help="How many pixels or values a sparse attacker changes.", rich_help_panel=THREAT)
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
        help="Data set, or a folder of class folders with pictures, @SIDE or @HxW for images of that size. "
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
    int | None, typer.Option("--limit", help="Only this many images: a fixed subset chosen by --seed.", rich_help_panel=DATA)
]
BatchOption = Annotated[
    int | None, typer.Option("--batch-size", help="Images at a time, at most; results do not depend on it.", rich_help_panel=RUN)
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
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="PATH|-",
        callback=file_to_write("--json"),
        help="Also write the result as one JSON object; - means stdout, and then nothing else is printed there.",
        rich_help_panel=RUN,
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and how long it would take; write nothing.", rich_help_panel=RUN)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]


def print_json(value: Any) -> None:
    """A value as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2))


def threat_from(*, threat: str | None, patch: str | None, k: int | None, unit: str | None) -> Threat | None:
    """The threat model that the options name, or None if the model's own is meant."""
    if threat is not None and ":" in threat:
        if patch is not None or k is not None or unit is not None:
            raise UsageError(f"--threat {threat} is complete.", hint="Leave --patch, --k and --unit out.")
        return parse_threat(threat)
    if threat is not None and threat not in KINDS:
        raise UnsupportedThreat(f"no threat '{threat}'.", hint=f"Use one of: {', '.join(KINDS)}.")
    if threat == "patches":
        raise UsageError("--threat patches does not say how many, or how large.", hint="Use --threat patches:2:5x5.")
    if unit is not None and unit not in UNITS:
        raise UsageError(f"invalid unit '{unit}'.", hint=f"Use one of {', '.join(UNITS)}.")
    if patch is not None and (threat == "sparse" or k is not None):
        raise UsageError("--patch and --k describe different attackers.", hint="Give one of them.")
    if k is not None and threat == "patch":
        raise UsageError("--k does not go with --threat patch.", hint="Use --threat sparse, or --patch.")
    if unit is not None and (patch is not None or threat == "patch"):
        raise UsageError("--unit goes with --k only.", hint="A patch always changes whole pixels.")
    if patch is not None:
        return parse_patch(patch)
    if k is None:
        return None
    if k < 1:
        raise UsageError(f"--k {k} must be 1 or more.")
    return parse_sparse(f"{k}:{unit or 'pixel'}")


def own_threat(own: str, *, threat: str | None, unit: str | None) -> Threat:
    """The threat model that a model was trained for, if it is of the kind asked for."""
    if not own:
        raise UsageError("a plain classifier is made for no threat.", hint="Choose one: --patch 32, or --patch 2%.")
    meant = parse_threat(own)
    if (threat is not None and meant.kind != threat) or (unit is not None and not isinstance(meant, Sparse)):
        raise UsageError(f"this model's own threat is {meant}.", hint="Choose one: --patch 5, or --threat sparse --k 10.")
    return Sparse(meant.k, unit) if unit is not None and isinstance(meant, Sparse) else meant


def typed_command() -> str:
    """What the user typed, for manifests and cards."""
    return shlex.join(["patchcert", *sys.argv[1:]])
