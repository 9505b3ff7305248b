"""Averages of weights, held against the formula step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from patchcert_cli.defenses import Defense
from patchcert_cli.training.average import Average
from tests.examples import tiny


def build() -> Defense:
    made: Any = tiny("patchcleanser")
    made.network = nn.Sequential(made.network, nn.BatchNorm1d(3))
    return made


def test_an_average_follows_weights_and_statistics() -> None:
    defense = build()
    average = Average(defense)
    assert not average.defense.training
    expected = {name: value.clone().double() for name, value in defense.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for number in range(1, 21):
        with torch.no_grad():
            for value in defense.state_dict().values():
                if value.is_floating_point():
                    value.copy_(torch.rand(value.shape, generator=generator))
                else:
                    value.fill_(number)
        average.follow(defense, 0.75)
        keep = min(0.75, (number + 1) / (number + 10))
        for name, value in defense.state_dict().items():
            moved = keep * expected[name] + (1 - keep) * value.double()
            expected[name] = moved if value.is_floating_point() else value.double()
    assert average.steps == 20
    for name, value in average.defense.state_dict().items():
        assert torch.allclose(value.double(), expected[name], atol=1e-6), name
    assert int(average.defense.state_dict()["network.1.num_batches_tracked"]) == 20


def test_what_was_averaged_is_left_alone() -> None:
    defense = build()
    before = {name: value.clone() for name, value in defense.state_dict().items()}
    average = Average(defense)
    with torch.no_grad():
        for value in average.defense.parameters():
            value.add_(1)
    average.follow(defense, 0.9)
    assert all(torch.equal(value, before[name]) for name, value in defense.state_dict().items())
    weight, mine = next(iter(defense.parameters())), next(iter(average.defense.parameters()))
    assert float((mine - weight).detach().amax()) == pytest.approx(2 / 11)
