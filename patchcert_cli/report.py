"""Results as rows of text. Every table says threat, guarantee and count."""

from __future__ import annotations

from typing import Any

Rows = list[tuple[str, str]]


def share(fraction: float, count: int, total: int) -> str:
    """``61.85 % (6185/10000)``."""
    return f"{100 * fraction:.2f} % ({count}/{total})"


def certify_rows(result: dict[str, Any]) -> Rows:
    """What a certify run found."""
    low, high = result["certified_interval"]
    counts, images = result["counts"], result["images"]
    certified = share(result["certified_accuracy"], counts["certified"], images)
    return [
        ("model", f"{result['model']} ({result['defense']}, {result['model_source']}, sha256 {result['model_sha256'][:12]})"),
        ("data", _data(result)),
        ("threat", f"{result['threat']}, anywhere in the image, any content in [0, 1]"),
        ("clean", share(result["clean_accuracy"], counts["clean"], images)),
        ("certified", f"{certified}, 95 % interval {100 * low:.2f} to {100 * high:.2f} %"),
        ("guarantee", f"{result['guarantee']} by {result['method']} bounds"),
        ("time", _time(result)),
        ("records", str(result["records"])),
    ]


def attack_rows(result: dict[str, Any]) -> Rows:
    """What an attack run found."""
    counts, images = result["counts"], result["images"]
    survived = round(result["attacked_accuracy"] * images)
    rows = [
        ("model", f"{result['model']} ({result['defense']}, {result['model_source']}, sha256 {result['model_sha256'][:12]})"),
        ("data", _data(result)),
        ("threat", f"{result['threat']}, anywhere in the image, any content in [0, 1]"),
        ("clean", share(result["clean_accuracy"], counts["clean"], images)),
        ("attacked", f"{share(result['attacked_accuracy'], survived, images)} (empirical: a stronger attack may find more)"),
    ]
    if "certified_accuracy" in result:
        rows.append(("certified", share(result["certified_accuracy"], counts["certified"], images)))
        rows.append(("verdict", f"{len(result['broken'])} certified images flipped"))
    return [*rows, ("queries", f"{result['queries']:,}"), ("time", _time(result)), ("records", str(result["records"]))]


def plain_rows(values: dict[str, Any]) -> Rows:
    """Names and values as they are."""
    return [(name.replace("_", " "), str(value)) for name, value in values.items()]


def train_rows(result: dict[str, Any]) -> Rows:
    """What a training run made."""
    counts, images = result["validation"]["counts"], result["validation"]["images"]
    spent = f"{result['epochs']} epochs in {result['seconds']:.0f} s on {result['device']}"
    return [
        ("model", f"{result['out']} ({result['defense']}, sha256 {result['model_sha256'][:12]})"),
        ("trained for", f"{result['threat']} on {result['dataset']}, {spent}"),
        ("clean", f"{share(counts['clean'] / images, counts['clean'], images)} of the held-out training images"),
        ("certified", f"{share(counts['certified'] / images, counts['certified'], images)} of the held-out training images"),
        ("next", f"patchcert certify {result['out']}"),
    ]


def _data(result: dict[str, Any]) -> str:
    part = "whole split" if result["full_split"] else "subset"
    return f"{result['dataset']} {result['split']}, {result['images']} images ({part}, {result['data_source']})"


def _time(result: dict[str, Any]) -> str:
    return f"{result['seconds']:.1f} s, {result['images_per_second']:.0f} images/s on {result['device']}"
