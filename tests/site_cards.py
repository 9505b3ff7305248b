"""Cards for tests of the web page, with numbers that are easy to tell apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from model_folders import COMMIT, measured

from patchcert_cli.cards import Card, File, Hub, Measured, Published, Training, Validation
from patchcert_cli.threats import Patch, parse_threat

PAPER = "Someone et al., Somewhere 2020, table 1"
HOSTILE = "</script></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)> javascript:alert(3) \x00\u202e\ud800"


def result(side: int | str, certified: int, **changes: Any) -> Measured:
    """A measurement under a square patch of this side, or under a threat by its name."""
    images = changes.get("images", 1000)
    share = certified / images
    values = {"images": images, "clean": 950, "certified": certified, "method": "additive", "command": "patchcert certify NAME"}
    values["threat"] = f"patch:{side}x{side}" if isinstance(side, int) else side
    values["certified_interval"] = (max(0.0, share - 0.0123), min(1.0, share + 0.0123))
    return measured(**{**values, **changes})


def card(name: str, results: Iterable[Measured] = (), **changes: Any) -> Card:
    """A card of a model with weights."""
    found = Card(
        name=name,
        status="measured" if results else "trained",
        defense="ibp",
        network="MLP 784-255-10",
        dataset="mnist",
        threat=Patch(3, 3),
        split="train[55000]",
        seed=3,
        recipe={"threat": "patch:3", "dataset": "mnist", "network_options": {"hidden": [255]}, "learning_rate": 1e-05},
        command="patchcert train --threat patch --patch 3 --seed 3",
        license="apache-2.0",
        hub=Hub(f"patchcert/{name}"),
        source="Someone et al., Somewhere 2020",
        trained=Training("2026-01-31", 12.5, "cpu", 1, "2.6.0", "0.1.0"),
        files={"config.json": File("c" * 64, 1066), "model.safetensors": File("a" * 64, 811316)},
        validation=Validation(5000, 4711, 3113),
        results=tuple(results),
    )
    return replace(found, **changes)


def sweep(name: str, first: int, step: int, sides: Iterable[int] = range(1, 7), **changes: Any) -> Card:
    """A model that was measured under several sides."""
    return card(name, [result(side, max(0, first - step * i)) for i, side in enumerate(sides)], **changes)


def recipe(name: str, **changes: Any) -> Card:
    """A recipe without weights."""
    paper = (Published(Patch(3, 3), 0.8642, 0.5931, PAPER),)
    bare: dict[str, Any] = {"files": {}, "trained": None, "validation": None, "published": paper, "status": "recipe only"}
    return card(name, **{**bare, **changes})


def zoo() -> list[Card]:
    """Two data sets, both guarantees, several proofs, sparse attacks, a doubtful model, a recipe, one not measured yet."""
    best = result(3, 700)
    return [
        sweep("votes-b", 900, 150, defense="bagcert", network="region scorer 32-64"),
        sweep("votes-a", 880, 110, defense="smoothing", files={"model.safetensors": File("b" * 64, 2_000_000)}),
        card(
            "bounds",
            [replace(best, method="3.1", certified=640), best, replace(best, method="3.2", certified=600)],
            published=(
                Published(parse_threat("patch:3"), 0.9, 0.71, PAPER),
                Published(parse_threat("patch:7x7"), 0.88, 0.1234, "another paper"),
            ),
            hub=Hub("patchcert/bounds", COMMIT),
            notes="See `votes-a`.",
        ),
        card("alarm", [result(3, 940, guarantee="detection"), result(4, 930, guarantee="detection")], network="CNN"),
        card("doubtful", [result(3, 949)], status="unreliable", reason="an attack flipped a certified image"),
        card("pixels-4", [result("sparse:4", 810)], threat=parse_threat("sparse:4")),
        card("pixels-10", [result("sparse:10", 410)], threat=parse_threat("sparse:10")),
        card("waiting"),
        recipe("large-recipe"),
        card(
            "photos",
            [result(side, 600 - 77 * side, dataset="cifar10") for side in (1, 2, 3)],
            dataset="cifar10",
            threat=parse_threat("patch:2x2"),
        ),
    ]
