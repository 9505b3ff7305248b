"""BagCert with square roots of regional votes: a monotone aggregation that is not a sum.

The cells of :mod:`patchcert_cli.defenses.bagcert` are divided into regions, and a class is worth the sum over regions of the
square root of its votes there: votes in many regions count more than as many in one, which is where a patch has them. The roots
are in whole steps, ``floor(2^8 sqrt(votes))``, so sums of them are exact and the order of classes is the same on every machine.

**Proof.** ``floor(2^8 sqrt(v))`` does not decrease with v, so the value of a class is monotone in every vote, and condition
3.1 of the BagCert paper applies (:func:`patchcert_cli.certifiers.cells.additive.prove_aggregate`): the smallest value of the
answer, without the votes of the cells that see the patch, is compared with the largest value of another class, with all of them.

Shapes: B images, K classes, N x M cells, R x R regions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli import schema
from patchcert_cli.certificate import Claim
from patchcert_cli.certifiers.cells import additive
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.geometry import CellCoverage
from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._base import own_entries, size_and_classes
from patchcert_cli.defenses._training import Options
from patchcert_cli.defenses.bagcert import BagCert, BagCertOptions, Step
from patchcert_cli.errors import UnsupportedThreat, UsageError
from patchcert_cli.layers.precision import first_largest
from patchcert_cli.models.region import RegionScorer
from patchcert_cli.schema import Positive
from patchcert_cli.threats import Threat

FINE = 8  # binary digits of a root after the point
SMALL = 1e-2  # added to shares before their root is taken in training, where a root of 0 would have no slope


def _sum_only(aggregate: str) -> Iterable[str]:
    if aggregate != "sum":
        yield "aggregate must be sum: regions have roots instead"


@dataclass(frozen=True)
class Regions:
    """How cells are divided, as it is deployed.

    Attributes:
        regions: R; there are R x R regions.
    """

    regions: Positive = 3


@dataclass(frozen=True)
class RootsOptions(Regions, BagCertOptions):
    """Training of BagCert, with regions."""

    rules: ClassVar[tuple[schema.Rule, ...]] = (_sum_only,)


class Roots(BagCert):
    """Sums over regions of the square roots of votes."""

    options = RootsOptions
    methods: ClassVar[tuple[str, ...]] = ("3.1",)
    table: Tensor

    def __init__(
        self, scorer: RegionScorer, *, input_shape: tuple[int, int, int], classes: tuple[str, ...], regions: int = 2
    ) -> None:
        super().__init__(scorer, input_shape=input_shape, classes=classes)
        self.regions, cells = regions, [scorer.cells(side) for side in input_shape[1:]]
        if regions > min(cells):
            raise UsageError(
                f"{regions}x{regions} regions are too many for {cells[0]}x{cells[1]} cells.", hint="Use fewer regions."
            )
        roots = [math.isqrt(votes << 2 * FINE) for votes in range(math.prod(cells) + 1)]
        self.register_buffer("table", torch.tensor(roots, dtype=torch.float64), persistent=False)

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        assert isinstance(options, RootsOptions)
        return {"regions": options.regions}

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> Roots:
        own = own_entries(Regions, deployed)
        return cls(cls.scorer_of(deployed), **size_and_classes(deployed), regions=own.regions)

    def worth(self, votes: Tensor) -> Tensor:
        """What votes float64 [..., N, M], whole numbers, are worth: [...]."""
        rows, columns = (self._membership(length).to(votes) for length in votes.shape[-2:])
        counts: Tensor = rows @ votes @ columns.t()
        return self.table[counts.long()].sum(dim=(-1, -2))

    def _membership(self, length: int) -> Tensor:
        """Which cells along an axis are in which region, 0 or 1, [R, length]."""
        return F.one_hot(torch.arange(length) * self.regions // length, self.regions).t()

    def answer(self, outputs: Votes) -> Tensor:
        return first_largest(self.worth(outputs.scores.double()))

    def prove(self, outputs: Votes, cover: CellCoverage, claim: Claim) -> additive.Proof:
        if cover.budget > 1:
            raise UnsupportedThreat(f"condition 3.1 is not for {claim.threat}.", hint="It is for one patch or one pixel.")
        return additive.prove_aggregate(outputs, cover, self.worth)

    def margins(self, outputs: Votes, cover: CellCoverage) -> Tensor:
        raise UsageError("this defense has no margins by location.", hint="Use bagcert for maps.")

    def note(self, threat: Threat) -> str:
        return ""

    def surrogates(self) -> tuple[Surrogate, ...]:
        """Roots of votes with the gradient of sigmoids (straight-through), and their smooth form."""
        votes = Surrogate(lambda x: self._share(Step.apply(self.scorer(x))))
        votes.tolerance = 0.1  # the deployed network is rounded, and SMALL is added
        return votes, Surrogate(self)

    def _share(self, votes: Tensor, down: int = 0, right: int = 0, every: int = 1) -> Tensor:
        """The mean over regions of the root of the share of votes [B, K, n, m], with gradients: [B, K]."""
        return (F.adaptive_avg_pool2d(votes, self.regions) + SMALL).sqrt().mean(dim=(2, 3))
