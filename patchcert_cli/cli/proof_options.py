"""Which of a defense's proofs ``patchcert certify`` takes, and which defense it makes of several models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from patchcert_cli.cli import complete
from patchcert_cli.errors import UsageError

RULES, MOST = ("majority", "cross", "sum"), 5  # of ensembles, and their members
CONDITIONS = ("exact", "3.1", "3.2", "3.3")
BOUNDS = ("interval", "linear", "best")
PROOF = "Proof"


@dataclass(frozen=True)
class ProofOptions:
    """Which of a defense's proofs."""

    condition: Annotated[
        str | None,
        typer.Option(
            "--condition",
            metavar="exact|3.1|3.2|3.3|all",
            help="Proof for votes: exact, or a published looser condition, or all side by side.",
            autocompletion=complete.among(*CONDITIONS, "all"),
            rich_help_panel=PROOF,
        ),
    ] = None
    bounds: Annotated[
        str | None,
        typer.Option(
            "--bounds",
            metavar="interval|linear|best|all",
            help="Bounds for networks: interval, or also linear ones for images that they leave undecided (best, the default).",
            autocompletion=complete.among(*BOUNDS, "all"),
            rich_help_panel=PROOF,
        ),
    ] = None

    top: Annotated[
        int,
        typer.Option(
            "--top",
            metavar="K",
            help="Certify that the right class stays among the first K, for votes and interval bounds. Default: 1.",
            rich_help_panel=PROOF,
        ),
    ] = 1
    ensemble: Annotated[
        str | None,
        typer.Option(
            "--ensemble",
            metavar="|".join(RULES),
            help="Combine the models into one: their majority, an alarm where they differ, or the sum of their votes.",
            rich_help_panel=PROOF,
        ),
    ] = None

    def combined(self, models: Sequence[str] | None) -> list[str] | None:
        """The models as one, where they are to be combined."""
        if self.ensemble is None:
            return None if models is None else list(models)
        if self.ensemble not in RULES:
            raise UsageError(f"no rule '{self.ensemble}' for an ensemble.", hint=f"Use {', '.join(RULES[:-1])} or {RULES[-1]}.")
        if not 2 <= len(models or []) <= MOST:
            raise UsageError(
                f"--ensemble combines 2 to {MOST} models, and {len(models or [])} are given.",
                hint="patchcert certify cifar-bagcert-rf7 cifar-smoothing-column --ensemble sum --patch 5",
            )
        return [f"{self.ensemble}:{'+'.join(models or [])}"]

    def methods(self) -> list[str | None]:
        """The names of the proofs; None is the defense's best."""
        if self.bounds is not None and self.condition is not None:
            raise UsageError("--condition is for votes and --bounds for networks.", hint="Give one of them.")
        for kind, given, known in (("bounds", self.bounds, BOUNDS), ("condition", self.condition, CONDITIONS)):
            if given not in (None, *known, "all"):
                raise UsageError(f"no {kind} '{given}'.", hint=f"Use one of {', '.join(known)}, or all.")
        if self.bounds == "all":
            return ["interval", "linear"]
        return list(CONDITIONS) if self.condition == "all" else [self.bounds or self.condition]
