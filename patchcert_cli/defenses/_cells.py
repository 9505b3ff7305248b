"""Defenses whose cells each see a known part of the image.

:class:`LocalFeatureDefense` knows which cells a threat reaches, and checks it. :class:`VotingDefense` adds up what cells say, so
one exact proof serves BagCert, clipped BagNet and derandomized smoothing: :mod:`patchcert_cli.certifiers.cells.additive`.
:class:`RegionDefense` has the cells of a region scorer, which BagCert, clipped BagNet and PatchGuard read in different ways.

Shapes: B images, C channels, H x W pixels, K classes, N x M cells, P x Q locations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from patchcert_cli.certificate import Arithmetic, Claim, Proof
from patchcert_cli.certifiers.cells import additive, by_location
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._base import MarginMaps, build_network
from patchcert_cli.defenses._training import Trainable
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.layers import fixed_point, programs
from patchcert_cli.layers.programs import Runner
from patchcert_cli.models.region import RegionScorer
from patchcert_cli.threats import Patch, Patches, PatchPercent, Sparse, Threat

CellOutputs = TypeVar("CellOutputs")


class LocalFeatureDefense(Trainable, MarginMaps, Generic[CellOutputs]):
    """A classifier that answers by what its cells say, kept in a form that its proof reads."""

    precision: Mapping[str, str] = {"votes": "exact"}

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """What the network makes of images [B, C, H, W] in [0, 1], [B, K, N, M]; the same in any batch and on any device."""

    @abstractmethod
    def count(self, scores: Tensor) -> CellOutputs:
        """What scores [B, K, N, M] mean, cell by cell."""

    @abstractmethod
    def answer(self, outputs: CellOutputs) -> Tensor:
        """The deployed answer, int64 [B]."""

    @abstractmethod
    def prove(self, outputs: CellOutputs, cover: CellCoverage, claim: Claim) -> additive.Proof:
        """The proof that a claim names, about that answer; ``cover`` is of the claim's threat."""

    @abstractmethod
    def margins(self, outputs: CellOutputs, cover: CellCoverage) -> Tensor:
        """The best proof's margin at every location, float64 [B, P, Q]."""

    @abstractmethod
    def cover(self, patch: Patch) -> CellCoverage:
        """Which cells see a pixel of the patch, for each of its locations."""

    def title(self, method: str) -> str:
        """A proof's name in records."""
        return method

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        self.check_input(x)
        self.test_once()
        return self.answer(self.count(self.scores(x)))

    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> list[Proof]:
        """All claims from one evaluation of the cells."""
        covers = [self.cover_of(claim.threat) for claim in claims]
        outputs = self.count(self.scores(x))
        return [self._proof(outputs, *pair) for pair in zip(claims, covers, strict=True)]

    def _proof(self, outputs: CellOutputs, claim: Claim, cover: CellCoverage) -> Proof:
        ranked = self.prove_first(outputs, cover, claim) if claim.top > 1 else None
        proof = self.prove(outputs, cover, claim) if ranked is None else ranked
        return Proof(  # whole numbers, so no tolerance; the attacker decides what rounding may decide
            answer=proof.answer,
            margin=proof.margin,
            location=proof.worst,
            runner_up=proof.rival,
            method=self.title(str(claim.method)),
            arithmetic=Arithmetic.EXACT,
            forced=self.forced(outputs, cover, claim) if claim.forced else None,
            ranking=None if ranked is None else ranked.ranking,
            stays=None if ranked is None else ranked.margins > 0,
        )

    def forced(self, outputs: CellOutputs, cover: CellCoverage, claim: Claim) -> Tensor:
        """What can be forced at each location of the claim's threat, bool [B, A, K]; ``locates`` says whether it is known."""
        raise NotImplementedError

    def prove_first(self, outputs: CellOutputs, cover: CellCoverage, claim: Claim) -> by_location.Ranking:
        """Which of the first ``claim.top`` classes stay among them; ``ranks`` says whether it is known."""
        raise NotImplementedError

    @torch.no_grad()
    def margin_map(self, x: Tensor, patch: Threat) -> Tensor:
        self.check_input(x)
        if not isinstance(patch, Patch | PatchPercent):
            raise UsageError(f"a map needs one patch, not {patch}.", hint="Use --patch, for example --patch 5.")
        return self.margins(self.count(self.scores(x)), self.cover_of(patch))

    def cover_of(self, threat: Threat) -> CellCoverage:
        """The cover of any threat model that this family can certify: one patch, several of one shape, or k pixels.

        A sparse attacker has k patches of one pixel; single values are covered by their pixels.
        """
        channels, height, width = self.input_shape
        threat.check(height, width, channels)
        if isinstance(threat, Patches):
            return replace(self.cover(threat.each.resolve(height, width)), budget=threat.number)
        if isinstance(threat, Patch | PatchPercent):
            return self.cover(threat.resolve(height, width))
        if isinstance(threat, Sparse) and threat.unit == "pixel":
            return replace(self.cover(Patch(1, 1)), budget=threat.k)
        raise UnsupportedThreat(f"votes have no certificate against {threat}.", hint="Allowed: patches, and sparse pixels.")

    @torch.no_grad()
    def self_test(self) -> None:
        """Push NaN through single pixels: it must reach some cells, and none that :meth:`cover` does not count.

        Dilated kernels alone have holes, which the proof counts as seen.
        """
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
            if bool((reached[at] & ~claimed).any()) or not bool(reached.any()):
                raise IntegrityError(
                    f"the pixel at row {row}, column {column} reaches {int(reached[at].sum())} cells,"
                    f" but the proof counts {int(claimed.sum())}.",
                    hint="The network is not what its configuration says; its certificates would be void.",
                )


class VotingDefense(LocalFeatureDefense[Votes]):
    """Cells vote, and the class with the largest sum is the answer, the lowest class index among equals."""

    methods: ClassVar[tuple[str, ...]] = additive.METHODS

    def votes(self, x: Tensor) -> Votes:
        """What the cells say about images [B, C, H, W] in [0, 1]."""
        return self.count(self.scores(x))

    def answer(self, outputs: Votes) -> Tensor:
        return outputs.answer()

    def prove(self, outputs: Votes, cover: CellCoverage, claim: Claim) -> additive.Proof:
        method = str(claim.method)
        if method == "3.1" and cover.budget > 1:
            raise UnsupportedThreat(f"condition 3.1 is not for {claim.threat}.", hint="It is for one patch or one pixel.")
        return additive.prove(outputs, cover, method)

    @property
    def locates(self) -> bool:
        """A defense with another answer than the largest sum needs a proof of its own."""
        return type(self).answer is VotingDefense.answer

    @property
    def ranks(self) -> bool:
        return self.locates

    def ranges(self, outputs: Votes, cover: CellCoverage, threat: Threat) -> Iterator[by_location.Ranges]:
        """What the sums can be under an attack at each location of a threat of one location, a few images at a time."""
        return by_location.ranges(outputs, cover)

    def forced(self, outputs: Votes, cover: CellCoverage, claim: Claim) -> Tensor:
        return by_location.forced(self.ranges(outputs, cover, claim.threat))

    def prove_first(self, outputs: Votes, cover: CellCoverage, claim: Claim) -> by_location.Ranking:
        if claim.method != "exact":
            raise UnsupportedThreat(f"condition {claim.method} is about one answer.", hint="For top use the exact proof.")
        return by_location.prove_first(outputs, cover, claim.top)

    def margins(self, outputs: Votes, cover: CellCoverage) -> Tensor:
        return additive.margin_map(outputs, cover)

    def title(self, method: str) -> str:
        return "additive" if method == "exact" else f"condition {method}"

    def note(self, threat: Threat) -> str:
        """A warning if a patch reaches more cells than any image could be certified with; else empty."""
        cover = self.cover_of(threat)
        size = torch.outer(cover.rows.matrix().sum(dim=1), cover.columns.matrix().sum(dim=1))
        reached, cells = int(size.max()) * threat.budget, cover.rows.cells * cover.columns.cells
        if 2 * reached <= cells:  # all cells vote for the answer, and those reached change to a class of higher index
            return ""
        return f"{threat} reaches {min(reached, cells)} of the {cells} cells: no image can be certified"


PIECE = 1 << 25  # activations of one layer that are computed at a time, at most


class RegionDefense(LocalFeatureDefense[CellOutputs]):
    """A classifier whose cells are those of a region scorer, deployed without rounding error
    (:mod:`patchcert_cli.layers.fixed_point`)."""

    default_network = "region"

    def __init__(self, scorer: RegionScorer, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__(input_shape=input_shape, classes=classes)
        self.scorer = scorer
        self.deployed = fixed_point.FrozenNetworkCache(scorer)
        self.run = Runner(self.deployed)

    @staticmethod
    def scorer_of(deployed: Mapping[str, Any]) -> RegionScorer:
        """The region scorer of a configuration, with fresh weights."""
        scorer: Any = build_network(deployed)
        if not isinstance(scorer, RegionScorer):
            raise IntegrityError(
                f"{deployed['defense']} needs a region scorer, not '{deployed['network']['name']}'.", hint="Use network region."
            )
        return scorer

    @property
    def receptive_field(self) -> int:
        """Side of the square of pixels that a cell sees."""
        return self.scorer.receptive_field

    @property
    def activations(self) -> int:
        return self.scorer.widest * self.input_shape[1] * self.input_shape[2]

    def scores(self, x: Tensor) -> Tensor:
        """The scores of all cells as the deployed network computes them, [B, K, N, M].

        Of a mirrored network the mean of both looks: float64 has room for the sum of two scores, so no digit is lost.
        """
        size = programs.at_once(self.activations, x.device, PIECE)
        steps = [fixed_point.to_steps(part) for part in torch.split(x, size)]
        if not self.scorer.mirrored:
            return torch.cat([self.run(part) for part in steps])
        return torch.cat([(self.run(part).double() + self.run(part.flip(3)).flip(3).double()) / 2 for part in steps])

    def cover(self, patch: Patch) -> CellCoverage:
        slide = {"kernel": self.receptive_field, "stride": self.scorer.stride, "padding": self.scorer.padding}
        height, width = self.input_shape[1:]
        return CellCoverage(Axis.sliding(height, patch.height, **slide), Axis.sliding(width, patch.width, **slide))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Choose the steps of the deployed network's activations from some training images."""
        self.eval()
        with fixed_point.observing(self.scorer):
            for part in torch.split(x, programs.at_once(self.activations, x.device, PIECE)):
                self.scorer(part)


class CellSurrogate(Surrogate):
    """Sums over cells; a box alters the cells that see it, which are computed from the pixels that they see.

    All windows are as large as one in the middle of the image needs, and moved inside where they would stick out.

    Attributes:
        vote: what a cell says, from scores [B, K, n, m], with gradients.
        weight: how much each cell counts, [N, M]; None for 1.
        tolerance: the deployed network is rounded, and some cells say something else.
    """

    def __init__(
        self, defense: RegionDefense[Any], vote: Callable[[Tensor], Tensor], weight: Tensor | None = None, tolerance: float = 2.0
    ) -> None:
        self._scorer, self._vote, self._reach = defense.scorer, vote, defense.receptive_field - 1
        self._stride, self._padding = defense.scorer.stride, defense.scorer.padding
        cells = [defense.scorer.cells(side) for side in defense.input_shape[1:]]
        self._weight = torch.ones(cells, device=defense.device) if weight is None else weight.float()
        self.tolerance = tolerance

    def whole(self, x: Tensor) -> Tensor:
        return (self._vote(self._scorer(x)) * self._weight).sum(dim=(2, 3))

    def near(self, x: Tensor, boxes: Tensor) -> Tensor:
        row, column = self._window(boxes, x, pixels=True)  # [B, h] and [B, w]
        image = torch.arange(len(x), device=x.device)[:, None, None]
        whole = self._scorer.prepare(x)
        seen = whole.permute(0, 2, 3, 1)[image, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
        row, column = self._window(boxes, x)  # cells
        weight = self._weight[row[:, :, None], column[:, None, :]]
        return (self._vote(self._scorer.score(seen)) * weight[:, None]).sum(dim=(2, 3))

    def share(self, boxes: Tensor) -> float:
        found = 1.0
        for axis, cells in enumerate(self._weight.shape):
            found *= min(1.0, (int(boxes[..., 2 + axis].amax()) + self._reach) / (cells * self._stride))
        return found

    def rest(self, x: Tensor, boxes: Tensor) -> Tensor:
        votes = self._vote(self._scorer(x)) * self._weight
        row, column = self._window(boxes, x)  # [B, S, n] and [B, S, m]
        image = torch.arange(len(x), device=x.device)[:, None, None, None]
        inside = votes.permute(0, 2, 3, 1)[image, row[..., :, None], column[..., None, :]]  # [B, S, n, m, K]
        return votes.sum(dim=(2, 3))[:, None] - inside.sum(dim=(2, 3))

    def _window(self, boxes: Tensor, x: Tensor, *, pixels: bool = False) -> list[Tensor]:
        """Rows and columns, int64 [..., h] and [..., w], of the cells that see a box, or of all the pixels that they see, as the
        prepared image numbers them, which begins with its padding.

        Cell i sees pixels ``i * stride`` to ``i * stride + reach`` there.
        """
        found, stride, reach = [], self._stride, self._reach
        for axis, length in enumerate(x.shape[2:]):
            cells = self._scorer.cells(length)
            size = min(cells, -(-(int(boxes[..., 2 + axis].amax()) + reach) // stride))
            start = boxes[..., axis] + self._padding
            first = (-((reach - start) // stride)).clamp(0, cells - size)  # ceil((start - reach) / stride)
            begin, count = (first * stride, (size - 1) * stride + reach + 1) if pixels else (first, size)
            found.append(begin[..., None] + torch.arange(count, device=x.device))
        return found
