"""k pixels by random search, without gradients (Sparse-RS: Croce et al., AAAI 2022).

Each round proposes several changes of the best pixels so far: a share of them is exchanged for others, with random corner colors.
The best proposal is kept if it raises the margin; the share falls along the run to a single pixel. The margin is the first
surrogate's; a candidate that may have changed the deployed answer is answered by the whole defense, which decides.

Shapes: n images in progress, C channels, H x W pixels, P proposals of an image, E entries: the H * W pixels with all channels,
or, if the threat counts single values, the C * H * W values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchcert_cli.attacks._random_search import FIRST_STREAM, RandomSearch, share
from patchcert_cli.attacks._target import Target
from patchcert_cli.threats import Sparse, Threat

SHARES = ((0.05, 1.0), (0.2, 0.5), (0.4, 0.25), (0.7, 0.12), (1.1, 0.0))  # until which part of the run, share of pixels exchanged


@dataclass(frozen=True, kw_only=True)
class SparseRS(RandomSearch):
    """Random search over which entries are changed, and to which corner of [0, 1]."""

    kinds: ClassVar[tuple[str, ...]] = ("sparse",)
    revision: ClassVar[int] = 2  # the first one ignored hints

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Work through the images in groups whose proposals make one chunk."""
        assert isinstance(threat, Sparse)
        for owner in target.groups(self.candidates):
            owner = owner[~target.done[owner]]
            if len(owner):
                self._search(target, x, owner, index, threat)
        return target.best

    def _search(self, target: Target, x: Tensor, owner: Tensor, index: Tensor, threat: Sparse) -> None:
        entries = x[0].numel() if threat.unit == "value" else x[0, 0].numel()
        k, count = min(threat.k, entries), self.candidates
        chosen = torch.zeros(len(owner), entries, dtype=torch.bool, device=x.device)
        best, held = torch.full((len(owner),), -torch.inf, device=x.device), x[owner].clone()
        live = torch.arange(len(owner), device=x.device)
        for number in range(1 + self.rounds):
            part = self.part(number)
            exchanged = k if number == 0 else max(1, round(k * share(part, SHARES)))
            drawn = self.draw(index[owner[live]], FIRST_STREAM + number, count * (entries + x[0].numel()))
            lot, bits = torch.split(drawn.reshape(len(live), count, -1), [entries, x[0].numel()], dim=2)
            if number == 0 and target.start is not None:
                lot = self._hinted(lot, target.start.location[owner], x)
            before = chosen[live, None].expand(-1, count, -1)
            kept = _highest(torch.where(before, lot, -1.0), k - exchanged) & before  # [n, P, E]
            added = _highest(torch.where(before, lot - 1, lot), k, k - kept.sum(dim=2, keepdim=True)) & ~kept
            where = [_as_values(part_, x, threat) for part_ in (added, kept)]
            rows = torch.where(where[1], held[live, None], x[owner[live], None])
            rows = torch.where(where[0], (bits < 0.5).to(x).reshape(rows.shape), rows)
            owners = owner[live].repeat_interleave(count)
            margin = target.gap(target.logits(rows.flatten(0, 1), owners), owners).reshape(rows.shape[:2])
            target.offer(rows, margin, owner[live])
            score, pick = margin.max(dim=1)
            better = score > best[live]
            winner, each = live[better], better.nonzero()[:, 0]
            best[winner], held[winner] = score[better], rows[each, pick[better]]
            chosen[winner] = (added | kept)[each, pick[better]]
            live = live[~target.done[owner[live]]]
            if not len(live):
                return

    def _hinted(self, lot: Tensor, location: Tensor, x: Tensor) -> Tensor:
        """The lots [n, P, E] of the first round, such that half of the proposals have the pixel at int64 [n, 4]."""
        pixel = torch.arange(lot.shape[2], device=x.device) % x[0, 0].numel()  # of each entry
        chosen = pixel == (location[:, :1] * x.shape[3] + location[:, 1:2])  # [n, E]
        half = torch.arange(lot.shape[1], device=x.device) < (lot.shape[1] + 1) // 2
        return torch.where(chosen[:, None] & half[None, :, None], 2.0, lot)


def _as_values(entries: Tensor, x: Tensor, threat: Sparse) -> Tensor:
    """Which values belong to the entries, bool [n, P, E] -> bool that fits [n, P, C, H, W]."""
    shape = x.shape[1:] if threat.unit == "value" else (1, *x.shape[2:])
    return entries.reshape(*entries.shape[:2], *shape)


def _highest(score: Tensor, most: int, count: Tensor | None = None) -> Tensor:
    """Whether each entry is among the ``most`` highest of its row, or the ``count`` int64 [n, P, 1] highest: bool [n, P, E]."""
    if most == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    top = score.topk(min(most, score.shape[2]), dim=2).indices
    among = torch.arange(top.shape[2], device=score.device) < (most if count is None else count)
    return torch.zeros_like(score, dtype=torch.bool).scatter(2, top, among.expand_as(top))
