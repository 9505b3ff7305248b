"""Load a model of the zoo, certify images that come with patchcert, and read every field of the certificate."""

from __future__ import annotations

from dataclasses import fields

import torch

import patchcert_cli as pc
from patchcert_cli import data

print("models of MNIST:", *pc.list_models("mnist-*"))
model = pc.load_model("mnist-ibp-p2")  # every file's sha256 is checked against the card
digits = data.load("mnist", "test").take(torch.arange(200))
x = data.to_float(digits.pixels)

certificate = model.defense.certify(x, "patch:2x2")  # all 27 x 27 locations, any content
B = len(x)

# What is claimed: one threat model, by one of the defense's proofs.
assert certificate.threat == pc.Patch(2, 2)
assert certificate.method in model.defense.methods
assert certificate.guarantee is pc.Guarantee.RECOVERY  # the answer stays; "detection" would be: it stays, or an alarm is raised
assert certificate.arithmetic == "bounded"  # rounding errors are bounded by proof and counted

# Image by image. ``prediction`` is what the deployed defense answers; a certificate knows no label.
assert torch.equal(certificate.prediction, model.defense.predict(x))
# ``certified``: no allowed change alters that answer. It is so where the margin exceeds what rounding may do to it.
assert torch.equal(certificate.certified, certificate.margin > certificate.tolerance)
# ``worst``: the location (top, left, height, width) that comes nearest to altering the answer, towards class ``runner_up``.
assert certificate.worst.shape == (B, 4) and bool((certificate.worst[:, 2:] == 2).all())
assert not bool((certificate.runner_up == certificate.prediction).any())
# Only some defenses fill these in: passes of the network per image, and, of one that raises alarms, thresholds and plain labels.
assert certificate.passes is certificate.thresholds is certificate.plain is None

for item in fields(certificate):
    value = getattr(certificate, item.name)
    print(f"{item.name:>12}: {value[0].tolist() if isinstance(value, torch.Tensor) else value}")

# Labels come in here: right and certified. The card holds the same counts for the whole test split.
counts = pc.Tally.of(digits.labels, certificate.prediction, certificate.certified)
print(f"{counts.certified} of {counts.images} are right and certified")
assert model.card is not None
published = model.card.result(pc.Patch(2, 2))
assert published is not None and published.images == 10_000
low, high = counts.certified_interval
assert low <= published.certified / published.images <= high

# A model may be certified for several threats in one call. What a smaller patch can do, a larger one can.
small, large = model.defense.certify_claims(x, [pc.Claim(pc.Patch(1, 1)), pc.Claim(pc.Patch(3, 3))])
assert not bool((large.certified & ~small.certified).any())
