"""Random small networks of every supported layer, with options at odd values: bounds, verdicts and answers, and attacks on them.

Bounds are held against interval arithmetic written slowly from the mathematics (``slow.py``); no change inside the threat, drawn
or found by following gradients, may leave a margin below the certified one, or move a certified answer.
"""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals
from patchcert_cli.certifiers.bounds.first_layer import Split
from patchcert_cli.defenses.ibp.defense import IntervalDefense
from patchcert_cli.errors import UnsupportedThreat
from patchcert_cli.layers import supported_layers
from patchcert_cli.layers.preprocessing import Normalize
from patchcert_cli.threats import Patch, Sparse

from . import slow

IMAGES, CLASSES = 3, 3


def _kernel(rng: random.Random, most: int = 3) -> tuple[int, int]:
    return rng.randint(1, most), rng.randint(1, most)


def _half(rng: random.Random, kernel: tuple[int, int]) -> tuple[int, int]:
    return rng.randint(0, kernel[0] // 2), rng.randint(0, kernel[1] // 2)


def _norm(rng: random.Random, kind: type[nn.BatchNorm1d | nn.BatchNorm2d], channels: int) -> nn.Module:
    norm = kind(channels, eps=rng.choice((1e-5, 0.3)), affine=rng.random() < 0.7)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    if norm.affine:
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    return norm


def _on_maps(rng: random.Random, channels: int) -> nn.Module:
    """A random layer on maps."""
    kernel = _kernel(rng)
    stride, dilation = _kernel(rng), rng.choice(((1, 1), (1, 1), (2, 1), (1, 3), (2, 2)))
    kind = rng.choice(("conv", "conv", "conv", "max", "average", "adaptive", "relu", "relu", "norm", "normalize", "dropout"))
    if kind == "conv":
        groups = rng.choice([n for n in range(1, channels + 1) if channels % n == 0])
        padding = rng.randint(0, 3), rng.randint(0, 3)
        return nn.Conv2d(channels, groups * rng.randint(1, 2), kernel, stride, padding, dilation, groups, bias=rng.random() < 0.7)
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, _half(rng, kernel), dilation, ceil_mode=rng.random() < 0.5)
    if kind == "average":
        divisor = rng.choice((None, None, 1, 3, 7))
        return nn.AvgPool2d(kernel, stride, _half(rng, kernel), rng.random() < 0.5, rng.random() < 0.5, divisor)
    if kind == "adaptive":
        return nn.AdaptiveAvgPool2d(rng.choice((1, 2, (1, 3), (3, 2), (None, 1))))  # type: ignore[arg-type]
    if kind == "norm":
        return _norm(rng, nn.BatchNorm2d, channels)
    if kind == "normalize":
        return Normalize([rng.random() for _ in range(channels)], [rng.uniform(0.2, 2) for _ in range(channels)])
    return (
        nn.ReLU(inplace=rng.random() < 0.5) if kind == "relu" else rng.choice((nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Identity()))
    )


def draw(seed: int) -> tuple[list[nn.Module], tuple[int, int, int]]:
    """The layers of a random network in eval mode, and the shape of its images."""
    rng = random.Random(seed)
    while True:
        shape = rng.randint(1, 3), rng.randint(3, 7), rng.randint(3, 7)
        layers: list[nn.Module] = []
        v = torch.zeros(1, *shape)
        for _ in range(rng.randint(0, 6)):
            layer = _on_maps(rng, v.shape[1]).eval()
            try:
                after = layer(v.clone())
            except RuntimeError:  # more window than map
                continue
            if 0 not in after.shape and after.numel() <= 150 and bool(after.isfinite().all()):
                layers, v = [*layers, layer], after
        layers += [nn.Identity(), nn.Flatten()] if rng.random() < 0.2 else [nn.Flatten()]
        width = v[0].numel()
        for _ in range(rng.randint(0, 2)):
            after_width = rng.randint(2, 8)
            layers += [nn.Linear(width, after_width, bias=rng.random() < 0.7)]
            layers += [_norm(rng, nn.BatchNorm1d, after_width)] if rng.random() < 0.3 else []
            layers += [nn.ReLU(inplace=rng.random() < 0.5)] if rng.random() < 0.8 else []
            width = after_width
        layers.append(nn.Linear(width, CLASSES))
        layers += [nn.ReLU()] if rng.random() < 0.1 else []
        if any(isinstance(layer, nn.Conv2d | nn.Linear) for layer in layers):
            return layers, shape


def _attacked(network: nn.Module, x: Tensor, label: Tensor, moved: Tensor, generator: torch.Generator) -> Tensor:
    """Some images each inside the threat: x where ``moved`` is 0; noise, corners, and where gradients lead: [n, B, C, H, W]."""
    found = [
        torch.rand(x.shape, generator=generator, dtype=x.dtype),
        torch.rand(x.shape, generator=generator, dtype=x.dtype).round(),
    ]
    found += [torch.zeros_like(x), torch.ones_like(x)]
    for start in list(found[:2]):
        for _ in range(3):
            now = torch.where(moved, start, x).requires_grad_()
            logits = network(now)
            own = logits.gather(1, label[:, None])
            lead = (own - logits.scatter(1, label[:, None], -torch.inf)).amin(dim=1)
            slope = torch.autograd.grad(lead.sum(), now)[0]
            start = torch.where(slope > 0, 0.0, torch.where(slope < 0, 1.0, now.detach()))
        found.append(start)
    return torch.stack([torch.where(moved, one, x) for one in found])


def check(seed: int) -> tuple[int, int]:
    """One network under a patch and a sparse threat: how many images were certified, and how many margins were compared."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers, shape = draw(seed)
        with torch.no_grad():
            final = next(layer for layer in reversed(layers) if isinstance(layer, nn.Linear))
            final.bias.mul_(10.0 ** (seed % 3))  # from often broken to often certified
    rng, generator = random.Random(-seed), torch.Generator().manual_seed(seed)
    x = torch.rand(IMAGES, *shape, generator=generator)
    x[0] = x[0].round()
    x = x.double() if rng.random() < 0.3 else x
    nested = [nn.Sequential(*layers[:2]), *layers[2:]] if rng.random() < 0.3 else layers
    made = IntervalDefense(nn.Sequential(*nested), input_shape=shape, classes=("a", "b", "c")).eval()
    if rng.random() < 0.5:
        made, x = made.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    path, exact = slow.steps(layers, shape), supported_layers.rebuilt(made.network, torch.float64)
    expected = np.stack([slow.logits(path, image) for image in x])
    kept, answers = x.clone(), made.predict(x)
    assert torch.equal(x, kept), "images were altered in place"
    assert np.allclose(exact(x.double()).numpy(), expected, rtol=1e-9, atol=1e-9)
    patch = Patch(rng.randint(1, min(3, shape[1])), rng.randint(1, min(3, shape[2])))
    truth = np.stack([slow.margins(path, x[i], patch.height, patch.width, int(answers[i])) for i in range(IMAGES)])
    found = intervals.lower_margins(exact, x.double(), answers, patch).values
    others = np.isfinite(truth)
    scale = 1 + np.abs(truth[others]).max()
    assert np.allclose(found.numpy()[others], truth[others], rtol=0, atol=1e-9 * scale), "not the interval bounds"
    certified, worst = 0, torch.from_numpy(truth.min(axis=1))
    for threat in (patch, Sparse(1), Sparse(2, "value")):
        for method in ("interval", "linear"):
            try:
                certificate = made.certify(x, threat, method)
            except UnsupportedThreat:  # sparse, where no affine layer comes first
                assert isinstance(threat, Sparse) and (Split.of(exact, shape[0]).first is None or _grouped(exact, shape))
                continue
            assert torch.equal(certificate.prediction, answers) and bool((certificate.tolerance >= 0).all())
            if isinstance(threat, Patch) and method == "interval":
                clear = worst.abs() > certificate.tolerance
                assert torch.equal(certificate.certified[clear], (worst > 0)[clear])
                assert bool((certificate.margin <= worst + certificate.tolerance).all())
            certified += int(certificate.certified.sum())
            for moved in _places(threat, shape, rng):
                hidden = torch.from_numpy(moved).expand(x.shape)
                changed = _attacked(exact, x.double(), answers, hidden, generator)
                logits = exact(changed.flatten(0, 1)).reshape(len(changed), IMAGES, CLASSES)
                own = answers.expand(len(changed), -1)[:, :, None]
                lead = (logits.gather(2, own) - logits).scatter(2, own, torch.inf).amin(dim=2)
                assert bool((lead >= certificate.margin - certificate.tolerance - 1e-9 * scale).all()), (threat, method)
                moved_answers = made.predict(changed.flatten(0, 1)).reshape(len(changed), IMAGES) != answers
                assert not bool(moved_answers[:, certificate.certified].any()), (threat, method)
    return certified, int(others.sum())


def _grouped(exact: nn.Module, shape: tuple[int, int, int]) -> bool:
    first = Split.of(exact, shape[0]).first
    return isinstance(first, nn.Conv2d) and first.groups != 1


def _places(threat: Patch | Sparse, shape: tuple[int, int, int], rng: random.Random) -> list[np.ndarray]:  # type: ignore[type-arg]
    """Some sets of entries that an attacker may change, bool [1, C, H, W]."""
    found, entries = [], list(product(range(shape[0]), range(shape[1]), range(shape[2])))
    for _ in range(3):
        moved = np.zeros((1, *shape), dtype=bool)
        if isinstance(threat, Patch):
            top, left = rng.randint(0, shape[1] - threat.height), rng.randint(0, shape[2] - threat.width)
            moved[0, :, top : top + threat.height, left : left + threat.width] = True
        else:
            for channel, row, column in rng.sample(entries, threat.k):
                moved[0, slice(None) if threat.unit == "pixel" else channel, row, column] = True
        found.append(moved)
    return found


@pytest.mark.parametrize("start", range(0, 16, 4))
def test_random_networks_are_bounded_and_certified_as_the_mathematics_says(start: int) -> None:
    certified, compared = (sum(part) for part in zip(*(check(seed) for seed in range(start, start + 4)), strict=True))
    assert certified > 0 and compared == 4 * IMAGES * (CLASSES - 1)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(1000, 2000, 50))
def test_many_random_networks(start: int) -> None:
    for seed in range(start, start + 50):
        check(seed)


def test_every_supported_layer_is_drawn() -> None:
    seen = {type(layer) for seed in range(16) for layer in draw(seed)[0]}
    assert seen >= set(supported_layers.KNOWN), set(supported_layers.KNOWN) - seen


def test_the_largest_of_nothing_certifies_nothing() -> None:
    """A dilated pooling window can lie in the padding alone: torch gives minus infinity, and there is no logit behind it."""
    layers = nn.Sequential(nn.MaxPool2d((1, 2), 1, (0, 1), 2), nn.Flatten(), nn.Linear(1, 3))
    x = torch.rand(4, 1, 1, 1)
    assert bool(layers[0](x).isneginf().all())
    made = IntervalDefense(layers, input_shape=(1, 1, 1), classes=("a", "b", "c")).eval()
    made.trust()  # the self-test refuses it before any proof
    for method in ("interval", "linear"):
        assert not bool(made.certify(x, Patch(1, 1), method).certified.any())
