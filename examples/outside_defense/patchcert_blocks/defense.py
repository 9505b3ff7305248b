"""Block voting: disjoint blocks of the image vote (after Levine & Feizi, NeurIPS 2020, where overlapping ones do).

Theorem. Block n votes for class v_n, which depends on the pixels of this block alone. The answer y has the most votes, the lowest
class index among equals. Let a location touch the blocks T. Then for every class j != y its pixels lower the lead of y over j,
``L_j = #{v_n = y} - #{v_n = j}``, by at most ``d_j = sum_{n in T} (1 + [v_n = y] - [v_n = j])``. Under a threat of k locations the
answer stays if ``L_j + [y < j] > D_j`` for every j != y, with D_j the sum of the k largest d_j.

Proof. A block outside of T sees the same pixels and votes alike. A block in T contributes [v_n = y] - [v_n = j] to L_j before and at
least -1 after, and the difference is its term of d_j. No term is negative, so k locations together, whose blocks may overlap, take at
most D_j. A lead that stays positive, or not negative where y < j, keeps y before j. All numbers are whole numbers far below 2^53: no
rounding occurs.

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


class Blocks(Trainable):
    """Disjoint blocks vote, each by a network of its own."""

    source = "an example, after Levine & Feizi, (De)Randomized Smoothing, NeurIPS 2020"
    default_network = "block_scorer"

    def __init__(self, network: nn.Module, *, input_shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        super().__init__(input_shape=input_shape, classes=classes)
        assert isinstance(network, BlockScorer), "the proof is about this network"
        self.network = network

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> Blocks:
        return cls(build_network(deployed), **size_and_classes(deployed))

    def forward(self, x: Tensor) -> Tensor:
        """The surrogate that attacks climb: the mean softmax of the blocks, [B, K]."""
        return self.network(x).softmax(dim=2).mean(dim=1)

    def training_loss(self, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
        return F.cross_entropy(self.network(x).transpose(1, 2), label[:, None].expand(-1, len(self.network.first)))

    @torch.no_grad()
    def votes(self, x: Tensor) -> Tensor:
        """One vote of each block, float64 [B, N, K] of zeros and ones; of equal scores the first counts."""
        self.check_input(x)
        return F.one_hot(self.network.exact(x).argmax(dim=2), len(self.classes)).double()

    def predict(self, x: Tensor) -> Tensor:
        return self.votes(x).sum(dim=1).argmax(dim=1)

    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> list[Proof]:
        votes = self.votes(x)
        count = votes.sum(dim=1)  # [B, K]
        answer = count.argmax(dim=1)
        own = F.one_hot(answer, len(self.classes)).bool()
        lead = count[own][:, None] - count + (torch.arange(len(self.classes), device=x.device) > answer[:, None])
        most = 1 + votes.transpose(1, 2)[own][:, :, None] - votes  # [B, N, K], the terms of d
        return [self._proof(answer, lead.masked_fill(own, torch.inf), self.touched(claim).to(votes) @ most, claim) for claim in claims]

    def _proof(self, answer: Tensor, lead: Tensor, lost: Tensor, claim: Claim) -> Proof:
        """The theorem, with leads [B, K] and d [B, A, K]."""
        worst = lost.topk(min(claim.threat.budget, lost.shape[1]), dim=1).values.sum(dim=1)
        margin, rival = (lead - worst).min(dim=1)
        location = lost.argmax(dim=1).gather(1, rival[:, None])[:, 0]
        return Proof(answer=answer, margin=margin, location=location, runner_up=rival, arithmetic=Arithmetic.EXACT)

    def touched(self, claim: Claim) -> Tensor:
        """Which blocks each location has a pixel in, bool [A, N]."""
        (_, height, width), side = self.input_shape, self.network.side
        top, left, tall, wide = claim.threat.locations(height, width).T[:, :, None]
        row, column = torch.arange(height // side) * side, torch.arange(width // side) * side
        rows, columns = (top < row + side) & (row < top + tall), (left < column + side) & (column < left + wide)
        return (rows[:, :, None] & columns[:, None, :]).flatten(1)
