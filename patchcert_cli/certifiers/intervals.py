"""Interval bounds of a network for every atom of a threat at once.

Shapes: B images, C channels, H x W pixels, A atoms, K classes, N neurons of the layer at hand.

**Theorem.** Let f be a ``Sequential`` of linear, convolution, ReLU, flatten, pooling, frozen batch norm and normalization layers, x an
image in [0, 1], y a class, and T a threat model. For a patch, let m_c be the minimum over all locations L of the interval lower
bound of f_y - f_c on the box {x' : x' = x outside L, x' in [0, 1] inside L}; for a sparse threat, on the box of
pre-activations that :mod:`first_layer` gives. If m_c > 0 for every c != y then argmax f(x') = y for every x' that T allows.
Proof: each x' lies in one of the boxes, and interval arithmetic encloses (:mod:`rules`); the last linear layer is merged with the
difference e_y - e_c first. Source: Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020, section 3. Theirs is
computed on one boxed copy of the image per location; here the first layer comes from sums over the patch window (:mod:`first_layer`).

**Rounding rule.** Let e bound the rounding error of m_c (float32, any order of summation) and d the error of a float64 forward pass
at any x' in [0, 1], both from :func:`rules.noise`. An image is certified at once if m_c > e + d for all c, and not certified if some
m_c <= -e. Every other image is bounded again in float64, and certified only if m_c exceeds that computation's own error + d. The
deployed prediction is the argmax of the float64 forward pass, lowest index first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.first_layer import (
    ConvolutionWindows,
    Split,
    patch_reach,
    sparse_box,
    sparse_reach,
    under_patch,
    window_sums,
)
from patchcert_cli.certifiers.rules import Box, noise, propagate, relative_error
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.threats import Patch, PatchPercent, Sparse, Threat

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}  # working memory of one chunk of locations: a core's caches, a part of the GPU
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclass(frozen=True)
class Margins:
    """Lower bounds of ``f_target - f_class`` over all atoms.

    Attributes:
        values: [B, K], the minimum over atoms; 0 in the target's own column.
        worst: int64 [B, K], the index of the atom that attains it.
    """

    values: Tensor
    worst: Tensor


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Switch off everything that computes in less than the tensors' own precision (TF32, autocast)."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn


def resolve(threat: Threat, height: int, width: int, channels: int) -> Patch | Sparse:
    """The threat in pixels on this image size; raises if it does not fit or has no interval certificate."""
    if isinstance(threat, PatchPercent):
        return threat.resolve(height, width)
    if isinstance(threat, Patch | Sparse):
        threat.check(height, width, channels)
        return threat
    raise UnsupportedThreat(f"interval bounds have no certificate against {threat};", hint="allowed: patch, sparse.")


def lower_margins(network: nn.Module, x: Tensor, target: Tensor, threat: Threat, *, epsilon: float = 1.0) -> Margins:
    """Interval lower bounds of ``f_target - f_class`` over every atom of ``threat``.

    Args:
        network: a ``Sequential`` in eval mode, images [B, C, H, W] in [0, 1] -> logits [B, K].
        x: [B, C, H, W] in [0, 1].
        target: int64 [B], the class to defend.
        threat: a patch or sparse threat model.
        epsilon: below 1, touched entries move only this fraction of their way to 0 or 1 (for training ramps).
    """
    split = Split.of(network, x.shape[1])
    resolved = resolve(threat, x.shape[2], x.shape[3], x.shape[1])
    stream: Stream
    if isinstance(resolved, Sparse):
        stream = SparseStream(split, x, resolved, epsilon)
    elif split.is_dense:
        stream = DenseStream(split, x, resolved, epsilon)
    else:
        stream = GeneralStream(split, x, resolved, epsilon)
    parts = []
    groups = [(target == y).nonzero()[:, 0] for y in range(int(target.max()) + 1)]
    for y, group in enumerate(groups):  # with one target, the last layer is one product per chunk
        if len(group):
            parts.append(_smallest(stream.chunks(group, Contrast(split, y))))
    back = torch.cat(groups).argsort()
    values, worst = (torch.cat(part, dim=1)[:, back].t() for part in zip(*parts, strict=True))
    return Margins(values, worst)


def _smallest(chunks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Minimum over atoms and its index, [K, B] each, from chunks [A', K, B] in order."""
    values = worst = None
    seen = 0
    for chunk in chunks:
        lowest, index = chunk.min(dim=0)
        if values is None or worst is None:
            values, worst = lowest, index
        else:
            worst = torch.where(lowest < values, index + seen, worst)
            values = torch.minimum(lowest, values)
        seen += len(chunk)
    assert values is not None and worst is not None
    return values, worst


class Contrast:
    """The last layer merged with ``e_target - e_class``: margins of one target class."""

    def __init__(self, split: Split, target: int) -> None:
        self.target = target
        self.final = split.rest[-1] if split.rest else None
        if isinstance(self.final, nn.Linear):
            weight, bias = self.final.weight, self.final.bias
            difference = weight[target] - weight  # [K, N]
            self.halves = torch.cat([difference.clamp(min=0), difference.clamp(max=0)], dim=1)
            self.offset = weight.new_zeros(len(weight)) if bias is None else bias[target] - bias

    def columns(self, bounds: Tensor) -> Tensor:
        """Margins [A', K, B] from stacked lower and upper inputs of the last layer, [A', 2N, B]."""
        return torch.matmul(self.halves, bounds) + self.offset[:, None]

    def rows(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Margins [A', K, B] from inputs of the last layer, [A', B, ...] each."""
        if isinstance(self.final, nn.Linear):
            return self.columns(torch.cat([lower, upper], dim=2).transpose(1, 2))
        shape = lower.shape[:2]
        layers = [self.final] if self.final is not None else []
        low, high = propagate(layers, (lower.flatten(0, 1), upper.flatten(0, 1)))
        margins = (low[:, self.target, None] - high).reshape(*shape, -1).transpose(1, 2).contiguous()
        margins[:, self.target] = 0
        return margins


class Stream(Protocol):
    """Margins of all atoms, chunk by chunk, so that memory does not grow with their number."""

    def chunks(self, group: Tensor, contrast: Contrast) -> Iterator[Tensor]:
        """Margins [A', K, G] for consecutive atoms, of the images with indices ``group`` [G], which share one target."""
        ...


def _chunk(per_atom_bytes: int, device: torch.device) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // per_atom_bytes)


class SparseStream:
    """One box of pre-activations holds every sparse change."""

    def __init__(self, split: Split, x: Tensor, threat: Sparse, epsilon: float) -> None:
        self.lower, self.upper = propagate(split.rest[:-1], sparse_box(split, x, threat, epsilon=epsilon))

    def chunks(self, group: Tensor, contrast: Contrast) -> Iterator[Tensor]:
        yield contrast.rows(self.lower[group][None], self.upper[group][None])


class DenseStream:
    """All patch locations of a fully connected network, with neurons as rows and images as columns.

    One chunk is a batched product over patch pixels added to the clean pre-activation, so the work per location is h*w*C*N
    products instead of H*W*C*N.
    """

    def __init__(self, split: Split, x: Tensor, patch: Patch, epsilon: float) -> None:
        self.split, self.x, self.patch, self.epsilon = split, x, patch, epsilon
        weight = split.dense_weight((x.shape[1], x.shape[2], x.shape[3]))
        self.weight = under_patch(weight.permute(1, 2, 3, 0).contiguous(), patch).transpose(1, 2)  # [A, N, P]
        self.radius = window_sums(weight.abs(), patch).t()[:, :, None] * (epsilon / 2)  # [A, N, 1]
        self.widest = max(layer.in_features for layer in split.rest if isinstance(layer, nn.Linear))

    def chunks(self, group: Tensor, contrast: Contrast) -> Iterator[Tensor]:
        x = self.x[group]
        hidden = under_patch((0.5 - x).permute(1, 2, 3, 0).contiguous(), self.patch)  # [A, P, B]
        clean = self.split.clean(x).t()[None].contiguous()  # [1, N, B]
        atoms, neurons, images = self.weight.shape[0], self.weight.shape[1], len(x)
        step = _chunk(2 * self.widest * images * x.element_size(), x.device)
        room, buffer = x.new_empty(min(step, atoms), neurons, images), x.new_empty(min(step, atoms), 2 * neurons, images)
        for start in range(0, atoms, step):
            part = slice(start, min(start + step, atoms))
            middle, bounds = room[: part.stop - start], buffer[: part.stop - start]
            torch.baddbmm(clean, self.weight[part], hidden[part], alpha=self.epsilon, out=middle)
            torch.sub(middle, self.radius[part], out=bounds[:, :neurons])
            torch.add(middle, self.radius[part], out=bounds[:, neurons:])
            for layer in self.split.rest[:-1]:
                bounds = _columns_rule(layer, bounds)
            yield contrast.columns(bounds)


def _columns_rule(layer: nn.Module, bounds: Tensor) -> Tensor:
    """One layer of a fully connected network on stacked bounds [A', 2N, B], lower above upper."""
    if isinstance(layer, nn.Linear):
        lower, upper = bounds.chunk(2, dim=1)
        middle = torch.matmul(layer.weight, (lower + upper) / 2)
        if layer.bias is not None:
            middle += layer.bias[:, None]
        radius = torch.matmul(layer.weight.abs(), (upper - lower) / 2)
        return torch.cat([middle - radius, middle + radius], dim=1)
    return bounds.relu_()


class GeneralStream:
    """All patch locations of any network: the first layer from window sums if it is a convolution, else boxed images."""

    def __init__(self, split: Split, x: Tensor, patch: Patch, epsilon: float) -> None:
        self.split, self.x, self.patch, self.epsilon = split, x, patch, epsilon
        self.windowed = isinstance(split.first, nn.Conv2d)
        layers = split.rest if self.windowed else split.layers
        self.body = layers[:-1] if split.rest else layers

    def chunks(self, group: Tensor, contrast: Contrast) -> Iterator[Tensor]:
        x = self.x[group]
        source: ConvolutionWindows | BoxedImages
        if self.windowed:
            source = ConvolutionWindows(self.split, x, self.patch, self.epsilon)
        else:
            source = BoxedImages(x, self.patch, self.epsilon)
        atoms = self.patch.count(x.shape[2], x.shape[3])
        widest = self.split.clean(x[:1]).numel() if self.windowed else x[0].numel()
        step = _chunk(4 * widest * x.element_size() * len(x), x.device)
        for start in range(0, atoms, step):
            stop = min(start + step, atoms)
            lower, upper = propagate(self.body, source.chunk(start, stop))
            shape = (stop - start, len(x), *lower.shape[1:])
            yield contrast.rows(lower.reshape(shape), upper.reshape(shape))


class BoxedImages:
    """The plain way: one boxed copy of each image per location."""

    def __init__(self, x: Tensor, patch: Patch, epsilon: float = 1.0) -> None:
        self.x, self.epsilon = x, epsilon
        self.masks = location_masks(patch, x)

    def chunk(self, start: int, stop: int) -> Box:
        """Lower and upper images for locations ``start`` to ``stop``: [A'*B, C, H, W] each."""
        moved = self.masks[start:stop, None, None] * self.epsilon  # [A', 1, 1, H, W]
        lower = self.x - moved * self.x
        return lower.flatten(0, 1), (lower + moved).flatten(0, 1)


def location_masks(patch: Patch, x: Tensor) -> Tensor:
    """1 under the patch, 0 elsewhere, for every location: [A, H, W] in the type of ``x``."""
    height, width = x.shape[2:]
    top, left = (part[:, None] for part in patch.atoms(height, width)[:, :2].to(x.device).unbind(dim=1))
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    rows = (row >= top) & (row < top + patch.height)
    columns = (column >= left) & (column < left + patch.width)
    return (rows[:, :, None] & columns[:, None, :]).to(x.dtype)


def margins_at(network: nn.Module, x: Tensor, target: Tensor, patch: Patch, chosen: Tensor, *, epsilon: float = 1.0) -> Tensor:
    """The interval lower bound of ``f_target - f_class`` at one chosen location per image and class, with gradient.

    Where ``chosen`` is the worst location, this is the minimum over all locations and has its gradient (the gradient of a
    minimum is that of its minimizer), at the cost of the few distinct locations instead of all.

    Args:
        chosen: int64 [B, K] or [B, R], indices of locations; with R != K each is used for all classes, and the smallest
            margin per class is returned.

    Returns: [B, K]; 0 in the target's column.
    """
    split = Split.of(network, x.shape[1])
    images, columns = chosen.shape
    atoms = patch.count(x.shape[2], x.shape[3])
    image = torch.arange(images, device=x.device)[:, None].expand_as(chosen)
    pairs, back = (image * atoms + chosen).unique(return_inverse=True)  # distinct (image, location)
    owner, location = pairs // atoms, pairs % atoms
    mask = location_masks(patch, x)
    final = split.rest[-1] if split.rest else None
    if not split.is_dense or not isinstance(final, nn.Linear):
        raise UnsupportedThreat("training at chosen locations needs a fully connected network.")
    shape = (x.shape[1], x.shape[2], x.shape[3])
    weight = split.dense_weight(shape)  # [N, C, H, W]
    content = (0.5 - x)[owner] * mask[location, None]
    middle = split.clean(x)[owner] + epsilon * (content.flatten(1) @ weight.flatten(1).t())
    radius = (epsilon / 2) * window_sums(weight.abs(), patch)[:, location].t()
    lower, upper = propagate(split.rest[:-1], (middle - radius, middle + radius))  # [U, N]
    if columns == final.out_features:  # one location per class
        contrast = final.weight[target][:, None] - final.weight  # [B, K, N]
        margin = (contrast.clamp(min=0) * lower[back] + contrast.clamp(max=0) * upper[back]).sum(dim=2)
    else:
        contrast = final.weight[target][:, None] - final.weight
        margin = (
            lower[back] @ contrast.clamp(min=0).transpose(1, 2) + upper[back] @ contrast.clamp(max=0).transpose(1, 2)
        ).amin(dim=1)
    bias = final.bias if final.bias is not None else final.weight.new_zeros(final.out_features)
    return margin + bias[target][:, None] - bias


@torch.no_grad()
def rounding_error(network: nn.Module, x: Tensor, threat: Threat, dtype: torch.dtype) -> Tensor:
    """Bound of the rounding error of :func:`lower_margins` computed in ``dtype``: float64 [B]."""
    split = Split.of(network, x.shape[1])
    resolved = resolve(threat, x.shape[2], x.shape[3], x.shape[1])
    unit = UNIT[dtype]
    shape = (x.shape[1], x.shape[2], x.shape[3])
    size, error = x.double(), torch.zeros_like(x, dtype=torch.float64)
    if split.first is None or (isinstance(resolved, Patch) and isinstance(split.first, nn.Linear) and not split.is_dense):
        return _final_noise(split.layers, torch.ones_like(size), error, unit)
    for layer in (*split.before, split.first):
        size, error = noise(layer, size, error, unit)
    reach = patch_reach(split, shape, resolved) if isinstance(resolved, Patch) else sparse_reach(split, shape, resolved)
    reach = reach.double() * (1 + 1e-6)
    # a sum over a window, or of the largest gains, has at most as many terms as the layer itself
    rate = relative_error(split.first, unit)
    return _final_noise(split.rest, size + reach, error + 2 * rate * (size + reach), unit)


def _final_noise(layers: list[nn.Module], size: Tensor, error: Tensor, unit: float) -> Tensor:
    """Error of a difference of two outputs: both ends, and the roundings of the difference itself."""
    for layer in layers:
        size, error = noise(layer, size, error, unit)
    return 2 * error.flatten(1).amax(dim=1) + 4 * unit * size.flatten(1).amax(dim=1)


@torch.no_grad()
def forward_error(network: nn.Module, shape: tuple[int, int, int]) -> float:
    """Bound of the error of ``f_y - f_c`` in a float64 forward pass, for every input in [0, 1]."""
    reference = next(iter(network.parameters()))
    ones = torch.ones(1, *shape, dtype=torch.float64, device=reference.device)
    split = Split.of(network, shape[0])
    return float(_final_noise(split.layers, ones, torch.zeros_like(ones), UNIT[torch.float64]))


@dataclass(frozen=True)
class Proof:
    """The smallest margin over rivals and atoms.

    Attributes:
        margin: float64 [B], lower bound of ``f_target - f_rival`` over all atoms.
        slack: float64 [B], what rounding may have added to it, plus the rounding of the deployed float64 prediction.
        worst: int64 [B], the atom index that attains it.
        rival: int64 [B], the class that attains it.
    """

    margin: Tensor
    slack: Tensor
    worst: Tensor
    rival: Tensor


def prove(network: nn.Module, exact: nn.Module, x: Tensor, target: Tensor, threat: Threat) -> Proof:
    """Bound the margins of ``target`` in float32, and again in float64 where rounding could decide (the rule above).

    Args:
        exact: a float64 copy of ``network``; its argmax is the deployed prediction.
    """
    deployed = forward_error(exact, (x.shape[1], x.shape[2], x.shape[3]))
    proof = _prove(network, x, target, threat, deployed)
    error = proof.slack - deployed
    close = ((proof.margin > -error) & (proof.margin <= proof.slack)).nonzero()[:, 0]
    if len(close) and x.dtype != torch.float64:
        again = _prove(exact, x[close].double(), target[close], threat, deployed)
        for name in ("margin", "slack", "worst", "rival"):
            getattr(proof, name)[close] = getattr(again, name)
    return proof


def _prove(network: nn.Module, x: Tensor, target: Tensor, threat: Threat, deployed: float) -> Proof:
    margins = lower_margins(network, x, target, threat)
    values = margins.values.scatter(1, target[:, None], float("inf"))
    margin, rival = values.min(dim=1)
    worst = margins.worst.gather(1, rival[:, None])[:, 0]
    slack = rounding_error(network, x, threat, x.dtype) + deployed
    broken = ~torch.isfinite(margin)  # overflow or NaN weights never certify
    return Proof(margin.double().masked_fill(broken, float("-inf")), slack, worst, rival)


def double(network: nn.Module) -> nn.Module:
    """A float64 copy of a network."""
    return copy.deepcopy(network).double()
