"""Certified accuracy over the size of the patch, as a plot file: ``python examples/plot.py curve.svg``.

It needs matplotlib: ``pip install "patchcert[plots]"``. The command line makes the same plot:
``patchcert certify mnist-bagcert --patch 1..8 --limit 200 --plot curve.svg``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import patchcert_cli as pc
from patchcert_cli import data
from patchcert_cli.reporting import plots

path = Path(sys.argv[1] if len(sys.argv) > 1 else "curve.svg")
model = pc.load_model("mnist-bagcert")
digits = data.load("mnist", "test").take(torch.arange(200))
x = data.to_float(digits.pixels)

# All sizes in one call: the network votes once, and the proof runs for each size on the same votes.
claims = [pc.Claim(pc.Patch(side, side)) for side in range(1, 9)]
certificates = model.defense.certify_claims(x, claims)

rows, certified = [], []
for certificate in certificates:
    counts = pc.Tally.of(digits.labels, certificate.prediction, certificate.certified)
    row = {"threat": str(certificate.threat), "method": certificate.method, "certified_interval": counts.certified_interval}
    rows.append({**row, "images": counts.images, "clean": counts.clean, "certified": counts.certified})
    certified.append(counts.certified)
    print(f"{certificate.threat}: {counts.certified_accuracy:.1%} right and certified")

assert certified == sorted(certified, reverse=True)  # a larger patch can do more

plots.curve(rows, path, title="mnist-bagcert")
assert path.stat().st_size > 0
print(f"written: {path}")
