"""The entries of a model card, with the limits of each field and the rules between them."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from patchcert_cli.arithmetic import Arithmetic
from patchcert_cli.errors import UsageError
from patchcert_cli.schema import Count, Must, NonNegative, Parsed, Positive, Rule
from patchcert_cli.storage import checksum_cache
from patchcert_cli.storage.files import CONFIG, PUBLISHED_RECORDS, SAMPLE, WEIGHTS, weight_files
from patchcert_cli.threats import Guarantee, Threat, parse_threat

STATUSES = ("measured", "trained", "recipe only", "public weights", "unreliable")
UNTRAINED = ("recipe only", "public weights")


def valid_name(name: str) -> bool:
    """Whether ``name`` may name a model: lower-case words of letters and digits, joined by single ``-`` or ``.``."""
    return len(name) <= 96 and re.fullmatch(r"[a-z0-9]+(?:[.-][a-z0-9]+)*", name) is not None


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _match(pattern: str, expected: str) -> Must:
    return Must(partial(_full, pattern), expected)


def _full(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


Text = Annotated[str, Must(bool, "a text of one character or more")]
Name = Annotated[str, Must(valid_name, "lower-case letters, digits, '-' and '.'")]
ThreatField = Annotated[Threat, Parsed(parse_threat)]
Date = Annotated[str, Must(_is_date, "a date such as 2026-01-31")]
Seconds = NonNegative
Share = Annotated[float, Must(lambda p: 0 <= p <= 1, "a fraction in [0, 1]")]
Split = Annotated[str, _match(r"[a-z]+\[\d+\]", "a split and how many of its images, such as train[55000]")]
Sha256 = Annotated[str, _match(r"[0-9a-f]{64}", "a sha256 of 64 hex digits")]
Commit = Annotated[str, _match(r"[0-9a-f]{40}", "a commit of 40 hex digits")]
Repo = Annotated[str, _match(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", "organization/name")]
Proven = Annotated[Guarantee, Must(lambda one: one.proves, "a guarantee of certificates")]
SampleFile = Annotated[str, _match(SAMPLE, "a file such as sample-1.jsonl.gz")]
Status = Annotated[str, Must(STATUSES.__contains__, f"one of {', '.join(STATUSES)}")]


def _ordered_counts(images: int, clean: int, certified: int) -> Iterable[str]:
    if not certified <= clean <= images:
        yield f"certified {certified}, clean {clean}, images {images}: each must be at most the next"


def _interval_holds_the_share(images: int, certified: int, certified_interval: tuple[float, float]) -> Iterable[str]:
    low, high = certified_interval
    if not low <= certified / images <= high:
        yield f"certified_interval [{low}, {high}] does not hold {certified}/{images}"


def _ordered_shares(clean: float, certified: float) -> Iterable[str]:
    if certified > clean:
        yield f"certified {certified} exceeds clean {clean}"


@dataclass(frozen=True)
class File:
    """What a file of the model folder must be."""

    sha256: Sha256
    size: Positive

    @classmethod
    def of(cls, path: Path) -> File:
        """The facts of a file on disk."""
        return cls(checksum_cache.sha256(path), path.stat().st_size)


@dataclass(frozen=True)
class Hub:
    """Where the model is on the Hub; without a ``revision`` it has not been published there."""

    repo: Repo
    revision: Commit | None = None


@dataclass(frozen=True)
class Training:
    """Where and when the weights were made."""

    date: Date
    seconds: Seconds
    device: Text
    threads: Positive
    torch: Text
    patchcert: Text


@dataclass(frozen=True)
class Validation:
    """Counts on the training images that were held out."""

    images: Positive
    clean: Count
    certified: Count
    rules: ClassVar[tuple[Rule, ...]] = (_ordered_counts,)


@dataclass(frozen=True)
class Measured:
    """One measurement with this code: counts, and the exact 95 % interval of the certified accuracy.

    Attributes:
        arithmetic: what is known of rounding in the certificates; None in older cards, where it follows from the defense
            (:meth:`patchcert_cli.cards.Card.arithmetic`).
    """

    dataset: Text
    split: Text
    images: Positive
    threat: ThreatField
    clean: Count
    certified: Count
    certified_interval: tuple[Share, Share]
    method: Text
    date: Date
    command: Text
    patchcert: Text
    guarantee: Proven = Guarantee.RECOVERY
    arithmetic: Arithmetic | None = None
    rules: ClassVar[tuple[Rule, ...]] = (_ordered_counts, _interval_holds_the_share)


@dataclass(frozen=True)
class Sample:
    """One measurement on images that are not a test split: counts, and the exact 95 % interval of the certified accuracy.

    It is valid for such images only, so no leaderboard or table of the zoo holds it.

    Attributes:
        pictures: what the images are and where they come from.
        masks: of a masked network, for example ``3 per axis``; empty if there are none.
        records: the file that holds the verdict on each of them.
    """

    pictures: Text
    images: Positive
    threat: ThreatField
    clean: Count
    certified: Count
    certified_interval: tuple[Share, Share]
    method: Text
    date: Date
    command: Text
    patchcert: Text
    records: SampleFile
    guarantee: Proven = Guarantee.RECOVERY
    arithmetic: Arithmetic = Arithmetic.MEASURED
    masks: str = ""
    rules: ClassVar[tuple[Rule, ...]] = (_ordered_counts, _interval_holds_the_share)


@dataclass(frozen=True)
class Published:
    """Numbers that a paper reports, as fractions, and which paper and table."""

    threat: ThreatField
    clean: Share
    certified: Share
    source: Text
    rules: ClassVar[tuple[Rule, ...]] = (_ordered_shares,)


def _right_of_clean(images: int, clean: int, right: int) -> Iterable[str]:
    if not right <= clean <= images:
        yield f"right {right}, clean {clean}, images {images}: each must be at most the next"


@dataclass(frozen=True)
class Attacked:
    """Accuracy under attacks that were run: right answers that none of them changed. It proves nothing, so no table of
    certificates holds it.

    Attributes:
        attacks: their names; an image counts as right if it withstood all of them.
    """

    dataset: Text
    split: Text
    images: Positive
    threat: ThreatField
    clean: Count
    right: Count
    attacks: Annotated[tuple[Text, ...], Must(bool, "the name of one attack or more")]
    date: Date
    command: Text
    patchcert: Text
    rules: ClassVar[tuple[Rule, ...]] = (_right_of_clean,)


def weights_sha256(files: Mapping[str, File]) -> str:
    """What identifies weights: the sha256 of their file, or of the list of their files' names and sha256."""
    names = weight_files(files)
    if len(names) == 1:
        return files[names[0]].sha256
    return hashlib.sha256("".join(f"{name} {files[name].sha256}\n" for name in names).encode()).hexdigest()


def _plain_files(files: dict[str, File]) -> Iterable[str]:
    for name in files:
        records = name == PUBLISHED_RECORDS or re.fullmatch(SAMPLE, name)
        if not records and not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.(safetensors|json)", name):
            yield f"files: '{name}' is not {PUBLISHED_RECORDS} or a plain name that ends in .safetensors or .json"


def _status_fits(
    status: str,
    reason: str,
    results: tuple[Measured, ...],
    files: dict[str, File],
    trained: Training | None,
    validation: Validation | None,
) -> Iterable[str]:
    if status in UNTRAINED:
        present: dict[str, Any] = {"results": results, "trained": trained, "validation": validation}
        present |= {"files": files} if status == "recipe only" else {}
        yield from (f"{name} must be empty while status is {status}" for name, value in present.items() if value)
    if status not in UNTRAINED:
        needed = {WEIGHTS: bool(weight_files(files)), CONFIG: CONFIG in files}
        needed[PUBLISHED_RECORDS] = PUBLISHED_RECORDS in files or not results
        yield from (f"files has no {name}" for name, there in needed.items() if not there)
        yield from (
            f"{name} is missing" for name, value in {"trained": trained, "validation": validation}.items() if value is None
        )
    if status == "measured" and not results:
        yield "results is empty, so status must be trained"
    if status == "trained" and results:
        yield "results is not empty, so status must be measured"
    if (status == "unreliable") != bool(reason):
        yield "reason is for status unreliable, which needs one"


def _classifier_fits(status: str, classifier: str, origin: str, files: dict[str, File]) -> Iterable[str]:
    public, held = status == "public weights", bool(weight_files(files)) and CONFIG in files
    if classifier and not public:
        yield "classifier is for status public weights"
    if public and bool(classifier) == bool(files):
        yield "status public weights needs a classifier, or files instead of one"
    if public and files and not held:
        yield f"files of public weights are {WEIGHTS} and {CONFIG}"
    if bool(origin) != (public and bool(files)):
        yield "origin is for public weights in files, which need one"
    if classifier and not re.fullmatch(r"(timm:|hf-hub:)\S+", classifier):  # a card never causes code to be imported
        yield f"classifier is '{classifier}', not timm:NAME or hf-hub:ORG/REPO@COMMIT"


def _recipe_agrees(recipe: dict[str, Any], dataset: str, defense: str, threat: Threat, seed: int) -> Iterable[str]:
    expected = {"dataset": dataset, "defense": defense, "threat": str(threat), "seed": seed}
    given = {**recipe, "threat": _canonical(recipe.get("threat", str(threat)))}
    yield from (
        f"recipe.{key} is {recipe[key]!r}, but the card has {value!r}"
        for key, value in expected.items()
        if given.get(key, value) != value
    )


def _canonical(threat: Any) -> Any:
    """The canonical text of a threat, such as ``patch:5x5`` of ``patch:5``; any other value as it is."""
    try:
        return str(parse_threat(threat)) if isinstance(threat, str) else threat
    except UsageError:
        return threat


def _recipe_is_plain(recipe: Any) -> Iterable[str]:
    """YAML reads ``1e-3`` as text, and so it reads a number in quotes."""
    todo = [("recipe", recipe)]
    while todo:
        at, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(f"{at}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            todo += [(f"{at}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value):
            yield f"{at} is '{value}', a number written as text"
        elif not isinstance(value, str | int | float | None):
            yield f"{at} is {value!r}, not plain text, number or list"


def _samples_fit(samples: tuple[Sample, ...], files: dict[str, File], status: str) -> Iterable[str]:
    named = {one.records for one in samples}
    held = {name for name in files if re.fullmatch(SAMPLE, name)}
    yield from (f"files has no {name}, which a sample names" for name in sorted(named - held))
    yield from (f"no sample names {name}" for name in sorted(held - named))
    if samples and status == "recipe only":
        yield "samples must be empty while status is recipe only"
    yield from _repeated("samples", [(one.records, str(one.threat), one.guarantee, one.method) for one in samples])


def _nothing_is_proven(
    guarantee: Guarantee,
    results: tuple[Measured, ...],
    samples: tuple[Sample, ...],
    published: tuple[Published, ...],
    validation: Validation | None,
) -> Iterable[str]:
    """All that a card may claim of a defense without certificates is accuracy under named attacks (``attacked``)."""
    claims: dict[str, Any] = {"results": results, "samples": samples, "published": published, "validation": validation}
    if not guarantee.proves:
        yield from (f"{name} must be empty while guarantee is {guarantee}" for name, claim in claims.items() if claim)


def _one_result_each(results: tuple[Measured, ...]) -> Iterable[str]:
    yield from _repeated("results", [(one.dataset, one.split, str(one.threat), one.guarantee, one.method) for one in results])


def _repeated(field: str, keys: list[tuple[str, ...]]) -> Iterable[str]:
    yield from (f"{field} has {' '.join(key)} more than once" for key in sorted(set(keys)) if keys.count(key) > 1)


CARD_RULES: tuple[Rule, ...] = (
    *(_plain_files, _status_fits, _classifier_fits, _recipe_agrees, _recipe_is_plain, _one_result_each),
    *(_samples_fit, _nothing_is_proven),
)
