"""Interval bounds by location: what an attacker can force there, and whether a class stays among the first few.

Shapes: B images, C channels, H x W pixels, A locations, K classes.

**What can be forced.** Let y be the answer and m_j(L) the lower bound of ``f_y - f_j`` at location L (:mod:`intervals`). Where
m_j(L) exceeds what rounding may have added to it (:mod:`rounding`), f_y is larger than f_j under every change of L, so j is not
the answer: L can force y and the classes whose bound is not so large. Of an image that is certified it is y alone.

**The first k classes.** A class c is lost from the first k only if at least k classes are not below it. With m_j(L) the lower
bound of ``f_c - f_j``: c stays if at every L fewer than k classes have a bound that is not above the tolerance, that is, if the
k-th smallest m_j(L) over j != c is above it.

A sparse threat has one box for all its locations, so what holds for it holds at each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds.first_layer import Split
from patchcert_cli.certifiers.bounds.intervals import resolve
from patchcert_cli.certifiers.bounds.margin_chunks import ClassDifference, MarginIterator, margin_iterator
from patchcert_cli.certifiers.bounds.rounding import bound_error, forward_error
from patchcert_cli.threats import Sparse, Threat


@torch.no_grad()
def forced(network: nn.Module, exact: nn.Module, x: Tensor, target: Tensor, threat: Threat, certified: Tensor) -> Tensor:
    """What can be forced at each location, bool [B, A, K].

    Args:
        network: a ``Sequential`` in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].
        exact: a float64 copy of ``network``; its argmax is the deployed answer.
        x: [B, C, H, W] in [0, 1].
        target: int64 [B], the deployed answers.
        threat: a patch or sparse threat model.
        certified: bool [B], images of which no location can force anything but the answer.
    """
    classes = exact(torch.zeros(1, *x.shape[1:], dtype=torch.float64, device=x.device)).shape[1]
    locations = threat.count(x.shape[2], x.shape[3])
    own = torch.arange(classes, device=x.device) == target[:, None]  # [B, K]
    found = own[:, None].expand(-1, locations, -1).clone()
    open_ = (~certified).nonzero()[:, 0]
    if not len(open_):
        return found
    stream, tolerance = _stream(network, exact, x[open_], threat)
    for group in stream.groups(target[open_]):
        images, first = open_[group], 0
        for chunk in stream.chunks(group, ClassDifference(stream.split, target[images])):  # [A', K, G]
            proven = (chunk > tolerance[group]) & torch.isfinite(chunk).all(dim=1, keepdim=True)
            part = slice(None) if isinstance(threat, Sparse) else slice(first, first + len(chunk))
            found[images, part] |= ~proven.permute(2, 0, 1)
            first += len(chunk)
    return found


@dataclass(frozen=True)
class Stay:
    """Whether one class of each image stays among the first k.

    Attributes:
        margin: float64 [B], lower bound of the k-th smallest difference to another class.
        tolerance: float64 [B], what rounding may have added to it; it stays if the margin is larger.
        worst: int64 [B], the location that attains it.
        rival: int64 [B], the class that attains it.
    """

    margin: Tensor
    tolerance: Tensor
    worst: Tensor
    rival: Tensor


@torch.no_grad()
def stay(network: nn.Module, exact: nn.Module, x: Tensor, target: Tensor, threat: Threat, top: int) -> Stay:
    """Whether ``target``, int64 [B], stays among the first ``top`` classes; the others as for :func:`forced`."""
    if not len(x):
        none = torch.zeros(0, dtype=torch.float64, device=x.device)
        return Stay(none, none.clone(), target.clone(), target.clone())
    stream, tolerance = _stream(network, exact, x, threat)
    margin = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
    worst, rival = torch.zeros_like(target), torch.zeros_like(target)
    for group in stream.groups(target):
        first = 0
        for chunk in stream.chunks(group, ClassDifference(stream.split, target[group])):
            own = torch.arange(chunk.shape[1], device=x.device)[:, None] == target[group]
            lowest, classes = chunk.masked_fill(own, float("inf")).topk(top, dim=1, largest=False)  # [A', k, G]
            least = lowest[:, -1].double().masked_fill(~torch.isfinite(chunk).all(dim=1), float("-inf"))
            least, where = least.min(dim=0)
            lower = least < margin[group]
            margin[group] = torch.where(lower, least, margin[group])
            worst[group] = torch.where(lower, where + first, worst[group])
            rival[group] = torch.where(lower, classes[:, -1].gather(0, where[None])[0], rival[group])
            first += len(chunk)
    return Stay(margin, tolerance, stream.worst_location(target, rival, worst), rival)


def _stream(network: nn.Module, exact: nn.Module, x: Tensor, threat: Threat) -> tuple[MarginIterator, Tensor]:
    """The margins of all locations in the type of ``x``, and what rounding may have added to them or to the answer."""
    resolved = resolve(threat, x.shape[2], x.shape[3], x.shape[1])
    stream = margin_iterator(Split.of(network, x.shape[1]), x, resolved, 1.0)
    tolerance = bound_error(stream.split, x, resolved) + forward_error(Split.of(exact, x.shape[1]), x)
    return stream, tolerance
