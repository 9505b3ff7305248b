"""Feature partition (Hammoudeh & Lowd, Provable Robustness against a Union of L0 Adversarial Attacks, AAAI 2024).

The pixels are divided into disjoint sets, and a network votes from each set alone; the class with the most votes is the answer.
One network serves all sets and is given the number of the set (in the paper each set has a network of its own). k changed pixels
reach at most k votes, whatever k is, so one evaluation certifies every k.

The deployed network computes without rounding error (:mod:`patchcert_cli.layers.fixed_point`): a vote depends on the pixels of
its set and on nothing else, neither on the batch nor on the machine.

A set of a lattice may be looked at several times (``mirrored``, ``moves``). In the mirrored image, and in images moved by some
pixels, a set's pixels are a set of the lattice again, with another number; what comes in from outside is 0 for every image. So
each score of a set still depends on its own pixels alone. Scores are added in float64, look by look in one order, each set by
itself, so their sum is the same in any batch and on any machine.

**Proof.** A set is a location of :mod:`patchcert_cli.certifiers.cells.additive` that reaches one cell, itself, and an attacker
with k pixels has min(k, n) of the n locations: each pixel lies in one set. No location reaches another's cell, so the loss of
several locations is the sum of their losses, and the largest is the sum of the k largest: the theorem's condition with a budget
is exact, not only sufficient, if votes can be set independently. They can, as far as the sets go: no set is empty, and k pixels
may lie in k sets. Single values lie in pixels, so a certificate against k pixels is one against k values.
A patch reaches the sets of its pixels; those of a lattice are a range of rows and of columns of sets, modulo the spacing.

Shapes: B images, C channels, H x W pixels, K classes, N x M sets (N = M), n = N M, P pixels of the largest set, D = C P.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcert_cli import schema
from patchcert_cli.certificate import Claim
from patchcert_cli.certifiers.cells import additive, by_location
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.defenses._attackable import Surrogate
from patchcert_cli.defenses._base import build_network, own_entries, size_and_classes
from patchcert_cli.defenses._cells import VotingDefense
from patchcert_cli.defenses._training import DIGITS, AugmentedOptions, Options, TrainingStep
from patchcert_cli.defenses.bagcert import Step
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.layers import fixed_point, programs
from patchcert_cli.layers.programs import Runner
from patchcert_cli.models.setwise import Setwise
from patchcert_cli.schema import Count, Fraction, NonNegative, Positive
from patchcert_cli.threats import Patch, Sparse, Threat

PIECE = 1 << 25  # activations of one layer that are computed at a time, at most


@dataclass(frozen=True)
class Division:
    """How pixels are divided and sets vote.

    Attributes:
        layout: ``lattice``, pixels (i, j) with equal i and j modulo ``spacing`` are a set; or ``random``, as many sets of random
            pixels.
        spacing: there are spacing * spacing sets.
        shuffle: seed of random sets.
        vote: ``top-one``, a set votes for the class of its largest score; or ``independent``, for each class whose score is
            positive, which may be several or none.
        mirrored: the deployed network also looks at each set of a lattice in the mirrored image, in twice the time.
        moves: m; the deployed network looks at each set of a lattice in all images moved by up to m pixels along both axes, in
            (2 m + 1)^2 times the time.
    """

    layout: Literal["lattice", "random"] = "lattice"
    spacing: Positive = 8
    shuffle: Count = 0
    vote: Literal["top-one", "independent"] = "top-one"
    mirrored: bool = False
    moves: Count = 0

    @property
    def looks(self) -> list[tuple[int, int, bool]]:
        """How the image is moved down and right, and whether it is mirrored before, for each look at its sets."""
        moves = sorted(range(-self.moves, self.moves + 1), key=abs)
        return list(product(moves, moves, (False, True) if self.mirrored else (False,)))


@dataclass(frozen=True)
class PartitionOptions(Division, AugmentedOptions):
    """How pixels are divided and sets vote, see :class:`Division`; and the training, which has one look at a set.

    Attributes:
        drawn: sets of each image that a training step looks at, drawn for each image; 0 for all.
        margin: M; besides the cross-entropy of votes there is the loss ``max(0, M - D)`` with D the smallest difference between
            the label's share of the votes and another class's. A certificate against k pixels takes about D > 2 k / n.
        margin_weight: weight of that loss; 0 for none.
        sharpness: T; the share of the other classes is the soft maximum ``logsumexp(T s) / T``.
        flip: mirror images at random.
        shift: move images by up to this many pixels.
        average: what a step keeps of the running average of weights that becomes the model; 0 for none.
    """

    drawn: Count = 0
    margin: NonNegative = 0.5
    margin_weight: NonNegative = 0.0
    sharpness: Annotated[float, schema.Must(lambda t: t > 0, "more than 0")] = 15.0
    flip: bool = True
    shift: Count = 3
    average: Fraction = 0.0

    @property
    def ema_decay(self) -> float:
        return self.average


class TopOne(torch.autograd.Function):
    """1 at the first of the largest scores of a row, else 0; its gradient is that of a softmax (straight-through)."""

    @staticmethod
    def forward(context: Any, scores: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        context.save_for_backward(scores)
        return torch.zeros_like(scores).scatter(-1, scores.argmax(dim=-1, keepdim=True), 1.0)

    @staticmethod
    def backward(context: Any, slope: Tensor) -> Tensor:
        likelihood = context.saved_tensors[0].softmax(dim=-1)
        return cast(Tensor, likelihood * (slope - (slope * likelihood).sum(dim=-1, keepdim=True)))


class Partition(VotingDefense):
    """Sets of pixels vote by what a network makes of each.

    Attributes:
        how: how pixels are divided and sets vote.
        sets: int64 [H, W], the number of each pixel's set.
        members: int64 [n, P], the pixels of each set, numbered row by row; H * W where a set has fewer.
    """

    source = "Hammoudeh & Lowd, Provable Robustness against a Union of L0 Adversarial Attacks, AAAI 2024"
    options = PartitionOptions
    default_network = "setwise"
    sets: Tensor
    members: Tensor

    def __init__(self, network: Setwise, how: Division, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__(input_shape=input_shape, classes=classes)
        self.network, self.how = network, how
        self.register_buffer("sets", divided(input_shape, how), persistent=False)
        self.register_buffer("members", listed(self.sets, how.spacing**2), persistent=False)
        self.deployed = fixed_point.FrozenNetworkCache(network)
        self.run = Runner(self.deployed)

    @classmethod
    def default_recipe(cls, threat: Threat, dataset: str) -> dict[str, Any]:
        augmented = DIGITS if dataset == "mnist" else {}
        return {
            "dataset": "cifar10",
            "epochs": 56,
            "batch_size": 512,
            "learning_rate": 0.02,
            "optimizer": "muon",
            "stored": "float16",
            "validation": 2000,
            "options": {"drawn": 16, **augmented},
        }

    @classmethod
    def deploy_config(cls, threat: Threat, options: Options) -> dict[str, Any]:
        return {item.name: getattr(options, item.name) for item in fields(Division)}

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> Partition:
        how, shape = own_entries(Division, deployed), tuple(deployed["input_shape"])
        size = listed(divided(shape, how), how.spacing**2).shape[1]
        network: Any = build_network(deployed, (shape[0] * size, how.spacing, how.spacing))
        if not isinstance(network, Setwise):
            raise IntegrityError(
                f"partition needs a network of sets, not '{deployed['network']['name']}'.", hint="Use network setwise."
            )
        return cls(network, how, **size_and_classes(deployed))

    @property
    def count_of_sets(self) -> int:
        """n."""
        return len(self.members)

    @property
    def activations(self) -> int:
        return self.count_of_sets * self.network.widest

    def values(self, x: Tensor) -> Tensor:
        """What the network is given of images [B, C, H, W]: the values of each set, 0 where it has fewer, [B, D, N, M]."""
        taken = F.pad(x.flatten(2), (0, 1))[:, :, self.members]  # [B, C, n, P]
        size = self.members.shape[1] * x.shape[1]
        return taken.permute(0, 1, 3, 2).reshape(len(x), size, self.how.spacing, self.how.spacing)

    def forward(self, x: Tensor) -> Tensor:
        """Smooth surrogate: the mean over sets of the softmax, or of the sigmoid of independent votes, [B, K]."""
        scores = self.network(self.values(x))
        likely = scores.softmax(dim=1) if self.how.vote == "top-one" else scores.sigmoid()
        return cast(Tensor, likely.mean(dim=(2, 3)))

    def surrogates(self) -> tuple[Surrogate, ...]:
        """Votes with the gradient of likelihoods (straight-through), and their smooth form, both of the
        look at the image itself: all looks would cost as many times as much, and the deployed answer judges what is found."""
        votes = Surrogate(lambda x: self._ballots(self.network(self.values(x)).permute(0, 2, 3, 1)).sum(dim=(1, 2)))
        votes.tolerance = 2.0  # the deployed network is rounded, and some sets say something else
        return votes, Surrogate(self)

    def _ballots(self, scores: Tensor) -> Tensor:
        """Votes of scores [..., K] with gradients."""
        ballots: Tensor = (TopOne if self.how.vote == "top-one" else Step).apply(scores)
        return ballots

    def scores(self, x: Tensor) -> Tensor:
        """The scores of all sets as the deployed network computes them, without rounding error, or the sums of all looks' scores,
        [B, K, N, M]."""
        size = programs.at_once(self.activations, x.device, PIECE)
        return torch.cat([self._looks(fixed_point.to_steps(part)) for part in torch.split(x, size)])

    def _looks(self, steps: Tensor) -> Tensor:
        """The sum of all looks' scores of images in whole steps; each set's at its own place, [B, K, N, M]."""
        width, spacing = steps.shape[3], self.how.spacing
        total: Tensor | int = 0
        for down, right, mirrored in self.how.looks:
            own = torch.arange(spacing, device=steps.device)
            rows = (own + down) % spacing  # where the sets of the image are in the one that is looked at
            columns = ((width - 1 - own if mirrored else own) + right) % spacing
            image = F.pad(steps.flip(3) if mirrored else steps, (right, -right, down, -down))
            total = total + self.run(self.values(image)).double()[:, :, rows[:, None], columns]
        return cast(Tensor, total)

    def count(self, scores: Tensor) -> Votes:
        """No vote is in doubt, since scores are not rounded."""
        if self.how.vote == "independent":
            return Votes((scores > 0).contiguous())
        best = scores == scores.amax(dim=1, keepdim=True)
        return Votes((best & (best.cumsum(dim=1) == 1)).contiguous(), one_hot=True)  # the first of equals

    def cover_of(self, threat: Threat) -> CellCoverage:
        """For sparse threats the locations are the sets; see the proof above."""
        if not isinstance(threat, Sparse):
            return super().cover_of(threat)
        channels, height, width = self.input_shape
        threat.check(height, width, channels)
        each = Axis(self.how.spacing, tuple((at,) for at in range(self.how.spacing)))
        return CellCoverage(each, each, min(threat.k, self.count_of_sets))

    def cover(self, patch: Patch) -> CellCoverage:
        if self.how.layout == "random":
            raise UnsupportedThreat(
                f"Random sets have no certificate against {patch}.", hint="Use a sparse threat, or sets of a lattice."
            )
        (height, width), spacing = self.input_shape[1:], self.how.spacing
        return CellCoverage(_lattice(height, patch.height, spacing), _lattice(width, patch.width, spacing))

    def prove(self, outputs: Votes, cover: CellCoverage, claim: Claim) -> additive.Proof:
        proof = super().prove(outputs, cover, claim)
        return replace(proof, worst=self._pixel(proof.worst)) if isinstance(claim.threat, Sparse) else proof

    def ranges(self, outputs: Votes, cover: CellCoverage, threat: Threat) -> Iterator[by_location.Ranges]:
        """For a pixel those of its set."""
        number = self.sets.flatten() if isinstance(threat, Sparse) else slice(None)
        for part in super().ranges(outputs, cover, threat):
            yield by_location.Ranges(part.low[:, :, number], part.high[:, :, number])

    def prove_first(self, outputs: Votes, cover: CellCoverage, claim: Claim) -> by_location.Ranking:
        found = super().prove_first(outputs, cover, claim)
        return replace(found, worst=self._pixel(found.worst)) if isinstance(claim.threat, Sparse) else found

    def _pixel(self, number: Tensor) -> Tensor:
        """The first pixel of each set, int64 of any shape."""
        return self.members[:, 0].to(number.device)[number]

    @torch.no_grad()
    def self_test(self) -> None:
        """Push NaN through single pixels: each must reach its own set and no other.

        Raises:
            IntegrityError: the network is not what the proof takes it for.
        """
        _, height, width = self.input_shape
        pixels = sorted({(0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1), (height // 2, width // 3)})
        x = torch.full((len(pixels), *self.input_shape), 0.5, device=self.device)
        for at, (row, column) in enumerate(pixels):
            x[at, :, row, column] = float("nan")
        reached = self.scores(x).isnan().any(dim=1).flatten(1).cpu()
        for at, (row, column) in enumerate(pixels):
            if reached[at].nonzero().flatten().tolist() != [int(self.sets[row, column])]:
                raise IntegrityError(
                    f"The pixel at row {row}, column {column} reaches {int(reached[at].sum())} sets, not its own alone.",
                    hint="The network is not what its configuration says; its certificates would be void.",
                )

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Choose the steps of the deployed network's activations from some training images."""
        self.eval()
        with fixed_point.observing(self.network):
            for part in torch.split(x, 100):
                self.network(self.values(part))

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """Cross-entropy of the votes of all or some sets, and a hinge on the margin of votes (straight-through)."""
        options = step.options
        assert isinstance(options, PartitionOptions)
        total = self.count_of_sets
        drawn = min(options.drawn, total) or total
        number = torch.arange(total).expand(len(x), -1)
        if drawn < total:
            number = torch.rand(len(x), total, generator=step.generator).argsort(dim=1)[:, :drawn]
        number = number.to(x.device)
        pixels = F.pad(x.flatten(2), (0, 1))  # [B, C, H * W + 1]
        wanted = self.members[number].flatten(1)[:, None].expand(-1, x.shape[1], -1)
        values = pixels.gather(2, wanted).reshape(len(x), x.shape[1], drawn, -1).permute(0, 2, 1, 3).flatten(2)
        scores = self.network.of_sets(values.flatten(0, 1), number.flatten()).float()
        labels = label.repeat_interleave(drawn)
        if self.how.vote == "top-one":
            loss = F.cross_entropy(scores, labels)
        else:
            loss = F.binary_cross_entropy_with_logits(scores, F.one_hot(labels, scores.shape[1]).to(scores))
        if options.margin_weight > 0:
            share = self._ballots(scores).reshape(len(x), drawn, -1).mean(dim=1)
            own = share.gather(1, label[:, None])[:, 0]
            rival = torch.logsumexp(options.sharpness * share.scatter(1, label[:, None], -1.0), dim=1) / options.sharpness
            loss = loss + options.margin_weight * F.relu(options.margin - (own - rival)).mean()
        return loss


def divided(shape: tuple[int, ...], how: Division) -> Tensor:
    """The number of each pixel's set on images of ``shape`` (C, H, W), int64 [H, W].

    Random sets are dealt in the order of a hash of the seed and the pixel, which no version of a library changes.

    Raises:
        UsageError: some set would be empty.
    """
    _, height, width = shape
    most = min(height, width) if how.layout == "lattice" else int((height * width) ** 0.5)
    if how.spacing > most:
        raise UsageError(
            f"{how.spacing**2} sets are too many for {height}x{width} pixels.",
            hint=f"Use a spacing from 1 to {most} instead of {how.spacing}.",
        )
    if how.layout == "lattice":
        if how.moves >= most:
            raise UsageError(
                f"moves = {how.moves} leaves nothing of {height}x{width} pixels.", hint=f"Use moves from 0 to {most - 1}."
            )
        rows, columns = torch.arange(height) % how.spacing, torch.arange(width) % how.spacing
        return rows[:, None] * how.spacing + columns
    if len(how.looks) > 1:
        raise UsageError("mirrored and moves need sets of a lattice.", hint="Use layout=lattice, or leave them out.")
    keys = [hashlib.sha256(f"{how.shuffle}:{pixel}".encode()).digest() for pixel in range(height * width)]
    order = sorted(range(height * width), key=keys.__getitem__)
    sets = torch.empty(height * width, dtype=torch.int64)
    sets[torch.tensor(order)] = torch.arange(height * width) % how.spacing**2
    return sets.reshape(height, width)


def listed(sets: Tensor, count: int) -> Tensor:
    """The pixels of each of ``count`` sets in order, int64 [n, P], filled up with H * W: one more than the last pixel."""
    flat = sets.flatten()
    members = [(flat == number).nonzero().flatten() for number in range(count)]
    largest = max(len(pixels) for pixels in members)
    return torch.stack([F.pad(pixels, (0, largest - len(pixels)), value=len(flat)) for pixels in members])


def _lattice(length: int, side: int, spacing: int) -> Axis:
    """Which of the lattice's rows or columns of sets a patch of ``side`` pixels reaches."""
    starts = range(length - side + 1)
    return Axis(spacing, tuple(tuple(sorted({(start + step) % spacing for step in range(side)})) for start in starts))
