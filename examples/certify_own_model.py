"""Certify a network of your own as it is: with masks around any classifier, and with interval bounds for a plain Sequential.

Run it with ``python examples/certify_own_model.py``. It trains a small network on digits that come with patchcert; put
yours in its place. All that patchcert asks of a network is: images [B, C, H, W] in [0, 1] to logits [B, K].
"""

from __future__ import annotations

import torch
from torch import nn

import patchcert_cli as pc
from patchcert_cli import data

digits = data.load("mnist", "test")
x, label = data.to_float(digits.pixels), digits.labels
shape, classes = (1, 28, 28), tuple("0123456789")

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(1, 8, 6, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for batch in torch.randint(8000, (200, 128)):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(network(x[batch]), label[batch])
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
network.eval().requires_grad_(False)
test, truth = x[8000:8100], label[8000:8100]  # not trained on

# 1. Masks: the network labels the image under pairs of masks, of which one hides the whole patch.
#    Any classifier will do. The masks are made for the largest patch that is to be certified.
masked = pc.PatchCleanser(network, input_shape=shape, classes=classes, masks=pc.MaskSpec((pc.Patch(2, 2),)), fill=(0.0,))
by_masks = masked.certify(test, "patch:2x2")

# 2. Interval bounds: every activation is bounded, for every location of the patch at once. This takes a Sequential of linear,
#    convolution, ReLU, pooling, flatten and frozen batch norm layers. Without training for it, expect small patches only.
bounded = pc.IntervalDefense(network, input_shape=shape, classes=classes)
by_bounds = bounded.certify(test, "patch:1x1")

for name, certificate in (("masks", by_masks), ("interval bounds", by_bounds)):
    counts = pc.Tally.of(truth, certificate.prediction, certificate.certified)
    low, high = counts.certified_interval
    print(f"{name}, {certificate.threat}: {counts.clean_accuracy:.1%} right, {counts.certified_accuracy:.1%} right and certified")
    print(f"  95 % interval of the latter: {low:.1%} to {high:.1%}; rounding: {certificate.arithmetic}")
    assert counts.images == 100 and 0 < counts.certified <= counts.clean

assert torch.equal(by_bounds.prediction, bounded.predict(test))  # a certificate is about the deployed answer
