"""An enemy that tries everything, and small defenses to try it on.

What the attacker may do is written out here with loops, from the words of the threat model alone; the package's own lists of
locations are not used. Shapes: B images, M changed images, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn

from patchcert_cli.defenses import Defense
from patchcert_cli.defenses.bagcert import BagCert
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.threats import Patch, Sparse
from tests.examples import section, tiny

Attack = Patch | Sparse
ALARM = -1
INTERIOR = 8  # random contents between 0 and 1 per place, besides all contents of zeros and ones


@cache
def changes(shape: tuple[int, int, int], threat: Attack) -> tuple[Tensor, Tensor]:
    """Everything the attacker may write: ``(mask, value)``, bool and float32 [M, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    masks, values = [], []
    for place in places(shape, threat):
        contents = torch.tensor(list(product((0.0, 1.0), repeat=len(place))))
        contents = torch.cat([contents, torch.rand(INTERIOR, len(place), generator=generator)])
        mask = torch.zeros(len(contents), *shape, dtype=torch.bool)
        value = torch.zeros(len(contents), *shape)
        for column, (c, row, col) in enumerate(place):
            mask[:, c, row, col] = True
            value[:, c, row, col] = contents[:, column]
        masks.append(mask)
        values.append(value)
    return torch.cat(masks), torch.cat(values)


def places(shape: tuple[int, int, int], threat: Attack) -> list[list[tuple[int, int, int]]]:
    """The sets of entries that may change together, each entry as (channel, row, column)."""
    channels, height, width = shape
    if isinstance(threat, Patch):
        found = []
        for top, left in product(range(height), range(width)):
            if top + threat.height <= height and left + threat.width <= width:
                inside = product(range(channels), range(top, top + threat.height), range(left, left + threat.width))
                found.append(list(inside))
        return found
    pixels = list(product(range(height), range(width)))
    if threat.unit == "value":
        entries = [(c, row, column) for c in range(channels) for row, column in pixels]
        return [list(chosen) for chosen in combinations(entries, threat.k)]
    return [[(c, row, column) for row, column in several for c in range(channels)] for several in combinations(pixels, threat.k)]


@dataclass
class Arena:
    """One defense, images, and (once computed) whether any change moves its answer."""

    name: str
    defense: Defense
    images: Tensor
    _truth: dict[Attack, Tensor] = field(default_factory=dict)

    def breakable(self, threat: Attack) -> Tensor:
        """Whether some allowed change moves ``defense.predict``, without an alarm if that is promised: bool [B]."""
        if isinstance(threat, Sparse) and self.images.shape[1] == 1:
            threat = Sparse(threat.k)  # with one channel a value is a pixel
        if threat not in self._truth:
            before = self.defense.predict(self.images)
            mask, value = changes(self.defense.input_shape, threat)
            moved = torch.zeros(len(self.images), dtype=torch.bool)
            for part in range(0, len(mask), 1024):
                m, v = mask[part : part + 1024], value[part : part + 1024]
                attacked = torch.where(m[:, None], v[:, None], self.images)  # [M', B, C, H, W]
                after = self.defense.predict(attacked.flatten(0, 1)).reshape(len(m), -1)
                another = after != before
                if self.defense.guarantee == "detection":
                    another &= after != ALARM
                moved |= another.any(dim=0)
            self._truth[threat] = moved
        return self._truth[threat]


@dataclass
class Score:
    """What an exhaustive check saw."""

    violations: list[str] = field(default_factory=list)
    certified: int = 0
    uncertified: int = 0
    broken: int = 0
    unsupported: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def check(arenas: list[Arena], threats: list[Attack], *, method: str | None = None, until_found: bool = False) -> Score:
    """Certify every image and look for certified answers that an allowed change moves, all of them or one."""
    score = Score()
    for arena, threat in product(arenas, threats):
        try:
            certificate = arena.defense.certify(arena.images, threat, method)
        except UnsupportedThreat:
            score.unsupported += 1
            continue
        breakable, certified = arena.breakable(threat), certificate.certified
        if not torch.equal(certificate.prediction, arena.defense.predict(arena.images)):
            score.violations.append(f"{arena.name} {threat}: the certificate is about another answer")
        if certificate.guarantee != arena.defense.guarantee:
            score.violations.append(f"{arena.name} {threat}: the certificate promises {certificate.guarantee}")
        if bool((certified & (certificate.prediction == ALARM)).any()):
            score.violations.append(f"{arena.name} {threat}: an alarm is certified")
        for index in (certified & breakable).nonzero()[:, 0].tolist():
            score.violations.append(f"{arena.name} {threat} image {index}: certified, yet a change moves the answer")
        if until_found and score.violations:
            break
        score.certified += int(certified.sum())
        score.uncertified += int((~certified).sum())
        score.broken += int((~certified & breakable).sum())
    return score


def draw_images(shape: tuple[int, int, int], count: int, seed: int) -> Tensor:
    """Half of the images have only zeros and ones."""
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))
    x[: count // 2] = x[: count // 2].round()
    return x


def _network(kind: str, shape: tuple[int, int, int]) -> nn.Sequential:
    channels, height, width = shape
    if kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 3))
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 4), nn.ReLU(), nn.Linear(4, 3))
    if kind == "deep":
        return nn.Sequential(
            *(nn.Flatten(), nn.Linear(channels * height * width, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
        )
    if kind == "cnn":
        return nn.Sequential(
            *(nn.Conv2d(channels, 2, 2, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            nn.Linear(2 * ((height + 1) // 2) * ((width + 1) // 2), 3),
        )
    if kind == "two convolutions":
        return nn.Sequential(
            *(nn.Conv2d(channels, 2, 2, 1, 1), nn.ReLU(), nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.Flatten()),
            nn.Linear(3 * (height // 2 + 1) * (width // 2 + 1), 3),
        )
    assert kind == "strided"
    return nn.Sequential(
        *(nn.Conv2d(channels, 3, 2, 2, 1), nn.ReLU(), nn.Flatten()), nn.Linear(3 * (height // 2 + 1) * (width // 2 + 1), 3)
    )


def random_defense(kind: str, shape: tuple[int, int, int], seed: int, *, whole: bool = False) -> IntervalDefense:
    """A random network; with ``whole`` numbers for weights, so that exact ties occur."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        network = _network(kind, shape)
        for name, weight in network.named_parameters():
            if whole:
                weight.copy_(torch.randint(-1, 2, weight.shape).float() + (weight.ndim == 1) * torch.randint(-1, 2, weight.shape))
            elif name.endswith("bias"):
                weight.normal_(0, 0.7)
            else:
                weight.normal_(0, 0.5)
    return IntervalDefense(network.requires_grad_(False), input_shape=shape, classes=("a", "b", "c")).eval()


@cache
def random_arenas(family: str, seeds: int = 2) -> list[Arena]:
    """Many random networks: ``dense`` or ``convolutional``, one and two channels, 3x3 and 4x4 images."""
    kinds = ("mlp", "mlp", "deep") if family == "dense" else ("cnn", "strided", "two convolutions")
    arenas = []
    for kind, shape, seed in product(kinds, ((1, 3, 3), (1, 4, 4), (2, 3, 3)), range(seeds)):
        for whole in (False, True):
            defense = random_defense(kind, shape, len(arenas), whole=whole)
            arenas.append(Arena(f"{kind} {shape} {seed} {whole}", defense, draw_images(shape, 24, len(arenas))))
    return arenas


@cache
def registered_arenas(name: str) -> list[Arena]:
    """The defense ``name`` with several random weights."""
    arenas = []
    for seed in range(10):
        defense = tiny(name, seed)
        arenas.append(Arena(f"{name} {seed}", defense, draw_images(defense.input_shape, 16, seed)))
    return arenas


REGIONS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "pairs": ((1, 6, 6), {"widths": [3, 4], "kernels": [2, 1], "dilations": [1, 1], "mixes": [0, 1]}),
    "colour": ((2, 5, 6), {"widths": [4], "kernels": [2], "dilations": [1], "mixes": [0]}),
    "dilated": ((1, 7, 6), {"widths": [3], "kernels": [2], "dilations": [2], "mixes": [1]}),
    "mirrored": ((1, 5, 6), {"widths": [3], "kernels": [2], "dilations": [1], "mixes": [0], "mirrored": True}),
    "framed": ((1, 4, 5), {"widths": [3], "kernels": [2], "dilations": [1], "mixes": [0], "padding": 1}),
    "framed wide": ((1, 4, 5), {"widths": [3], "kernels": [3], "dilations": [1], "mixes": [1], "padding": 2}),
    "single": ((1, 4, 5), {"widths": [3], "kernels": [1], "dilations": [1], "mixes": [0]}),
}


def random_region(name: str, seed: int, *, classes: int = 3, lean: float = 2.0) -> BagCert:
    """A random BagCert; the larger ``lean``, the more its cells agree with each other."""
    shape, plan = REGIONS[name]
    options = {**plan, "mean": [0.5] * shape[0], "std": [0.5] * shape[0]}
    made = {"input_shape": shape, "classes": list("abcd")[:classes], "network": {"name": "region", "options": options}}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        defense = BagCert.from_config(section("bagcert", made)).eval()
        x = draw_images(shape, 64, seed + 1000)
        scores = defense.scorer(x)
        spread, middle = scores.std(dim=(0, 2, 3)), scores.mean(dim=(0, 2, 3))
        defense.scorer.head.bias += lean * torch.randn(classes) * spread - middle
        defense.calibrate(x)
    return defense


def pixel_votes(bias: float = 0.5, *, mirrored: bool = False, side: int = 1, padding: int = 0) -> BagCert:
    """Cells of one pixel each: a bright one votes for b, a dark one for a, and all can be set independently.

    With a larger ``side`` a cell votes for b if any pixel that it sees is bright; a frame of ``padding`` pixels is dark.
    """
    options = {"widths": [2], "kernels": [side], "dilations": [1], "mixes": [0], "mean": [0.0], "std": [1.0]}
    options |= {"mirrored": mirrored, "padding": padding}
    made = {"input_shape": (1, 4, 4), "classes": ["a", "b"], "network": {"name": "region", "options": options}}
    defense = BagCert.from_config(section("bagcert", made)).eval()
    stage, head = defense.scorer.stages[0], defense.scorer.head
    with torch.no_grad():
        stage.convolution.weight.copy_(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, side, side))
        stage.norm.bias.copy_(torch.tensor([bias, -bias]))  # relu(bias - x), relu(x - bias)
        head.weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))
        head.bias.zero_()
        defense.calibrate(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 4, 4))
    return defense


@cache
def voting_arenas() -> list[Arena]:
    """Random BagCert models with 16 to 25 cells, so that patches of several sizes leave something to certify."""
    arenas = []
    for name, seed in product(REGIONS, range(4)):
        defense = random_region(name, seed, classes=2 + seed % 2, lean=(1.0, 2.0, 4.0)[seed % 3])
        arenas.append(Arena(f"{name} {seed}", defense, draw_images(defense.input_shape, 10, seed)))
    return arenas


@cache
def pixel_arena(*, mirrored: bool = False) -> Arena:
    """Images of every brightness, from all dark to all bright, for :func:`pixel_votes`."""
    generator = torch.Generator().manual_seed(0)
    share = torch.linspace(0, 1, 80)[:, None, None, None]
    return Arena("pixels", pixel_votes(mirrored=mirrored), (torch.rand(80, 1, 4, 4, generator=generator) < share).float())


def framed_arena() -> Arena:
    """Images that are bright towards the bottom right, whose cells see 3x3 pixels of a framed image."""
    generator = torch.Generator().manual_seed(0)
    towards = torch.linspace(0, 1, 4)[:, None] + torch.linspace(0, 1, 4)
    share = torch.linspace(0, 1, 80)[:, None, None, None] * towards / 2
    images = (torch.rand(80, 1, 4, 4, generator=generator) < share).float()
    return Arena("framed pixels", pixel_votes(side=3, padding=2), images)
