"""PatchCleanser (Xiang, Mahloujifar & Mittal, USENIX Security 2022): any classifier, evaluated under pairs of masks.

Masks that hide every location of the patch are laid over the image one at a time, then two at a time; the answer is made of the
labels that the classifier gives then. Masks: :mod:`patchcert_cli.certifiers.masks`; answer and proof:
:mod:`patchcert_cli.certifiers.masks.double_masking`. Training uses two random masks, or the two worst of some (greedy cutout:
Saha et al., Revisiting Image Classifier Training for Improved Certified Robust Defense against Adversarial Patches, TMLR 2023).

A label that rounding might decide is computed again, in float64 and each image alone
(:mod:`patchcert_cli.certifiers.masks.masked_predictions`). That the other labels do not depend on rounding is measured, not
proven: the certificates say ``measured``.

Shapes: B images, C channels, H x W pixels, K classes, M masks, n passes, A locations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from patchcert_cli.certificate import Claim, Proof
from patchcert_cli.certifiers.masks import double_masking
from patchcert_cli.certifiers.masks.double_masking import Table
from patchcert_cli.certifiers.masks.exact_predictions import ExactMaskedPredictor, Predictor
from patchcert_cli.certifiers.masks.mask_sets import MaskCoverage
from patchcert_cli.defenses._masked import MaskedClassifier
from patchcert_cli.threats import Threat

TABLE_ENTRIES = 1 << 23  # of the tables of a group of images, at most
MAP_BYTES = 1 << 28  # of the maps under single masks of a group of images, at most


class PatchCleanser(MaskedClassifier):
    """Any classifier under pairs of masks."""

    source = "Xiang, Mahloujifar & Mittal, PatchCleanser, USENIX Security 2022"
    methods = double_masking.METHODS

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The published two-round answer; see :mod:`patchcert_cli.certifiers.masks.double_masking`."""
        self.check_input(x)
        answers = [double_masking.answer(table, len(self.classes)) for table in self._tables(x, self.views())]
        return torch.cat([torch.zeros(0, dtype=torch.int64), *answers]).to(x.device)

    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> list[Proof]:
        """All claims from the same passes: what one of them asked is known to the next."""
        covers = [self.set.cover(claim.threat) for claim in claims]
        parts: list[list[Proof]] = [[] for _ in claims]
        views = self.views()
        for table in self._tables(x, views):
            answer = double_masking.answer(table, len(self.classes))
            known = table.label >= 0
            proofs = [self._proof(table, answer, known, views, *pair) for pair in zip(claims, covers, strict=True)]
            for mine, proof in zip(parts, proofs, strict=True):
                mine.append(replace(proof, passes=table.passes))  # of all claims
        return [Proof.cat(mine) for mine in parts]

    def _proof(self, table: Table, answer: Tensor, known: Tensor, views: Predictor, claim: Claim, cover: MaskCoverage) -> Proof:
        by, location = self.sets(cover, whole=claim.method == "pairs")  # "pairs": every mask is to have a whole row
        found = double_masking.prove(table, answer, by, views.tolerance, known)
        forced = self._forced(table, answer, found.certified, views, claim) if claim.forced else None
        return Proof(
            answer=answer,
            margin=torch.where(found.certified, found.margin, found.margin.clamp(max=views.tolerance)),
            location=location[found.weakest],
            runner_up=found.rival,
            tolerance=views.tolerance,
            arithmetic=views.arithmetic,
            forced=forced,
        )

    @property
    def locates(self) -> bool:
        return True

    def _forced(self, table: Table, answer: Tensor, certified: Tensor, views: Predictor, claim: Claim) -> Tensor:
        """The answer alone where the theorem holds for a location, else every class: bool [b, A, K]."""
        harmed = double_masking.forced(table, answer, self.set.hides(claim.threat), views.tolerance, certified)
        own = torch.arange(len(self.classes)) == answer[:, None]
        return harmed[:, :, None] | own[:, None, :]

    def _tables(self, x: Tensor, views: Predictor) -> Iterator[Table]:
        """What is known of the images, a group at a time; an empty batch is one group."""
        self.test_once()
        size = max(1, TABLE_ENTRIES // len(self.set) ** 2)
        if isinstance(views, ExactMaskedPredictor):
            size = max(1, min(size, MAP_BYTES // max(views.bytes_each(), 1)))
        for part in torch.split(x, size):
            yield Table(views.for_images(part), len(part), len(self.set))

    def views(self) -> Predictor:
        return self._behind(self.masks)

    def passes_per_image(self) -> tuple[int, int]:
        return len(self.set), self.set.passes

    def note(self, threat: Threat) -> str:
        """What it costs, and whether pairs of its masks leave nothing to see."""
        nothing = ". Two of these masks hide the whole image, so answers of one class alone can be certified: use more masks"
        return super().note(threat) + (nothing if self.set.pair_hides_all else "")

    def mask_margins(self, x: Tensor) -> Tensor:
        """From all pairs."""
        tables = self._tables(x, self.views())
        return torch.cat([double_masking.lowest(table, double_masking.answer(table, len(self.classes))) for table in tables])
