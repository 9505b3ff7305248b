"""Default recipes that several defenses have in common."""

from __future__ import annotations

from typing import Any


def masked(dataset: str) -> dict[str, Any]:
    """The entries of a recipe for a network of whole numbers that sees masked images."""
    digits = dataset == "mnist"  # a mirrored digit is not a digit, and digits need a smaller network
    small = {"stem": 16, "widths": [32, 64, 128], "takes_mask": True} if digits else {}
    return {
        "dataset": "cifar10",
        "network_options": {"bits": 8, **small},
        "epochs": 20,
        "learning_rate": 0.25,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "precision": "bfloat16",
        "stored": "float16",
        "validation": 500,  # certifying them costs the most here
        "options": {"flip": not digits, "shift": 1 if digits else 2},
    }
