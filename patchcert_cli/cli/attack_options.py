"""The options of ``patchcert attack`` that no other command has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from patchcert_cli.cli.options import RUN
from patchcert_cli.errors import UsageError

ATTACK, SAVED = "Attack", "Images to paste"

AttackOption = Annotated[
    str | None,
    typer.Option(
        "--attack",
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
        own = ("steps", "restarts", "locations", "iterations", "budget", "proposals")
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
            raise UsageError(f"--max-seconds {self.max_seconds:g} must be more than 0.")
