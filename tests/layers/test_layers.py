"""Preprocessing in front of a classifier: what is done, in which order, and that nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from patchcert_cli import models
from patchcert_cli.layers.preprocessing import INTERPOLATIONS, WithPreprocessing


class Keeps(nn.Module):
    """Returns the mean of each channel, and keeps what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        self.given = x
        return x.mean(dim=(2, 3))


def test_nothing_is_done_that_is_not_stated() -> None:
    model, x = Keeps(), torch.rand(2, 3, 5, 7)
    assert WithPreprocessing(model)(x).shape == (2, 3)
    assert model.given is x


def test_it_is_normalized_per_channel() -> None:
    model, x = Keeps(), torch.rand(2, 3, 4, 4)
    WithPreprocessing(model, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))(x)
    wanted = (x - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    torch.testing.assert_close(model.given, wanted)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(9, 12), (3, 3), (6, 8)])
def test_it_is_resized_before_it_is_normalized_and_stays_in_range(interpolation: str, size: tuple[int, int]) -> None:
    model, x = Keeps(), (torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    WithPreprocessing(model, size=size, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation)(x)
    assert tuple(model.given.shape[2:]) == size
    assert float(model.given.min()) >= 0 and float(model.given.max()) <= 1  # bicubic overshoots by itself
    if size == (6, 8):
        assert torch.equal(model.given, x)
    else:
        smooth = {} if interpolation == "nearest" else {"antialias": True, "align_corners": False}
        assert torch.equal(model.given, nn.functional.interpolate(x, size, mode=interpolation, **smooth).clamp(0, 1))  # type: ignore[arg-type]


def test_grey_becomes_colour_only_where_colour_is_wanted() -> None:
    model, x = Keeps(), torch.rand(2, 1, 4, 4)
    WithPreprocessing(model, channels=3)(x)
    assert torch.equal(model.given, x.repeat(1, 3, 1, 1))
    for channels in (1, None):
        WithPreprocessing(model, channels=channels)(x)
        assert torch.equal(model.given, x)


def test_what_is_hidden_before_it_is_resized_leaves_no_trace() -> None:
    """Why masks go outside: behind one, no pixel of a patch has leaked into another."""
    network = WithPreprocessing(Keeps(), size=(23, 31), mean=(0.5,), std=(0.25,))
    one, two = torch.rand(2, 1, 1, 8, 9).unbind()
    two = torch.where(torch.arange(9) < 5, one, two)  # differ in the last four columns
    hidden = (torch.arange(9) >= 5).expand(8, 9)
    answers = [network(torch.where(hidden, 0.5, x)) for x in (one, two)]
    assert torch.equal(*answers)
    resized = [nn.functional.interpolate(x, (23, 31), mode="bicubic", antialias=True) for x in (one, two)]
    wide = nn.functional.interpolate(hidden[None, None].float(), (23, 31)) > 0
    assert not torch.equal(*(x[~wide] for x in resized))


def test_it_keeps_the_names_of_its_parameters_and_says_what_it_is() -> None:
    network = WithPreprocessing(nn.Linear(2, 3), mean=(0.5,), std=(0.5,), size=(1, 2), summary="mine at 1x2")
    assert list(network.state_dict()) == ["model.weight", "model.bias"]
    assert models.describe(nn.Sequential(network)) == "mine at 1x2, 0.00M parameters"
    assert WithPreprocessing(nn.Linear(2, 3)).summary == "Linear"
    with pytest.raises(ValueError, match="interpolation 'sinc' must be one of bicubic, bilinear, nearest"):
        WithPreprocessing(nn.Linear(2, 3), interpolation="sinc")
