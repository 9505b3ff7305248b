"""What certificates, records, cards and tables say of rounding, and how what was written before they said it is read."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_run, measured

from patchcert_cli import cards, defenses
from patchcert_cli.arithmetic import MEANING, Arithmetic, former, weakest
from patchcert_cli.cards import Card
from patchcert_cli.cards.published import ClaimKey, PublishedRecord, PublishedRecords, check_card
from patchcert_cli.catalog import bundled
from patchcert_cli.certificate import Certificate
from patchcert_cli.errors import ClaimError, IntegrityError
from patchcert_cli.reporting import text
from patchcert_cli.schema import read
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch
from tests.examples import tiny

KNOWN = {
    "ensemble": "exact",  # that of its weakest member
    "bagcert": "exact",
    "smoothing": "exact",
    "clipped": "exact",
    "partition": "exact",
    "patchguard": "exact",
    "roots": "exact",
    "ibp": "bounded",
    "patchcleanser": "measured",
    "hicert": "measured",
    "minority": "measured",
}


@pytest.mark.parametrize("name", [name for name in defenses.names() if defenses.by_name(name).guarantee.proves])
def test_every_defense_says_what_its_certificates_are(name: str) -> None:
    made = tiny(name)
    certificate = made.certify(torch.rand(3, *made.input_shape, generator=torch.Generator().manual_seed(0)), Patch(1, 1))
    assert certificate.arithmetic == KNOWN[name]
    if name not in ("partition", "ensemble"):  # records always said it
        assert former(name) == KNOWN[name]


def test_joined_certificates_keep_the_least() -> None:
    made = tiny("ibp")
    one = made.certify(torch.zeros(1, 1, 4, 4), Patch(1, 1))
    assert Certificate.cat([one, one]).arithmetic is Arithmetic.BOUNDED
    assert Certificate.cat([one, replace(one, arithmetic=Arithmetic.MEASURED)]).arithmetic is Arithmetic.MEASURED


def test_the_words() -> None:
    assert list(Arithmetic) == ["exact", "bounded", "measured"] and set(MEANING) == set(Arithmetic)
    assert all(one.meaning and "." not in one.meaning for one in Arithmetic), "one sentence"
    assert weakest(["exact", "bounded"]) == "bounded" and weakest(["exact"]) == "exact"
    assert former("somebody's") == "measured", "of what is unknown the least is claimed"


def result(**changes: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "defense": "patchcleanser",
        "model_source": "here",
        "model_sha256": "0" * 64,
        "dataset": "mnist",
        "split": "test",
        "data_source": "here",
        "full_split": True,
        "images": 10,
        "resumed": 0,
        "clean_accuracy": 0.5,
        "counts": {"clean": 5},
        "seconds": 1.0,
        "images_per_second": 10.0,
        "device": "cpu",
        "records": "r",
        "claims": [
            {
                "threat": "patch:2x2",
                "method": "rows",
                "guarantee": "recovery",
                "certified_interval": [0.1, 0.9],
                "counts": {"clean": 5, "certified": 4},
                **changes,
            }
        ],
    }


@pytest.mark.parametrize(("said", "word"), [({}, "measured"), ({"arithmetic": "exact"}, "exact")])
def test_results_are_printed_with_the_word_and_its_meaning(said: dict[str, str], word: str) -> None:
    found = result(**said)
    assert dict(text.certify_rows(found))["arithmetic"] == f"{word}: {Arithmetic(word).meaning}"
    assert text.claim_list(found)[0]["arithmetic"] == word
    assert ("measured, not proven" in text.plot_title(found)) == (word == "measured")


def test_a_card_without_the_word_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    made = {**run.files, files.PUBLISHED_RECORDS: cards.File("0" * 64, 7)}
    old = replace(run, status="measured", files=made, results=(measured(),))
    assert "arithmetic:" not in old.render().split("---\n")[1]
    assert Card.from_text(old.render()) == old and old.arithmetic(old.results[0]) == "bounded"
    masked = replace(old, defense="patchcleanser", recipe={**run.recipe, "defense": "patchcleanser"})
    assert masked.arithmetic(masked.results[0]) == "measured"
    new = replace(masked, results=(measured(arithmetic="exact"),))
    text = new.render()
    assert text.split("---\n")[1].count("arithmetic: exact") == 2, "in the table and in the Hub's index"
    assert Card.from_text(text) == new and new.arithmetic(new.results[0]) == "exact"
    assert "Arithmetic: **measured**" in masked.render() and "Arithmetic: **exact**" in text
    values = masked.to_dict()
    values["results"][0]["arithmetic"] = "good"
    with pytest.raises(IntegrityError, match=r"results\[0\].arithmetic is 'good', not exact, bounded or measured"):
        Card.from_dict(values)


@pytest.mark.parametrize("name", bundled.names())
def test_every_measured_claim_of_the_zoo_says_it(name: str) -> None:
    card = bundled.card(name)
    whole = card.recipe.get("network_options", {}).get("bits", 0) > 0  # masked networks of whole numbers
    assert [one.arithmetic for one in card.results] == ["exact" if whole else KNOWN[card.defense]] * len(card.results)


ROWS = {0: PublishedRecord(1, 1, (True,), (0.5,))}


def book(arithmetic: str) -> PublishedRecords:
    values = {"threat": "patch:2x2", "method": "rows"} | ({"arithmetic": arithmetic} if arithmetic else {})
    return PublishedRecords("a" * 64, "mnist", "test", (read(ClaimKey, values),), ROWS)


def claim(arithmetic: str) -> Any:
    shape = {"images": 1, "clean": 1, "certified": 1, "certified_interval": (0.025, 1.0)}
    return measured(method="rows", arithmetic=arithmetic or None, **shape)


@pytest.mark.parametrize(
    ("records", "said", "fine"),
    [("", "measured", True), ("", "exact", False), ("measured", "exact", False), ("exact", "exact", True), ("exact", "", True)],
)
def test_a_card_says_no_more_than_its_records(records: str, said: str, fine: bool, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl.gz"
    path.write_bytes(book(records).pack())
    kept = PublishedRecords.read(path)
    assert kept == book(records) and ("arithmetic" in json.dumps([one.to_dict() for one in kept.claims])) == bool(records)
    if fine:
        check_card(kept, [claim(said)], "there", "patchcleanser")
    else:
        with pytest.raises(ClaimError, match="exact, but its records are measured"):
            check_card(kept, [claim(said)], "there", "patchcleanser")


def test_an_unknown_word_in_records_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl.gz"
    text = gzip.decompress(book("exact").pack()).decode()
    path.write_bytes(gzip.compress(text.replace('"exact"', '"good"').encode()))
    with pytest.raises(IntegrityError, match="'good', not exact, bounded or measured"):
        PublishedRecords.read(path)
