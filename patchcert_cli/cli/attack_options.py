"""The options of ``patchcert attack`` that no other command has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from patchcert_cli.cli import complete
from patchcert_cli.cli.options import RUN, DataOptions, RunOptions, file_to_write
from patchcert_cli.errors import UsageError

ATTACK, SAVED, IMAGE = "Attack", "Images to paste", "One image, plots, and images to keep"

AttackOption = Annotated[
    str | None,
    typer.Option(
        "--attack",
        autocompletion=complete.attacks,
        metavar="NAME|NAME,NAME|all|list",
        help="Attack by name; several, or all, take turns on the images that are not flipped yet; list prints all names with the "
        "threats they know. Default: the documented one of the threat.",
        rich_help_panel=ATTACK,
    ),
]


@dataclass(frozen=True)
class SearchOptions:
    """Which attack searches, and how long."""

    attack: AttackOption = None
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Gradient steps.", rich_help_panel=ATTACK)] = None
    restarts: Annotated[
        int | None, typer.Option("--restarts", min=0, help="Random restarts per location (patch).", rich_help_panel=ATTACK)
    ] = None
    locations: Annotated[
        int | None,
        typer.Option(
            "--locations", min=1, help="How many of the most damaging locations to attack (patch).", rich_help_panel=ATTACK
        ),
    ] = None
    starts: Annotated[
        int | None,
        typer.Option(
            "--starts", min=1, help="At how many of the certificate's weakest locations to begin (patch).", rich_help_panel=ATTACK
        ),
    ] = None
    iterations: Annotated[
        int | None, typer.Option("--iterations", min=0, help="Rounds of random search (sparse).", rich_help_panel=ATTACK)
    ] = None

    budget: Annotated[
        int | None, typer.Option("--budget", min=1, help="Candidates of an image (random search).", rich_help_panel=ATTACK)
    ] = None
    proposals: Annotated[
        int | None,
        typer.Option("--proposals", min=1, help="Candidates of a round (random search).", rich_help_panel=ATTACK),
    ] = None

    def settings(self) -> dict[str, Any]:
        """What is given of the attack's own options."""
        own = ("steps", "restarts", "locations", "starts", "iterations", "budget", "proposals")
        return {name: value for name in own if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class SavedOptions:
    """Given images that are pasted in the place of a search."""

    saved: Annotated[
        Path | None,
        typer.Option("--saved", metavar="FOLDER", help="Paste these images at random places instead.", rich_help_panel=SAVED),
    ] = None
    places: Annotated[
        int | None,
        typer.Option("--places", min=1, help="How often each is pasted on an image. Default: 1.", rich_help_panel=SAVED),
    ] = None
    turn: Annotated[
        float | None,
        typer.Option("--turn", metavar="DEGREES", help="Turn each by up to DEGREES to either side.", rich_help_panel=SAVED),
    ] = None
    shrink: Annotated[
        float | None,
        typer.Option("--shrink", metavar="SHARE", help="Scale each by a factor between SHARE and 1.", rich_help_panel=SAVED),
    ] = None

    def settings(self) -> dict[str, Any]:
        """What is given of how they are pasted."""
        return {name: value for name in ("places", "turn", "shrink") if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class JoinOptions:
    """How long, and whether certificates are checked against it."""

    join: Annotated[
        bool,
        typer.Option(
            "--certify/--no-certify",
            help="Certify the same images, if the defense has certificates; exit 8 if a certified one is flipped.",
            rich_help_panel=RUN,
        ),
    ] = True
    max_seconds: Annotated[
        float | None,
        typer.Option(
            "--max-seconds",
            metavar="S",
            help="Stop after S seconds and report which images are left; the same command goes on with them.",
            rich_help_panel=RUN,
        ),
    ] = None

    def check(self) -> None:
        """Refuse a time that is none."""
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise UsageError(f"--max-seconds is {self.max_seconds:g}.", hint="Allowed: more than 0; leave it out for no limit.")


@dataclass(frozen=True)
class KeepOptions:
    """One image in the place of test images, what is drawn, and which images are kept."""

    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FOLDER",
            help="Keep the adversarial images in this new folder: as PNG, and bit for bit as safetensors.",
            rich_help_panel=IMAGE,
        ),
    ] = None
    image: Annotated[
        Path | None, typer.Option("--image", help="Attack this one image instead of test images.", rich_help_panel=IMAGE)
    ] = None
    resize: Annotated[
        bool, typer.Option("--resize", help="Resize and crop it, as the images of a folder are.", rich_help_panel=IMAGE)
    ] = False
    map_: Annotated[
        Path | None,
        typer.Option(
            "--map",
            callback=file_to_write("--map"),
            help="Draw it, its adversarial image and their difference into this file.",
            rich_help_panel=IMAGE,
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            callback=file_to_write("--plot"),
            help="Draw accuracy under attack over the queries of an image into this file.",
            rich_help_panel=IMAGE,
        ),
    ] = None

    @property
    def of_one_model(self) -> dict[str, Path | None]:
        """What is given of these, by flag."""
        return {"--save": self.save, "--image": self.image, "--map": self.map_, "--plot": self.plot}

    def check(self, data: DataOptions, run: RunOptions, join: JoinOptions, dry_run: bool) -> None:
        """Refuse what does not go together, and what cannot be written, before anything is computed."""
        if self.image is None and self.map_ is not None:
            raise UsageError("--map draws one image.", hint="Add --image FILE.")
        if self.image is None and self.resize:
            raise UsageError("--resize goes with --image.", hint="The images of a folder are always resized and cropped.")
        if self.image is not None:
            of_many: dict[str, Any] = {"--limit": data.limit, "--batch-size": run.batch_size, "--out": run.out}
            of_many |= {"--dry-run": dry_run, "--fresh": run.fresh, "--plot": self.plot, "--max-seconds": join.max_seconds}
            of_many |= {"--processes": run.processes}
            given = [flag for flag, value in of_many.items() if value not in (None, False)]
            if given:
                hint = "It is about one image: leave one of them out."
                raise UsageError(f"{given[0]} does not go with --image.", hint=hint)
        if self.save is not None:
            from patchcert_cli.evaluation import adversarial_images

            adversarial_images.check(self.save)
        for path in filter(None, (self.map_, self.plot)):
            from patchcert_cli.reporting import plots

            plots.require()
            plots.check_path(path)
