"""Attack a model and compare with its certificates: an attack bounds robustness from above, a certificate from below."""

from __future__ import annotations

import torch

import patchcert_cli as pc
from patchcert_cli import attacks, data

threat = pc.Patch(5, 5)
model = pc.load_model("mnist-ibp-p5")
digits = data.load("mnist", "test").take(torch.arange(40))
x = data.to_float(digits.pixels)

certificate = model.defense.certify(x, threat)

# An attack meets the deployed answer and its gradients, never the certificate. "patch_pgd" is the default against a patch; its
# defaults try harder than these. A start only says where to begin: here where the certificate found the least room.
attack = attacks.for_threat(threat, "patch_pgd", steps=10, restarts=0, locations=4)
start = attacks.Start(certificate.worst, certificate.runner_up)
found = attack(model.defense, x, threat, start=start)

# A success was judged by the base class of attacks: only allowed pixels changed, and the deployed answer is another one.
changed = (found.adversarial != x).any(dim=1)
assert bool(threat.contains(changed[:, None]).all())
assert torch.equal(model.defense.predict(found.adversarial), found.prediction)

right = certificate.prediction == digits.labels
print(f"{int(right.sum())} of {len(x)} are right")
print(f"{int((right & certificate.certified).sum())} are right and certified: no patch can change them")
print(f"{int((right & ~found.success).sum())} are right and were not flipped by this attack")

flipped_though_certified = found.success & certificate.certified
assert not bool(flipped_though_certified.any()), "a certificate is wrong: please report it"
assert bool(found.success.any()), "this attack flips some of what is not certified"
