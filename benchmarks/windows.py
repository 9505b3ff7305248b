"""Certification and training of a convolutional network in windows, against boxed copies of each image through every layer.

    python benchmarks/windows.py [--images N] [--dense N] [--batch N] [--locations N] [--threads N]

The network is the five-layer one of Chiang et al. (ICLR 2020) for CIFAR-10 (convolutions of 64, 64, 128, 128 and 128 channels, a
dense layer of 512) with random weights and images: neither way's time depends on them. Prints ratios measured in this one run, in
processor time, so that other programs disturb them less. Both sides use the same network, float32 and the same number of threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals, rounding
from patchcert_cli.certifiers.bounds.first_layer import location_masks
from patchcert_cli.certifiers.bounds.rules import propagate
from patchcert_cli.certifiers.bounds.windows.partition import Partition
from patchcert_cli.certifiers.bounds.windows.patch_windows import PatchWindows
from patchcert_cli.certifiers.bounds.windows.windows import Windows
from patchcert_cli.layers import precision
from patchcert_cli.layers.supported_layers import layers_of
from patchcert_cli.models import cnn
from patchcert_cli.threats import Patch

PATCH, SHAPE = Patch(5, 5), (3, 32, 32)


def five_layers() -> nn.Sequential:
    torch.manual_seed(0)
    channels, strides, half = (64, 64, 128, 128, 128), (1, 1, 2, 1, 1), (0.5,) * 3
    return cnn.build(input_shape=SHAPE, classes=10, channels=channels, strides=strides, hidden=(512,), mean=half, std=half).eval()


def margins_of(final: nn.Linear, lower: Tensor, upper: Tensor, target: Tensor) -> Tensor:
    """Margins [A, B, K] from the last layer's inputs [A, B, N]."""
    row = final.weight[target][:, None] - final.weight  # [B, K, N]
    margins = torch.einsum("bkn,abn->abk", row.clamp(min=0), lower) + torch.einsum("bkn,abn->abk", row.clamp(max=0), upper)
    return margins + final.bias[target][:, None] - final.bias


def boxed(network: nn.Module, x: Tensor, target: Tensor, location: Tensor) -> Tensor:
    """Margins [A, B, K] from one boxed copy of each image for each of some locations, through every layer."""
    layers = layers_of(network)
    moved = location_masks(PATCH, x)[location][:, None, None]
    lower = x - moved * x
    bounds = propagate(layers[:-1], (lower.flatten(0, 1), (lower + moved).flatten(0, 1)))
    lower, upper = (part.reshape(len(location), len(x), -1) for part in bounds)
    assert isinstance(layers[-1], nn.Linear)
    return margins_of(layers[-1], lower, upper, target)


def behind_first(network: nn.Module, x: Tensor, target: Tensor, location: Tensor) -> Tensor:
    """As :func:`boxed`, but only the outputs of the first convolution that see the patch are computed for each location."""
    layers = layers_of(network)
    cut = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)) + 1
    bounds = Windows(layers[:cut], x, PATCH, 1.0, clip=False).everywhere(location)
    lower, upper = (part.reshape(len(location), len(x), -1) for part in propagate(layers[cut:-1], bounds))
    assert isinstance(layers[-1], nn.Linear)
    return margins_of(layers[-1], lower, upper, target)


def seconds(action: Callable[[], object], repeats: int = 1) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        action()
        times.append(time.process_time() - began)
    return min(times)


@torch.no_grad()
def certification(network: nn.Module, images: int, dense: int) -> None:
    x = torch.rand(images, *SHAPE, generator=torch.Generator().manual_seed(1))
    target, locations = network(x).argmax(dim=1), torch.arange(PATCH.count(*SHAPE[1:]))
    few, wanted = x[:dense], target[:dense]
    partition = Partition.of(layers_of(network), x[:1])
    windows = PatchWindows(partition.path, (SHAPE[1], SHAPE[2]), PATCH, clip=True)
    rows, columns = (axis.length.amax(dim=1).tolist() for axis in windows.axes)
    print("windows of", ", ".join(f"{h}x{w} of {m}x{n}" for h, w, (m, n) in zip(rows, columns, windows.maps, strict=True)))

    def least(way: Callable[..., Tensor], copies: int, part: Tensor = locations) -> Tensor:
        parts = torch.split(part, max(1, copies // dense))
        return torch.stack([way(network, few, wanted, some).amin(dim=0) for some in parts]).amin(dim=0)

    def best(way: Callable[..., Tensor]) -> float:
        """Seconds an image, with as many copies at a time as suit this way best."""
        copies = min((8, 32, 64), key=lambda size: seconds(lambda: least(way, size, locations[:64])))
        return seconds(lambda: least(way, copies)) / dense

    times = {"one boxed copy per location": best(boxed), "whole maps after the first layer": best(behind_first)}
    reference = least(boxed, 32)
    quick = seconds(lambda: intervals.lower_margins(network, x, target, PATCH), 2) / images
    found = intervals.lower_margins(network, few, wanted, PATCH).values
    print(f"certify, {len(locations)} locations: {quick:.3f} s an image in windows ({images} images)")
    for name, slow in times.items():
        print(f"  {name}: {slow:.2f} s an image ({dense} images); ratio {slow / quick:.1f}")
    others = torch.arange(10) != wanted[:, None]
    middle = reference[others].median()  # random weights have margins on one side of zero, so they are judged by their median
    same = ((found > middle) == (reference > middle))[others]
    error = float((found - reference).abs().max() / reference.abs().max())
    print(f"  margins equal to {error:.1e} of the largest; on the same side of their median: {int(same.sum())} of {len(same)}")
    exact = precision.double(network)
    proof = seconds(lambda: rounding.prove(network, exact, x, target, PATCH)) / images
    print(f"  with rounding bounds and what float64 decides: {proof:.3f} s an image")


def training(network: nn.Module, batch: int, count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x, label = torch.rand(batch, *SHAPE, generator=generator), torch.randint(10, (batch,), generator=generator)
    chosen = torch.randint(PATCH.count(*SHAPE[1:]), (batch, count), generator=generator)
    parameters, final = list(network.parameters()), layers_of(network)[-1]
    scale = 1e-4  # random weights have margins so large that a softmax would forget all but one

    def fast() -> list[Tensor]:
        margins = intervals.smallest_margins(network, x, label, PATCH, chosen)
        return list(torch.autograd.grad(F.cross_entropy(-scale * margins, label), parameters))

    def slow(part: int) -> list[Tensor]:
        total = [torch.zeros_like(weight) for weight in parameters]
        assert isinstance(final, nn.Linear)
        for i in range(0, batch, part):  # autograd through all copies of a few images at a time
            some, rows = x[i : i + part], chosen[i : i + part]
            moved = location_masks(PATCH, x)[rows.flatten(), None]
            lower = some.repeat_interleave(count, dim=0) * (1 - moved)
            bounds = propagate(layers_of(network)[:-1], (lower, lower + moved))
            low, high = (v.reshape(len(some), count, -1).transpose(0, 1) for v in bounds)
            margins = margins_of(final, low, high, label[i : i + part]).amin(dim=0)
            loss = F.cross_entropy(-scale * margins, label[i : i + part], reduction="sum") / batch
            total = [a.add_(b) for a, b in zip(total, torch.autograd.grad(loss, parameters), strict=True)]
        return total

    part = min((1, 4, 16), key=lambda size: seconds(lambda: slow(size)) if size <= batch else float("inf"))
    quick, dense = seconds(fast, 3), seconds(lambda: slow(part), 2)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(fast(), slow(part), strict=True))
    print(
        f"training step, {batch} images, {count} random locations: {quick:.2f} s; boxed copies {dense:.2f} s ({part} images each)"
    )
    print(f"  ratio {dense / quick:.1f}; gradients equal to {error:.1e} of their largest entry")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--dense", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--locations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = five_layers()
    print(f"torch {torch.__version__}, {options.threads} threads, float32")
    certification(network, options.images, options.dense)
    training(network, options.batch, options.locations)


if __name__ == "__main__":
    main()
