"""Muon: an orthogonal step for matrices, AdamW for the rest, and a run that resumes to the bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli.training import muon
from patchcert_cli.training.muon import Muon, orthogonal
from patchcert_cli.training.recipe import Recipe
from patchcert_cli.training.state import Beginning, State


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(8, 8), (5, 30), (30, 5), (1, 7), (3, 12, 20)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    given = noise(*shape)
    made = orthogonal(given)
    values = torch.linalg.svdvals(made)
    assert made.shape == given.shape and float(values.min()) > 0.5 and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    diagonal = (left.mT @ made @ right.mT).diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(diagonal, values.flip(-1).sort(dim=-1).values, atol=0.8)
    assert float((left.mT @ made @ right.mT - torch.diag_embed(diagonal)).abs().max()) < 1e-3


def test_size_does_not_matter_and_zero_stays_zero() -> None:
    assert torch.allclose(orthogonal(noise(6, 9) * 1e-3), orthogonal(noise(6, 9) * 1e3), atol=1e-3)
    assert not orthogonal(torch.zeros(4, 6)).any()


def test_bfloat16_makes_nearly_the_same_step() -> None:
    """The step of a run in bfloat16 is orthogonal in bfloat16, and the weights themselves stay in float32."""
    first, second = (nn.Parameter(torch.zeros(24, 40)) for _ in range(2))
    for weight, precision in ((first, torch.float32), (second, torch.bfloat16)):
        weight.grad = noise(24, 40)
        Muon([weight], lr=0.1, precision=precision).step()
    assert second.dtype == torch.float32 and not torch.equal(first, second)
    assert float((first - second).detach().norm() / first.detach().norm()) < 0.05


@pytest.mark.parametrize(
    ("precision", "fast", "kind"),
    [("bfloat16", True, "bfloat16"), ("bfloat16", False, "float32"), ("float32", True, "float32")],
)
def test_a_run_takes_the_precision_in_which_its_network_computes(
    precision: str, fast: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchcert_cli.training.state.computes_in_bfloat16", lambda device: fast)
    recipe = Recipe("patch:5x5", network_options={"hidden": [12]}, precision=precision, optimizer="muon")
    assert isinstance(optimizer := State.of(recipe, Beginning.of(recipe), "cpu").optimizer, Muon)
    assert optimizer.precision == getattr(torch, kind)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3))


def loss(made: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(made(noise(16, 2, 4, 4, seed=1)), torch.arange(16) % 3)


def test_who_moves_how() -> None:
    """A matrix moves by its rate times an orthogonal one, a convolution as a matrix; the rest as AdamW moves it."""
    made = network()
    before, other = copy.deepcopy(made), copy.deepcopy(made)
    optimizer = Muon(made.parameters(), lr=0.02)
    loss(made).backward()  # type: ignore[no-untyped-call]
    slope = made[0].weight.grad.clone()  # type: ignore[union-attr, operator]
    optimizer.step()
    moved = (made[0].weight - before[0].weight).flatten(1)  # type: ignore[operator]
    assert torch.allclose(moved, -0.02 * orthogonal(slope.flatten(1)), atol=1e-5)  # 6 x 18 is wide: no factor
    assert torch.linalg.svdvals(moved).max() < 0.02 * 1.3
    rest = torch.optim.AdamW(
        [w for w in other.parameters() if w.ndim < 2], lr=0.02 * muon.REST, betas=(0.9, 0.98), weight_decay=0
    )
    loss(other).backward()  # type: ignore[no-untyped-call]
    rest.step()
    for name, value in made.named_parameters():
        if value.ndim < 2:
            assert torch.allclose(value, dict(other.named_parameters())[name], atol=1e-6), name


def test_weight_decay_shrinks_by_the_rate() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.zeros(4, 4)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, torch.full((4, 4), 0.95))


def test_it_learns() -> None:
    made = network()
    optimizer, first = Muon(made.parameters(), lr=0.02), float(loss(made).detach())
    for _ in range(30):
        optimizer.zero_grad()
        now = loss(made)
        now.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(now.detach()) < first / 2


def test_its_state_is_saved_and_loaded(tmp_path: Path) -> None:
    made = network()
    optimizer = Muon(made.parameters(), lr=0.02)

    def steps(one: nn.Module, by: Muon, count: int) -> None:
        for _ in range(count):
            by.zero_grad()
            loss(one).backward()  # type: ignore[no-untyped-call]
            by.step()

    steps(made, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    again = copy.deepcopy(made)
    other = Muon(again.parameters(), lr=0.02)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    steps(made, optimizer, 3)
    steps(again, other, 3)
    assert all(torch.equal(one, two) for one, two in zip(made.state_dict().values(), again.state_dict().values(), strict=True))
