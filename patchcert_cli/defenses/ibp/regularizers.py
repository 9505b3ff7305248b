"""Keeping intervals narrow while the attacker grows (Shi et al., Fast Certified Robust Training with Short Warmup, NeurIPS 2021).

Shapes: B images; a box is a pair ``lower <= upper`` of tensors [B, ...], what one ReLU sees.

Both penalties are 0 once their ratio is at least ``ENOUGH``, and average over the ReLUs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.rules import Box

ENOUGH = 0.5
TINY = 1e-12


@torch.no_grad()
def initialize(network: nn.Module) -> None:
    """Weights from N(0, 2 pi / n^2) for n inputs, biases 0 (section 3.1 there).

    A layer then multiplies the mean width of intervals by ``n E|w| = 2``, and a ReLU halves it. The usual sqrt(1/n) makes it
    grow by sqrt(n) with each layer.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def widening(width: Tensor, boxes: list[Box]) -> Tensor:
    """How much wider than the input's the intervals before the ReLUs are; ``width`` is the input's mean radius."""
    radii = torch.stack([(upper - lower).mean() / 2 for lower, upper in boxes])
    return F.relu(ENOUGH - width / radii.clamp(min=TINY)).mean() / ENOUGH


def imbalance(boxes: list[Box]) -> Tensor:
    """How unlike ReLUs that are always on and those that are always off are, in the mean and the variance of their centers."""
    ratios = []
    for lower, upper in boxes:
        center = (lower + upper) / 2
        spread = (center - center.mean()).square()
        on, off = lower > 0, upper < 0
        ratios.append(_ratio((center * on).mean(), -(center * off).mean()))
        ratios.append(_ratio((spread * on).mean(), (spread * off).mean()))
    return F.relu(ENOUGH - torch.stack(ratios)).sum() / (ENOUGH * len(boxes))


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """The smaller of two positive numbers over the larger."""
    return torch.minimum(one, other) / torch.maximum(one, other).clamp(min=TINY)
