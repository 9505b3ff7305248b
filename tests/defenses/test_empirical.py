"""LGS, digital watermarking, and no defense: slow references, the same bits in any batch, and attacks that go through them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli import defenses
from patchcert_cli.attacks.patch_pgd import PatchPGD
from patchcert_cli.attacks.patch_rs import PatchRS
from patchcert_cli.attacks.transfer import Transfer
from patchcert_cli.defenses._empirical import EmpiricalDefense, straight_through
from patchcert_cli.defenses.lgs import Lgs, gradients, windows
from patchcert_cli.defenses.watermark import DigitalWatermarking, Watermark, cleaned, filled, guided, hottest
from patchcert_cli.errors import UsageError
from patchcert_cli.threats import Patch, Sparse
from tests.examples import tiny

SHAPE, CLASSES = (2, 6, 7), ("a", "b")


def images(count: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Noise, of which every third image is smooth and one is constant."""
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))
    x[1::3] = F.avg_pool2d(x[1::3], 3, stride=1, padding=1)
    x[2:3] = 0.25
    return x


def network(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        convolution = nn.Conv2d(shape[0], 4, 3, padding=1)
        made = nn.Sequential(convolution, nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.GELU(), nn.Flatten())
        return made.append(nn.Linear(4 * shape[1] * shape[2], len(CLASSES))).eval()


def around(kind: str, seed: int = 0, **settings: object) -> EmpiricalDefense:
    made = defenses.wrapping(kind).wrap(network(seed), input_shape=SHAPE, classes=CLASSES, **settings).eval()
    assert isinstance(made, EmpiricalDefense)
    return made


def slow_lgs(image: Tensor, block: int, overlap: int, threshold: float, smoothing: float) -> Tensor:
    """Pixel by pixel, in Python's floats: [C, H, W] -> float64 [C, H, W]."""
    channels, height, width = image.shape
    v = [[[round(float(image[c, i, j]) * 2**20) for j in range(width)] for i in range(height)] for c in range(channels)]
    size = [[0.0] * width for _ in range(height)]
    for i in range(height):
        for j in range(width):
            total = 0
            for c in range(channels):
                total += (v[c][i + 1][j] - v[c][i][j]) ** 2 if i + 1 < height else 0
                total += (v[c][i][j + 1] - v[c][i][j]) ** 2 if j + 1 < width else 0
            size[i][j] = math.sqrt(total)
    least, most = min(map(min, size)), max(map(max, size))
    g = [[(one - least) / ((most - least) or 1) for one in row] for row in size]
    starts = [sorted({*range(0, side - block, block - overlap), side - block}) for side in (height, width)]
    kept = [[False] * width for _ in range(height)]
    for top in starts[0]:
        for left in starts[1]:
            inside = [(i, j) for i in range(top, top + block) for j in range(left, left + block)]
            if sum(round(g[i][j] * 2**30) for i, j in inside) > threshold * 2**30 * block**2:
                for i, j in inside:
                    kept[i][j] = True
    out = image.double().clone()
    for i in range(height):
        for j in range(width):
            factor = 1 - min(max(smoothing * g[i][j] * kept[i][j], 0), 1)
            for c in range(channels):
                out[c, i, j] = float(image[c, i, j]) * factor
    return out


@pytest.mark.parametrize(("block", "overlap"), [(2, 1), (3, 0), (4, 2), (6, 3)])
@pytest.mark.parametrize(("threshold", "smoothing"), [(0.1, 2.3), (0.4, 1.0), (0.0, 0.0), (1.0, 2.3)])
def test_lgs_is_the_slow_reference(block: int, overlap: int, threshold: float, smoothing: float) -> None:
    x = images(5)
    made = around("lgs", block=block, overlap=overlap, threshold=threshold, smoothing=smoothing)
    expected = torch.stack([slow_lgs(one, block, overlap, threshold, smoothing) for one in x])
    assert torch.equal(made.filtered(x), expected.float())
    changed = bool((made.filtered(x) != x).any())
    assert changed == (smoothing > 0 and threshold < 1)


def test_lgs_scales_the_published_windows() -> None:
    sides = {shape: windows(Lgs(), shape) for shape in ((3, 224, 224), (3, 32, 32), (1, 28, 28))}
    assert {shape: int(found[0, 2]) for shape, found in sides.items()} == {(3, 224, 224): 15, (3, 32, 32): 2, (1, 28, 28): 2}
    tops = sides[3, 224, 224][:, 0].unique()
    assert tops[:3].tolist() == [0, 10, 20] and tops[-1] == 209
    assert torch.equal(gradients(torch.full((1, 3, 4, 4), 0.7)), torch.zeros(1, 4, 4, dtype=torch.float64))


def slow_clean(hot: Tensor, island: int, grow: int) -> Tensor:
    height, width = hot.shape
    found = torch.zeros_like(hot)
    for top in range(height - island + 1):
        for left in range(width - island + 1):
            if bool(hot[top : top + island, left : left + island].all()):
                found[max(0, top - grow) : top + island + grow, max(0, left - grow) : left + island + grow] = True
    return found


def slow_fill(image: Tensor, hidden: Tensor) -> Tensor:
    """Ring by ring, neighbour by neighbour."""
    out, known = image.clone(), ~hidden
    out[:, hidden] = 0.5
    while not bool(known.all()):
        new = {}
        for i, j in (~known).nonzero().tolist():
            near = [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
            near = [(r, c) for r, c in near if 0 <= r < known.shape[0] and 0 <= c < known.shape[1] and known[r, c]]
            if near:
                total = torch.zeros(len(out))
                for r, c in near:
                    total = total + out[:, r, c]
                new[i, j] = total / len(near)
        if not new:
            return out
        for (i, j), value in new.items():
            out[:, i, j], known[i, j] = value, True
    return out


@pytest.mark.parametrize(("island", "grow"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_the_parts_of_watermark_are_the_slow_references(island: int, grow: int) -> None:
    x = images(4)
    hot = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    hidden = cleaned(hot, island, grow)
    assert torch.equal(hidden, torch.stack([slow_clean(one, island, grow) for one in hot]))
    assert torch.equal(filled(x, hidden), torch.stack([slow_fill(*pair) for pair in zip(x, hidden, strict=True)]))
    everything = torch.ones(1, 6, 7, dtype=torch.bool)
    assert torch.equal(filled(x[:1], everything), torch.full((1, *SHAPE), 0.5))
    assert torch.equal(filled(x, torch.zeros_like(hot)), x)


def test_the_hottest_pixels() -> None:
    saliency = torch.tensor([[[3.0, 1.0, 2.0], [0.0, 2.0, 0.0]]])
    assert hottest(saliency, 0.34).nonzero()[:, 1:].tolist() == [[0, 0], [0, 2], [1, 1]]  # equals of the least one too
    assert not hottest(torch.zeros(1, 2, 2), 0.5).any()


def test_saliency_is_guided_backpropagation() -> None:
    """Of one ReLU layer: the weights of the units that are active, where what comes from above is positive."""
    first, last = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2, 0, 0], [0, 0, 3, -1], [0, 0, -1, -1]]))
        last.weight.copy_(torch.tensor([[1.0, -2, 1], [-9, -9, -9]]))
    layers = nn.Sequential(nn.Flatten(), first, nn.ReLU(inplace=True), last).eval()
    made = DigitalWatermarking(layers, Watermark(island=1, grow=0), input_shape=(1, 2, 2), classes=CLASSES)
    x = torch.full((1, 1, 2, 2), 0.5)
    assert made.saliency(layers, x).flatten().tolist() == [1, 2, 0, 0]  # unit 1 has weight -2 above, unit 2 is inactive
    assert not any(layer._forward_hooks for layer in layers.modules())
    point = x.clone().requires_grad_()
    layers(point)[:, 0].sum().backward()
    assert point.grad is not None and point.grad.flatten().tolist() == [1, 2, -6, 2]  # without guidance


@pytest.mark.parametrize("kind", ["lgs", "watermark", "undefended"])
def test_the_same_bits_in_any_batch(kind: str) -> None:
    made, x = around(kind, **({"share": 0.4} if kind == "watermark" else {})), images(7)
    once, answers = made.filtered(x), made.predict(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(torch.cat([made.filtered(part) for part in x.split(3)]), once)
        assert torch.equal(torch.cat([made.predict(part) for part in x.split(3)]), answers)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([made.predict(part) for part in x.split(1)]), answers)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(made.filtered(x[order]), once[order]) and torch.equal(made.predict(x[order]), answers[order])
    assert torch.equal(made.predict(x), made.undefended().predict(once))
    assert torch.equal(made.plain(x), made.undefended().predict(x))
    if kind == "undefended":
        assert torch.equal(once, x)
    else:
        assert not torch.equal(once, x)


def test_the_classifier_inside_is_tested_and_frozen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = around("lgs"), images(2)
    made.predict(x)
    monkeypatch.setattr(EmpiricalDefense, "self_test", lambda self: pytest.fail("tested again"))
    inside = made.undefended()
    assert torch.equal(inside.predict(x), made.plain(x))
    assert isinstance(inside, EmpiricalDefense) and inside._memory is made._memory and inside.deployed is made.deployed


def test_watermark_sees_new_weights() -> None:
    made, x = around("watermark", share=0.3), images(3)
    before = made.filtered(x)
    made.load_state_dict(around("watermark", seed=5).state_dict())
    assert not torch.equal(made.filtered(x), before)
    assert torch.equal(made.filtered(x), around("watermark", seed=5, share=0.3).filtered(x))


@pytest.mark.parametrize("kind", ["lgs", "watermark"])
def test_surrogates_have_the_scores_of_the_defense_and_gradients(kind: str) -> None:
    made, x = around(kind, **({"share": 0.3} if kind == "watermark" else {})), images(4)
    for surrogate in made.surrogates():
        point = x.clone().requires_grad_()
        scores = surrogate.whole(point)
        assert torch.allclose(scores, made(x), atol=1e-5)
        (slope,) = torch.autograd.grad(scores[:, 0].sum(), point)
        assert bool(slope.isfinite().all()) and bool((slope[[0, 1, 3]] != 0).any())
    value, x = torch.rand(2, requires_grad=True), torch.rand(2, requires_grad=True)
    out = straight_through(value, x)
    assert torch.equal(out, value)
    out.sum().backward()
    assert value.grad is None and x.grad is not None and x.grad.tolist() == [1, 1]


def test_an_adaptive_attack_does_better_than_a_blind_one() -> None:
    made, x = tiny("lgs"), torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    searches = (Transfer(steps=10), PatchPGD(steps=10, locations=3), PatchRS(budget=100))
    blind, gradients_, random = (int(search(made, x, Patch(2, 2)).success.sum()) for search in searches)
    alone = int(Transfer(steps=10)(made.undefended(), x, Patch(2, 2)).success.sum())
    assert alone >= 10, "the attack is weak, not blind"
    assert blind < 6 and min(gradients_, random) >= 10


def test_the_blind_attack_is_the_attack_on_the_undefended_classifier() -> None:
    made, x = tiny("lgs"), torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    threat = Patch(2, 2)
    alone, found = PatchPGD(steps=3)(made.undefended(), x, threat), Transfer(steps=3)(made, x, threat)
    assert torch.equal(found.success, made.predict(alone.adversarial) != made.predict(x))
    assert torch.equal(found.adversarial[found.success], alone.adversarial[found.success])
    assert bool((found.queries == alone.queries + 2).all())
    effort = Transfer(steps=3).most(made, threat, hinted=False)
    assert effort is not None and int(found.queries.max()) <= effort.queries + effort.answers
    assert Transfer(steps=1)(made, x[:2], Sparse(2)).success.shape == (2,)
    assert Transfer.suits(made) and not Transfer.suits(tiny("ibp"))
    with pytest.raises(UsageError, match="no classifier that answers without it"):
        Transfer()(tiny("ibp"), x, Patch(2, 2))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("lgs", {"block": 9}, "block 9 does not fit 6x7 images"),
        ("lgs", {"block": 3, "overlap": 3}, "overlap 3 is not less than block 3"),
        ("lgs", {"threshold": 1.5}, r"threshold is 1.5, not in \[0, 1\]. Settings: block"),
        ("lgs", {"smoothing": -1}, "smoothing is -1"),
        ("lgs", {"share": 0.1}, "share is not a known entry"),
        ("watermark", {"share": 0.0}, "share is 0.0, not between 0 and 1"),
        ("watermark", {"island": 7}, "island 7 and grow 0 do not fit 6x7 images"),
        ("watermark", {"grow": 3}, "island 2 and grow 3 do not fit"),
        ("undefended", {"share": 0.1}, "share is not a known entry. It has no settings"),
    ],
)
def test_bad_settings(kind: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        around(kind, **settings)


class Steps(nn.Module):
    """A network without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().flatten(1)[:, :2]


def test_watermark_needs_gradients() -> None:
    made = DigitalWatermarking(Steps().eval(), input_shape=SHAPE, classes=CLASSES)
    made.trust()
    with pytest.raises(UsageError, match="no gradients"):
        made.predict(images(1))


def test_a_configuration_builds_the_same() -> None:
    options = {"hidden": (6,), "mean": (0.4,), "std": (0.5,)}
    deployed = {"input_shape": (1, 4, 4), "classes": ("a", "b", "c"), "network": {"name": "mlp", "options": options}}
    for kind, settings in (("lgs", {"block": 3, "overlap": 1}), ("watermark", {"share": 0.2}), ("undefended", {})):
        made = defenses.build({**deployed, "defense": kind, **settings})
        made.load_state_dict(tiny(kind).state_dict())
        assert made.settings() == {**tiny(kind).settings(), **settings}


def test_guidance_leaves_nothing_behind() -> None:
    made = network()
    with pytest.raises(ValueError, match="x"), guided(made):
        raise ValueError("x")
    assert not any(layer._forward_hooks for layer in made.modules())
