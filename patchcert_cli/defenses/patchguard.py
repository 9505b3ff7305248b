"""PatchGuard (Xiang et al., PatchGuard: A Provably Robust Defense against Adversarial Patches, USENIX Security 2021).

A network with a small receptive field gives each class evidence at every cell. A class loses its heaviest window of evidence, as
large as what a patch of the size ``covers`` can reach, and the class with most left is the answer. The deployed network computes
without rounding error and its evidence is made of whole steps, so nothing is rounded in the proof either
(:mod:`patchcert_cli.certifiers.cells.robust_masking`).

Shapes: B images, C channels, H x W pixels, K classes, N x M cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli.certificate import Claim
from patchcert_cli.certifiers.cells import additive, robust_masking
from patchcert_cli.certifiers.cells.robust_masking import FINEST, MOST, Masking
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._base import own_entries, size_and_classes
from patchcert_cli.defenses._cells import RegionDefense
from patchcert_cli.defenses._training import AugmentedOptions, Options, TrainingStep
from patchcert_cli.errors import PatchcertError, UnsupportedThreat, UsageError
from patchcert_cli.models.region import RegionScorer
from patchcert_cli.schema import Count, Must, Parsed
from patchcert_cli.threats import Threat, parse_patch, parse_threat

STEPS = 256.0  # of evidence, for one of the network's units
DOUBT = 0.02  # how far a cell of the deployed network may be from the trained one, in the network's units, for attacks


def _is_patch(text: str) -> bool:
    try:
        parse_patch(text or "1")
    except PatchcertError:
        return False
    return True


Share = Annotated[float, Must(lambda t: 0 <= t < 1, "in [0, 1)")]


@dataclass(frozen=True)
class RobustMasking:
    """What is deployed: the threats whose largest windows of cells a class loses, and ``share`` of :class:`PatchGuardOptions`."""

    covers: tuple[Annotated[Threat, Parsed(parse_threat)], ...]
    share: Share = 0.0


@dataclass(frozen=True)
class PatchGuardOptions(AugmentedOptions):
    """What PatchGuard takes away, when it is trained and when it is deployed, and its training.

    Attributes:
        covers: the largest patch that a mask is to hold, as N, HxW or P%; by default the patch that it is trained against. It
            decides the deployed answer, as ``deployed.covers`` in config.json; what reaches more cells is never certified.
        share: T; a class loses its heaviest window only if this holds more than so much of its evidence, in thousandths.
        warm_up_epochs: first epochs, in which the true class keeps all its evidence; later ones take its heaviest window away
            (the paper's provable adversarial training).
        flip: mirror images at random.
        shift: move images by up to this many pixels.
    """

    covers: Annotated[str, Must(_is_patch, "a patch such as 5, 3x7 or 2%")] = ""
    share: Share = 0.0
    warm_up_epochs: Count = 1
    flip: bool = True
    shift: Count = 4


class PatchGuard(RegionDefense[Tensor]):
    """Evidence of a region scorer's cells, robustly masked.

    Attributes:
        masking: what a class loses.
    """

    source = "Xiang et al., PatchGuard, USENIX Security 2021"
    methods = ("masking",)
    options = PatchGuardOptions
    unit = "evidence"

    def __init__(
        self,
        scorer: RegionScorer,
        *,
        input_shape: tuple[int, int, int],
        classes: tuple[str, ...],
        covers: Sequence[Threat],
        share: float = 0.0,
    ) -> None:
        super().__init__(scorer, input_shape=input_shape, classes=classes)
        known = [super(PatchGuard, self).cover_of(threat) for threat in covers]
        window = max(_widest(cover.rows) for cover in known), max(_widest(cover.columns) for cover in known)
        cells = known[0].rows.cells, known[0].columns.cells
        if window == cells:
            raise UsageError(
                f"masks for {', '.join(map(str, covers))} hide all of the {cells[0]}x{cells[1]} cells.",
                hint="Cover a smaller patch, or use a smaller receptive field.",
            )
        self.masking = Masking(window, Fraction(round(share * FINEST), FINEST))

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        assert isinstance(options, PatchGuardOptions)
        return {"covers": [f"patch:{options.covers}" if options.covers else str(threat)], "share": options.share}

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> PatchGuard:
        own = own_entries(RobustMasking, deployed)
        return cls(cls.scorer_of(deployed), **size_and_classes(deployed), covers=own.covers, share=own.share)

    def forward(self, x: Tensor) -> Tensor:
        """Smooth surrogate: what each class is left, in the network's units, [B, K]."""
        evidence = F.relu(self.scorer(x).float())
        heaviest, total = self._heaviest(evidence), evidence.sum(dim=(2, 3))
        return total - torch.where(heaviest > float(self.masking.share) * total, heaviest, 0)

    def _heaviest(self, evidence: Tensor) -> Tensor:
        """The largest sum of a window, [B, K, N, M] -> [B, K]."""
        windows = F.avg_pool2d(evidence, self.masking.window, stride=1, divisor_override=1)
        return windows.flatten(2).amax(dim=2)

    def surrogates(self) -> tuple[Surrogate, ...]:
        """What is left, and all evidence."""
        left, whole = Surrogate(self), Surrogate(lambda x: F.relu(self.scorer(x)).sum(dim=(2, 3)))
        left.tolerance = DOUBT * self.scorer.cells(self.input_shape[1]) * self.scorer.cells(self.input_shape[2])
        return left, whole

    def count(self, scores: Tensor) -> Tensor:
        """Evidence in whole steps, int64 [B, K, N, M]: positive scores, exactly rounded."""
        return (scores.double() * STEPS).round().clamp(0, MOST).long()

    def answer(self, outputs: Tensor) -> Tensor:
        return robust_masking.answer(outputs, self.masking)

    def prove(self, outputs: Tensor, cover: CellCoverage, claim: Claim) -> additive.Proof:
        return robust_masking.prove(outputs, self.masking, cover)

    @property
    def locates(self) -> bool:
        return True

    def forced(self, outputs: Tensor, cover: CellCoverage, claim: Claim) -> Tensor:
        return robust_masking.forced(outputs, self.masking, cover)

    def margins(self, outputs: Tensor, cover: CellCoverage) -> Tensor:
        return robust_masking.margin_map(outputs, self.masking, cover)

    def cover_of(self, threat: Threat) -> CellCoverage:
        """The cover of one patch or one pixel."""
        cover = super().cover_of(threat)
        if cover.budget > 1:
            raise UnsupportedThreat(f"robust masking has no certificate against {threat}.", hint="Allowed: one patch or pixel.")
        return cover

    def note(self, threat: Threat) -> str:
        """Says so where the patch reaches more cells than a mask holds."""
        cover, (height, width) = self.cover_of(threat), self.masking.window
        reached = (_widest(cover.rows), _widest(cover.columns))
        if reached[0] <= height and reached[1] <= width:
            return ""
        return f"{threat} reaches {reached[0]}x{reached[1]} cells, but a mask holds {height}x{width}: no image can be certified"

    def margin_map(self, x: Tensor, patch: Threat) -> Tensor:
        if remark := self.note(patch):
            raise UsageError(f"{remark}.", hint="Draw a smaller patch.")
        return super().margin_map(x, patch)

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """Cross-entropy of the mean evidence, from which the true class loses its heaviest window."""
        options = step.options
        assert isinstance(options, PatchGuardOptions)
        evidence = F.relu(self.scorer(x).float())
        mean = evidence.mean(dim=(2, 3))
        if step.progress >= options.warm_up_epochs:
            taken = self._heaviest(evidence) / (evidence.shape[2] * evidence.shape[3])
            mean = mean - F.one_hot(label, mean.shape[1]) * taken
        return F.cross_entropy(mean, label)


def _widest(axis: Axis) -> int:
    """The most cells that a start touches."""
    return max(len(cells) for cells in axis.touched)
