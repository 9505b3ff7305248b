"""The interval defense: its loss is compared with boxed copies of the image written out here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchcert_cli.certifiers.bounds import intervals
from patchcert_cli.defenses import TrainingStep
from patchcert_cli.defenses.ibp import defense
from patchcert_cli.defenses.ibp.defense import IntervalDefense, IntervalOptions
from patchcert_cli.errors import IntegrityError, MachineError
from patchcert_cli.layers import precision
from patchcert_cli.threats import Patch, Sparse, Threat
from tests.examples import section, tiny

CONFIG = {
    "defense": "ibp",
    "input_shape": [1, 4, 4],
    "classes": list("abcde"),
    "network": {"name": "mlp", "options": {"hidden": [6], "mean": [0.3], "std": [0.4]}},
}


def build(classes: int = 5) -> IntervalDefense:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return IntervalDefense.from_config(section("ibp", {**CONFIG, "classes": list("abcdefgh"[:classes])}))


def batch(count: int = 7, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 4, 4, generator=generator), torch.randint(classes, (count,), generator=generator)


def step(threat: Threat, *, epsilon: float = 1.0, locations: int = 0, natural: float = 0.0, seed: int = 0) -> TrainingStep:
    options = IntervalOptions(natural_epochs=0, ramp_epochs=10, bounded_epochs=0, locations=locations, natural=natural)
    return TrainingStep(threat, options, 10 * epsilon, 20, torch.Generator().manual_seed(seed))


def margins_by_location(defense: IntervalDefense, x: Tensor, label: Tensor, side: int, epsilon: float) -> Tensor:
    """[A, B, K] through one boxed copy per location, in the form ``W+ lo + W- hi``."""
    normalize, flatten, first, relu, last = defense.network
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    found = []
    for top in range(5 - side):
        for left in range(5 - side):
            mask = torch.zeros(4, 4)
            mask[top : top + side, left : left + side] = epsilon
            low, high = flatten(normalize(x - mask * x)), flatten(normalize(x + mask * (1 - x)))
            plus, minus = first.weight.clamp(min=0).t(), first.weight.clamp(max=0).t()
            low, high = relu(low @ plus + high @ minus + first.bias), relu(high @ plus + low @ minus + first.bias)
            row = last.weight[label][:, None] - last.weight
            bound = (row.clamp(min=0) * low[:, None] + row.clamp(max=0) * high[:, None]).sum(dim=2)
            found.append(bound + last.bias[label][:, None] - last.bias)
    return torch.stack(found)


@pytest.mark.parametrize(("epsilon", "natural"), [(1.0, 0.0), (0.3, 0.0), (0.0, 0.0), (1.0, 0.25)])
def test_the_loss_over_all_locations_and_its_gradient(epsilon: float, natural: float) -> None:
    defense = build()
    x, label = batch()
    fast = defense.training_loss(x, label, step(Patch(2, 2), epsilon=epsilon, natural=natural))
    slow = F.cross_entropy(-margins_by_location(defense, x, label, 2, epsilon).amin(dim=0), label)
    slow = (1 - natural) * slow + natural * F.cross_entropy(defense(x), label)
    assert float(fast.detach()) == pytest.approx(float(slow.detach()), rel=1e-5)
    parameters = list(defense.parameters())
    for a, b in zip(torch.autograd.grad(fast, parameters), torch.autograd.grad(slow, parameters), strict=True):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-7


@pytest.mark.parametrize("locations", [1, 3, 5, 8])
def test_random_locations_are_shared_by_all_classes(locations: int) -> None:
    """With as many locations as classes (5) too: each class takes its smallest margin over all of them."""
    defense = build()
    x, label = batch()
    fast = defense.training_loss(x, label, step(Patch(2, 2), locations=locations, seed=4))
    chosen = torch.randint(9, (len(x), locations), generator=torch.Generator().manual_seed(4))
    table = margins_by_location(defense, x, label, 2, 1.0)  # [A, B, K]
    smallest = torch.stack([table[chosen[i], i].amin(dim=0) for i in range(len(x))])
    assert float(fast.detach()) == pytest.approx(float(F.cross_entropy(-smallest, label).detach()), rel=1e-5)


def test_the_bounded_loss_is_one_minus_the_worst_case_probability() -> None:
    defense = build()
    x, label = batch()
    plain = step(Patch(2, 2))
    bounded = replace(plain, options=IntervalOptions(natural_epochs=0, ramp_epochs=0, bounded_natural=0.0))
    margins = margins_by_location(defense, x, label, 2, 1.0).amin(dim=0)
    right = (-margins).softmax(dim=1).gather(1, label[:, None])
    assert float(defense.training_loss(x, label, bounded).detach()) == pytest.approx(float(1 - right.mean().detach()), rel=1e-5)


def test_the_sparse_loss_is_that_of_the_margins() -> None:
    defense = build()
    x, label = batch()
    loss = defense.training_loss(x, label, step(Sparse(2), epsilon=0.5))
    margins = intervals.lower_margins(defense.network, x, label, Sparse(2), epsilon=0.5).values
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(-margins, label).detach()), rel=1e-6)
    gradients = torch.autograd.grad(loss, list(defense.parameters()))
    assert all(bool(gradient.isfinite().all()) and float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_training_against_a_patch_certifies_more() -> None:
    defense = build(3)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 1, 4, 4, generator=generator) * 0.3
    label = torch.arange(60) % 3
    x[label == 1, :, :2] += 0.7
    x[label == 2, :, 2:] += 0.7
    before = int((defense.certify(x, Patch(1, 1)).certified & (defense.predict(x) == label)).sum())
    optimizer = torch.optim.Adam(defense.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        defense.training_loss(x, label, step(Patch(1, 1))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = int((defense.certify(x, Patch(1, 1)).certified & (defense.predict(x) == label)).sum())
    assert after > max(before, 40)


def test_the_configuration_rebuilds_the_same_shapes() -> None:
    defense = build()
    assert defense.input_shape == (1, 4, 4)
    assert defense.classes == tuple("abcde")
    assert [tuple(weight.shape) for weight in defense.parameters()] == [(6, 16), (6,), (5, 6), (5,)]
    assert defense(batch()[0]).shape == (7, 5)


def test_the_answer_is_the_argmax_in_float64() -> None:
    defense, (x, _) = build(), batch(50)
    logits = precision.double(defense.network)(x.double())
    assert defense.predict(x).tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert all(weight.dtype == torch.float32 for weight in defense.parameters())


def test_less_than_float32_is_found_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny("ibp")
    made.self_test()
    rebuilt = defense.rebuilt

    class Coarse(nn.Module):
        """A network that a machine computes in bfloat16 although it should not."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            return found.bfloat16().float()

    def coarse(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        found = rebuilt(network, dtype)
        return Coarse(found) if dtype == torch.float32 else found

    monkeypatch.setattr(defense, "rebuilt", coarse)
    with pytest.raises(MachineError, match="in float32 logits are off by .*, and rounding explains"):
        made.self_test()
    monkeypatch.setattr(defense, "rebuilt", rebuilt)
    next(iter(made.parameters())).data.fill_(float("nan"))
    with pytest.raises(IntegrityError, match="NaN or infinity"):
        made.self_test()
