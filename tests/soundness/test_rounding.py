"""Rounding decides nothing: pictures made so that it could (``rounding_enemy.py``) have one answer and verdict in every way."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.io import read_image

import patchcert_cli
from patchcert_cli.certifiers.masks import logit_scale, masked_predictions
from patchcert_cli.certifiers.masks.exact_predictions import ExactMaskedPredictor
from patchcert_cli.certifiers.masks.logit_scale import HeadRecorder
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.layers import integers
from patchcert_cli.threats import Patch

from . import rounding_enemy as enemy

CASE = Path(__file__).parent / "cases" / "masked-flip"
WAYS = ("float32",)


def case() -> tuple[Tensor, Tensor]:
    """A picture and the same with a 5x5 patch, float32 [1, 3, 32, 32]."""
    clean, patched = (read_image(str(CASE / f"{name}.png"))[None].float() / 255 for name in ("clean", "patched"))
    return clean, patched


class Foreign(nn.Module):
    """A network of the zoo as one of others, which nothing can freeze."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.takes_mask = inner, bool(getattr(inner, "takes_mask", False))

    def forward(self, *given: Tensor) -> Tensor:
        logits: Tensor = self.inner(*given)
        return logits


@cache
def loaded(name: str) -> PatchCleanser:
    """A zoo model, whose self-test takes seconds."""
    made = patchcert_cli.load(name)
    assert isinstance(made, PatchCleanser)
    return made


def foreign(name: str) -> PatchCleanser:
    """The defense of a zoo model around its network as if it were one of others."""
    made = loaded(name)
    around = PatchCleanser(
        Foreign(made.network),
        input_shape=made.input_shape,
        classes=made.classes,
        masks=made.plan,
        fill=made.fill.flatten().tolist(),
        prediction_dtype=made.prediction_dtype,
    )
    return around.eval()


def shrinking_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic that was broken: a logit margin is a share of the largest logit of its own pass."""
    monkeypatch.setattr(logit_scale, "power_above", lambda value: 1e-300)
    monkeypatch.setattr(HeadRecorder, "scale", lambda self, logits: logits.double().abs().amax(dim=1).cpu())


def test_the_flipped_picture_has_one_answer_in_every_batch() -> None:
    """It was certified in a batch of two, and flipped by its patch when asked alone."""
    clean, patched = case()
    changed = (clean != patched).any(dim=1)[0].nonzero()
    assert changed.amin(dim=0).tolist() == [9, 9] and changed.amax(dim=0).tolist() == [13, 13]
    for defense in (foreign("cifar-masked-cnn"), loaded("cifar-masked-cnn")):
        told = []
        for copies in (1, 2):
            certificate = defense.certify(clean.repeat(copies, 1, 1, 1), Patch(5, 5))
            after = defense.predict(patched.repeat(copies, 1, 1, 1))
            told += list(zip(certificate.certified.tolist(), certificate.prediction.tolist(), after.tolist(), strict=True))
        assert len(set(told)) == 1, told
        certified, before, later = told[0]
        assert not certified or before == later


def noise(shape: tuple[int, ...], count: int = 4) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def test_the_enemy_makes_what_it_says() -> None:
    """Two logits meet to a millionth, or all of them become small."""
    defense = foreign("mnist-masked-cnn")
    occluded = defense.masks[3] | defense.masks[20]
    x = noise((1, 28, 28))[0]
    before = enemy.logits_of(defense, x[None].double(), occluded)
    for among in (10, 2):
        found = enemy.aimed(defense, x, occluded, among)
        assert torch.equal((found * 255).round(), found.double().mul(255).round().float()) and len(found) == 8
        logits = enemy.logits_of(defense, found.double(), occluded)
        best = logits.topk(2, dim=1).values
        if among == 2:
            assert float((best[:, 0] - best[:, 1]).amax()) < 1e-6
        else:
            assert float(logits.abs().amax()) < 0.25 * float(before.abs().amax())


@pytest.mark.parametrize("precisions", [("float32",), pytest.param(("bfloat16",), marks=pytest.mark.slow)])
def test_the_enemy_finds_nothing_around_a_network_of_others(precisions: tuple[str, ...]) -> None:
    assert (
        enemy.search(foreign("mnist-masked-cnn"), noise((1, 28, 28)), 2, precisions=precisions, sizes=(1, 2), keep=3, pairs=48)
        == []
    )


@pytest.mark.parametrize("backend", ["", *(pytest.param(one, marks=pytest.mark.slow) for one in ("float32", "float64"))])
def test_the_enemy_finds_nothing_around_a_network_of_whole_numbers(backend: str) -> None:
    """By construction: what it aims at is small in the network that was trained, and exact in the one that is deployed."""
    defense = loaded("cifar-masked-cnn")
    assert isinstance(defense.views(), ExactMaskedPredictor)
    with integers.only(backend) if backend else contextlib.nullcontext():
        assert enemy.search(defense, case()[0], 1, precisions=WAYS, sizes=(1, 2), keep=3, pairs=48) == []


@pytest.mark.slow
def test_a_long_search_finds_nothing_around_a_network_of_whole_numbers() -> None:
    defense, images = loaded("cifar-masked-cnn"), torch.cat([case()[0], noise((3, 32, 32))])
    assert enemy.search(defense, images, 20, precisions=WAYS) == []
    picture = enemy.aimed(defense, images[0], defense.masks[3] | defense.masks[20], 10)[0]
    assert enemy.contradiction(picture, enemy.asked(defense, picture, Patch(5, 5), (1, 2, 3), WAYS)) is None


@pytest.mark.slow
def test_the_enemy_flips_leads_that_are_shares_of_their_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    defense, images = foreign("cifar-masked-cnn"), torch.cat([case()[0], noise((3, 32, 32))])
    assert enemy.search(defense, images, 6, among=10, sizes=enemy.SIZES) == []
    shrinking_scale(monkeypatch)
    assert enemy.search(defense, images, 6, among=10, sizes=(1, 2), precisions=WAYS)


@pytest.mark.slow
def test_answers_and_verdicts_of_the_enemys_pictures_are_one() -> None:
    """The whole answer and verdict, not just the pair that was aimed at, by ``certify`` and by ``predict``."""
    defense, images = foreign("mnist-masked-cnn"), noise((1, 28, 28))
    for at, (first, second) in enumerate(((0, 0), (3, 20), (14, 14))):
        picture = enemy.aimed(defense, images[at], defense.masks[first] | defense.masks[second], 10)[0]
        found = enemy.asked(defense, picture, Patch(5, 5), sizes=(1, 2, 3, 7))
        assert enemy.contradiction(picture, found) is None, str(enemy.contradiction(picture, found))


def test_passes_in_doubt_are_few() -> None:
    """What one way of computing costs: of ordinary pictures, hardly a pass is asked again."""
    defense, x = foreign("mnist-masked-cnn"), noise((1, 28, 28), 16)
    asked = masked_predictions.MaskedPredictor.reference_logits
    counted: list[int] = []

    def counting(self: masked_predictions.MaskedPredictor, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        counted.append(len(x))
        return asked(self, x, first, second)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_predictions.MaskedPredictor, "reference_logits", counting)
        certificate = defense.certify(x, Patch(5, 5))
    assert certificate.passes is not None
    assert sum(counted) < 0.05 * int(certificate.passes.sum())
