"""The loss of interval training (Chiang et al., ICLR 2020, section 3.2).

Shapes: B images, C channels, H x W pixels, K classes, R locations of each image, A all locations.

**Locations.** A margin's bound over all locations is its minimum; its gradient is that at the location which attains it. So the
search for locations runs without gradient, and only what was picked is bounded again with gradient.

**Batch norm.** The clean batch's statistics normalize its own pass and its bounds
(:mod:`patchcert_cli.certifiers.bounds.folding`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals, pairwise
from patchcert_cli.certifiers.bounds.folding import fold
from patchcert_cli.defenses._training import TrainingStep
from patchcert_cli.defenses.ibp.guide import guided, sample
from patchcert_cli.defenses.ibp.options import IntervalOptions
from patchcert_cli.defenses.ibp.regularizers import imbalance, widening
from patchcert_cli.threats import Patch, Sparse


def training_loss(network: nn.Module, x: Tensor, label: Tensor, step: TrainingStep) -> Tensor:
    """Cross-entropy of the negated margin bounds, each at its worst location, and what the options add to it.

    The bounded form is ``1 - exp(-cross-entropy)``, one minus the worst-case softmax probability: like the certified error
    it stops pushing where nothing can be won, so the images near the decision get the gradient.
    """
    options = _options(step)
    if step.progress < options.natural_epochs:
        return F.cross_entropy(network(x), label)
    threat = intervals.resolve(step.threat, x.shape[2], x.shape[3], x.shape[1])
    bounded, epsilon = options.bounded(step.progress, step.epochs), options.epsilon(step.progress)
    bare, logits = fold(network, x)
    bounds = _bounds(bare, x, label, threat, step)
    loss = _worst_case(bounds.margins, label, bounded=bounded)
    if options.linear:
        with _in_float32(x):
            linear = pairwise.linear_margins(bare, x, label, threat, bounds.locations, epsilon=epsilon)
        better = _worst_case(torch.maximum(bounds.margins, linear), label, bounded=bounded)
        loss = (1 - options.linear) * loss + options.linear * better
    natural = options.bounded_natural if bounded else options.natural
    if natural > 0:
        loss = (1 - natural) * loss + natural * F.cross_entropy(network(x) if logits is None else logits, label)
    if 0 < epsilon < 1 and (options.tightness or options.balance):
        with _in_float32(x):
            rival = bounds.margins.detach().scatter(1, label[:, None], float("inf")).argmin(dim=1, keepdim=True)
            location = bounds.locations.gather(1, rival)[:, 0]
            width, boxes = pairwise.relu_boxes(bare, x, threat, location, epsilon=epsilon)
            penalty = options.tightness * widening(width, boxes) + options.balance * imbalance(boxes)
            loss = loss + (1 - epsilon) * penalty
    return loss + bounds.guide_loss


def _options(step: TrainingStep) -> IntervalOptions:
    assert isinstance(step.options, IntervalOptions)
    return step.options


def _in_float32(x: Tensor) -> torch.autocast:
    """No autocast: small differences of large sums are what bounds are made of."""
    return torch.autocast(x.device.type, enabled=False)


def _worst_case(margins: Tensor, label: Tensor, *, bounded: bool) -> Tensor:
    losses = F.cross_entropy(-margins, label, reduction="none")
    return (1 - torch.exp(-losses) if bounded else losses).mean()


@dataclass(frozen=True)
class Bounds:
    """What a batch is trained on.

    Attributes:
        margins: [B, K], interval bounds of ``f_label - f_class``, with gradient.
        locations: int64 [B, K], where each is attained, if an option asks for it; 0 if the threat is sparse.
        guide_loss: a scalar that is 0 and whose gradient teaches the guide.
    """

    margins: Tensor
    locations: Tensor
    guide_loss: Tensor


def _bounds(network: nn.Module, x: Tensor, label: Tensor, threat: Patch | Sparse, step: TrainingStep) -> Bounds:
    """Bounds over the locations to train on.

    Autocast stays on for sparse threats: middle and radius of a box are rounded apart, so its ends stay in order. For patches
    it is off: their bounds are clean values plus deviations, which need the same precision.
    """
    options = _options(step)
    epsilon = options.epsilon(step.progress)
    none = x.new_zeros(())
    if isinstance(threat, Sparse):
        found = intervals.lower_margins(network, x, label, threat, epsilon=epsilon, topk_limit=options.visits)
        return Bounds(found.values, torch.zeros_like(found.worst), none)
    guide = step.auxiliary_network if options.picked == "guided" else None
    prediction = guide(x) if guide is not None else none  # under autocast: it decides where to look, and proves nothing
    with _in_float32(x):
        chosen, per_class = pick(network, x, label, threat, step, prediction)
        if per_class or not (guide or options.linear or options.tightness or options.balance):
            bound = intervals.margins_at if per_class else intervals.smallest_margins
            margins = bound(network, x, label, threat, chosen, epsilon=epsilon)
            return Bounds(margins, chosen if per_class else chosen[:, :1].expand_as(margins), none)
        table = intervals.margins_table(network, x, label, threat, chosen, epsilon=epsilon)
        margins, index = table.min(dim=1)
        if guide is not None:
            error = F.mse_loss(guided(prediction, threat, chosen), table.detach())
            none = error - error.detach()
        return Bounds(margins, chosen.gather(1, index), none)


def pick(
    network: nn.Module, x: Tensor, label: Tensor, patch: Patch, step: TrainingStep, prediction: Tensor | None = None
) -> tuple[Tensor, bool]:
    """Locations to train on: int64 [B, K], one for each class (then true), or [B, R] for all classes alike.

    ``prediction`` is what the guide makes of ``x``, [B, K, H, W].
    """
    options = _options(step)
    epsilon, locations = options.epsilon(step.progress), patch.count(x.shape[2], x.shape[3])
    if options.picked == "worst":
        with torch.no_grad():
            return intervals.lower_margins(network, x, label, patch, epsilon=epsilon).worst, True
    if options.picked == "random":
        return _random(locations, len(x), options.locations, step).to(x.device), False
    if options.picked == "guided":
        assert prediction is not None
        return sample(prediction.detach(), patch, options.locations, step.generator), False
    screened = _random(locations, len(x), options.screened, step).to(x.device)
    table = pairwise.screen(network, x, label, patch, screened, epsilon=epsilon)  # [B, S, K]
    if not options.locations:
        return screened.gather(1, table.argmin(dim=1)), True
    rivals = table.scatter(2, label[:, None, None].expand(-1, table.shape[1], 1), float("inf"))
    worst = rivals.amin(dim=2).topk(options.locations, dim=1, largest=False).indices
    return screened.gather(1, worst), False


def _random(locations: int, images: int, count: int, step: TrainingStep) -> Tensor:
    return torch.randint(locations, (images, count), generator=step.generator)
