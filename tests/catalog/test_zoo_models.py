"""The zoo reproduces itself: the published records of a fixed sample are measured again, image by image."""

from __future__ import annotations

import pytest
import torch

import patchcert_cli
from patchcert_cli import Certificate, cards, data
from patchcert_cli.cards.published import PublishedRecords
from patchcert_cli.catalog import bundled
from patchcert_cli.certificate import Tally
from patchcert_cli.storage import files
from patchcert_cli.threats import Sparse

NAMES = [name for name, card in bundled.cards().items() if card.results]
DEAR = ("smoothing", "patchcleanser")  # defenses that run a network for every band or mask
SAMPLE = 6  # images whose published verdicts are held against new ones
DEAR_SAMPLE = {"cifar-masked-cnn": 2, "mnist-masked-cnn": 2, "cifar-ibp-k4-value": 3, "cifar-ibp-k10-value": 3}


def certified_again(name: str, count: int | None) -> tuple[data.Images, Certificate, cards.Measured]:
    card = bundled.card(name)
    result = card.result()
    assert result is not None
    images = data.load(card.dataset, "test").limit(count, 1)
    defense, threat = patchcert_cli.load(name), result.threat
    method = result.method if result.method in defense.methods else None  # what only names the family of the proof
    parts = [defense.certify(data.to_float(part), threat, method) for part in images.pixels.split(500)]
    return images, Certificate.cat(parts), result


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_has_the_answers_and_verdicts_of_the_records(name: str) -> None:
    """Image by image: one verdict that differs fails. That all records add up to the card's counts is tested with the cards."""
    count = DEAR_SAMPLE.get(name, SAMPLE)
    images, certificate, result = certified_again(name, count)
    published = PublishedRecords.read(bundled.folder() / name / files.PUBLISHED_RECORDS)
    at = published.position(result.threat, result.method, result.guarantee)
    rows = [published.rows[index] for index in images.index.tolist()]
    assert images.labels.tolist() == [row.label for row in rows]
    assert certificate.prediction.tolist() == [row.prediction for row in rows]
    assert certificate.certified.tolist() == [row.certified[at] for row in rows]
    assert len(rows) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_split_gives_the_counts_of_the_card(name: str) -> None:
    images, certificate, card = certified_again(name, None)
    tally = Tally.of(images.labels, certificate.prediction, certificate.certified)
    assert (tally.images, tally.clean, tally.certified) == (card.images, card.clean, card.certified)


# Another model of the same network and kind of threat is attacked.
ALIKE = (
    *("mnist-ibp-p2-muon", "mnist-ibp-p5-muon", "mnist-ibp-p5-linear", "cifar-ibp-p2-muon", "cifar-ibp-k10-value"),
    *(f"cifar-bagcert-rf{field}" for field in (5, 9, 11, 13)),
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in NAMES])
@pytest.mark.parametrize("effort", ["short", pytest.param("long", marks=pytest.mark.slow)])
def test_the_attack_breaks_no_certificate(name: str, effort: str) -> None:
    card, dear = bundled.card(name), bundled.card(name).defense in DEAR
    threat, defense = card.threat, patchcert_cli.load(name)
    from patchcert_cli import attacks

    for count in ((3 if dear else 4) if effort == "short" else 6, 40):  # more where none of the first is certified
        images = data.load(card.dataset, "test").limit(count, 2)
        certificate = defense.certify(data.to_float(images.pixels), threat)
        if bool(certificate.certified.any()):
            break
    if count == 40:
        images = images.take(certificate.certified.nonzero()[:4, 0])
        certificate = defense.certify(data.to_float(images.pixels), threat)
    x = data.to_float(images.pixels)
    options: dict[str, object] = {}
    if isinstance(threat, Sparse):
        options = {"steps": 8, "iterations": 40} if effort == "short" else {}
    elif dear or effort == "short":
        options = {"steps": 6, "restarts": 0, "rounds": 0} | ({"locations": 2 if dear else 5} if effort == "short" else {})
    outcome = attacks.for_threat(threat, **options)(defense, x, threat, index=images.index)
    assert not bool((outcome.success & certificate.certified).any())
    assert bool(certificate.certified.any())
    assert torch.equal(outcome.clean_prediction, certificate.prediction)
