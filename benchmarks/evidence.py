"""Votes: each exact way to compute scores, what the proof costs beside it and by itself, and smoothing beside another toolbox.

    python benchmarks/evidence.py [--bagcert NAME|PATH] [--smoothing NAME|PATH] [--images N] [--threads N] [--backends]

Prints ratios measured in this one run. If the Adversarial Robustness Toolbox is installed (``pip install
adversarial-robustness-toolbox``), its derandomized smoothing certifies the same images with the same weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from patchcert_cli import data, defenses
from patchcert_cli.catalog import resolve
from patchcert_cli.certifiers.cells import additive
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.defenses import Claim, TrainingStep
from patchcert_cli.defenses.bagcert import BagCert
from patchcert_cli.defenses.smoothing import Smoothing, SmoothingOptions
from patchcert_cli.layers import fixed_point, integers, precision
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch
from patchcert_cli.training.recipe import Recipe

PATCH = Patch(5, 5)


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The best of some runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def overhead(defense: BagCert, x: Tensor) -> None:
    sizes = [Claim(Patch(side, side)) for side in range(1, 11)]
    forward = seconds(lambda: defense.scores(x))
    one, ten = seconds(lambda: defense.certify_claims(x, sizes[4:5])), seconds(lambda: defense.certify_claims(x, sizes))
    print(f"bagcert, {len(x)} images: forward pass {forward:.3f} s = {len(x) / forward:.0f} images/s")
    print(
        f"  certify 5x5 at all 784 locations: +{100 * (one / forward - 1):.1f} %; sizes 1..10: +{100 * (ten / forward - 1):.1f} %"
    )


def backends(name: str, defense: BagCert | Smoothing, x: Tensor, rounds: int = 5) -> None:
    """The deployed network by each of its exact ways, and as it was computed before there were any, in turns."""
    ways: dict[str, Callable[[], Tensor]] = {"layer by layer, in large pieces": lambda: layer_by_layer(defense, x)}
    for backend in integers.BACKENDS[:2]:
        ways[backend] = partial(_only, backend, defense, x)
    defense.scores(x)
    ways["as deployed"] = lambda: defense.scores(x)
    spent: dict[str, list[float]] = {way: [] for way in ways}
    wanted = ways["layer by layer, in large pieces"]()
    for _ in range(rounds):
        for way, work in ways.items():
            began = time.process_time()
            same = torch.equal(work(), wanted)
            spent[way].append(time.process_time() - began)
            if not same:
                raise SystemExit(f"{name}: {way} has other scores")
    first = min(spent["layer by layer, in large pieces"])
    print(f"{name}, scores of {len(x)} images, equal to the bit; convolutions: {integers.serving()}")
    for way, times in spent.items():
        middle = sorted(times)[len(times) // 2]
        print(f"  {way}: {1000 * min(times) / len(x):.2f} ms of CPU an image (median {1000 * middle / len(x):.2f}),", end=" ")
        print(f"ratio {first / min(times):.2f}")


def _only(backend: str, defense: BagCert | Smoothing, x: Tensor) -> Tensor:
    with integers.only(backend):
        return defense.scores(x)


def layer_by_layer(defense: BagCert | Smoothing, x: Tensor) -> Tensor:
    """Scores by the definition of the frozen network, float32 values on their grids, in pieces that no cache holds."""
    network, steps = defense.deployed(), fixed_point.to_steps(x)
    if isinstance(defense, Smoothing):
        pieces = defense._pieces(x, max(1, (1 << 22) // defense.network.most))
        given = (defense.views(steps, image, cell, full=255.0) for image, cell in pieces)
    else:
        given = (part for part in torch.split(steps, max(1, (1 << 25) // defense.activations)))
    with torch.no_grad(), precision.exact_arithmetic():
        found = torch.cat([network(piece.contiguous(memory_format=torch.channels_last)) for piece in given])
    if isinstance(defense, BagCert):
        return found
    shape = (len(x), len(defense.rows), len(defense.columns), len(defense.classes))
    return found.reshape(shape).permute(0, 3, 1, 2)


def proof() -> None:
    generator = torch.Generator().manual_seed(0)
    small = Votes(torch.rand(8192, 10, 26, 26, generator=generator) < 0.2)
    axis = Axis.sliding(32, 5, kernel=7)
    quick = seconds(lambda: additive.prove(small, CellCoverage(axis, axis)))
    cells = len(small.scores) * 10 * 784 / quick
    print(f"proof on stored votes, 26x26 cells, 10 classes, 5x5: {len(small.scores) / quick:.0f} images/s")
    wide = Votes(torch.rand(1, 1000, 218, 218, generator=generator) < 0.01)
    axis = Axis.sliding(224, 32, kernel=7)
    slow = seconds(lambda: additive.prove(wide, CellCoverage(axis, axis)), repeats=1)
    many = 1000 * axis_count(224, 32) ** 2 / slow
    print(f"  locations times classes a second: {cells:.2e}; on a 218x218 map with 1,000 classes, 32x32: {many:.2e}")
    print(f"  ratio {many / cells:.2f} (above 1 means that the large map is cheaper per location)")


def axis_count(length: int, side: int) -> int:
    return length - side + 1


def smoothing(defense: Smoothing, recipe: dict[str, Any], x: Tensor) -> None:
    quick = seconds(lambda: defense.certify(x, PATCH), 2)
    print(f"column smoothing, {len(x)} images, {defense.cells} bands each")
    print(f"  given the band alone, as deployed: {len(x) / quick:.1f} images/s")
    network = {**recipe["network_options"], "bits": 6}  # random weights need them more evenly spread than trained ones
    changed = {**recipe, "network_options": network, "options": {**recipe["options"], "view": "full"}}
    frames = cast(Smoothing, defenses.build_trainable(Recipe.from_dict(changed).config()))  # the same layers
    for layer in frames.train().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    step = TrainingStep(PATCH, SmoothingOptions(), 0.0, 1, torch.Generator())
    frames.training_loss(x, torch.zeros(len(x), dtype=torch.int64), step)
    frames.calibrate(x[:8])
    whole = seconds(lambda: frames.certify(x, PATCH), 1)
    print(f"  given whole frames, as published: {len(x) / whole:.1f} images/s")
    if importlib.util.find_spec("art") is None:
        print("  the Adversarial Robustness Toolbox is not installed: not compared")
        return
    slow = seconds(lambda: toolbox(frames.network, x), 1)
    print(f"  the toolbox, the same layers on whole frames: {len(x) / slow:.1f} images/s;", end=" ")
    print(f"ratio {slow / whole:.1f} on whole frames, {slow / quick:.1f} as deployed")


def toolbox(network: nn.Module, x: Tensor) -> Any:
    """Predict and certify with the Adversarial Robustness Toolbox, column ablations of 4 pixels."""
    from art.estimators.certification.derandomized_smoothing import (  # type: ignore[import-not-found]
        PyTorchDeRandomizedSmoothing,
    )

    smoothed = PyTorchDeRandomizedSmoothing(
        model=network,
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=10,
        ablation_size=4,
        ablation_type="column",
        algorithm="levine2020",
        threshold=0.2,
        logits=True,
        clip_values=(0, 1),
        device_type="cpu",
        verbose=False,
    )
    counts = smoothed.predict(x.numpy(), batch_size=128)
    label = torch.zeros(len(x), dtype=torch.int64)  # the toolbox asks for it; what it costs does not depend on it
    return smoothed.ablator.certify(torch.as_tensor(counts), label=label, size_to_certify=PATCH.width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bagcert", default="cifar-bagcert-rf7")
    parser.add_argument("--smoothing", default="cifar-smoothing-column")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--backends", action="store_true", help="only compare the ways to compute the scores")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads")
    x = data.to_float(data.load("cifar10", "test").pixels[: options.images])
    bagcert, bands = cast(BagCert, resolve.load(options.bagcert)), cast(Smoothing, resolve.load(options.smoothing))
    few = x[: max(options.images // 4, 1)]
    backends(options.bagcert, bagcert, x)
    backends(options.smoothing, bands, few)
    if options.backends:
        return
    overhead(bagcert, x)
    proof()
    found = resolve.resolve(options.smoothing)
    recipe = files.read_json(found.folder / files.CONFIG)["recipe"]
    smoothing(bands, recipe, few)


if __name__ == "__main__":
    main()
