"""From what certify measured to what a card may say: a claim counts only with every record of the full test split behind it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from patchcert_cli.arithmetic import former
from patchcert_cli.cards import Card, File, Sample, weights_sha256
from patchcert_cli.cards.published import PublishedRecords, check_card, check_counts
from patchcert_cli.catalog.resolve import ResolvedModel
from patchcert_cli.errors import ClaimError, IntegrityError, PatchcertError
from patchcert_cli.storage import files
from patchcert_cli.threats import as_options, parse_threat

MEASURED = (
    *("dataset", "split", "images", "threat", "certified_interval", "method", "date", "command", "patchcert"),
    *("guarantee", "arithmetic"),
)

Results = Mapping[str, Mapping[str, Any]]  # results of certify, by the path of their result.json


def card_with_results(found: ResolvedModel, results: Results) -> tuple[Card, bytes | None]:
    """The card of ``found`` with these results as its measurements, and the records behind them as one file.

    Raises:
        ClaimError: a result is about other weights or not about every image of the test split, or its records do not bear it out.
        IntegrityError: something is not a result of certify.
    """
    assert found.card is not None
    entries = [entry for where, result in results.items() for entry in _entries(result, where, found)]
    published = PublishedRecords.from_runs(results)
    status = found.card.status if found.card.public else "measured" if entries else "trained"
    kept = {name: file for name, file in found.card.files.items() if name != files.PUBLISHED_RECORDS}
    card = replace(found.card, status=status, results=(), files=kept).to_dict()
    if published is None:
        return Card.from_dict(card, where=found.name), None
    packed = published.pack()
    card["files"][files.PUBLISHED_RECORDS] = {"sha256": files.sha256_of(packed), "size": len(packed)}
    return Card.from_dict({**card, "results": entries}, where=found.name), packed


def card_with_samples(found: ResolvedModel, results: Results, pictures: Mapping[str, str]) -> tuple[Card, dict[str, bytes]]:
    """The card of ``found`` with these results, on pictures that are no test split, and their records by name of file.

    ``pictures`` says for each result what the pictures are and where they come from. A measurement of the same claim on pictures
    of the same words is replaced.

    Raises:
        ClaimError: a result is about other weights, or its records do not bear it out.
        IntegrityError: something is not a result of certify.
    """
    assert found.card is not None
    card, packed = found.card, {}
    for where, result in results.items():
        common = {key: value for key, value in result.items() if key != "claims"}
        claims = [{**common, **claim} for claim in result.get("claims", [{}])]
        for claim in claims:
            _check_about(claim, where, found)
            _check_counts(claim, where)
        published = PublishedRecords.from_runs({where: result})
        assert published is not None
        number = next(n for n in range(1, 1000) if f"sample-{n}.jsonl.gz" not in card.files)
        name = f"sample-{number}.jsonl.gz"
        packed[name] = published.pack()
        masks = _masks(Path(where).parent)
        fresh = tuple(_sample(claim, pictures[where], masks, name) for claim in claims)
        keys = [(one.pictures, one.threat, one.method, one.guarantee) for one in fresh]
        kept = tuple(one for one in card.samples if (one.pictures, one.threat, one.method, one.guarantee) not in keys)
        card = replace(card, samples=(*kept, *fresh))
        named = {one.records for one in card.samples}
        held = {file: facts for file, facts in card.files.items() if file in named or not re.fullmatch(files.SAMPLE, file)}
        content = packed[name]
        card = replace(card, files={**held, name: File(files.sha256_of(content), len(content))})
    return Card.from_dict(card.to_dict(), where=found.name), {name: packed[name] for name in packed if name in card.files}


def _sample(result: Mapping[str, Any], pictures: str, masks: str, records: str) -> Sample:
    copied = ("threat", "certified_interval", "method", "date", "command", "patchcert", "guarantee", "arithmetic", "images")
    said = {key: result[key] for key in copied} | {key: result["counts"][key] for key in ("clean", "certified")}
    return Sample(
        **{**said, "certified_interval": tuple(said["certified_interval"])}, pictures=pictures, masks=masks, records=records
    )


def _masks(run: Path) -> str:
    """The masks of a run in words; empty if it has none."""
    said = files.read_json(run / files.MANIFEST).get("setting", {}).get("masks", {})
    return f"{said['per_axis']} per axis" if said.get("per_axis") else ""


def check_samples(card: Card, folder: Path) -> None:
    """Raise :class:`ClaimError` unless the records in ``folder`` bear out the samples of ``card``."""
    for one in card.samples:
        published = PublishedRecords.read(folder / one.records)
        if published.model_sha256 != weights_sha256(card.files):
            raise ClaimError(f"'{folder / one.records}' is about other weights (sha256 {published.model_sha256[:12]}…).")
        at = published.position(one.threat, one.method, one.guarantee)
        check_counts(published, at, one.images, one.clean, one.certified, str(folder / one.records))


def check_results(card: Card, folder: Path) -> None:
    """Raise :class:`ClaimError` unless the records in ``folder`` bear out every measurement of ``card``."""
    where = str(folder)
    if not card.results:
        raise ClaimError(f"{card.name} has no measurement on the full test split.", hint=_how(card, where))
    if files.PUBLISHED_RECORDS not in card.files or not (folder / files.PUBLISHED_RECORDS).is_file():
        raise ClaimError(f"'{folder / files.PUBLISHED_RECORDS}' is missing: the measurements of {card.name} have no records.")
    published = PublishedRecords.read(folder / files.PUBLISHED_RECORDS)
    if published.model_sha256 != weights_sha256(card.files):
        raise ClaimError(f"the records of {card.name} are about other weights (sha256 {published.model_sha256[:12]}…).")
    check_card(published, card.results, where, card.defense)


def results_about(found: ResolvedModel, places: list[Path]) -> dict[str, Mapping[str, Any]]:
    """The newest results in ``places`` about these weights and the full test split, one for each set of claims.

    Raises:
        ClaimError: there is none; says what there is instead.
    """
    assert found.card is not None
    fitting: dict[str, tuple[float, str, Mapping[str, Any]]] = {}
    partial: list[str] = []
    for path in sorted({path.resolve() for place in places if place.is_dir() for path in place.glob(f"*/{files.RESULT}")}):
        try:
            result = files.read_json(path)
        except PatchcertError:
            continue  # a run that crashed while writing is none
        if result.get("model_sha256") != found.sha256 or "attack" in result or result.get("defense") != found.card.defense:
            continue
        if result.get("split") != "test" or result.get("full_split") is not True:
            partial.append(f"{result.get('images')} images of {result.get('split')}")
            continue
        stated = repr(sorted((one.get("threat"), one.get("method")) for one in result.get("claims", [result])))
        entry = (path.stat().st_mtime, str(path), result)
        fitting[stated] = max(fitting.get(stated, entry), entry, key=lambda one: one[0])
    if not fitting:
        there = f" (only {', '.join(dict.fromkeys(partial))})" if partial else ""
        raise ClaimError(f"no result of these weights on the full test split{there}.", hint=_how(found.card, str(found.folder)))
    return {path: result for _, path, result in fitting.values()}


def _how(card: Card, where: str) -> str:
    return f"Make one: patchcert certify {where} {as_options(parse_threat(card.threat))}"


def _entries(result: Mapping[str, Any], where: str, found: ResolvedModel) -> list[dict[str, Any]]:
    """A certify result as the card tells it, one entry for each claim, after holding it against the weights."""
    common = {key: value for key, value in result.items() if key != "claims"}
    return [_entry({**common, **claim}, where, found) for claim in result.get("claims", [{}])]


def _check_about(result: Mapping[str, Any], where: str, found: ResolvedModel) -> None:
    assert found.card is not None
    if "attack" in result or "certified" not in (result.get("counts") or {}):
        raise IntegrityError(f"'{where}' is not a result of patchcert certify.")
    if result.get("model_sha256") != found.sha256:
        raise ClaimError(
            f"'{where}' is about other weights (sha256 {str(result.get('model_sha256'))[:12]}…, not {found.sha256[:12]}…).",
            hint="Certify this run.",
        )
    if result.get("defense") != found.card.defense:  # the same weights may stand behind several, with other guarantees
        raise ClaimError(f"'{where}' is about {result.get('defense')} with these weights, but the model is {found.card.defense}.")


def _check_counts(result: Mapping[str, Any], where: str) -> None:
    for key in ("clean", "certified"):
        if result.get(f"{key}_accuracy") != result["counts"].get(key, -1) / (result.get("images") or 1):
            raise ClaimError(f"'{where}': {key}_accuracy is not its count over its images.")


def _entry(result: Mapping[str, Any], where: str, found: ResolvedModel) -> dict[str, Any]:
    assert found.card is not None
    _check_about(result, where, found)
    if result.get("split") != "test" or result.get("full_split") is not True:
        raise ClaimError(
            f"'{where}' is about {result.get('images')} images of {result.get('split')}, not about the full test split.",
            hint="Certify it without --limit.",
        )
    if result.get("dataset") != found.card.dataset:
        raise ClaimError(f"'{where}' is about {result.get('dataset')}, but the model was trained on {found.card.dataset}.")
    _check_counts(result, where)
    said = {"arithmetic": str(former(found.card.defense)), **{key: result[key] for key in MEASURED if key in result}}
    return {**said, "clean": result["counts"].get("clean"), "certified": result["counts"]["certified"]}
