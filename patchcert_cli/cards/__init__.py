"""Model cards: what is claimed about each model of the zoo. Neither torch nor a network is needed to read them."""

from patchcert_cli.cards.card import DEFAULT_LICENSE, Card, card_for_run, slug, weights_of
from patchcert_cli.cards.entries import (
    Attacked,
    File,
    Hub,
    Measured,
    Published,
    Sample,
    Training,
    Validation,
    valid_name,
    weights_sha256,
)
from patchcert_cli.cards.page import HUB_DATASETS, metric, prose

__all__ = [
    "DEFAULT_LICENSE",
    "HUB_DATASETS",
    "Attacked",
    "Card",
    "File",
    "Hub",
    "Measured",
    "Published",
    "Sample",
    "Training",
    "Validation",
    "card_for_run",
    "metric",
    "prose",
    "slug",
    "valid_name",
    "weights_of",
    "weights_sha256",
]
