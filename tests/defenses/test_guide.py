"""The U-Net that guides interval training: where it sends the search, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.certifiers.bounds import intervals, pairwise
from patchcert_cli.defenses import TrainingStep
from patchcert_cli.defenses.ibp import losses
from patchcert_cli.defenses.ibp.guide import Guide, at_locations, guided, sample
from patchcert_cli.defenses.ibp.options import IntervalOptions
from patchcert_cli.threats import Patch

PATCH = Patch(2, 3)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        options = {"input_shape": (1, 8, 8), "classes": 3, "mean": (0.4,), "std": (0.5,), "hidden": (20,)}
        return models.build("mlp", options)


def batch(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)


def guide(channels: int = 1, classes: int = 3) -> Guide:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Guide(channels, classes)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (8, 8), (7, 5), (4, 4), (1, 3)])
def test_a_prediction_for_each_class_and_location(size: tuple[int, int]) -> None:
    assert guide(2, 5)(torch.rand(3, 2, *size)).shape == (3, 5, *size)


def test_locations_are_those_of_the_patch() -> None:
    prediction = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    locations = PATCH.locations(8, 8)
    found = at_locations(prediction, PATCH)
    assert found.shape == (2, 3, len(locations))
    for index, (top, left, _, _) in enumerate(locations.tolist()):
        assert torch.equal(found[:, :, index], prediction[:, :, top, left])
    chosen = torch.tensor([[0, 5], [41, 41]])
    assert torch.equal(guided(prediction, PATCH, chosen)[1, 0], found[1, :, 41])


def test_samples_follow_the_softmax_of_each_class() -> None:
    prediction = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2
    prediction[:, :, -1] = prediction[:, :, :, -2:] = -50  # no location begins here
    count = 40_000
    drawn = sample(prediction, PATCH, count, torch.Generator().manual_seed(1))
    assert drawn.shape == (2, 3 * count)
    wanted = (-at_locations(prediction, PATCH)).softmax(dim=2)
    for i in range(2):
        for k in range(3):
            seen = torch.bincount(drawn[i, k * count : (k + 1) * count], minlength=wanted.shape[2]) / count
            assert float((seen - wanted[i, k]).abs().sum()) / 2 < 0.02


def step(aid: nn.Module, seed: int = 0, **options: object) -> TrainingStep:
    made = IntervalOptions(natural_epochs=0, ramp_epochs=0, bounded_epochs=0, pick="guided", **options)  # type: ignore[arg-type]
    return TrainingStep(PATCH, made, 5, 20, torch.Generator().manual_seed(seed), aid)


def test_the_loss_and_both_gradients() -> None:
    """The loss is that of the worst of the sampled locations; the classifier's gradient too; the guide's is that of its error."""
    net, aid, (x, label) = network(), guide(), batch(6)
    loss = losses.training_loss(net, x, label, step(aid, locations=2, seed=4))
    chosen = sample(aid(x), PATCH, 2, torch.Generator().manual_seed(4))
    assert chosen.shape == (6, 3 * 2)
    margins = intervals.smallest_margins(net, x, label, PATCH, chosen)
    expected = torch.nn.functional.cross_entropy(-margins, label)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    error = torch.nn.functional.mse_loss(
        guided(aid(x), PATCH, chosen), intervals.margins_table(net, x, label, PATCH, chosen).detach()
    )
    for module, value in ((net, expected), (aid, error)):
        weights = list(module.parameters())
        pairs = (torch.autograd.grad(of, weights, retain_graph=True) for of in (loss, value))
        for a, b in zip(*pairs, strict=True):
            assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


def test_the_guide_learns_the_bounds_and_finds_worse_locations() -> None:
    net, aid = network(), guide()
    optimizer = torch.optim.Adam(aid.parameters(), lr=3e-3)
    x, label = batch(200, seed=9)
    with torch.no_grad():
        label = net(x).argmax(dim=1)  # so that the image alone says what the bounds are
    everywhere = torch.arange(PATCH.count(8, 8)).expand(40, -1)
    table = pairwise.screen(net, x[:40], label[:40], PATCH, everywhere)

    def report() -> tuple[float, float]:
        with torch.no_grad():
            error = float((guided(aid(x[:40]), PATCH, everywhere) - table).square().mean())
            chosen = sample(10 * aid(x[:40]), PATCH, 2, torch.Generator().manual_seed(0))
            return error, float(pairwise.screen(net, x[:40], label[:40], PATCH, chosen).amin(dim=1).mean())

    before = report()
    for i in range(80):
        optimizer.zero_grad()
        part = slice(40 * (1 + i % 4), 40 * (2 + i % 4))
        losses.training_loss(net, x[part], label[part], step(aid, seed=i, locations=4)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = report()
    assert after[0] < before[0] / 2
    assert after[1] < before[1]
