"""What a certificate costs and what it proves, mask set by mask set: certified accuracy, passes and images a second.

    python benchmarks/trade.py [--images N] [--out FILE] [--only TEXT] [--data-dir PATH]

Appends a row for each setting below to a JSON file, and skips settings that it has; ``docs/make_trade.py`` draws them. Speeds are
of the processor's time on one thread, the self-test not counted. The images are the N test images of CIFAR-10 that ``certify
--limit N`` takes, the same for every row of 5x5 patches.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import data
from patchcert_cli.catalog import resolve
from patchcert_cli.certificate import Tally
from patchcert_cli.certifiers.masks.mask_sets import PER_AXIS, MaskSpec
from patchcert_cli.data.images import Images, to_float
from patchcert_cli.defenses import Defense
from patchcert_cli.defenses.ensemble import Ensemble
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.defenses.smoothing import Smoothing
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, Threat, parse_threat

MASKED, FIVE = "cifar-masked-cnn", Patch(5, 5)
OTHERS = ("cifar-bagcert-rf7", "cifar-smoothing-column", "cifar-ibp-p5", "cifar-ibp-p2")  # timed with the threat of their card
TEST_IMAGES, KEPT = 10_000, 100  # of the first, how many the file has, in the order of samples
SQUARES, COLUMNS, ROWS = (2, 3, 4, 5, 6), (4, 7, 14, 28), (4, 7, 14)  # masks along an axis
THREE = ((14, "column"), (14, "row"), (4, "square"))  # members of a majority
SIZES = (1, 2, 3, 4, 6, 7, 8, 9, 10)  # of patches besides 5, with the default number of masks


def settings(strips: str) -> list[tuple[str, MaskSpec | None, Threat]]:
    """Model, masks and threat of every row; ``strips`` is a model trained with strips, if there is one."""
    found: list[tuple[str, MaskSpec | None, Threat]] = []
    for name in dict.fromkeys(filter(None, (MASKED, strips))):
        found += [(name, MaskSpec((FIVE,), per_axis=count, shape="column"), FIVE) for count in COLUMNS]
        found += [(name, MaskSpec((FIVE,), per_axis=count, shape="row"), FIVE) for count in ROWS]
    found += [(MASKED, MaskSpec((FIVE,), per_axis=count), FIVE) for count in SQUARES]
    found += [(name, None, parse_threat(resolve_threat(name))) for name in (*OTHERS, MASKED)]
    return found + [(MASKED, MaskSpec((Patch(side, side),), per_axis=PER_AXIS), Patch(side, side)) for side in SIZES]


def resolve_threat(name: str) -> str:
    return str(files.read_json(resolve.resolve(name).folder / files.CONFIG)["threat"])


def with_masks(name: str, plan: MaskSpec | None) -> Defense:
    own = resolve.load(name)
    if plan is None:
        return own
    assert isinstance(own, PatchCleanser)
    return PatchCleanser(
        own.network,
        input_shape=own.input_shape,
        classes=own.classes,
        masks=plan,
        fill=own.fill.flatten().tolist(),
        prediction_dtype=own.prediction_dtype,
    ).eval()


def row(name: str, plan: MaskSpec | None, threat: Threat, images: Images) -> dict[str, Any]:
    """One setting, measured: counts, mean passes, images a second, and which images it certifies rightly, as 0 and 1."""
    defense, x = with_masks(name, plan), to_float(images.pixels)
    defense.certify(x[:1], threat)
    began = time.process_time()
    certificate = defense.certify(x, threat)
    spent = time.process_time() - began
    tally = Tally.of(images.labels, certificate.prediction, certificate.certified)
    right = certificate.certified & (certificate.prediction == images.labels)
    masks = {"masks": defense.plan.to_dict(), "sizes": defense.set.sizes} if isinstance(defense, PatchCleanser) else {}
    each = float(certificate.passes.double().mean()) if certificate.passes is not None else _views(defense)
    return {
        "model": name,
        "model_sha256": resolve.resolve(name).sha256,
        "threat": str(threat),
        "own": plan is None,
        **masks,
        "pairs": defense.set.passes if isinstance(defense, PatchCleanser) else None,
        "images": tally.images,
        "clean": tally.clean,
        "certified": tally.certified,
        "passes": each,
        "images_per_second": tally.images / spent,
        "arithmetic": str(certificate.arithmetic),
        "verdicts": "".join("01"[int(one)] for one in right),
    }


def majority(images: Images) -> dict[str, Any]:
    """The majority of three mask sets around one network, certified location by location."""
    plans = [MaskSpec((FIVE,), per_axis=count, shape=shape) for count, shape in THREE]
    certificate = Ensemble([with_masks(MASKED, plan) for plan in plans]).eval().certify(to_float(images.pixels), FIVE)
    tally = Tally.of(images.labels, certificate.prediction, certificate.certified)
    counts = {"images": tally.images, "clean": tally.clean, "certified": tally.certified}
    return {"model": MASKED, "masks": [plan.to_dict() for plan in plans], **counts}


def order() -> list[int]:
    """The test images in the order in which samples grow: ``--images N`` takes the first N of them."""
    return torch.randperm(TEST_IMAGES, generator=torch.Generator().manual_seed(0))[:KEPT].tolist()


def _views(defense: Defense) -> int:
    """How often an image is given to the network: once for each band of smoothing, else once."""
    return defense.cells if isinstance(defense, Smoothing) else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "trade.json")
    parser.add_argument("--only", default="", help="settings whose text contains this")
    parser.add_argument("--strips", default="", help="a model trained with strips")
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = data.open_dataset("cifar10", data_dir=options.data_dir).load("test").limit(options.images, 0)
    before = files.read_json(options.out) if options.out.exists() else {}
    rows: list[dict[str, Any]] = before.get("rows", [])
    known = {"majority": before.get("majority") or majority(images)}
    for name, plan, threat in settings(options.strips):
        key = {"model": name, "threat": str(threat), "own": plan is None} | ({"masks": plan.to_dict()} if plan else {})
        if options.only in str(key) and not any(key.items() <= one.items() for one in rows):
            rows.append(row(name, plan, threat, images))
            files.write_json(options.out, {"sample": order(), **known, "rows": rows})
            print({name: value for name, value in rows[-1].items() if name != "verdicts"}, flush=True)


if __name__ == "__main__":
    main()
