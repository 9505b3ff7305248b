"""Derandomized smoothing (Levine & Feizi, (De)Randomized Smoothing for Certifiable Defense against Patch Attacks, NeurIPS 2020).

An image is shown to a network many times, each time ablated: only a band of columns, a band of rows or a block is kept, which
wraps around the image's borders. Each ablation is a cell that votes, and the class with the most votes is the answer. A patch
reaches the few cells whose kept pixels it meets.

A kept value x is given as (x, 1 - x) in two channels and an absent one as (0, 0), which differs from black, (0, 1). The deployed
network computes without rounding error (:mod:`patchcert_cli.layers.fixed_point`), and the proof is exact
(:mod:`patchcert_cli.certifiers.cells.additive`); a vote that a rounded softmax may have decided counts as the attacker's.

Shapes: B images, C channels, H x W pixels, K classes, N x M cells, V views (ablated images), h x w pixels of a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.defenses._base import build_network, own_entries, size_and_classes
from patchcert_cli.defenses._cells import VotingDefense
from patchcert_cli.defenses._training import Options, TaughtOptions, TrainingStep, cross_entropy
from patchcert_cli.errors import IntegrityError, UsageError
from patchcert_cli.layers import fixed_point, programs
from patchcert_cli.layers.precision import first_largest
from patchcert_cli.layers.programs import Runner
from patchcert_cli.models.resnet import ResNet
from patchcert_cli.schema import Count, Must, Positive
from patchcert_cli.threats import Patch, Threat

PIECE = 1 << 22  # activations of one layer that are computed at a time, at most
ROUNDING = 1e-9  # far more than the rounding error of a softmax in float64
OBSERVED = 4  # ablations of each image that :meth:`Smoothing.calibrate` looks at


ABLATIONS, VOTES, VIEWS = ("column", "row", "block"), ("top-one", "threshold"), ("crop", "full")


def one_of(names: tuple[str, ...]) -> Must:
    """The limit of a field that is one of a few words."""
    return Must(lambda name: name in names, f"one of {', '.join(names)}")


@dataclass(frozen=True)
class Ablations:
    """What derandomized smoothing keeps of an image and how it votes.

    Attributes:
        ablation: what is kept, a band of ``band`` columns over the full height, a band of rows over the full width, or a block of
            ``band`` x ``band`` pixels; all wrap around the borders.
        band: width of a band or side of a block, in pixels.
        stride: bands start at every ``stride``-th pixel; the last may overlap the first where this does not divide the image.
        vote: ``top-one``, each cell votes for its most likely class, or ``threshold``, for each class whose softmax is at least
            ``threshold``, which may be several or none.
        threshold: see ``vote``; not used by ``top-one``.
        view: ``full``, the network is given a whole frame with the kept pixels in place and all else absent, as published; or
            ``crop``, it is given the kept pixels alone, put together where they wrap around, which costs about band / W as much.
    """

    ablation: Annotated[str, one_of(ABLATIONS)] = "column"
    band: Positive = 4
    stride: Positive = 1
    vote: Annotated[str, one_of(VOTES)] = "top-one"
    threshold: Annotated[float, Must(lambda share: 0 < share < 1, "between 0 and 1")] = 0.2
    view: Annotated[str, one_of(VIEWS)] = "crop"


@dataclass(frozen=True)
class SmoothingOptions(Ablations, TaughtOptions):
    """Ablations and votes, see :class:`Ablations`, the same in training and deployed; and changes of training images.

    Attributes:
        flip: mirror training images at random.
        shift: move training images by up to this many pixels.
    """

    flip: bool = True
    shift: Count = 4


class Smoothing(VotingDefense):
    """Ablations of the image vote by what a network says about each.

    Attributes:
        how: what is kept and how cells vote.
        rows: int64 [N, h], the rows of pixels that the cells of each row keep; all rows, once, where bands are columns.
        columns: int64 [M, w], likewise.
    """

    source = "Levine & Feizi, (De)Randomized Smoothing for Certifiable Defense against Patch Attacks, NeurIPS 2020"
    options = SmoothingOptions
    default_network = "resnet"
    rows: Tensor
    columns: Tensor

    def __init__(self, network: ResNet, how: Ablations, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__(input_shape=input_shape, classes=classes)
        self.network, self.how = network, how
        self.register_buffer("rows", kept(input_shape[1], how, along=("row", "block")), persistent=False)
        self.register_buffer("columns", kept(input_shape[2], how, along=("column", "block")), persistent=False)
        self.deployed = fixed_point.FrozenNetworkCache(network)
        self.run = Runner(self.deployed)

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        return {item.name: getattr(options, item.name) for item in fields(Ablations)}

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> Smoothing:
        how = own_entries(Ablations, deployed)
        network: Any = build_network(deployed, view_shape(tuple(deployed["input_shape"]), how))
        if not isinstance(network, ResNet):
            raise IntegrityError(
                f"smoothing needs a residual network, not '{deployed['network']['name']}'.", hint="Use network resnet."
            )
        return cls(network, how, **size_and_classes(deployed))

    @property
    def cells(self) -> int:
        """How many ablations of an image there are."""
        return len(self.rows) * len(self.columns)

    @property
    def activations(self) -> int:
        return self.cells * self.network.most

    def views(self, x: Tensor, image: Tensor, cell: Tensor, full: float = 1.0) -> Tensor:
        """Ablated and encoded images.

        Args:
            x: [B, C, H, W], values from 0 to ``full``.
            image: int64 [V], which image each view is of.
            cell: int64 [V], which cell it is for, numbered row by row.
            full: the value of white.

        Returns: [V, 2C, h, w], channels last in memory: x in the first C channels, ``full - x`` in the others, 0 where absent.
        """
        rows, columns = self.rows[cell // len(self.columns)], self.columns[cell % len(self.columns)]  # [V, h], [V, w]
        if self.how.view == "crop":
            pixels = x.permute(0, 2, 3, 1)[image[:, None, None], rows[:, :, None], columns[:, None, :]]  # [V, h, w, C]
            encoded = torch.cat([pixels, full - pixels], dim=3)
        else:
            pixels = x.permute(0, 2, 3, 1)[image]
            seen = _shown(rows, x.shape[2])[:, :, None] & _shown(columns, x.shape[3])[:, None, :]  # [V, H, W]
            encoded = torch.cat([pixels, full - pixels], dim=3).masked_fill(~seen[..., None], 0)
        return encoded.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Smooth surrogate: the mean over all cells of the softmax, [B, K].

        Where there are many views, they are computed again for the gradient, so that their activations are never held at once.
        """
        pieces = list(self._pieces(x, max(1, PIECE // self.network.most)))
        if len(pieces) == 1:
            parts = [self._likelihood(x, *pieces[0])]
        else:
            parts = [checkpoint(self._likelihood, x, *piece, use_reentrant=False) for piece in pieces]
        return torch.cat(parts).reshape(len(x), self.cells, len(self.classes)).mean(dim=1)

    def class_probabilities(self, x: Tensor) -> Tensor:
        return self.forward(x).float()

    def _likelihood(self, x: Tensor, image: Tensor, cell: Tensor) -> Tensor:
        return cast(Tensor, self.network(self.views(x, image, cell)).softmax(dim=1))

    def scores(self, x: Tensor) -> Tensor:
        """The logits of all cells as the deployed network computes them, float64 [B, K, N, M], without rounding error."""
        steps, size = fixed_point.to_steps(x), programs.at_once(self.network.most, x.device, PIECE)
        parts = [self.run(self.views(steps, *piece, full=255.0)) for piece in self._pieces(x, size)]
        shape = (len(x), len(self.rows), len(self.columns), len(self.classes))
        return torch.cat(parts).reshape(shape).permute(0, 3, 1, 2).contiguous()

    def count(self, scores: Tensor) -> Votes:
        """``top-one``: no vote is in doubt, since logits are not rounded; ``threshold``: those next to it are."""
        if self.how.vote == "top-one":
            return Votes(
                torch.zeros_like(scores, dtype=torch.bool).scatter(1, first_largest(scores)[:, None], True), one_hot=True
            )
        away = scores.double().softmax(dim=1) - self.how.threshold
        return Votes(away >= 0, unknown=away.abs() <= ROUNDING)

    def cover(self, patch: Patch) -> CellCoverage:
        height, width = self.input_shape[1:]
        return CellCoverage(self._axis(height, patch.height, "row"), self._axis(width, patch.width, "column"))

    def _axis(self, length: int, side: int, along: str) -> Axis:
        if self.how.ablation in (along, "block"):
            return Axis.bands(length, side, band=self.how.band, stride=self.how.stride)
        return Axis.whole(length, side)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Choose the steps of the deployed network's activations from a few ablations of some training images."""
        self.eval()
        generator = torch.Generator().manual_seed(0)
        with fixed_point.observing(self.network):
            for part in torch.split(x, 250):
                for _ in range(OBSERVED):
                    self.network(self.drawn(part, generator))

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """Cross-entropy of one ablation of each image, of a cell drawn for each image on its own."""
        return cross_entropy(self.network(self.drawn(x, step.generator)).float(), label, step)

    def drawn(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """One view of each image, of a random cell."""
        cell = torch.randint(self.cells, (len(x),), generator=generator).to(x.device)
        return self.views(x, torch.arange(len(x), device=x.device), cell)

    def _pieces(self, x: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All cells of all images, image by image, ``size`` at a time: numbers of images and of cells, int64 [V] each."""
        image = torch.arange(len(x), device=x.device).repeat_interleave(self.cells)
        cell = torch.arange(self.cells, device=x.device).repeat(len(x))
        return zip(torch.split(image, size), torch.split(cell, size), strict=True)


def kept(length: int, how: Ablations, *, along: tuple[str, ...]) -> Tensor:
    """The pixels along one axis that each cell keeps, int64: bands if the ablation is one of ``along``, else [1, length], all."""
    every = torch.arange(length)
    if how.ablation not in along:
        return every[None]
    return (every[:: how.stride, None] + torch.arange(how.band)) % length


def view_shape(shape: tuple[int, ...], how: Ablations) -> tuple[int, int, int]:
    """2C, h and w of what the network is given of images of ``shape`` (C, H, W)."""
    channels, height, width = shape
    least = {"column": width, "row": height, "block": min(height, width)}[how.ablation]
    if how.band > least:
        raise UsageError(
            f"a {how.ablation} of {how.band} pixels is larger than the {height}x{width} image.", hint=f"Allowed: up to {least}."
        )
    if how.view == "full":
        return 2 * channels, height, width
    return (
        2 * channels,
        how.band if how.ablation in ("row", "block") else height,
        how.band if how.ablation in ("column", "block") else width,
    )


def _shown(pixels: Tensor, length: int) -> Tensor:
    """Numbers of pixels [V, h] -> which of ``length`` are among them, bool [V, length]."""
    return torch.zeros(len(pixels), length, dtype=torch.bool, device=pixels.device).scatter_(1, pixels, True)
