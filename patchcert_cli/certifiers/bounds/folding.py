"""Batch norm folded into the layer before it, so that bounds see one affine layer.

Shapes: B images, C channels, N outputs of a layer.

**Claim.** For ``z = W v + b`` and batch norm ``g (z - m) / sqrt(s + eps) + h`` per channel, the two together are the layer with
weight ``t W`` and bias ``t (b - m) + h``, ``t = g / sqrt(s + eps)``. In training, m and s are the mean and variance of z over a
batch of clean images, and the bounds use them too (Shi et al., Fast Certified Robust Training with Short Warmup, NeurIPS 2021,
section 3.3): gradients flow through both. In eval mode m and s are the running statistics, as deployed.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from patchcert_cli.layers.supported_layers import layers_of

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def fold(network: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor | None]:
    """The network without batch norm, and its logits [B, K] on the clean images ``x``.

    A network that has none is returned as it is, without logits: they would cost a pass that not every loss needs. In training
    mode the running statistics move, as in any forward pass.
    """
    layers = layers_of(network)
    if not any(isinstance(layer, NORMS) for layer in layers):
        return network, None
    folded: list[nn.Module] = []
    for layer in layers:
        before = x
        x = layer(x)
        if isinstance(layer, NORMS) and folded and isinstance(folded[-1], nn.Linear | nn.Conv2d):
            folded[-1] = _joined(folded[-1], layer, before)
        else:
            folded.append(layer)
    return nn.Sequential(*folded), x


def _joined(affine: nn.Linear | nn.Conv2d, norm: nn.Module, z: Tensor) -> nn.Module:
    """One affine layer for ``affine`` and the batch norm after it, whose input is ``z``; its weights are not parameters."""
    norm = cast(nn.BatchNorm2d, norm)
    if norm.training or norm.running_mean is None or norm.running_var is None:
        axes = [0, *range(2, z.ndim)]
        variance, mean = torch.var_mean(z.float(), dim=axes, correction=0)
    else:
        mean, variance = norm.running_mean, norm.running_var
    scale = torch.rsqrt(variance + norm.eps)
    scale = scale * norm.weight if norm.affine else scale
    shift = -mean if affine.bias is None else affine.bias - mean
    shift = shift * scale + norm.bias if norm.affine else shift * scale
    folded: Any = copy.copy(affine)
    folded._parameters = {}  # the copy's own: weight and bias are plain tensors, through which gradients flow
    folded.weight = affine.weight * scale.reshape(-1, *([1] * (affine.weight.ndim - 1)))
    folded.bias = shift
    return cast(nn.Module, folded)
