"""Muon: momentum whose matrices are made orthogonal before each step (Jordan et al., Muon, 2024), AdamW for all other weights.

A weight of two or more axes is a matrix [O, rest]: a convolution is flattened. The other weights (biases, gains) go to AdamW.
torch has ``torch.optim.Muon`` from 2.9 on, for weights of exactly two axes; this one also runs on 2.6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
STEPS = 5  # of the Newton-Schulz iteration
QUINTIC = (3.4445, -4.7750, 2.0315)  # its odd polynomial pushes every singular value to about 1 (Jordan et al., 2024)
REST = 0.1  # AdamW's learning rate as a share of Muon's


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [..., O, I] with their singular values pushed to between about 0.7 and 1.2; their directions stay."""
    a, b, c = QUINTIC
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return cast(Tensor, x if wide else x.mT)


class Muon(torch.optim.Optimizer):
    """Both in one optimizer, so that a run is saved and resumed like any other.

    The first group has the matrices, the second the rest. ``lr`` of the second is :data:`REST` of the first's.
    """

    def __init__(
        self, weights: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, precision: torch.dtype = torch.float32
    ) -> None:
        """Optimize ``weights`` with Nesterov momentum at the rate ``lr``; ``weight_decay`` is decoupled.

        ``precision`` is that of :func:`orthogonal`, which needs few bits: it leaves singular values between 0.7 and 1.2 anyway.
        """
        self.precision = precision
        every = list(weights)
        groups = [
            {"params": [w for w in every if w.ndim >= 2], "share": 1.0},
            {"params": [w for w in every if w.ndim < 2], "share": REST},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["lr"] = lr * group["share"]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all weights that have gradients."""
        for group in self.param_groups:
            weights: list[Tensor] = [weight for weight in cast(Sequence[Tensor], group["params"]) if weight.grad is not None]
            if not weights:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            (self._matrices if group["share"] == 1.0 else self._rest)(weights, group["lr"])

    def _matrices(self, weights: Sequence[Tensor], lr: float) -> None:
        for weight in weights:
            state, slope = self.state[weight], cast(Tensor, weight.grad)
            momentum = state.setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(slope, 1 - MOMENTUM)
            ahead = slope.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov
            size = max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5
            weight.add_(orthogonal(ahead.to(self.precision)).reshape(weight.shape).to(weight), alpha=-lr * size)

    def _rest(self, weights: Sequence[Tensor], lr: float) -> None:
        """AdamW with betas 0.9 and 0.98, as elsewhere in :mod:`patchcert_cli.training.loop`."""
        for weight in weights:
            state: dict[str, Any] = self.state[weight]
            slope = cast(Tensor, weight.grad)
            if not state:
                state |= {"step": torch.zeros(()), "mean": torch.zeros_like(weight), "square": torch.zeros_like(weight)}
            state["step"] += 1
            state["mean"].lerp_(slope, 0.1)
            state["square"].mul_(0.98).addcmul_(slope, slope, value=0.02)
            at = float(state["step"])
            root = (state["square"] / (1 - 0.98**at)).sqrt_().add_(1e-8)
            weight.addcdiv_(state["mean"], root, value=-lr / (1 - 0.9**at))
