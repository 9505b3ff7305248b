"""Where an attack may begin: the location and the runner-up of the smallest certified margin, and further weak locations."""

from __future__ import annotations

import torch
from torch import Tensor

from patchcert_cli.attacks import AnyAttack, AttackResult, Start
from patchcert_cli.certificate import Certificate
from patchcert_cli.defenses import Defense, MarginMaps
from patchcert_cli.errors import UsageError
from patchcert_cli.threats import Patch, PatchPercent, Threat

FURTHER = 31  # locations besides the worst one


def start(defense: Defense, x: Tensor, threat: Threat, certificate: Certificate) -> Start:
    """A start for images [B, C, H, W] from their certificate; the attack sees nothing else of it.

    Where the margins of all locations come from the votes that are there anyhow, it has the locations of the next smallest
    ones as well, no two of them closer than half a patch along both axes.
    """
    first = Start(certificate.worst, certificate.runner_up)
    if not isinstance(threat, Patch | PatchPercent) or defense.passes_per_image() is not None or not len(x):
        return first
    if not isinstance(defense, MarginMaps):
        return first
    try:
        margins = defense.margin_map(x, threat).flatten(1)  # [B, A]
    except UsageError:  # none for this defense, or for a patch as large as this one
        return first
    locations = threat.locations(int(x.shape[2]), int(x.shape[3])).to(margins.device)
    return Start(first.location, first.rival, spread(margins, locations, first.location.to(margins.device), FURTHER))


def search(
    defense: Defense, x: Tensor, threat: Threat, attacker: AnyAttack, index: Tensor | None = None, *, join: bool
) -> tuple[AttackResult, Certificate | None]:
    """Attack images [B, C, H, W] with numbers [B]; with ``join`` certify them before, and begin where the margin is smallest."""
    certificate = defense.certify(x, threat) if join else None
    hint = None if certificate is None else start(defense, x, threat, certificate)
    return attacker(defense, x, threat, index=index, start=hint), certificate


def spread(margins: Tensor, locations: Tensor, first: Tensor, count: int) -> Tensor:
    """Locations of the smallest margins, one after the other, each at least half a patch from ``first`` and all before it.

    Where no such location is left, the one of smallest margin that is not taken yet.

    Args:
        margins: [B, A].
        locations: int64 [A, 4].
        first: int64 [B, 4].
        count: how many, fewer where there are no more locations.

    Returns:
        int64 [B, min(count, A - 1), 4].
    """
    far, left = margins.double().clone(), margins.double().clone()
    images, last, found = torch.arange(len(margins), device=margins.device), first, []
    for _ in range(min(count, len(locations) - 1)):
        apart = (locations[None, :, :2] - last[:, None, :2]).abs()  # [B, A, 2]
        far = far.masked_fill((2 * apart < locations[:, 2:]).all(dim=2), torch.inf)
        left = left.masked_fill((apart == 0).all(dim=2), torch.inf)
        values = torch.where(far.isfinite().any(dim=1, keepdim=True), far, left)
        last = locations[values.argmin(dim=1)]
        far[images, values.argmin(dim=1)] = torch.inf
        found.append(last)
    return torch.stack(found, dim=1) if found else first.new_zeros(len(first), 0, 4)
