"""Linear bounds for images that interval bounds leave undecided: cheap bounds first, expensive ones only for undecided images.

Shapes: B images, A locations, K classes.

**Rule.** Every bound of :mod:`linear` or :mod:`intervals` on (image, location, class) holds, so the largest found so far does. An
image is certified once each of its pairs (location, class) has a bound above what rounding may have added; it is given up, which
is always sound, once a pair still has none when bounded alone. The order of questions depends on the image only:

1. the pair with the smallest interval bound, alone: most images that cannot be certified end here, at the cost of one location;
2. interval bounds of every pair, and a few of the smallest, alone;
3. the others together, one relaxation for each tile of locations, from large tiles to small ones;
4. what is left, alone, the smallest first.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.intervals import resolve
from patchcert_cli.certifiers.bounds.linear.linear import Engine, Query, raise_to, tiles
from patchcert_cli.certifiers.bounds.rounding import Proof, bound_error, forward_error
from patchcert_cli.threats import Patch, Threat

SIDES = (4,)  # sides of the tiles; a union of many locations is too loose to pay, and one location is cheap
FEW = 4  # pairs of an image that are bounded alone before the tiles
WAVE = 32  # and after them, at first
GROWTH = 4  # the next such wave is this many times as large


@torch.no_grad()
def improve(
    exact: nn.Module, x: Tensor, target: Tensor, threat: Threat, proof: Proof, *, sides: tuple[int, ...] = SIDES
) -> Proof:
    """Take a proof by interval bounds and certify more of its images by linear ones.

    Args:
        exact: a ``Sequential`` in eval mode and float64; its argmax is the deployed prediction.
        x: [B, C, H, W] in [0, 1].
        target: int64 [B], the deployed prediction.
        threat: a patch or sparse threat model.
        proof: what interval bounds give.
        sides: sides of the tiles of locations that share a relaxation, from large to small.

    Returns: a proof in which every image that ``proof`` certifies is as it was, and so is every image that stays uncertified.
    """
    usable = torch.isfinite(proof.margin) & torch.isfinite(proof.tolerance)
    chosen = (usable & ~(proof.margin > proof.tolerance)).nonzero()[:, 0]
    if not len(chosen):
        return proof
    resolved = resolve(threat, x.shape[2], x.shape[3], x.shape[1])
    wide = x[chosen].double()
    engine = Engine(exact, wide, target[chosen], resolved)
    if engine.loss == float("inf"):
        return proof
    tolerance = bound_error(engine.split, wide, resolved).clamp(min=engine.loss) + forward_error(engine.split, wide)
    location = proof.worst[chosen] if isinstance(resolved, Patch) else torch.zeros_like(chosen)
    rival = proof.rival[chosen]
    first = engine.bounds(Query.single(torch.arange(len(chosen), device=x.device), location, rival)).gather(1, location[:, None])
    alive = (first[:, 0] > tolerance).nonzero()[:, 0]
    if not len(alive):
        return proof
    search = _Search(engine, alive, tolerance[alive])
    search.settle(sides)
    better = replace(proof, **{name: getattr(proof, name).clone() for name in ("margin", "tolerance", "worst", "rival")})
    rows, proven = chosen[alive[search.alive]], alive[search.alive]
    margin, index = search.table[search.alive].flatten(1).min(dim=1)
    better.margin[rows], better.tolerance[rows], better.rival[rows] = margin, tolerance[proven], index % engine.classes
    if isinstance(resolved, Patch):  # a sparse threat keeps its pixel: the pairs are about all of them
        better.worst[rows] = index // engine.classes
    return better


class _Search:
    """Steps 2 to 4 of the rule.

    Attributes:
        table: float64 [B, A, K], the largest bound of each pair so far.
        alive: bool [B], images not given up.
    """

    def __init__(self, engine: Engine, images: Tensor, tolerance: Tensor) -> None:
        self.engine, self.images, self.tolerance = engine, images, tolerance
        self.table = engine.intervals(images)
        self.alive = torch.ones_like(images, dtype=torch.bool)

    def settle(self, sides: tuple[int, ...]) -> None:
        """Raise bounds until each image is certified or given up."""
        self._alone(FEW)
        height, width = self.engine.x.shape[2:]
        for side in sides if isinstance(self.engine.threat, Patch) else ():
            wanted = self._open()
            if bool(wanted.any()):
                self._raise(Query.grouped(wanted, tiles(self.engine.threat, height, width, side, wanted.device)))
        size = WAVE
        while bool(self._open().any()):
            self._alone(size)
            size *= GROWTH

    def _open(self) -> Tensor:
        """Pairs without a sufficient bound, bool [B, A, K]; NaN counts as no bound."""
        return ~(self.table > self.tolerance[:, None, None]) & self.alive[:, None, None]

    def _alone(self, size: int) -> None:
        """Bound the ``size`` smallest open pairs of each image alone, and give up an image where one stays open."""
        wanted = self._open().flatten(1)
        value = self.table.flatten(1).masked_fill(~wanted, float("inf"))
        index = value.topk(min(size, value.shape[1]), dim=1, largest=False).indices
        image, rank = wanted.gather(1, index).nonzero().unbind(dim=1)
        pair = index[image, rank]
        self._raise(Query.single(image, pair // self.engine.classes, pair % self.engine.classes))
        failed = ~(self.table.flatten(1)[image, pair] > self.tolerance[image])
        self.alive[image[failed]] = False

    def _raise(self, query: Query) -> None:
        raise_to(self.table, query, self.engine.bounds(replace(query, image=self.images[query.image])))
