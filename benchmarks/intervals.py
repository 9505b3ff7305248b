"""Certification and training of MNIST 5x5 against the straightforward way: 576 boxed copies of each image.

    python benchmarks/intervals.py [--model NAME|PATH] [--images N] [--threads N]

Prints ratios measured in this one run. Both sides use the same network, float32 and the same number of threads.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli import data
from patchcert_cli.catalog import resolve
from patchcert_cli.certifiers.bounds import intervals
from patchcert_cli.certifiers.bounds.first_layer import location_masks
from patchcert_cli.certifiers.bounds.rules import propagate
from patchcert_cli.defenses import TrainingStep
from patchcert_cli.defenses.ibp.options import IntervalOptions
from patchcert_cli.evaluation.task import BATCH_SIZE
from patchcert_cli.layers.supported_layers import layers_of
from patchcert_cli.threats import Patch

PATCH = Patch(5, 5)


def dense_margins(network: nn.Module, x: Tensor, target: Tensor, locations: int | None = None) -> Tensor:
    """Margin lower bounds [B, K] from one boxed copy of each image per location, pushed through every layer."""
    layers = layers_of(network)
    final = layers[-1]
    assert isinstance(final, nn.Linear)
    every = PATCH.count(x.shape[2], x.shape[3])
    moved = location_masks(PATCH, x)[: locations or every, None, None]
    boxed = x - moved * x
    lower, upper = propagate(layers[:-1], (boxed.flatten(0, 1), (boxed + moved).flatten(0, 1)))
    lower, upper = lower.reshape(-1, len(x), lower.shape[1]), upper.reshape(-1, len(x), upper.shape[1])
    contrast = final.weight[target][:, None] - final.weight  # [B, K, N]
    margins = torch.einsum("bkn,abn->abk", contrast.clamp(min=0), lower) + torch.einsum(
        "bkn,abn->abk", contrast.clamp(max=0), upper
    )
    return margins.amin(dim=0) + final.bias[target][:, None] - final.bias


def seconds(action: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def certification(network: nn.Module, images: data.Images, count: int) -> None:
    x = data.to_float(images.pixels[:count])
    with torch.no_grad():
        target = network(x).argmax(dim=1)
        batches = [slice(i, i + BATCH_SIZE) for i in range(0, count, BATCH_SIZE)]

        def quick() -> Tensor:
            return torch.cat([intervals.lower_margins(network, x[rows], target[rows], PATCH).values for rows in batches])

        fast, margins = seconds(quick), quick()

        dense_count = min(count, 200)

        def dense(small: int, images: int = dense_count) -> Tensor:
            parts = range(0, images, small)
            return torch.cat([dense_margins(network, x[i : i + small], target[i : i + small]) for i in parts])

        small = min((1, 2, 4, 8, 16), key=lambda size: seconds(lambda: dense(size, 16), 2))  # the dense way at its best
        slow = seconds(lambda: dense(small), repeats=2) * count / dense_count
        reference = dense(small)
    others = torch.arange(margins.shape[1]) != target[:dense_count, None]
    verdicts = ((margins[:dense_count] > 0) | ~others).all(1) == ((reference > 0) | ~others).all(1)
    print(
        f"certify {count} images, 576 locations: {fast:.3f} s; dense {slow:.1f} s (from {dense_count} images, {small} at a time)"
    )
    print(f"  ratio {slow / fast:.1f}; margins equal to {(margins[:dense_count] - reference).abs().max():.1e}; ", end="")
    print(f"verdicts equal: {int(verdicts.sum())} of {dense_count}")


def training(defense: nn.Module, images: data.Images, batch: int = 256, part: int = 16) -> None:
    x, label = data.to_float(images.pixels[:batch]), images.labels[:batch]
    network = defense.network
    assert isinstance(network, nn.Module)
    exact = IntervalOptions(natural_epochs=0, ramp_epochs=0, bounded_epochs=0)
    step = TrainingStep(PATCH, exact, 0.0, 1, torch.Generator())

    def fast() -> list[Tensor]:
        return list(torch.autograd.grad(defense.training_loss(x, label, step), list(network.parameters())))  # type: ignore[operator]

    def dense() -> list[Tensor]:
        total: list[Tensor] = []
        for i in range(0, batch, part):  # autograd through all copies of a few images at a time
            rows = slice(i, i + part)
            loss = F.cross_entropy(-dense_margins(network, x[rows], label[rows]), label[rows], reduction="sum") / batch
            grads = torch.autograd.grad(loss, list(network.parameters()))
            total = [a + b for a, b in zip(total, grads, strict=True)] if total else list(grads)
        return total

    quick, slow = seconds(fast, 5), seconds(dense, 1)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(fast(), dense(), strict=True))
    print(f"training step, {batch} images, exact worst of 576 locations: {quick:.3f} s; dense with autograd {slow:.2f} s")
    print(f"  ratio {slow / quick:.1f}; gradients equal to {error:.1e} of their largest entry")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist-ibp-p5")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    defense = resolve.load(options.model)
    images = data.load("mnist", "test")
    print(f"{options.model}, torch {torch.__version__}, {options.threads} threads, float32")
    certificate = seconds(lambda: defense.certify(data.to_float(images.pixels[:BATCH_SIZE]), PATCH))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    speed = BATCH_SIZE / certificate
    print(f"defense.certify at the default batch of {BATCH_SIZE}: {speed:.0f} images/s, peak memory {peak:.2f} GB")
    network = defense.network
    assert isinstance(network, nn.Module)
    certification(network, images, options.images)
    training(defense, images)


if __name__ == "__main__":
    main()
