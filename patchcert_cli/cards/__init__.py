"""Model cards and the zoo they stand in: what is claimed about each model. Neither torch nor a network is needed to read them."""

from patchcert_cli.cards.card import DEFAULT_LICENSE, Card, card_for_run, slug, weights_of
from patchcert_cli.cards.page import HUB_DATASETS, metric, prose
from patchcert_cli.cards.records import File, Hub, Measured, Published, Sample, Training, Validation, valid_name, weights_sha256
from patchcert_cli.cards.shelf import (
    DEFAULT_DATASET,
    DEFAULT_MODELS,
    ENVIRONMENT,
    bundled,
    bundled_card,
    bundled_folder,
    bundled_names,
    default_model,
)
from patchcert_cli.files import CARD, CONFIG, INDEX, LEDGER, WEIGHTS, sha256, weight_files

__all__ = [
    "CARD",
    "CONFIG",
    "DEFAULT_DATASET",
    "DEFAULT_LICENSE",
    "DEFAULT_MODELS",
    "ENVIRONMENT",
    "HUB_DATASETS",
    "INDEX",
    "LEDGER",
    "WEIGHTS",
    "Card",
    "File",
    "Hub",
    "Measured",
    "Published",
    "Sample",
    "Training",
    "Validation",
    "bundled",
    "bundled_card",
    "bundled_folder",
    "bundled_names",
    "card_for_run",
    "default_model",
    "metric",
    "prose",
    "sha256",
    "slug",
    "valid_name",
    "weight_files",
    "weights_of",
    "weights_sha256",
]
