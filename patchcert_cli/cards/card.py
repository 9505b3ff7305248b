"""Model cards: the ``README.md`` of a model folder, YAML front matter and prose, the one source of truth about the model.

``zoo/<name>/`` and ``runs/<name>/`` have the same shape: README.md, config.json, model.safetensors. The ``patchcert`` table of
the front matter is the card; the Hub's own keys and the prose are made from it: ``Card.from_text(card.render()) == card``.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from patchcert_cli import schema
from patchcert_cli.arithmetic import Arithmetic, former
from patchcert_cli.cards import page
from patchcert_cli.cards.entries import (
    CARD_RULES,
    Attacked,
    File,
    Hub,
    Measured,
    Name,
    Published,
    Sample,
    Split,
    Status,
    Text,
    ThreatField,
    Training,
    Validation,
    weights_sha256,
)
from patchcert_cli.errors import IntegrityError
from patchcert_cli.schema import Count, Rule
from patchcert_cli.storage import checksum_cache
from patchcert_cli.storage.files import CARD, CONFIG, weight_files
from patchcert_cli.threats import Guarantee, Threat

MAX_VALUES, MAX_DEPTH = 20_000, 32  # of the front matter, which may come from an unknown server
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEFAULT_LICENSE = "apache-2.0"
RESTORE = "Restore the card as patchcert wrote it."


@dataclass(frozen=True)
class Card:
    """Everything that is claimed about a model.

    Attributes:
        network: short text such as ``MLP 784-255-10``.
        threat: what it was trained against.
        guarantee: what the defense promises, which the published numbers and those on held-out images are about.
        split: what it was trained on, with the count of images kept, for example ``train[55000]``.
        command: the ``patchcert train`` command that made it; of public weights the one that measures them.
        classifier: the address of public weights of others, if the model is a defense around them.
        origin: for public weights in the model's own files: who published them, under which licence, what was changed.
        source: the paper that the defense comes from; may be empty.
        files: sha256 and size of every file but the card.
        status: ``measured``, ``trained`` (no test measurement yet), ``recipe only``, ``public weights`` (of others, not measured
            here) or ``unreliable`` (for ``reason``).
        notes: free text, a paragraph of the prose.
        samples: what was measured on images that are not a test split.
        attacked: accuracy under named attacks, which is all that a card of a defense without certificates may claim.
    """

    name: Name
    status: Status
    defense: Text
    network: Text
    dataset: Text
    threat: ThreatField
    split: Split
    seed: Count
    recipe: dict[str, Any]
    command: Text
    license: Text
    hub: Hub
    guarantee: Guarantee = Guarantee.RECOVERY
    classifier: str = ""
    origin: str = ""
    source: str = ""
    reason: str = ""
    notes: str = ""
    trained: Training | None = None
    files: dict[str, File] = field(default_factory=dict)
    validation: Validation | None = None
    results: tuple[Measured, ...] = ()
    samples: tuple[Sample, ...] = ()
    published: tuple[Published, ...] = ()
    attacked: tuple[Attacked, ...] = ()
    rules: ClassVar[tuple[Rule, ...]] = CARD_RULES

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of a model folder.

        Raises:
            IntegrityError: it is missing or wrong; everything that is wrong is listed.
        """
        path = folder / CARD
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as problem:
            raise IntegrityError(
                f"'{folder}' has no model card ({CARD}).",
                hint="Give the folder of a finished training run.",
            ) from problem
        except (OSError, UnicodeDecodeError) as problem:
            raise IntegrityError(f"'{path}' is not readable: {problem}.", hint=RESTORE) from problem
        return cls.from_text(text, where=str(path))

    @classmethod
    def from_text(cls, text: str, *, where: str = CARD) -> Card:
        """Inverse of :meth:`render`; the prose is not read, and the Hub's own keys must follow from the card."""
        match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
        if match is None:
            raise IntegrityError(
                f"'{where}' is not a model card: it does not begin with YAML between two lines of ---.",
                hint=RESTORE,
            )
        try:
            _check_yaml(match[1])
            front = yaml.load(match[1], _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as problem:  # ValueError: an impossible date or number
            raise IntegrityError(
                f"'{where}' is not a model card: {' '.join(str(problem).split())}.",
                hint=RESTORE,
            ) from problem
        if not isinstance(front, dict) or "patchcert" not in front:
            raise IntegrityError(
                f"'{where}' is not a model card: its front matter has no patchcert table.",
                hint=RESTORE,
            )
        card = cls.from_dict(front.pop("patchcert"), where=where)
        expected = page.hub_metadata(card)
        different = [key for key in {**expected, **front} if front.get(key) != expected.get(key)]
        _refuse([f"{key} does not follow from the patchcert table" for key in different], where)
        return card

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = CARD) -> Card:
        """Inverse of :meth:`to_dict`; one :class:`IntegrityError` lists everything that is wrong."""
        try:
            return schema.read(cls, values)
        except schema.Invalid as invalid:
            _refuse(invalid.problems, where)
            raise

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON and YAML."""
        values: dict[str, Any] = schema.plain(self)
        if self.guarantee is Guarantee.RECOVERY:  # the default
            del values["guarantee"]
        for name in ("classifier", "origin", "samples", "attacked"):
            if not values[name]:
                del values[name]
        for one in values["results"]:
            if not one["arithmetic"]:
                del one["arithmetic"]
        return values

    def render(self) -> str:
        """The text of ``README.md``; a card that could not be read back is refused."""
        values = self.to_dict()
        self.from_dict(values)
        front = {**page.hub_metadata(self), "patchcert": values}
        text = yaml.dump(front, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=1_000_000)
        return f"---\n{text}---\n\n{page.prose(self)}"

    def result(self, threat: Threat | None = None) -> Measured | None:
        """The measurement of the card's guarantee under ``threat``, by default the one that the model was trained against; of
        several proofs the best.
        """
        wanted = threat or self.threat
        found = [one for one in self.results if one.threat == wanted and one.guarantee is self.guarantee]
        return max(found, key=lambda one: one.certified, default=None)

    def arithmetic(self, result: Measured) -> Arithmetic:
        """What is known of rounding in one of the measurements."""
        return result.arithmetic or former(self.defense)

    def report(self, threat: Threat | None = None) -> Published | None:
        """The published numbers under ``threat``, by default the one that the model was trained against."""
        return next((one for one in self.published if one.threat == (threat or self.threat)), None)

    @property
    def public(self) -> bool:
        """Whether the weights are public ones of others, with a defense around them."""
        return self.status == "public weights"

    @property
    def size(self) -> int:
        """Bytes of the weights; 0 if there are none."""
        return sum(self.files[name].size for name in weight_files(self.files))

    def verify(self, folder: Path) -> str:
        """Check the sha256 of every file of the card in ``folder``; returns that of the weights."""
        if not self.files:
            raise IntegrityError(f"{self.name}: no weights are published yet.", hint=f"Try: {self.command}")
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                raise IntegrityError(f"'{path}' is missing.", hint=f"Fetch it with: patchcert zoo pull {self.name} --force")
            if (actual := checksum_cache.sha256(path)) != expected.sha256:
                raise IntegrityError(
                    f"'{path}': sha256 {actual[:12]}… but its card says {expected.sha256[:12]}….",
                    hint=f"It was not used. Fetch it again with: patchcert zoo pull {self.name} --force",
                )
        return weights_sha256(self.files)


def _check_yaml(text: str) -> None:
    """Raise ``ValueError`` unless the text is small, flat and without aliases, with which a small text could become huge."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, _Loader)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has an alias, *{event.anchor}; write the value itself in its place")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if number >= MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_VALUES} values, or they are nested more than {MAX_DEPTH} deep")


class _Dumper(yaml.SafeDumper):
    """Plain YAML: no anchors for values that occur twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refuse(problems: Sequence[str], where: str) -> None:
    if problems:
        raise IntegrityError(f"'{where}' is not a valid model card: {'; '.join(problems)}.", hint=RESTORE)


def weights_of(folder: Path) -> list[str]:
    """The names of the files in ``folder`` that hold weights; empty if there are none or not all of them."""
    return weight_files(path.name for path in folder.iterdir() if path.is_file())


def slug(text: str) -> str:
    """The nearest valid model name: ``My run`` becomes ``my-run``."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:96].rstrip("-") or "run"


def card_for_run(
    recipe: Mapping[str, Any],
    folder: Path,
    *,
    network: str,
    kept: int,
    validation: Mapping[str, int],
    trained: Mapping[str, Any],
    command: str,
    name: str | None = None,
    source: str = "",
    guarantee: Guarantee = Guarantee.RECOVERY,
) -> Card:
    """The first card of a finished training run (status ``trained``), about the weights and configuration in ``folder``.

    ``recipe`` holds at least defense, dataset, threat and seed; ``kept`` is the number of images trained on; ``validation`` the
    counts images, clean, certified on those held out; ``trained`` has seconds, device, threads, torch, patchcert and, if not
    today, date.
    """
    name = name or slug(folder.resolve().name)
    today = datetime.date.today().isoformat()
    return Card.from_dict(
        {
            "name": name,
            "status": "trained",
            **{key: recipe[key] for key in ("defense", "dataset", "threat", "seed")},
            "network": network,
            "split": f"train[{kept}]",
            "recipe": schema.plain(recipe),
            "command": command,
            "license": DEFAULT_LICENSE,
            "hub": {"repo": f"patchcert/{name}"},
            "source": source,
            "guarantee": guarantee,
            "trained": {"date": today, **trained},
            "files": {file: dataclasses.asdict(File.of(folder / file)) for file in (CONFIG, *weights_of(folder))},
            "validation": dict(validation),
        },
        where=str(folder / CARD),
    )
