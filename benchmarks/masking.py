"""Double masking: what part of all pairs of masks a proof asks for, and how fast it is beside loops over all of them.

    python benchmarks/masking.py [--model NAME|PATH] [--images N] [--loop N] [--threads N]

Prints ratios measured in this one run. Two thirds of the images that are counted are certified, whatever the model: as many
as there are of the one kind, and half as many of the other. The masks are the model's own, and masks at least as large two pixels
apart, so that several hide every location. Speeds are of the processor's time. The loops evaluate every pair of the
model's own masks for every image in float32, and know no order and no end.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from patchcert_cli import checkpoint, data, defenses
from patchcert_cli.catalog import resolve
from patchcert_cli.certificate import Certificate
from patchcert_cli.certifiers.masks import mask_influence
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.layers import integers
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, Threat, parse_threat

APART = 2  # pixels between masks that overlap


def opened(name: str) -> PatchCleanser:
    defense = resolve.load(name)
    assert isinstance(defense, PatchCleanser)
    return defense


def with_masks(defense: PatchCleanser, plan: MaskSpec, labels: str) -> PatchCleanser:
    fill = defense.fill.flatten().tolist()
    return PatchCleanser(
        defense.network, input_shape=defense.input_shape, classes=defense.classes, masks=plan, fill=fill, prediction_dtype=labels
    ).eval()


def overlapping(defense: PatchCleanser, patch: Patch) -> MaskSpec:
    """Masks as large as the model's own, two pixels apart, and large enough for several to hide every location."""
    wider = defense.set.boxes[0][0][2] - (patch.height + APART - 1)
    return MaskSpec((patch,), stride=APART, wider=max(wider, APART))


def two_thirds(certificate: Certificate) -> Tensor:
    """Images of which two thirds are certified, as many as there are: int64 [n]."""
    sure, open_ = certificate.certified.nonzero()[:, 0], (~certificate.certified).nonzero()[:, 0]
    part = min(len(sure) // 2, len(open_))
    return torch.cat([sure[: 2 * part], open_[:part]])


def passes(defense: PatchCleanser, x: Tensor, threat: Threat, what: str) -> None:
    certificate = defense.certify(x, threat)
    assert certificate.passes is not None
    chosen, each, masks = two_thirds(certificate), certificate.passes.double(), len(defense.set)
    sure = certificate.certified
    print(f"{what}: {masks} masks, {defense.set.passes} pairs; {int(sure.sum())} of {len(x)} certified")
    if not len(chosen):
        print("  all images or none are certified: nothing to count")
        return
    mean, whole = float(each[chosen].mean()), defense.set.passes
    print(f"  passes an image: certified {float(each[sure].mean()):.0f}, others {float(each[~sure].mean()):.0f}")
    print(
        f"  of {len(chosen)} images, two thirds certified: {mean:.0f} passes an image, {mean / whole:.1%} of all pairs"
        f" ({mean / masks**2:.1%} if (i, j) and (j, i) are two)"
    )


@torch.no_grad()
def loop(defense: PatchCleanser, x: Tensor, *, at_once: bool) -> float:
    """Images a second of evaluating every pair, one by one, or all pairs of an image at once."""
    first, second = torch.triu_indices(len(defense.set), len(defense.set))
    occluded = defense.masks[first] | defense.masks[second]
    began = time.process_time()
    for image in x:
        for some in torch.split(occluded, len(occluded) if at_once else 1):
            defense.behind(image.expand(len(some), -1, -1, -1), some).argmax(dim=1)
    return len(x) / (time.process_time() - began)


def in_floats(name: str) -> PatchCleanser:
    """The model's weights in a network that computes in floating point."""
    path = resolve.resolve(name).folder / files.CONFIG
    deployed = checkpoint.upgraded(files.read_json(path), path)["deployed"]
    deployed["network"]["options"]["bits"] = 0
    made = defenses.build(deployed)
    missing = made.load_state_dict(opened(name).state_dict(), strict=False)
    assert isinstance(made, PatchCleanser) and not missing.missing_keys
    return made.eval()


def rate(defense: PatchCleanser, x: Tensor, threat: Threat, what: str) -> float:
    """Images a second of the processor's time, self-test and tests of backends not counted."""
    defense.certify(x[:1], threat)
    began = time.process_time()
    certificate = defense.certify(x, threat)
    spent = time.process_time() - began
    assert certificate.passes is not None
    each = float(certificate.passes.double().sum())
    sure = int(certificate.certified.sum())
    print(f"  {what}: {len(x) / spent:.3f} images/s, {1e3 * spent / each:.2f} ms a pass, {sure} certified")
    return each / spent


def speed(name: str, defense: PatchCleanser, x: Tensor, threat: Threat, few: int) -> None:
    """Passes a second as deployed, and what they would be without each thing that makes them fast."""
    chosen = x[two_thirds(defense.certify(x, threat))]
    print(f"certify {len(chosen)} images, two thirds certified; without what makes it fast {min(few, len(chosen))}:")
    mine, slow = rate(defense, chosen, threat, "as deployed"), chosen[-few:]
    others = {}
    if defense.deployed is not None:
        with integers.only("float32"):
            others["float32 convolutions"] = rate(opened(name), slow, threat, "whole numbers in float32 convolutions")
        shared, mask_influence.WORTH = mask_influence.WORTH, 0.0
        others["every pass on its own"] = rate(opened(name), slow, threat, "every pass on its own")
        mask_influence.WORTH = shared
        others["floating point"] = rate(in_floats(name), slow, threat, "floating point, labels in float32")
    one, all_ = loop(in_floats(name), slow[:1], at_once=False), loop(in_floats(name), slow[:1], at_once=True)
    print(f"loop over pairs in float32, one masked image at a time: {one:.3f} images/s; all pairs in one batch: {all_:.3f}")
    others |= {"one by one": one * defense.set.passes, "all pairs in one batch": all_ * defense.set.passes}
    print("ratios of passes a second: " + ", ".join(f"{mine / other:.1f} ({what})" for what, other in others.items()))


def half(name: str, count: int, start: int) -> Certificate:
    torch.set_num_threads(1)
    defense = opened(name)
    return defense.certify(images(name, count)[start::2], Patch(5, 5))


def images(name: str, count: int) -> Tensor:
    dataset = next(one for one in data.DATASETS.values() if one.shape == opened(name).input_shape)
    return data.to_float(data.load(dataset.name, "test").pixels[:count])


def two_processes(name: str, count: int) -> None:
    alone = opened(name).certify(images(name, count), Patch(5, 5))
    with ProcessPoolExecutor(2) as pool:
        parts = list(pool.map(half, [name] * 2, [count] * 2, range(2)))
    same = {
        field: all(torch.equal(getattr(alone, field)[start::2], getattr(part, field)) for start, part in enumerate(parts))
        for field in ("prediction", "certified", "worst", "runner_up")
    }
    print(f"two processes, half of {count} images each: " + ", ".join(f"{name} equal: {ok}" for name, ok in same.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mnist-masked-cnn")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--loop", type=int, default=3, help="images for what is slow")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    defense, threat = opened(options.model), parse_threat("patch:5x5")
    assert isinstance(threat, Patch)
    x = images(options.model, options.images)
    print(f"{options.model}, {threat}, torch {torch.__version__}, {options.threads} threads, {len(x)} images")
    passes(defense, x, threat, "the model's masks")
    passes(with_masks(defense, overlapping(defense, threat), defense.prediction_dtype), x, threat, "masks that overlap")
    speed(options.model, defense, x, threat, options.loop)
    two_processes(options.model, min(options.images, 40))


if __name__ == "__main__":
    main()
