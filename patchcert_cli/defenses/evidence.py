"""What BagCert and derandomized smoothing share: cells vote, the answer is a sum, one exact proof serves both.

Proof: :mod:`patchcert_cli.certifiers.additive`. A defense of this family says
what its cells vote and which cells a patch touches.

Shapes: B images, C channels, H x W pixels, K classes, N x M cells, P x Q locations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers import additive
from patchcert_cli.certifiers.additive import Votes
from patchcert_cli.defenses.base import Claim, Defense
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.geometry import Cover
from patchcert_cli.threats import Patch, PatchPercent, Sparse, Threat


class EvidenceDefense(Defense):
    """A classifier whose cells vote."""

    methods: ClassVar[tuple[str, ...]] = additive.METHODS
    numerics: ClassVar[Mapping[str, str]] = {"votes": "exact"}

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """What votes are made of, [B, K, N, M], from images [B, C, H, W] in [0, 1]; the same in any batch and on any device."""

    @abstractmethod
    def count(self, scores: Tensor) -> Votes:
        """The votes that scores [B, K, N, M] mean, cell by cell."""

    def votes(self, x: Tensor) -> Votes:
        """What the cells say about images [B, C, H, W] in [0, 1]."""
        return self.count(self.scores(x))

    @abstractmethod
    def cover(self, patch: Patch) -> Cover:
        """Which cells see a pixel of the patch, for each of its locations."""

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The class with the most votes, lowest class index first."""
        self.check_input(x)
        return self.votes(x).answer()

    @torch.no_grad()
    def certify_each(self, x: Tensor, claims: Sequence[Claim]) -> list[Certificate]:
        """All claims from one evaluation of the cells."""
        self.check_input(x)
        for claim in claims:
            self.check_method(claim.method)
        votes = self.votes(x)
        return [self._certificate(votes, claim) for claim in claims]

    def _certificate(self, votes: Votes, claim: Claim) -> Certificate:
        height, width = self.input_shape[1:]
        method = claim.method or self.methods[0]
        cover = self.cover_of(claim.threat)
        if method == "3.1" and cover.budget > 1:
            raise UnsupportedThreat(f"condition 3.1 is not for {claim.threat};", hint="it is for one patch or one pixel.")
        proof = additive.prove(votes, cover, method)
        return Certificate(
            prediction=proof.answer,
            certified=proof.margin > 0,
            margin=proof.margin,
            slack=torch.zeros_like(proof.margin),  # whole numbers; what rounding may decide is the attacker's
            worst=claim.threat.atoms(height, width).to(proof.worst.device)[proof.worst],
            rival=proof.rival,
            threat=claim.threat,
            method="additive" if method == "exact" else f"condition {method}",
        )

    def cover_of(self, threat: Threat) -> Cover:
        """The cover of any threat model that this family can certify: one patch, or k pixels.

        A sparse attacker has k patches of one pixel; single values are covered by their pixels.
        """
        channels, height, width = self.input_shape
        threat.check(height, width, channels)
        if isinstance(threat, PatchPercent):
            threat = threat.resolve(height, width)
        if isinstance(threat, Patch):
            return self.cover(threat)
        if isinstance(threat, Sparse) and threat.unit == "pixel":
            return replace(self.cover(Patch(1, 1)), budget=threat.k)
        raise UnsupportedThreat(f"votes have no certificate against {threat};", hint="allowed: patch, and sparse pixels.")

    @torch.no_grad()
    def self_test(self) -> None:
        """Push NaN through single pixels: it must reach the very cells that :meth:`cover` counts."""
        _, height, width = self.input_shape
        pixels = sorted({(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, width // 3)})
        x = torch.full((len(pixels), *self.input_shape), 0.5, device=self.device)
        for at, (row, column) in enumerate(pixels):
            x[at, :, row, column] = float("nan")
        reached = self.scores(x).isnan().any(dim=1).cpu()  # [n, N, M]
        cover = self.cover(Patch(1, 1))
        rows, columns = cover.rows.matrix().bool(), cover.columns.matrix().bool()
        for at, (row, column) in enumerate(pixels):
            claimed = rows[row][:, None] & columns[column]
            if not torch.equal(reached[at], claimed):
                raise IntegrityError(
                    f"the pixel at row {row}, column {column} reaches {int(reached[at].sum())} cells,"
                    f" but the proof counts {int(claimed.sum())}.",
                    hint="The network is not what its configuration says; its certificates would be void.",
                )

    def remark(self, threat: Threat) -> str:
        """Says so where a patch reaches so many cells that no image whatever can be certified."""
        cover = self.cover_of(threat)
        size = torch.outer(cover.rows.matrix().sum(dim=1), cover.columns.matrix().sum(dim=1))
        reached, cells = int(size.max()) * threat.budget, cover.rows.cells * cover.columns.cells
        if 2 * reached <= cells:  # all cells vote for the answer, and those reached turn to a rival of higher index
            return ""
        return f"{threat} reaches {min(reached, cells)} of the {cells} cells: no image can be certified"

    @torch.no_grad()
    def margin_map(self, x: Tensor, patch: Threat) -> Tensor:
        self.check_input(x)
        if isinstance(patch, PatchPercent):
            patch = patch.resolve(*self.input_shape[1:])
        if not isinstance(patch, Patch):
            raise UsageError(f"a map needs one patch, not {patch};", hint="use --patch, for example --patch 5.")
        patch.check(*self.input_shape[1:], self.input_shape[0])
        return additive.margin_map(self.votes(x), self.cover(patch))
