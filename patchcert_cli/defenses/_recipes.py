"""Default recipes that several defenses have in common."""

from __future__ import annotations

from typing import Any

from patchcert_cli.threats import Threat


class MaskedRecipe:
    """Of defenses whose network of whole numbers sees masked images."""

    @classmethod
    def default_recipe(cls, threat: Threat, dataset: str) -> dict[str, Any]:
        """See :meth:`patchcert_cli.defenses.Defense.default_recipe`."""
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
