"""Block voting: disjoint blocks of the image vote (after Levine & Feizi, NeurIPS 2020, where overlapping ones do).

Theorem. Block n votes for class v_n, which depends on the pixels of this block alone. The answer y has the most votes, the
lowest class index among equals. A location that touches the blocks T lowers the lead of y over another class j,
``L_j = #{v_n = y} - #{v_n = j}``, by at most ``d_j = sum_{n in T} (1 + [v_n = y] - [v_n = j])``. Under a threat of k locations
the answer stays if ``L_j + [y < j] > D_j`` for every j != y, with D_j the sum of the k largest d_j.

Proof. A block outside of T sees the same pixels and votes alike. A block in T contributes [v_n = y] - [v_n = j] to L_j before
and at least -1 after; the difference is its term of d_j. No term is negative, so k locations together, whose blocks may
overlap, take at most D_j. A lead that stays positive, or not negative where y < j, keeps y before j. All numbers are whole
numbers far below 2^53, so nothing is rounded.

Shapes: B images, N blocks, K classes, A locations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_blocks.network import BlockScorer
from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.defenses import Claim, Proof, Trainable, TrainingStep, build_network, size_and_classes
from patchcert_cli.errors import IntegrityError
from patchcert_cli.threats import Threat


class Blocks(Trainable):
    """Disjoint blocks vote, each by a network of its own."""

    source = "an example, after Levine & Feizi, (De)Randomized Smoothing, NeurIPS 2020"
    default_network = "block_scorer"

    def __init__(self, network: nn.Module, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__(input_shape=input_shape, classes=classes)
        if not isinstance(network, BlockScorer):
            raise IntegrityError("block voting is proven for the network block_scorer alone.", hint="Use --network block_scorer.")
        self.network = network

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> Blocks:
        return cls(build_network(deployed), **size_and_classes(deployed))

    def forward(self, x: Tensor) -> Tensor:
        """The surrogate that attacks climb: the mean softmax of the blocks, [B, K]."""
        scores: Tensor = self.network(x)
        return scores.softmax(dim=2).mean(dim=1)

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        """Cross-entropy of the votes, a third each, with the gradient of the softmax (straight-through)."""
        soft = self.network(x).softmax(dim=2)
        votes = F.one_hot(soft.argmax(dim=2), len(self.classes)) + soft - soft.detach()
        return F.cross_entropy(votes.sum(dim=1) / 3, label)

    @torch.no_grad()
    def votes(self, x: Tensor) -> Tensor:
        """One vote of each block, float64 [B, N, K] of zeros and ones; of equal scores the lowest class counts."""
        self.check_input(x)
        return F.one_hot(self.network.exact(x).argmax(dim=2), len(self.classes)).double()

    def predict(self, x: Tensor) -> Tensor:
        return self.votes(x).sum(dim=1).argmax(dim=1)

    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> list[Proof]:
        votes = self.votes(x)
        classes, count = torch.arange(len(self.classes), device=x.device), votes.sum(dim=1)  # [B, K]
        answer = count.argmax(dim=1)
        own = classes == answer[:, None]
        lead = (count[own][:, None] - count + (answer[:, None] < classes)).masked_fill(own, torch.inf)
        terms = 1 + votes.transpose(1, 2)[own][:, :, None] - votes  # [B, N, K], what each block adds to d
        proofs = []
        for claim in claims:
            lost = self.touched(claim.threat).to(votes) @ terms  # d, [B, A, K]
            worst = lost.topk(min(claim.threat.budget, lost.shape[1]), dim=1).values.sum(dim=1)  # D
            margin, rival = (lead - worst).min(dim=1)
            location = lost.argmax(dim=1).gather(1, rival[:, None])[:, 0]
            proofs.append(Proof(answer=answer, margin=margin, location=location, runner_up=rival, arithmetic=Arithmetic.EXACT))
        return proofs

    def touched(self, threat: Threat) -> Tensor:
        """Which blocks each location has a pixel in, bool [A, N]."""
        (_, height, width), side = self.input_shape, self.network.side
        top, left, tall, wide = threat.locations(height, width).T[:, :, None]
        row, column = torch.arange(height // side) * side, torch.arange(width // side) * side
        rows: Tensor = (top < row + side) & (row < top + tall)
        columns: Tensor = (left < column + side) & (column < left + wide)
        return (rows[:, :, None] & columns[:, None, :]).flatten(1)
