"""A model goes to the Hub: card, weights, configuration, records and evaluation metadata, or nothing.

What is pushed is what was measured: the card's numbers must follow from the records, the records must be about these very
weights, and both must cover the full test split.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchcert_cli import cards
from patchcert_cli.cards import Card, Hub
from patchcert_cli.catalog.add_to_zoo import write_card
from patchcert_cli.catalog.claims import Results, card_with_results, check_results, results_about
from patchcert_cli.catalog.resolve import ResolvedModel
from patchcert_cli.errors import ClaimError, IntegrityError, UsageError
from patchcert_cli.hub import client
from patchcert_cli.storage import files

EVALUATION = ".eval_results/patchcert.yaml"


@dataclass(frozen=True)
class Release:
    """What a push sends.

    Attributes:
        source: the model folder that it comes from.
        repo: where it goes.
        card: as it will be there.
        contents: every file, in the order in which it is shown and sent.
        evidence: the results that were found, one line each.
    """

    source: Path
    repo: str
    card: Card
    contents: Mapping[str, bytes | Path]
    evidence: Sequence[str]

    def preview(self) -> dict[str, Any]:
        """Every file with size and sha256, and what the card claims, as plain values."""
        rows = {}
        for name, content in self.contents.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            rows[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        claims = [
            {key: getattr(one, key) for key in ("method", "images", "clean", "certified")}
            | {"threat": str(one.threat), "guarantee": str(one.guarantee), "arithmetic": str(self.card.arithmetic(one))}
            for one in self.card.results
        ]
        return {"repo": self.repo, "model": self.card.name, "files": rows, "claims": claims, "evidence": list(self.evidence)}


def prepare(found: ResolvedModel, repo: str | None, results: Results, places: Sequence[Path] = ()) -> Release:
    """What a push of this model would send; does not use the network.

    A zoo folder has its measurements. For a training run they are ``results``, by the path of their ``result.json``, or else
    those found in ``places``.

    Raises:
        ClaimError: no result on the full test split for these very weights, records missing, or records with other counts.
        IntegrityError: a file has another sha256 than in its card.
        UsageError: no valid repository.
    """
    card = found.card
    if card is None:
        raise IntegrityError(f"'{found.folder}' has no model card ({files.CARD}).", hint="Train it again with the same command.")
    repo = repo or card.hub.repo
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo):
        raise UsageError(f"--to '{repo}' is not a repository.", hint="Use organization/name.")
    if card.status == "unreliable":
        raise ClaimError(
            f"{card.name} is marked unreliable: {card.reason}.",
            hint="Train it again, or certify it again, before it is published.",
        )
    contents: dict[str, bytes | Path] = {}
    if card.results and not results:
        check_results(card, found.folder)
        evidence = [f"{found.folder / files.PUBLISHED_RECORDS}"]
    else:
        results = results or results_about(found, list(places))
        card, packed = card_with_results(found, results)
        assert packed is not None
        contents[files.PUBLISHED_RECORDS] = packed
        evidence = list(results)
    card = replace(card, hub=Hub(repo))
    for name in card.files:
        contents.setdefault(name, found.folder / name)
    contents = {
        files.CARD: card.render().encode(),
        **{name: contents[name] for name in sorted(contents)},
        EVALUATION: evaluation(card).encode(),
    }
    return Release(found.folder, repo, card, contents, evidence)


def publish(release: Release, *, create_pr: bool = False, private: bool = False) -> client.Pushed:
    """Send it, and write the commit back into the card it came from; a pull request has none until it is merged.

    Raises:
        HubError: the Hub is out of reach or refuses.
        IntegrityError: the Hub holds other content than was sent, or a file has changed since :func:`prepare`.
    """
    for name, facts in release.card.files.items():
        content = release.contents[name]
        actual = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else files.sha256(content)
        if actual != facts.sha256:
            raise IntegrityError(f"'{name}' has changed since the push was planned.", hint="Run the same command again.")
    message = f"{release.card.name}: weights, card and records of every test image"
    done = client.push(release.repo, release.contents, message, create_pr=create_pr, private=private)
    if done.request is None:
        packed = release.contents.get(files.PUBLISHED_RECORDS)
        if isinstance(packed, bytes):
            files.write_atomically(release.source / files.PUBLISHED_RECORDS, packed)
        write_card(release.source, replace(release.card, hub=Hub(release.repo, done.commit)))
    return done


def evaluation(card: Card) -> str:
    """The Hub's ``.eval_results`` file: one entry per measurement."""
    entries = [
        {
            "dataset_id": cards.HUB_DATASETS.get(one.dataset, one.dataset),
            "task_id": task,
            "value": count / one.images,
            "date": one.date,
            "notes": f"{one.threat}, {one.split} split, {one.guarantee}, {one.method}, arithmetic {card.arithmetic(one)}:"
            f" {count} of {one.images} images",
        }
        for one in card.results
        for task, count in (("clean_accuracy", one.clean), (cards.metric(one)[0], one.certified))
    ]
    return client.evaluation(entries)
