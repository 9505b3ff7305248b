"""What a model card shows: the Hub's metadata keys and the prose, both made from the card alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from patchcert_cli.threats import Guarantee, as_options

if TYPE_CHECKING:
    from patchcert_cli.cards.card import Card
    from patchcert_cli.cards.entries import Measured, Published

HUB_DATASETS = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10", "imagenet": "ILSVRC/imagenet-1k"}
CHANGES = {
    "patch": "replaces the pixels of one such patch, wherever it lies wholly inside the image, by any values in [0, 1]",
    "sparse": "changes at most k pixels (k single channel values where the threat ends in `:value`) to any values in [0, 1]",
}


def hub_metadata(card: Card) -> dict[str, Any]:
    """The Hub's own front matter keys."""
    metadata: dict[str, Any] = {
        "library_name": "patchcert",
        "pipeline_tag": "image-classification",
        "license": card.license,
        **({} if ":" in card.dataset else {"datasets": [HUB_DATASETS.get(card.dataset, card.dataset)]}),  # not a local folder
        "tags": [*(["certified-robustness"] if card.guarantee.proves else []), f"{card.threat.kind}-attack", card.defense],
    }
    if card.results:
        results = [_hub_result(one) for one in card.results]
        metadata["model-index"] = [{"name": card.name, "results": results}]
    return metadata


def _hub_result(one: Measured) -> dict[str, Any]:
    about = {"threat": str(one.threat), "images": one.images, "guarantee": str(one.guarantee), "method": one.method}
    about |= {"arithmetic": str(one.arithmetic)} if one.arithmetic else {}
    kind, words = metric(one)
    return {
        "task": {"type": "image-classification"},
        "dataset": {"name": one.dataset, "type": HUB_DATASETS.get(one.dataset, one.dataset), "split": one.split},
        "metrics": [
            {"type": "accuracy", "name": "clean accuracy", "value": one.clean / one.images},
            {
                "type": kind,
                "name": f"{words} ({one.threat})",
                "value": one.certified / one.images,
                "args": about,
            },
        ],
    }


def metric(one: Measured) -> tuple[str, str]:
    """The Hub's name of what was certified, and a text for readers: detection is another metric than recovery."""
    if one.guarantee is Guarantee.DETECTION:
        return "certified_detection_accuracy", "certified detection accuracy"
    return "certified_accuracy", "certified accuracy"


def prose(card: Card) -> str:
    """The Markdown below the front matter."""
    sections = [
        f"# {card.name}",
        _summary(card),
        *([card.notes] if card.notes else []),
        *(["## Measured beside published", *_comparison(card)] if card.guarantee.proves else []),
        *_samples(card),
        *_attacked(card),
        "## Use",
        *_use(card),
        "## How it was made",
        *_making(card),
        "## What is proven, and what is not",
        *_proof(card),
        "## Files",
        _files(card),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(card: Card) -> str:
    facts = {
        "Status": f"**{card.status}**: {card.reason}" if card.reason else card.status,
        "Defense": f"{card.defense} ({card.source})" if card.source else card.defense,
        "Network": card.network,
        "Data set": card.dataset,
        "Made for" if card.public else "Trained against": f"`{card.threat}`",
        **({} if card.guarantee is Guarantee.RECOVERY else {"Guarantee": str(card.guarantee)}),
        **({"Weights": card.origin} if card.origin else {}),
        "Licence": card.license,
        "Hub": f"{card.hub.repo} @ {card.hub.revision}" if card.hub.revision else _unpinned(card),
    }
    return "\n".join(f"- {name}: {text}" for name, text in facts.items())


def _unpinned(card: Card) -> str:
    if card.classifier:
        return f"{card.hub.repo}, public weights of others; the commit used is printed and recorded"
    return f"not published yet ({card.hub.repo})"


def percent(count: int, images: int) -> str:
    """An accuracy with its count."""
    return f"{count / images:.2%} ({count}/{images})"


def _comparison(card: Card) -> list[str]:
    """A table for each guarantee that was measured; published numbers are of the card's own guarantee."""
    others = sorted({one.guarantee for one in card.results} - {card.guarantee})
    parts = _compared(card, card.guarantee)
    for guarantee in others:
        parts += [f"Guarantee of {guarantee}, which is another promise:", *_compared(card, guarantee)]
    return parts


def _compared(card: Card, guarantee: Guarantee) -> list[str]:
    lines = [
        "| threat | data | arithmetic | clean, measured | certified, measured | 95 % interval"
        " | clean, published | certified, published |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    results = [one for one in card.results if one.guarantee == guarantee]
    reports = card.published if guarantee == card.guarantee else ()
    published = {one.threat: one for one in reports}
    for one in results:
        low, high = one.certified_interval
        measured = [percent(one.clean, one.images), percent(one.certified, one.images), f"{low:.2%} to {high:.2%}"]
        cells = [
            f"`{one.threat}`, {one.guarantee} ({one.method})",
            f"{one.dataset} {one.split}",
            str(card.arithmetic(one)),
            *measured,
        ]
        lines.append(_row(cells, published.get(one.threat)))
    measured_threats = {one.threat for one in results}
    for threat, report in published.items():
        if threat not in measured_threats:
            lines.append(_row([f"`{threat}`", card.dataset, "", "not measured", "not measured", ""], report))
    if len(lines) == 2:
        return ["No test measurement yet, and no published numbers."]
    notes = ["Published numbers are those of the source; they belong to its weights, not to these:"] if published else []
    notes += [f"- `{one.threat}`: {one.source}" for one in reports]
    made = list(dict.fromkeys(f"- `{one.command}` (patchcert {one.patchcert}, {one.date})" for one in results))
    paragraphs = ["\n".join(lines)]
    if notes:
        paragraphs += [notes[0], "\n".join(notes[1:])]
    return paragraphs + (["Measured with:", "\n".join(made)] if made else [])


def _samples(card: Card) -> list[str]:
    """What was measured on images that are not a test split, with their number and origin in each line."""
    if not card.samples:
        return []
    lines = ["| images | n | threat | masks | arithmetic | clean | certified | 95 % interval |", "|" + " --- |" * 8]
    for one in card.samples:
        low, high = one.certified_interval
        shares = [percent(one.clean, one.images), percent(one.certified, one.images), f"{low:.2%} to {high:.2%}"]
        about = [one.pictures, str(one.images), f"`{one.threat}`, {one.guarantee} ({one.method})", one.masks, one.arithmetic]
        lines.append("| " + " | ".join([*about, *shares]) + " |")
    known = "These are not figures for the test split: they hold for images like these only."
    if not card.results:
        known = f"No figure for the test split of {card.dataset} is known; these hold for images like theirs only."
    made = dict.fromkeys(f"- `{one.command}` (patchcert {one.patchcert}, {one.date}; {one.records})" for one in card.samples)
    return ["## Measured on other images", known, "\n".join(lines), "Measured with:", "\n".join(made)]


def _attacked(card: Card) -> list[str]:
    """Accuracy under named attacks, apart from everything that is proven."""
    if not card.attacked:
        return []
    lines = ["| threat | data | n | clean | right under all attacks | attacks |", "|" + " --- |" * 6]
    for one in card.attacked:
        shares = [percent(one.clean, one.images), percent(one.right, one.images)]
        about = [f"`{one.threat}`", f"{one.dataset} {one.split}", str(one.images), *shares, ", ".join(one.attacks)]
        lines.append("| " + " | ".join(about) + " |")
    made = dict.fromkeys(f"- `{one.command}` (patchcert {one.patchcert}, {one.date})" for one in card.attacked)
    known = "This proves nothing: a stronger attack may leave less."
    return ["## Accuracy under attack", known, "\n".join(lines), "Measured with:", "\n".join(made)]


def _row(cells: list[str], report: Published | None) -> str:
    shares = [f"{report.clean:.2%}", f"{report.certified:.2%}"] if report else ["", ""]
    return "| " + " | ".join([*cells, *shares]) + " |"


def _use(card: Card) -> list[str]:
    if card.classifier:
        return [f"The weights are public, `{card.classifier}`: nothing is trained. Measure them:", _code("bash", card.command)]
    if not card.files:
        return ["There are no weights yet. Train them:", _code("bash", card.command)]
    option, verb = as_options(card.threat), "certify" if card.guarantee.proves else "attack"
    option += " --data imagefolder:./val" if card.public else ""
    name = card.name if card.hub.repo == f"patchcert/{card.name}" else f"{card.hub.repo}@{card.hub.revision or 'COMMIT'}"
    proof = f'certificate = defense.certify(images, patchcert_cli.parse_threat("{card.threat}"))'
    python = [
        "import patchcert_cli",
        "",
        "# a torch module; images are [B, C, H, W] in [0, 1]",
        f'defense = patchcert_cli.load("{name}")',
        proof if card.guarantee.proves else "answers = defense.predict(images)",
    ]
    return [_code("bash", f"patchcert {verb} {name} {option}"), _code("python", "\n".join(python))]


def _making(card: Card) -> list[str]:
    parts = [] if card.public else [_code("bash", card.command)]
    text = f"Trained on `{card.split}` of {card.dataset}"
    text += ", by those who published the weights. The defense around them:" if card.public else f", seed {card.seed}."
    if card.validation:
        held = card.validation
        text += f" On {held.images} held-out training images: clean {percent(held.clean, held.images)},"
        text += f" certified {percent(held.certified, held.images)}. No test image was used to choose anything."
    if teacher := card.recipe.get("teacher"):
        text += f" Taught by `{teacher}`, whose own training may have seen these held-out images."
    if card.trained:
        made = card.trained
        text += f" {made.date}, {made.seconds:.0f} s on {made.device} with {made.threads} threads;"
        text += f" torch {made.torch}, patchcert {made.patchcert}."
    return [*parts, text, _code("yaml", yaml.safe_dump(card.to_dict()["recipe"], sort_keys=False, allow_unicode=True).rstrip())]


def _proof(card: Card) -> list[str]:
    if not card.guarantee.proves:
        return [
            f"Nothing is proven: {card.defense} has no certificate. All that is known is how often it withstood given attacks."
        ]
    change = CHANGES.get(card.threat.kind, "makes any change that the threat allows")
    detects = card.guarantee is Guarantee.DETECTION
    proven = (
        "An image counts as certified only if its answer is right and a proof shows that no attacker that"
        f" {change} can alter that answer{' without raising an alarm' if detects else ''}"
        f" (here `{card.threat}`; guarantee: {card.guarantee}). Each image and threat is proven separately."
    )
    if detects:
        proven += " An image that raises an alarm without an attack counts as a wrong answer. This guarantees less than recovery."
    elif any(one.guarantee is Guarantee.DETECTION for one in card.results):
        proven += " Where the guarantee is detection, the attacker can alter the answer, but not without raising an alarm."
    words = dict.fromkeys(card.arithmetic(one) for one in card.results)
    return [
        proven,
        *(f"Arithmetic: **{one}**. That is: {one.meaning}." for one in words),
        "Not proven: anything about images that are not certified, about larger or additional patches, more pixels or other"
        " threat models, or about changes outside them such as rotation or noise. The interval holds for images drawn like"
        " the test images, not for other data. Success rates of attacks are empirical and are not part of this card.",
    ]


def _files(card: Card) -> str:
    if not card.files:
        return "None."
    rows = [f"| {name} | {file.size} | `{file.sha256}` |" for name, file in card.files.items()]
    return "\n".join(["| file | bytes | sha256 |", "| --- | --- | --- |", *rows])


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
