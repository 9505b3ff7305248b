"""One small random defense of each family, on 1x4x4 images with 3 classes: what soundness tests are run on.

A registered defense without an example fails the tests. An outside package names its own by an entry point
``patchcert.examples``, a function without arguments under the defense's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from patchcert_cli import checkpoint, models
from patchcert_cli.certifiers.masks.mask_sets import MaskSpec
from patchcert_cli.defenses import Defense
from patchcert_cli.defenses.bagcert import BagCert
from patchcert_cli.defenses.clipped import Clip, Clipped
from patchcert_cli.defenses.ensemble import RULES, Ensemble
from patchcert_cli.defenses.hicert import HiCert
from patchcert_cli.defenses.ibp import IntervalDefense
from patchcert_cli.defenses.lgs import LocalGradientsSmoothing
from patchcert_cli.defenses.minority import Minority
from patchcert_cli.defenses.partition import Division, Partition, divided, listed
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.defenses.patchguard import PatchGuard
from patchcert_cli.defenses.roots import Roots
from patchcert_cli.defenses.smoothing import ABLATIONS, VOTES, Ablations, Smoothing, view_shape
from patchcert_cli.defenses.undefended import Undefended
from patchcert_cli.defenses.watermark import DigitalWatermarking
from patchcert_cli.threats import Patch

SHAPE, CLASSES = (1, 4, 4), ("a", "b", "c")
SCALING: dict[str, Any] = {"mean": (0.4,), "std": (0.5,)}


def tiny(name: str, seed: int = 0) -> Defense:
    """The example of defense ``name`` with random weights from ``seed``, in eval mode; global randomness is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return example(name)().eval()


def example(name: str) -> Callable[[], Defense]:
    if name in EXAMPLES:
        return EXAMPLES[name]
    found = list(metadata.entry_points(group="patchcert.examples", name=name))
    assert found, f"defense '{name}' has no example: add one to tests/examples.py"
    build: Callable[[], Defense] = found[0].load()
    return build


def _one_of(choices: tuple[Any, ...]) -> Any:
    return choices[int(torch.randint(2, ()))]


def _mlp() -> torch.nn.Sequential:
    return models.build("mlp", {"input_shape": SHAPE, "classes": 3, "hidden": (6,), **SCALING})


def _region(kernel: int) -> Any:
    plan = {"widths": (4, 6), "kernels": (kernel, 1), "dilations": (1, 1), "mixes": (0, 1)}
    return models.build("region", {"input_shape": SHAPE, "classes": 3, **SCALING, **plan})


def bagcert() -> BagCert:
    scorer = _region(2)
    defense = BagCert(scorer, input_shape=SHAPE, classes=CLASSES).eval()
    _lean(defense, factor=6)  # a class is mostly, sometimes or hardly ever voted for
    return defense


def _lean(defense: BagCert | PatchGuard, factor: float) -> None:
    """Calibrate, and move the scores of each class by a random share of their spread."""
    sample = torch.rand(64, *SHAPE)
    defense.calibrate(sample)
    with torch.no_grad():
        scores = defense.scorer(sample)
        spread, middle = scores.std(dim=(0, 2, 3)), scores.mean(dim=(0, 2, 3))
        defense.scorer.head.bias += factor * torch.randn(3) * spread - middle


def clipped() -> Clipped:
    clip = _one_of(("tanh", "linear"))
    scorer = _region(1)
    defense = Clipped(scorer, Clip(clip=clip, slope=2.0), input_shape=SHAPE, classes=CLASSES).eval()
    sample = torch.rand(64, *SHAPE)
    defense.calibrate(sample)
    with torch.no_grad():  # scores reach from one end of the interval to the other
        scores = scorer(sample)
        grow = 0.8 / scores.std(dim=(0, 2, 3))
        scorer.head.weight.mul_(grow[:, None, None, None])
        scorer.head.bias.copy_(grow * (scorer.head.bias - scores.mean(dim=(0, 2, 3))) + 0.4 * torch.randn(3))
    return defense


def hicert() -> HiCert:
    network = _mlp()
    return HiCert(network, **_masks(), threshold=_one_of((0.0, 0.4))).eval()


def ensemble() -> Ensemble:
    """A majority of three, a cross-check of two, or the sum of two."""
    rule = RULES[int(torch.randint(len(RULES), ()))]
    members = {"majority": (_region_votes, ibp, smoothing), "cross": (_region_votes, ibp), "sum": (_region_votes, smoothing)}
    return Ensemble([make() for make in members[rule]], rule)


def _region_votes() -> BagCert:
    """Cells of one pixel."""
    defense = BagCert(_region(1), input_shape=SHAPE, classes=CLASSES).eval()
    _lean(defense, factor=2)
    return defense


def ibp() -> IntervalDefense:
    return IntervalDefense(_mlp(), input_shape=SHAPE, classes=CLASSES)


def lgs() -> LocalGradientsSmoothing:
    return LocalGradientsSmoothing(_mlp(), input_shape=SHAPE, classes=CLASSES)


def undefended() -> Undefended:
    return Undefended(_mlp(), input_shape=SHAPE, classes=CLASSES)


def watermark() -> DigitalWatermarking:
    return DigitalWatermarking(_mlp(), input_shape=SHAPE, classes=CLASSES)


def _masks() -> dict[str, Any]:
    return {"input_shape": SHAPE, "classes": CLASSES, "masks": MaskSpec(("patch:2x3",), stride=1), "fill": (0.4,)}


def minority() -> Minority:
    network = _mlp()
    return Minority(network, **_masks(), threshold=_one_of((0.0, 0.4))).eval()


def partition() -> Partition:
    how = Division(spacing=_one_of((3, 4)), vote=_one_of(("top-one", "independent")))
    size = listed(divided(SHAPE, how), how.spacing**2).shape[1]
    options = {"width": 6, "blocks": (4,), **SCALING, "input_shape": (size, how.spacing, how.spacing), "classes": 3}
    network: Any = models.build("setwise", options)
    defense, x = Partition(network, how, input_shape=SHAPE, classes=CLASSES).eval(), torch.rand(64, *SHAPE)
    with torch.no_grad():  # scores around 0, so that sets differ in what they vote for
        network.head.weight.mul_(20)
        network.head.bias.sub_(network(defense.values(x)).mean(dim=(0, 2, 3)) - 0.5 * torch.randn(3))
    defense.calibrate(x)
    return defense


def patchcleanser() -> PatchCleanser:
    return PatchCleanser(_mlp(), **_masks())


def patchguard() -> PatchGuard:
    scorer = _region(1)
    share = _one_of((0.0, 0.2))
    defense = PatchGuard(scorer, input_shape=SHAPE, classes=CLASSES, covers=[Patch(2, 2)], share=share).eval()
    _lean(defense, factor=4)  # a class has evidence in most, some or hardly any cells
    return defense


def roots() -> Roots:
    defense = Roots(_region(1), input_shape=SHAPE, classes=CLASSES, regions=2).eval()  # larger cells: too many in reach
    _lean(defense, factor=6)
    return defense


def smoothing() -> Smoothing:
    ablation, vote = _one_of(ABLATIONS), _one_of(VOTES)  # a band, of columns or of rows
    how = Ablations(ablation=ablation, band=1, vote=vote, threshold=0.4)
    options = {"widths": (4,), "blocks": (1,), "strides": (1,), **SCALING}
    network: Any = models.build("resnet", {**options, "input_shape": view_shape(SHAPE, how), "classes": 3})
    defense, x = Smoothing(network, how, input_shape=SHAPE, classes=CLASSES).eval(), torch.rand(64, *SHAPE)
    with torch.no_grad():  # logits around 0, so that cells differ in what they vote for
        network.head.weight.mul_(20)
        network.head.bias.sub_(network(defense.drawn(x, torch.Generator().manual_seed(0))).mean(dim=0))
    defense.calibrate(x)
    return defense


EXAMPLES: dict[str, Callable[[], Defense]] = {
    "bagcert": bagcert,
    "clipped": clipped,
    "hicert": hicert,
    "ensemble": ensemble,
    "ibp": ibp,
    "lgs": lgs,
    "minority": minority,
    "partition": partition,
    "patchcleanser": patchcleanser,
    "patchguard": patchguard,
    "roots": roots,
    "smoothing": smoothing,
    "undefended": undefended,
    "watermark": watermark,
}


def section(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``deployed`` of a configuration of any format, by default of defense ``kind``."""
    deployed: dict[str, Any] = checkpoint.upgraded({"defense": kind, **config}, Path("config.json"))["deployed"]
    return deployed


def file_of(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` that deploys the same."""
    return checkpoint.upgraded({"defense": kind, **config}, Path("config.json"))
