"""An enemy who knows rounding: pictures whose logit margins all but vanish behind some masks, and every way in which they may be
asked.

A picture is made in three stages, in float64. Newton steps (least squares in all pixels) bring the logits behind a pair of masks
to zero, or the largest ones together. Rounded to 8 bits, it is moved in steps of 1/255, one or two pixels at a time, until the
logits are small again. Of all pairs of such steps those are kept that leave the smallest logit margin. A defense whose labels
depend on how they were computed then gives several answers or verdicts for one picture.

Shapes: C channels, H x W pixels, K classes, B images, D = C H W, n pictures.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.threats import Threat

SIZES = (1, 2, 3, 7, 64)
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Find:
    """One picture that a defense treats in two ways, and how it was asked then."""

    picture: Tensor
    ways: dict[str, tuple[int, bool]]

    def __str__(self) -> str:
        return "; ".join(f"{way}: answer {answer}, certified {certified}" for way, (answer, certified) in self.ways.items())


def aimed(
    defense: PatchCleanser, x: Tensor, occluded: Tensor, among: int, *, keep: int = 8, rounds: int = 8, pairs: int = 256
) -> Tensor:
    """8-bit pictures [keep, C, H, W], float32, near x [C, H, W], with the smallest logit margins behind ``occluded`` bool [H, W].

    ``among`` is how many of the largest logits are brought together; with all K of them they are brought to zero. Of so many
    ``pairs`` of steps the best are kept.
    """
    network = copy.deepcopy(defense.network).double().requires_grad_(False).eval()

    def logits(pictures: Tensor) -> Tensor:
        return logits_of(defense, pictures, occluded, network)

    at = x.double()
    which = logits(at[None])[0].topk(among).indices
    zero = among == len(defense.classes)

    def missing(z: Tensor) -> Tensor:
        """What logits [n, among] lack."""
        return -z if zero else z.mean(dim=1, keepdim=True) - z

    for _ in range(rounds):
        z, slope = _slopes(logits, at, which)
        change = torch.linalg.lstsq(slope, missing(z[None])[0][:, None], driver="gelsd").solution[:, 0]
        at = (at + change.reshape(at.shape)).clamp(0, 1)
    at = (at * 255).round() / 255
    for _ in range(4 * rounds):
        z, slope = _slopes(logits, at, which)
        near = _stepped(at, _pairs(at, slope, missing(z[None])[0], pairs // 4))
        left = missing(logits(near)[:, which]).abs().amax(dim=1)
        if float(left.min()) >= float(missing(z[None]).abs().max()):
            break
        at = near[int(left.argmin())]
    z, slope = _slopes(logits, at, which)
    first, second = z.topk(2).indices.tolist()
    near = _stepped(at, _pairs(at, (slope[first] - slope[second])[None], (z[second] - z[first])[None], pairs))
    best = logits(near).topk(2, dim=1).values
    return near[(best[:, 0] - best[:, 1]).argsort()[:keep]].float()


def logits_of(defense: PatchCleanser, pictures: Tensor, occluded: Tensor, network: Any = None) -> Tensor:
    """Logits [n, K] of float64 pictures [n, C, H, W] behind ``occluded`` bool [H, W]."""
    network = network or copy.deepcopy(defense.network).double().requires_grad_(False).eval()
    seen = torch.where(occluded, defense.fill.double(), pictures)
    told = (seen, occluded.expand(len(seen), 1, -1, -1)) if getattr(network, "takes_mask", False) else (seen,)
    logits: Tensor = network(*told)
    return logits


def _slopes(logits: Any, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen logits [k] of x [C, H, W], and their slopes [k, D]."""
    many = x.repeat(len(which), 1, 1, 1).requires_grad_()
    z = logits(many)[:, which].diagonal()
    (slope,) = torch.autograd.grad(z.sum(), many)
    return z.detach(), slope.flatten(1)


def _pairs(x: Tensor, slope: Tensor, wanted: Tensor, count: int) -> Tensor:
    """The ``count`` pairs of 8-bit steps that come nearest to ``wanted`` [k] by ``slope`` [k, D]: int64 [count, 2].

    Steps 0 to D - 1 go up, D to 2 D - 1 down. Of all steps the 512 best alone are paired with each other.
    """
    effect = torch.cat([slope, -slope], dim=1) / 255  # [k, 2 D]
    room = torch.cat([x.flatten() < 1, x.flatten() > 0]) & (effect != 0).any(dim=0)
    alone = (wanted[:, None] - effect).square().sum(dim=0).masked_fill(~room, torch.inf)
    some = alone.topk(min(512, int(room.sum())), largest=False).indices
    rest = (wanted[:, None, None] - effect[:, some, None] - effect[:, None, some]).abs().amax(dim=0)
    places = rest.triu(1).masked_fill(~torch.ones_like(rest, dtype=torch.bool).triu(1), torch.inf).flatten()
    best = places.topk(min(count, len(some) * (len(some) - 1) // 2), largest=False).indices
    return torch.stack([some[best // len(some)], some[best % len(some)]], dim=1)


def _stepped(x: Tensor, steps: Tensor) -> Tensor:
    """The picture x [C, H, W] after each pair of steps int64 [n, 2]: [n, C, H, W]."""
    size, moved = x.numel(), (x.flatten() * 255).round().repeat(len(steps), 1)
    moved.scatter_add_(1, steps % size, torch.where(steps < size, 1.0, -1.0).to(moved))
    return moved.clamp(0, 255).reshape(-1, *x.shape) / 255


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ways(x: Tensor, sizes: tuple[int, ...] = SIZES) -> Iterator[tuple[str, Tensor, int, int]]:
    """Every way to ask for one picture [C, H, W]: in words, a batch, where the picture stands in it, and the threads.

    Its neighbours are itself, and mirrored and darker versions.
    """
    others = torch.stack([x.flip(2), x * 0.5, 1 - x])
    for size in sizes:
        for place in sorted({0, size // 2, size - 1} if size < 8 else {size // 2}):
            batch = others[torch.arange(size) % len(others)].clone()
            batch[place] = x
            yield f"{size}, at {place}", batch, place, 1
    pair = x.repeat(2, 1, 1, 1)
    yield "2 alike, at 1", pair, 1, 1
    yield "1, two threads", x[None], 0, 2
    yield "2, two threads", pair, 0, 2
    yield "2, channels last", pair.contiguous(memory_format=torch.channels_last), 0, 1
    yield "1, channels last", x[None].contiguous(memory_format=torch.channels_last), 0, 1


def asked(
    defense: PatchCleanser, x: Tensor, threat: Threat, sizes: tuple[int, ...] = SIZES, precisions: tuple[str, ...] = PRECISIONS
) -> dict[str, tuple[int, bool]]:
    """Answer and verdict for one float32 picture [C, H, W] in every way, in words; ``predict`` is asked too."""
    found: dict[str, tuple[int, bool]] = {}
    before = defense.prediction_dtype
    try:
        for defense.prediction_dtype in precisions:
            for way, batch, place, count in ways(x, sizes):
                with threads(count):
                    certificate = defense.certify(batch, threat)
                    verdict = bool(certificate.certified[place])
                    found[f"{defense.prediction_dtype}, {way}"] = (int(certificate.prediction[place]), verdict)
                    found[f"{defense.prediction_dtype}, {way}, predict"] = (int(defense.predict(batch)[place]), verdict)
    finally:
        defense.prediction_dtype = before
    return found


def quick_look(
    defense: PatchCleanser,
    x: Tensor,
    first: int,
    second: int,
    sizes: tuple[int, ...] = SIZES,
    precisions: tuple[str, ...] = PRECISIONS,
) -> dict[str, tuple[int, bool]]:
    """Label of one pair of masks, and whether it is sure, in every way: what :func:`asked` rests on, for few passes."""
    found: dict[str, tuple[int, bool]] = {}
    before = defense.prediction_dtype
    try:
        for defense.prediction_dtype in precisions:
            for way, batch, place, count in ways(x, sizes):
                views: Any = defense.views()
                tolerance = getattr(views, "tolerance", 2.0**-40)
                n = len(batch)
                with threads(count):
                    told = views.ask(batch, torch.arange(n), torch.full((n,), first), torch.full((n,), second))
                found[f"{defense.prediction_dtype}, {way}"] = (int(told.label[place]), bool(told.logit_margin[place] > tolerance))
    finally:
        defense.prediction_dtype = before
    return found


def contradiction(picture: Tensor, found: dict[str, tuple[int, bool]]) -> Find | None:
    """Two answers, or two verdicts; of each kind one way is kept."""
    kinds: dict[tuple[int, bool], str] = {}
    for way, told in found.items():
        kinds.setdefault(told, way)
    return Find(picture, {way: told for told, way in kinds.items()}) if len(kinds) > 1 else None


def search(
    defense: PatchCleanser,
    images: Tensor,
    trials: int,
    *,
    seed: int = 0,
    among: int | None = None,
    sizes: tuple[int, ...] = SIZES,
    precisions: tuple[str, ...] = PRECISIONS,
    keep: int = 8,
    pairs: int = 256,
) -> list[Find]:
    """Pictures whose pass behind a random pair is treated in more than one way.

    In each of ``trials``, ``keep`` pictures are aimed from one of the images [B, C, H, W].
    ``among`` as in :func:`aimed`, by default all classes and two in turn.
    """
    generator, finds = torch.Generator().manual_seed(seed), []
    for trial in range(trials):
        first, second = torch.randint(len(defense.masks), (2,), generator=generator).tolist()
        occluded = defense.masks[first] | defense.masks[second]
        many = among or (len(defense.classes), 2)[trial % 2]
        for picture in aimed(defense, images[trial % len(images)], occluded, many, keep=keep, pairs=pairs):
            for some in dict.fromkeys((sizes[:2], sizes)):  # most of what is to be found is found in small batches
                find = contradiction(picture, quick_look(defense, picture, first, second, some, precisions))
                if find:
                    finds.append(find)
                    break
    return finds
