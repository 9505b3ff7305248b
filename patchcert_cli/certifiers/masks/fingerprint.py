"""Whether a network is still the function that it was: a few of its answers, compared within what rounding does to them.

Shapes: K classes.
"""

from __future__ import annotations

from typing import Any

import torch

from patchcert_cli.certifiers.masks.masked_predictions import TOLERANCE, MaskedPredictor

SUMS = 4  # of the logits of an image


def answers(views: MaskedPredictor) -> dict[str, Any]:
    """The network's answers on three fixed masked images, each computed in one way.

    For each image there are a few sums of its logits with fixed signs, [3 * SUMS], divided by K and the scale; ``near`` is how
    far they may be apart on machines that round differently.
    """
    x, first, second = views.probe_images()
    some = torch.tensor([0, 2, 5])  # noise, squares, a slope
    logits, scale = views.reference_logits(x[some.to(x.device)], first[some], second[some])
    signs = torch.randint(2, (views.classes, SUMS), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    said = logits @ signs / views.classes / scale[:, None]
    precision = "float64" if views.calibration.double else "float32"
    return {"sums": said.flatten().tolist(), "precision": precision, "near": TOLERANCE[precision]}
