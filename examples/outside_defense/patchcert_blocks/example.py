"""A small random defense on 1x4x4 images with 3 classes: patchcert's soundness tests run on it."""

from __future__ import annotations

import torch

from patchcert_blocks.defense import Blocks
from patchcert_blocks.network import build


def tiny() -> Blocks:
    """Four blocks of 2x2 pixels with random weights."""
    network = build(input_shape=(1, 4, 4), classes=3, side=2, width=6, mean=(0.0,), std=(1.0,))
    torch.nn.init.normal_(network.second)
    return Blocks(network, input_shape=(1, 4, 4), classes=("a", "b", "c"))
