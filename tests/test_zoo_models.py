"""The zoo reproduces itself: a fixed sample of each model's published counts is measured again."""

from __future__ import annotations

import pytest
import torch

import patchcert_cli
from patchcert_cli import cards, data
from patchcert_cli.certificate import Tally, clopper_pearson

NAMES = [name for name, card in cards.bundled().items() if card.results]
DEAR = {"smoothing": 4, "patchcleanser": 4}  # images for attacks on defenses that run a network for every band or mask
# Gains of 3,072 values for every neuron take a while, and so do a thousand pairs of masks.
SAMPLE, SMALL = 300, {"cifar-ibp-k4-value": 100, "cifar-ibp-k10-value": 60, "cifar-masked-cnn": 24, "mnist-masked-cnn": 40}


def measured(name: str, count: int | None) -> tuple[Tally, cards.Measured]:
    card = cards.bundled_card(name)
    result = card.result()
    assert result is not None
    images = data.load(card.dataset, "test").limit(count, 1)
    defense, threat = patchcert_cli.load(name), patchcert_cli.parse_threat(result.threat)
    parts = [defense.certify(data.to_float(part), threat) for part in images.pixels.split(500)]
    certificate = patchcert_cli.Certificate.cat(parts)
    return Tally.of(images.labels, certificate.prediction, certificate.certified), result


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_agrees_with_the_card(name: str) -> None:
    tally, card = measured(name, SMALL.get(name, SAMPLE))
    for here, there in ((tally.clean, card.clean), (tally.certified, card.certified)):
        low, high = clopper_pearson(here, tally.images, 0.999)
        assert low <= there / card.images <= high


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_split_gives_the_counts_of_the_card(name: str) -> None:
    tally, card = measured(name, None)
    assert (tally.images, tally.clean, tally.certified) == (card.images, card.clean, card.certified)


@pytest.mark.parametrize("name", NAMES)
def test_the_attack_breaks_no_certificate(name: str) -> None:
    card = cards.bundled_card(name)
    threat, defense = patchcert_cli.parse_threat(card.threat), patchcert_cli.load(name)
    images = data.load(card.dataset, "test").limit(DEAR.get(card.defense, 12), 2)
    x = data.to_float(images.pixels)
    from patchcert_cli import attacks

    certificate = defense.certify(x, threat)
    options = {"steps": 6, "restarts": 0, "rounds": 0} if card.defense in DEAR else {}
    outcome = attacks.for_threat(threat, **options)(defense, x, threat, index=images.index)
    assert not bool((outcome.success & certificate.certified).any())
    assert int(certificate.certified.sum()) >= len(x) // 4
    assert torch.equal(outcome.clean_prediction, certificate.prediction)
