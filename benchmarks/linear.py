"""Linear bounds against interval bounds: what they cost, and how many images they certify.

    python benchmarks/linear.py [--model NAME|PATH] [--threat THREAT] [--images N] [--threads N]

Prints ratios measured in this one run, on one network and one number of threads: interval bounds as certification computes them
(float32), one linear pass for all locations and classes of each image, linear passes for tiles of locations and for each location
alone (on a few images), and what certification does: linear bounds only for images that interval bounds leave undecided.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from patchcert_cli import data
from patchcert_cli.catalog import resolve
from patchcert_cli.certifiers.bounds import intervals, rounding
from patchcert_cli.certifiers.bounds.linear import linear, refine
from patchcert_cli.evaluation.task import BATCH_SIZE
from patchcert_cli.layers import precision
from patchcert_cli.threats import Threat, parse_threat

FEW = 20  # images for the passes that certification never makes


def seconds(action: Callable[[], object], repeats: int = 3) -> float:
    """The shortest of a few runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times)


def passes(network: nn.Module, exact: nn.Module, x: Tensor, target: Tensor, threat: Threat) -> None:
    """Cost per image of each kind of bound, of every location and every class."""
    count = len(x)
    plain = seconds(lambda: intervals.lower_margins(network, x, target, threat)) / count
    print(f"interval bounds of all locations and classes: {1e3 * plain:.2f} ms an image, 1.0")
    wide, height, width = x.double(), x.shape[2], x.shape[3]
    resolved = intervals.resolve(threat, height, width, x.shape[1])
    whole = linear.Engine(exact, wide, target, resolved)
    few = linear.Engine(exact, wide[:FEW], target[:FEW], resolved)
    sides = ((0, "all locations", whole), (4, "tiles of 4x4 locations", few), (1, "each location alone", few))
    for side, what, engine in sides if whole.source.locations > 1 else sides[:1]:
        each = seconds(lambda e=engine, s=side: linear.table(e, s), 2 if side == 0 else 1) / len(engine.x)  # type: ignore[misc]
        table = linear.table(engine, side)[: len(few.x)]
        better = share(table, few.intervals(torch.arange(len(few.x))))
        print(
            f"  linear, one relaxation for {what}: {1e3 * each:.2f} ms, {each / plain:.1f}; better than interval in {better:.0%}"
        )


def share(table: Tensor, plain: Tensor) -> float:
    """Share of the pairs (location, class) with a larger linear bound."""
    return float((table > plain)[torch.isfinite(plain)].double().mean())


def certification(network: nn.Module, exact: nn.Module, x: Tensor, label: Tensor, threat: Threat) -> None:
    """Certified accuracy and time with and without linear bounds, in batches as certification makes them."""
    spent, right = {"interval": 0.0, "linear": 0.0}, {"interval": 0, "linear": 0}
    for start in range(0, len(x), BATCH_SIZE):
        part, truth = x[start : start + BATCH_SIZE], label[start : start + BATCH_SIZE]
        target = exact(part.double()).argmax(dim=1)
        began = time.perf_counter()
        proof = rounding.prove(network, exact, part, target, threat)
        middle = time.perf_counter()
        better = refine.improve(exact, part, target, threat, proof)
        spent["interval"] += middle - began
        spent["linear"] += time.perf_counter() - middle
        for name, found in (("interval", proof), ("linear", better)):
            right[name] += int(((found.margin > found.tolerance) & (target == truth)).sum())
    print(f"certified and right, of {len(x)}: interval {right['interval']}, with linear bounds {right['linear']}")
    print(
        f"  {spent['interval']:.2f} s, and {spent['linear']:.2f} s more: {spent['linear'] / spent['interval']:.2f} times the cost"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist-ibp-p5")
    parser.add_argument("--threat", type=parse_threat, default="patch:5x5")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    defense = resolve.load(options.model)
    network = defense.network
    assert isinstance(network, nn.Module)
    frozen, exact = precision.frozen(network), precision.double(network)
    images = data.load("mnist", "test")
    x, label = data.to_float(images.pixels[: options.images]), images.labels[: options.images]
    print(f"{options.model}, {options.threat}, torch {torch.__version__}, {options.threads} threads")
    with torch.no_grad():
        part = x[:BATCH_SIZE]
        passes(frozen, exact, part, exact(part.double()).argmax(dim=1), options.threat)
        certification(frozen, exact, x, label, options.threat)


if __name__ == "__main__":
    main()
