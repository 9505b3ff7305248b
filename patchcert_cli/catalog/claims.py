"""From what certify measured to what a card may claim: a measurement needs a record of every image of the test split."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from patchcert_cli.arithmetic import former
from patchcert_cli.cards import Card, File, Measured, Sample, weights_sha256
from patchcert_cli.cards.published import PublishedRecords, check_card, check_counts
from patchcert_cli.cards.results import CertifyResult, ClaimResult, current_result
from patchcert_cli.catalog.resolve import ResolvedModel
from patchcert_cli.errors import ClaimError, PatchcertError
from patchcert_cli.storage import files
from patchcert_cli.threats import Guarantee, Threat, as_options

MAX_SAMPLE_FILES = 999  # of one card
MEASURE = "Certify it again: patchcert certify, then patchcert zoo add with --result."

Results = Mapping[str, Mapping[str, Any]]  # results of certify, by the path of their result.json


def card_with_results(model: ResolvedModel, results: Results) -> tuple[Card, bytes | None]:
    """The card of ``model`` with these results beside or instead of its earlier measurements, and all records as one file.

    A measurement of the same claim is replaced, the others stay: they are about the same weights and images. The card is not
    validated as a whole yet; that is done when it is rendered.

    Raises:
        ClaimError: a result is about other weights, does not cover the test split, or has counts that its records do not have.
        IntegrityError: something is not a result of certify.
    """
    assert model.card is not None
    measured = {where: _read(values, where, model) for where, values in results.items()}
    for where, result in measured.items():
        _check_full_split(result, where, model.card)
        _check_own_masks(where, model)
        _check_accuracies(result, where)
    new = [_entry(result, claim, model.card) for result in measured.values() for claim in result.claims]
    replaced = {_claim(one) for one in new}
    kept_entries = [one for one in model.card.results if _claim(one) not in replaced]
    entries = (*kept_entries, *new)
    before = None
    if kept_entries:
        check_results(model.card, model.folder)
        before = PublishedRecords.read(model.folder / files.PUBLISHED_RECORDS).only({_claim(one) for one in kept_entries})
    published = PublishedRecords.from_runs(measured, before=before)
    status = model.card.status if model.card.public else "measured" if entries else "trained"
    kept = {name: file for name, file in model.card.files.items() if name != files.PUBLISHED_RECORDS}
    card = replace(model.card, status=status, results=entries, files=kept)
    if published is None:
        return card, None
    packed = published.pack()
    return replace(card, files=kept | {files.PUBLISHED_RECORDS: File(files.sha256_of(packed), len(packed))}), packed


def card_with_samples(model: ResolvedModel, results: Results, pictures: Mapping[str, str]) -> tuple[Card, dict[str, bytes]]:
    """The card of ``model`` with these results, on images that are not a test split, and their records by file name.

    ``pictures`` describes for each result the images and where they come from. A measurement of the same claim on images with
    the same description is replaced.

    Raises:
        ClaimError: a result is about other weights, or has counts that its records do not have.
        IntegrityError: something is not a result of certify.
    """
    assert model.card is not None
    card, packed = model.card, {}
    for where, values in results.items():
        result = _read(values, where, model)
        _check_accuracies(result, where)
        published = PublishedRecords.from_runs({where: result})
        assert published is not None
        numbers = range(1, MAX_SAMPLE_FILES + 1)
        name = next(name for number in numbers if (name := f"sample-{number}.jsonl.gz") not in card.files)
        packed[name] = published.pack()
        masks = _masks(Path(where).parent)
        new = [_sample(result, claim, pictures[where], masks, name) for claim in result.claims]
        replaced = {_sample_key(one) for one in new}
        kept = [one for one in card.samples if _sample_key(one) not in replaced]
        card = replace(card, samples=(*kept, *new))
        named = {one.records for one in card.samples}
        held = {file: facts for file, facts in card.files.items() if file in named or not re.fullmatch(files.SAMPLE, file)}
        card = replace(card, files={**held, name: File(files.sha256_of(packed[name]), len(packed[name]))})
    return card, {name: content for name, content in packed.items() if name in card.files}


def _claim(one: Measured | Sample) -> tuple[Threat, str, Guarantee]:
    return one.threat, one.method, one.guarantee


def _sample_key(one: Sample) -> tuple[Any, ...]:
    return one.pictures, *_claim(one)


def _sample(result: CertifyResult, claim: ClaimResult, pictures: str, masks: str, records: str) -> Sample:
    arithmetic = claim.arithmetic or former(result.defense)
    return Sample(**_common(result, claim), pictures=pictures, masks=masks, records=records, arithmetic=arithmetic)


def _entry(result: CertifyResult, claim: ClaimResult, card: Card) -> Measured:
    arithmetic = claim.arithmetic or former(card.defense)
    return Measured(**_common(result, claim), dataset=result.dataset, split=result.split, arithmetic=arithmetic)


def _common(result: CertifyResult, claim: ClaimResult) -> dict[str, Any]:
    """What measurements on any images have."""
    values = {name: getattr(claim, name) for name in ("threat", "method", "guarantee", "certified_interval")}
    values |= {name: getattr(result, name) for name in ("images", "date", "command", "patchcert")}
    return values | {"clean": claim.counts.clean, "certified": claim.counts.certified}


def _masks(run: Path) -> str:
    """The masks of a run as text; empty if it has none."""
    masks = _setting(run).get("masks", {})
    return f"{masks['per_axis']} per axis" if masks.get("per_axis") else ""


def _setting(run: Path) -> Mapping[str, Any]:
    """What a run of certify used besides weights and images."""
    setting: Mapping[str, Any] = files.read_json(run / files.MANIFEST).get("setting", {})
    return setting


def _other_masks(where: Path, model: ResolvedModel) -> str:
    """How the masks of a run differ from those of the model; empty if they do not.

    Other masks are another predictor with the same weights, whose numbers are not those of the model.
    """
    from patchcert_cli import checkpoint  # imports torch

    path = model.folder / files.CONFIG
    own = checkpoint.upgraded(files.read_json(path), path)["deployed"].get("masks")
    if not own or (used := _setting(where.parent).get("masks")) == own:
        return ""
    return f"{json.dumps(used)}, not {json.dumps(own)}"


def _check_own_masks(where: str, model: ResolvedModel) -> None:
    if difference := _other_masks(Path(where), model):
        raise ClaimError(
            f"'{where}' is about other masks than those of the model: {difference}.",
            hint="Certify without --masks, or give the result as --sample.",
        )


def check_samples(card: Card, folder: Path) -> None:
    """Raise :class:`ClaimError` unless the samples of ``card`` have the counts of the records in ``folder``."""
    for one in card.samples:
        published = PublishedRecords.read(folder / one.records)
        if published.model_sha256 != weights_sha256(card.files):
            raise ClaimError(
                f"'{folder / one.records}' is about other weights (sha256 {published.model_sha256[:12]}…).",
                hint=MEASURE,
            )
        at = published.position(one.threat, one.method, one.guarantee)
        check_counts(published, at, one.images, one.clean, one.certified, str(folder / one.records))


def check_results(card: Card, folder: Path) -> None:
    """Raise :class:`ClaimError` unless every measurement of ``card`` has the counts of the records in ``folder``."""
    where = str(folder)
    if not card.results:
        raise ClaimError(f"{card.name} has no measurement on the full test split.", hint=_how(card, where))
    if files.PUBLISHED_RECORDS not in card.files or not (folder / files.PUBLISHED_RECORDS).is_file():
        raise ClaimError(
            f"'{folder / files.PUBLISHED_RECORDS}' is missing: the measurements of {card.name} have no records.",
            hint=MEASURE,
        )
    published = PublishedRecords.read(folder / files.PUBLISHED_RECORDS)
    if published.model_sha256 != weights_sha256(card.files):
        raise ClaimError(
            f"the records of {card.name} are about other weights (sha256 {published.model_sha256[:12]}…).",
            hint=MEASURE,
        )
    check_card(published, card.results, where, card.defense)


def results_about(model: ResolvedModel, places: list[Path]) -> dict[str, Mapping[str, Any]]:
    """The newest results in ``places`` about these weights and the full test split, one for each set of claims.

    Raises:
        ClaimError: there is none; the message names what there is instead.
    """
    assert model.card is not None
    fitting: dict[str, tuple[float, str, Mapping[str, Any]]] = {}
    partial: list[str] = []
    for path in sorted({path.resolve() for place in places if place.is_dir() for path in place.glob(f"*/{files.RESULT}")}):
        try:
            result = current_result(files.read_json(path))
        except PatchcertError:
            continue  # the run crashed while it wrote the file
        if result.get("model_sha256") != model.sha256 or "attack" in result or result.get("defense") != model.card.defense:
            continue
        if result.get("split") != "test" or result.get("full_split") is not True:
            partial.append(f"{result.get('images')} images of {result.get('split')}")
            continue
        if _other_masks(path, model):
            continue
        claims = repr(sorted((str(one.get("threat")), str(one.get("method"))) for one in result["claims"]))
        entry = (path.stat().st_mtime, str(path), result)
        fitting[claims] = max(fitting.get(claims, entry), entry, key=lambda one: one[0])
    if not fitting:
        there = f" (only {', '.join(dict.fromkeys(partial))})" if partial else ""
        raise ClaimError(f"no result of these weights on the full test split{there}.", hint=_how(model.card, str(model.folder)))
    return {path: result for _, path, result in fitting.values()}


def _how(card: Card, where: str) -> str:
    return f"Make one: patchcert certify {where} {as_options(card.threat)}"


def _read(values: Mapping[str, Any], where: str, model: ResolvedModel) -> CertifyResult:
    """A result of certify, checked to be about the weights and the defense of ``model``."""
    assert model.card is not None
    result = CertifyResult.from_dict(values, where)
    if result.model_sha256 != model.sha256:
        raise ClaimError(
            f"'{where}' is about other weights (sha256 {result.model_sha256[:12]}…, not {model.sha256[:12]}…).",
            hint="Certify this run.",
        )
    if result.defense != model.card.defense:  # the same weights may serve several, with other guarantees
        raise ClaimError(
            f"'{where}' is about {result.defense} with these weights, but the model is {model.card.defense}.",
            hint="Give the result.json of this model.",
        )
    return result


def _check_accuracies(result: CertifyResult, where: str) -> None:
    for claim in result.claims:
        for name in ("clean", "certified"):
            if getattr(claim, f"{name}_accuracy") != getattr(claim.counts, name) / result.images:
                raise ClaimError(
                    f"'{where}': {name}_accuracy is not its count over its images.", hint="The file was changed: certify again."
                )


def _check_full_split(result: CertifyResult, where: str, card: Card) -> None:
    if result.split != "test" or not result.full_split:
        raise ClaimError(
            f"'{where}' is about {result.images} images of {result.split}, not about the full test split.",
            hint="Certify it without --limit.",
        )
    if result.dataset != card.dataset:
        raise ClaimError(
            f"'{where}' is about {result.dataset}, but the model was trained on {card.dataset}.",
            hint="Give the result.json of a run on these images.",
        )
