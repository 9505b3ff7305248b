"""What must hold between certificates: a weaker attacker, another batch or another order never makes things worse.

Each function returns the breaches it finds. The reference is the defense itself, asked another way.
"""

from __future__ import annotations

import math
from itertools import pairwise, product

import torch
from torch import Tensor

from patchcert_cli.certificate import Certificate
from patchcert_cli.defenses import Defense
from patchcert_cli.threats import Patch, Sparse, Threat, parse_threat


def _implied(strong: Certificate, weak: Certificate) -> list[str]:
    """Breaches of "certified against the stronger attacker implies certified against the weaker"."""
    lost = strong.certified & ~weak.certified
    lower = weak.margin < strong.margin - strong.tolerance - weak.tolerance
    if "linear" in (strong.method, weak.method):  # its margins are asked for only as far as a verdict needs them
        lower = torch.zeros_like(lower)
    return [
        f"image {i}: {strong.threat} {float(strong.margin[i]):.6g}, but {weak.threat} {float(weak.margin[i]):.6g}"
        for i in (lost | lower).nonzero()[:, 0].tolist()
    ]


def smaller_patches(defense: Defense, x: Tensor) -> list[str]:
    """Every rectangle inside another one is the weaker attacker."""
    height, width = x.shape[2:]
    sides = [(h, w) for h, w in product(range(1, height + 1), range(1, width + 1))]
    certificates = {side: defense.certify(x, Patch(*side)) for side in sides}
    return [
        breach
        for (h, w), (h2, w2) in product(sides, repeat=2)
        if h <= h2 and w <= w2 and (h, w) != (h2, w2)
        for breach in _implied(certificates[h2, w2], certificates[h, w])
    ]


def smaller_budgets(defense: Defense, x: Tensor, units: tuple[str, ...] = ("pixel", "value")) -> list[str]:
    """k entries are weaker than k + 1."""
    found = []
    for unit in units:
        certificates = [defense.certify(x, Sparse(k, unit)) for k in range(1, 5)]
        found += [breach for weak, strong in pairwise(certificates) for breach in _implied(strong, weak)]
    return found


def values_within_pixels(defense: Defense, x: Tensor) -> list[str]:
    """k single values are weaker than k whole pixels, and one pixel is a patch of one pixel."""
    found = []
    for k in (1, 2, 3):
        found += _implied(defense.certify(x, Sparse(k)), defense.certify(x, Sparse(k, "value")))
    return found + one_pixel_is_a_patch(defense, x)


def one_pixel_is_a_patch(defense: Defense, x: Tensor) -> list[str]:
    """One pixel is a patch of one pixel."""
    return _implied(defense.certify(x, Sparse(1)), defense.certify(x, Patch(1, 1)))


def weaker_proofs(defense: Defense, x: Tensor, threat: Threat, methods: tuple[str, ...]) -> list[str]:
    """Each proof certifies all that the next one does, about the same answer."""
    certificates = [defense.certify(x, threat, method) for method in methods]
    return [
        f"image {i}: {threat} {strong.method}, but not {weak.method}"
        for weak, strong in pairwise(certificates)
        for i in ((strong.certified & ~weak.certified) | (strong.prediction != weak.prediction)).nonzero()[:, 0].tolist()
    ]


def percent_is_a_square(defense: Defense, x: Tensor, percent: int) -> list[str]:
    """A percentage is the smallest square of at least that area."""
    height, width = x.shape[2:]
    side = next(s for s in range(1, 1 + math.isqrt(height * width) + 1) if s * s * 100 >= percent * height * width)
    if side > min(height, width):
        return []
    a, b = defense.certify(x, parse_threat(f"patch:{percent}%")), defense.certify(x, Patch(side, side))
    return [] if torch.equal(a.margin, b.margin) and torch.equal(a.certified, b.certified) else [f"{percent}% is not {b.threat}"]


def _same(whole: Certificate, other: Certificate, what: str) -> list[str]:
    apart = (whole.margin - other.margin).abs() > whole.tolerance + other.tolerance
    wrong = apart | (whole.certified != other.certified) | (whole.prediction != other.prediction)
    return [f"image {i}: {whole.threat} {what}" for i in wrong.nonzero()[:, 0].tolist()]


def batches_do_not_matter(defense: Defense, x: Tensor, threat: Threat, order: Tensor) -> list[str]:
    """Each image alone, or all in another order, gives the same verdict."""
    whole = defense.certify(x, threat)
    alone = Certificate.cat([defense.certify(image[None], threat) for image in x])
    moved = defense.certify(x[order], threat)
    back = Certificate.cat([_at(moved, int(i)) for i in order.argsort()])
    return _same(whole, alone, "alone") + _same(whole, back, "in another order")


def _at(certificate: Certificate, index: int) -> Certificate:
    names = ("prediction", "certified", "margin", "tolerance", "worst", "runner_up")
    one = {name: getattr(certificate, name)[index : index + 1] for name in names}
    return Certificate(**one, threat=certificate.threat, method=certificate.method)
