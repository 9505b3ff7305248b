"""Which locations interval training trains on, and the loss of each way, compared with boxed copies of the image."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.certifiers.bounds import intervals, pairwise
from patchcert_cli.certifiers.bounds.folding import fold
from patchcert_cli.certifiers.bounds.rules import propagate
from patchcert_cli.defenses import TrainingStep
from patchcert_cli.defenses.ibp import losses
from patchcert_cli.defenses.ibp.options import IntervalOptions
from patchcert_cli.errors import UsageError
from patchcert_cli.threats import Patch, Sparse
from patchcert_cli.training import run
from patchcert_cli.training.recipe import Recipe

PATCH, LOCATIONS, CLASSES = Patch(2, 2), 25, 4
NETWORKS = {
    "mlp": {"hidden": (7, 5)},
    "cnn": {"channels": (3, 4), "strides": (1, 2), "hidden": (6,)},
}


def build(name: str, **options: object) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        shape = {"input_shape": (2, 6, 6), "classes": CLASSES, "mean": (0.4, 0.5), "std": (0.5, 0.3)}
        return models.build(name, {**shape, **NETWORKS[name], **options})


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 2, 6, 6, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def step(*, epsilon: float = 1.0, seed: int = 0, **options: object) -> TrainingStep:
    made = IntervalOptions(natural_epochs=0, ramp_epochs=10, bounded_epochs=0, **options)  # type: ignore[arg-type]
    return TrainingStep(PATCH, made, 10 * epsilon, 20, torch.Generator().manual_seed(seed))


def slow_table(network: nn.Sequential, x: Tensor, label: Tensor, epsilon: float = 1.0) -> Tensor:
    """[B, A, K] through a boxed copy of the image per location, without the merged last layer's shortcut."""
    rows = []
    for top in range(5):
        for left in range(5):
            mask = torch.zeros(6, 6)
            mask[top : top + 2, left : left + 2] = epsilon
            lower, upper = propagate(list(network)[:-1], (x - mask * x, x + mask * (1 - x)))
            last = network[-1]
            assert isinstance(last, nn.Linear)
            contrast = last.weight[label][:, None] - last.weight  # [B, K, N]
            bound = (contrast.clamp(min=0) * lower[:, None] + contrast.clamp(max=0) * upper[:, None]).sum(dim=2)
            rows.append(bound + last.bias[label][:, None] - last.bias)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("epsilon", [1.0, 0.3])
def test_the_table_of_margins_and_its_gradient(name: str, epsilon: float) -> None:
    network, (x, label) = build(name), batch()
    chosen = torch.randint(LOCATIONS, (6, 9), generator=torch.Generator().manual_seed(5))
    fast = intervals.margins_table(network, x, label, PATCH, chosen, epsilon=epsilon)
    slow = slow_table(network, x, label, epsilon).gather(1, chosen[:, :, None].expand(-1, -1, CLASSES))
    assert torch.allclose(fast, slow, atol=1e-5)
    assert torch.allclose(pairwise.screen(network, x, label, PATCH, chosen, epsilon=epsilon), slow, atol=1e-5)
    together = intervals.smallest_margins(network, x, label, PATCH, chosen, epsilon=epsilon)
    assert torch.allclose(fast.amin(dim=1), together, atol=1e-5)
    weights, parameters = torch.rand_like(slow), list(network.parameters())
    pairs = (torch.autograd.grad((weights * table).sum(), parameters) for table in (fast, slow))
    for a, b in zip(*pairs, strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


def test_a_table_in_parts_is_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    network, (x, label) = build("cnn"), batch()
    chosen = torch.randint(LOCATIONS, (6, 9), generator=torch.Generator().manual_seed(5))
    whole = pairwise.screen(network, x, label, PATCH, chosen)
    monkeypatch.setattr(pairwise, "PAIRS", {"cpu": 20})
    assert torch.allclose(pairwise.screen(network, x, label, PATCH, chosen), whole, atol=1e-6)
    assert not whole.requires_grad


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_mined_locations_are_the_worst_of_the_screened(name: str, kept: int) -> None:
    network, (x, label) = build(name), batch()
    how = step(pick="mined", screened=10, locations=kept, epsilon=0.7, seed=8)
    chosen, per_class = losses.pick(network, x, label, PATCH, how)
    screened = torch.randint(LOCATIONS, (6, 10), generator=torch.Generator().manual_seed(8))
    table = slow_table(network, x, label, 0.7).detach()
    assert per_class == (kept == 0)
    for i in range(len(x)):
        seen = table[i, screened[i]]  # [S, K]
        assert set(chosen[i].tolist()) <= set(screened[i].tolist())
        if per_class:
            assert torch.allclose(table[i, chosen[i], torch.arange(CLASSES)], seen.amin(dim=0), atol=1e-5)
        else:
            rivals = [rival for rival in range(CLASSES) if rival != label[i]]
            found = table[i, chosen[i]][:, rivals].amin(dim=1)
            assert torch.allclose(found, seen[:, rivals].amin(dim=1).sort().values[:kept], atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_of_each_pick(name: str) -> None:
    network, (x, label) = build(name), batch()
    table = slow_table(network, x, label)
    draw = torch.randint(LOCATIONS, (6, 8), generator=torch.Generator().manual_seed(2))
    drawn = table.gather(1, draw[:, :, None].expand(-1, -1, CLASSES))
    expected = {"worst": table.amin(dim=1), "random": drawn.amin(dim=1), "mined": drawn.amin(dim=1)}
    options = {"worst": {}, "random": {"locations": 8}, "mined": {"screened": 8}}
    for pick, margins in expected.items():
        loss = losses.training_loss(network, x, label, step(pick=pick, seed=2, **options[pick]))
        assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(-margins, label).detach()), rel=1e-5)


def test_more_screening_finds_a_worse_location() -> None:
    network, (x, label) = build("mlp"), batch()
    found = [float(losses.training_loss(network, x, label, step(pick="mined", screened=count)).detach()) for count in (1, 5, 400)]
    worst = float(losses.training_loss(network, x, label, step(pick="worst")).detach())
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(worst, rel=1e-5)


def test_natural_epochs_see_no_attacker() -> None:
    network, (x, label) = build("mlp"), batch()
    natural = replace(step(pick="worst"), options=IntervalOptions(natural_epochs=30, bounded_epochs=0))
    assert torch.equal(losses.training_loss(network, x, label, natural), F.cross_entropy(network(x), label))


@pytest.mark.parametrize("threat", [PATCH, Patch(1, 3), Sparse(2), Sparse(3, "value")], ids=str)
@pytest.mark.parametrize("epsilon", [1.0, 0.4])
@pytest.mark.parametrize("norm", [False, True])
def test_linear_margins_hold_for_whatever_the_attacker_shows(threat: Patch | Sparse, epsilon: float, norm: bool) -> None:
    network, (x, label) = fold(build("mlp", norm=norm), batch()[0])[0], batch()
    generator = torch.Generator().manual_seed(6)
    locations = threat.locations(6, 6)
    chosen = torch.randint(len(locations), (6, CLASSES), generator=generator)
    found = pairwise.linear_margins(network, x, label, threat, chosen, epsilon=epsilon)
    assert torch.equal(found.gather(1, label[:, None]), torch.zeros(6, 1))
    closest = float("inf")
    for kind in [*range(CLASSES), "sparse"]:
        for _ in range(150):
            mask = torch.zeros(6, 2, 6, 6)
            for i in range(6):
                if isinstance(threat, Patch):
                    top, left, height, width = locations[chosen[i, kind if kind != "sparse" else 0]].tolist()
                    mask[i, :, top : top + height, left : left + width] = epsilon
                else:
                    cells = 72 if threat.unit == "value" else 36
                    flat = torch.zeros(cells).index_fill(0, torch.randperm(cells, generator=generator)[: threat.k], epsilon)
                    mask[i] = flat.reshape(2, 6, 6) if threat.unit == "value" else flat.reshape(1, 6, 6)
            corner = torch.rand(x.shape, generator=generator).round()
            with torch.no_grad():
                logits = network(x + mask * (corner - x))
            truth = logits.gather(1, label[:, None]) - logits
            judged = slice(None) if isinstance(threat, Sparse) else slice(kind, kind + 1) if kind != "sparse" else slice(0, 1)
            gap = (truth - found.detach())[:, judged]
            assert float(gap.min()) >= -1e-5
            closest = min(closest, float(gap[gap > 1e-7].min()) if bool((gap > 1e-7).any()) else closest)
    assert closest < 1.2  # the bound is near what was reached, somewhere


def test_linear_margins_are_exact_where_no_relu_bends() -> None:
    """One box of one pixel that moves nothing much: every ReLU keeps its side, and the bound is attained."""
    network, (x, label) = build("mlp"), batch()
    chosen = torch.zeros(6, CLASSES, dtype=torch.int64)
    found = pairwise.linear_margins(network, x, label, PATCH, chosen, epsilon=1e-4)
    lines = pairwise.linear_margins(network, x, label, PATCH, chosen, epsilon=0.0)
    logits = network(x)
    assert torch.allclose(lines, logits.gather(1, label[:, None]) - logits, atol=1e-5)
    moved = x.clone().requires_grad_()
    out = network(moved)
    for rival in range(CLASSES):
        margin = out.gather(1, label[:, None])[:, 0] - out[:, rival]
        slope = torch.autograd.grad(margin.sum(), moved, retain_graph=True)[0]
        least = torch.minimum(slope * (1 - x), -slope * x)[:, :, :2, :2].sum(dim=(1, 2, 3))
        assert torch.allclose(found[:, rival], (margin + 1e-4 * least).detach(), atol=1e-5)


def test_the_linear_share_of_the_loss() -> None:
    network, (x, label) = build("mlp"), batch()
    how = {"pick": "random", "locations": 6, "seed": 3}
    interval = losses.training_loss(network, x, label, step(**how))
    mixed = losses.training_loss(network, x, label, step(**how, linear=0.25))
    chosen = torch.randint(LOCATIONS, (6, 6), generator=torch.Generator().manual_seed(3))
    margins, index = slow_table(network, x, label).gather(1, chosen[:, :, None].expand(-1, -1, CLASSES)).min(dim=1)
    linear = pairwise.linear_margins(network, x, label, PATCH, chosen.gather(1, index))
    better = F.cross_entropy(-torch.maximum(margins, linear), label)
    assert bool((linear > margins + 1e-3).any())
    assert float(mixed.detach()) == pytest.approx(0.75 * float(interval.detach()) + 0.25 * float(better.detach()), rel=1e-5)
    gradients = torch.autograd.grad(mixed, list(network.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_the_gradient_of_linear_margins_is_that_of_differences() -> None:
    network, (x, label) = build("mlp").double(), batch()
    chosen = torch.randint(LOCATIONS, (6, CLASSES), generator=torch.Generator().manual_seed(6))
    weights = torch.rand(6, CLASSES, dtype=torch.float64)

    def value() -> Tensor:
        return (weights * pairwise.linear_margins(network, x.double(), label, PATCH, chosen)).sum()

    for parameter in network.parameters():
        (gradient,) = torch.autograd.grad(value(), parameter)
        flat = parameter.data.view(-1)
        for at in (0, len(flat) // 2, len(flat) - 1):
            before, sides = float(flat[at]), []
            for move in (1e-6, -1e-6):
                flat[at] = before + move
                sides.append(float(value().detach()))
            flat[at] = before
            assert float(gradient.view(-1)[at]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4, abs=1e-6)


def test_networks_without_lines_are_refused_before_training() -> None:
    with pytest.raises(UsageError, match="fully connected"):
        pairwise.linear_margins(build("cnn"), *batch(), PATCH, torch.zeros(6, CLASSES, dtype=torch.int64))
    for norm, network in ((False, "mlp"), (True, "mlp"), (False, "cnn")):
        recipe = Recipe("patch:3x3", network=network, network_options={"norm": norm}, options={"linear": 0.5})
        if network == "cnn":
            with pytest.raises(UsageError, match="linear=0"):
                run.begin(recipe)
        else:
            run.begin(recipe)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("threat", [PATCH, Sparse(2)], ids=str)
def test_bounds_are_normalized_by_the_clean_batch(name: str, threat: Patch | Sparse) -> None:
    """In training mode the folded network is the network with this batch's statistics frozen into it."""
    network, (x, label) = build(name, norm=True).train(), batch()
    frozen = copy.deepcopy(network)
    for layer in frozen.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = 1.0  # so that its running mean becomes the batch's
    frozen(x)
    frozen.eval()
    v = x
    for layer in frozen:  # the running variance is the unbiased one; the batch is normalized by the other
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_var = torch.var(v, dim=[0, *range(2, v.ndim)], correction=0).detach()
        v = layer(v)
    bare, logits = fold(network, x)
    assert not any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in bare.modules())
    assert logits is not None
    assert torch.allclose(logits, frozen(x), atol=1e-5) and torch.allclose(bare(x), logits, atol=1e-5)
    margins = intervals.lower_margins(bare, x, label, threat).values
    assert torch.allclose(margins, intervals.lower_margins(frozen, x, label, threat).values, atol=1e-4)
    assert bool((margins <= logits.gather(1, label[:, None]) - logits + 1e-5).all())


def test_gradients_flow_through_the_statistics() -> None:
    """A bias in front of batch norm has no effect at all, so its gradient is zero, in the clean pass and in the bounds."""
    network = build("mlp", norm=True).train()
    x, label = batch()
    loss = losses.training_loss(network, x, label, step(pick="worst", natural=0.3))
    gradients = dict(zip(dict(network.named_parameters()), torch.autograd.grad(loss, list(network.parameters())), strict=True))
    assert float(gradients["2.bias"].abs().max()) < 1e-5 < float(gradients["3.bias"].abs().max())
    assert float(gradients["2.weight"].abs().max()) > 1e-5


def test_running_statistics_move_once_per_step_and_serve_eval_mode() -> None:
    network = build("cnn", norm=True).train()
    x, label = batch()
    losses.training_loss(network, x, label, step(pick="worst", natural=0.3))
    assert {int(layer.num_batches_tracked) for layer in network if isinstance(layer, nn.BatchNorm2d)} == {1}
    network.eval()
    assert torch.allclose(fold(network, x)[0](x), network(x), atol=1e-6)
    assert {int(layer.num_batches_tracked) for layer in network if isinstance(layer, nn.BatchNorm2d)} == {1}
    plain = build("cnn")
    assert fold(plain, x) == (plain, None)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("options", [{"pick": "worst"}, {"pick": "mined", "screened": 8}, {"pick": "random", "locations": 4}])
def test_bounds_stay_below_the_clean_margin_under_autocast(name: str, norm: bool, options: dict[str, object]) -> None:
    network, (x, label) = build(name, norm=norm), batch()
    x = x.contiguous(memory_format=torch.channels_last)
    for threat in (PATCH, Sparse(2)):
        for epsilon in (1e-3, 1.0):
            how = replace(step(epsilon=epsilon, natural=0.2, tightness=0.1, balance=0.1, **options), threat=threat)
            with torch.autocast("cpu", torch.bfloat16):
                loss = losses.training_loss(network, x, label, how)
                bare, _ = fold(network, x)
                bounds = losses._bounds(bare, x, label, threat, how)
                logits = bare(x).float()
            clean = logits.gather(1, label[:, None]) - logits
            room = 2**-6 * float(logits.detach().abs().max()) if epsilon < 1 or isinstance(threat, Sparse) else 0.0
            assert bool((bounds.margins <= clean + room + 1e-6).all())
            assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, list(network.parameters())))


def test_boxes_keep_their_order_under_autocast() -> None:
    for name in NETWORKS:
        network, (x, _) = build(name), batch()
        for threat in (PATCH, Sparse(2)):
            for epsilon in (1e-4, 0.5, 1.0):
                with torch.autocast("cpu", torch.bfloat16):
                    width, boxes = pairwise.relu_boxes(network, x, threat, torch.arange(6), epsilon=epsilon)
                assert len(boxes) == len([layer for layer in network if isinstance(layer, nn.ReLU)])
                assert all(bool((lower <= upper).all()) for lower, upper in boxes) and float(width) > 0
