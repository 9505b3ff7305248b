"""Claims that reproduce, and claims that do not: the same images certified again, compared one by one, attacked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from patchcert_cli import cards, checkpoint, data, defenses
from patchcert_cli.cards import Card, File, published
from patchcert_cli.cards.published import ClaimKey, PublishedRecord, PublishedRecords
from patchcert_cli.catalog import bundled
from patchcert_cli.cli.main import app
from patchcert_cli.errors import ClaimError, DataError, IntegrityError, PatchcertError
from patchcert_cli.evaluation import reproduce
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, Sparse
from patchcert_cli.training.recipe import Recipe

NAME = "mnist-tiny"
SPLIT = 10_000


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with one quickly trained model, certified on the whole test split by the commands themselves."""
    place = tmp_path_factory.mktemp("measured")
    recipe = Recipe("patch:1x1", network_options={"hidden": [16]}, epochs=1, options={"ramp_epochs": 1, "bounded_epochs": 0})
    config = recipe.config()
    torch.manual_seed(0)
    defense = defenses.build(config["deployed"])
    images = data.load("mnist", "test")
    optimizer = torch.optim.Adam(defense.parameters(), 3e-3)
    for start in range(0, 6000, 100):  # a few steps on bundled images: what is tested here is bookkeeping, not accuracy
        optimizer.zero_grad()
        x, y = data.to_float(images.pixels[start : start + 100]), images.labels[start : start + 100]
        torch.nn.functional.cross_entropy(defense(x), y).backward()
        optimizer.step()
    folder = place / "zoo" / NAME
    checkpoint.save_defense(folder, defense.eval(), config)
    card = cards.card_for_run(
        recipe.to_dict(),
        folder,
        network="MLP 784-16-10",
        kept=55000,
        validation={"images": 5000, "clean": 4000, "certified": 100},
        trained={"date": "2026-01-31", "seconds": 1.0, "device": "cpu", "threads": 1, "torch": "2.6.0", "patchcert": "0.1.0"},
        command=recipe.command,
        name=NAME,
    )
    (folder / files.CARD).write_text(card.render())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv(bundled.ENVIRONMENT, str(place / "zoo"))
        done = CliRunner().invoke(app, ["certify", NAME, "--out", "certify", "--json", "result.json"])
        assert done.exit_code == 0, (done.output, done.exception)
        done = CliRunner().invoke(
            app, ["zoo", "add", str(folder), "--name", "mnist-tiny-2", "--result", str(place / "certify" / "result.json")]
        )
        assert done.exit_code == 0, (done.output, done.exception)
    return place / "zoo" / "mnist-tiny-2"


@pytest.fixture
def model(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may spoil."""
    copy = tmp_path / "zoo" / measured.name
    copy.mkdir(parents=True)
    for path in measured.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv(bundled.ENVIRONMENT, str(tmp_path / "zoo"))
    return copy


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["zoo", "verify", *arguments])


def fail(kind: type[PatchcertError], *arguments: str) -> str:
    done = call(*arguments)
    assert isinstance(done.exception, kind), (done.output, done.exception)
    return str(done.exception)


def rewrite(model: Path, change: dict[int, PublishedRecord], **facts: str) -> None:
    """Publish other records, with a card whose counts follow from them: only certifying again can tell."""
    book = PublishedRecords.read(model / files.PUBLISHED_RECORDS)
    forged = replace(book, rows={**book.rows, **change}, **facts)
    (model / files.PUBLISHED_RECORDS).write_bytes(forged.pack())
    card = Card.read(model)
    clean, certified = forged.counts(0)
    share = certified / SPLIT
    result = replace(card.results[0], clean=clean, certified=certified, certified_interval=(max(0, share - 0.01), share + 0.01))
    listed = {files.PUBLISHED_RECORDS: File.of(model / files.PUBLISHED_RECORDS)}
    changed = replace(card, results=(result,), files=card.files | listed)
    (model / files.CARD).write_text(changed.render())


def sampled(count: int) -> list[int]:
    return [int(i) for i in data.load("mnist", "test").limit(count, 0).index]


def test_an_honest_claim_is_consistent(model: Path) -> None:
    done = call(model.name, "--sample", "60", "--attack-limit", "3")
    assert done.exit_code == 0, (done.output, done.exception)
    for said in ("60/60 records agree", "at most 4.87 % of all 10000 are false", "broke 0 of", "claim consistent"):
        assert said in done.stdout
    (folder,) = Path("runs").iterdir()
    outcome = files.read_json(folder / "verdict.json")
    assert (outcome["agree"], outcome["different"], outcome["holds"], outcome["images"]) == (60, [], True, 60)
    assert outcome["attacked"] == min(3, outcome["certified"])
    again = call(model.name, "--sample", "60", "--attack-limit", "3", "--json", "-")
    assert json.loads(again.stdout)["holds"] is True


def test_a_false_record_is_named_and_exits_8(model: Path) -> None:
    book, chosen = PublishedRecords.read(model / files.PUBLISHED_RECORDS), sampled(60)
    lies = [i for i in chosen if not book.rows[i].certified[0]][:2]
    rewrite(model, {i: replace(book.rows[i], certified=(True,), prediction=book.rows[i].label) for i in lies})
    done = call(model.name, "--sample", "60", "--no-attack")
    assert isinstance(done.exception, ClaimError)
    assert done.exception.code == 8
    assert f"2 of 60 records differ (indices {lies[0]}, {lies[1]})" in str(done.exception)
    assert f"image {lies[0]}" in done.stdout
    assert "claim does not reproduce" in done.stdout
    elsewhere = next(i for i in book.rows if i not in chosen)
    rewrite(model, {**book.rows, elsewhere: replace(book.rows[elsewhere], prediction=11)})
    assert call(model.name, "--sample", "60", "--no-attack").exit_code == 0  # what was not sampled is not known


def test_records_that_are_not_about_these_weights_or_images_are_refused(model: Path, tmp_path: Path) -> None:
    book = PublishedRecords.read(model / files.PUBLISHED_RECORDS)
    other = tmp_path / "other.jsonl.gz"
    other.write_bytes(replace(book, model_sha256="0" * 64).pack())
    assert "about other weights" in fail(IntegrityError, model.name, "--records", str(other), "--sample", "5")
    other.write_bytes(replace(book, dataset="cifar10").pack())
    assert "about cifar10 test, not mnist test" in fail(DataError, model.name, "--records", str(other), "--sample", "5")
    part = {i: row for i, row in book.rows.items() if i not in sampled(5)[:2]}
    other.write_bytes(replace(book, rows=part).pack())
    assert "lack 2 of the images" in fail(DataError, model.name, "--records", str(other), "--sample", "5")
    assert "no published records for patch:7x7" in fail(DataError, model.name, "--patch", "7")
    other.write_bytes(b"not gzip")
    assert "holds no published records" in fail(IntegrityError, model.name, "--records", str(other))
    (model / files.PUBLISHED_RECORDS).write_bytes(replace(book, model_sha256="0" * 64).pack())
    assert "sha256" in fail(IntegrityError, model.name)


def test_counts_that_do_not_follow_from_the_records_are_refused_before_anything_is_computed(model: Path) -> None:
    card = Card.read(model)
    better = replace(card, results=(replace(card.results[0], clean=card.results[0].clean + 1),))
    (model / files.CARD).write_text(better.render())
    assert f"published with {card.results[0].clean + 1} right" in fail(ClaimError, model.name, "--sample", "5")


def test_an_attack_that_flips_a_certified_image_is_reported() -> None:
    outcome = {"model": "x", "different": [], "images": 9, "broken": [4], "out": "runs/x"}
    with pytest.raises(ClaimError, match=r"flipped 1 certified images \(indices 4\): the claim does not reproduce"):
        reproduce.check(outcome)


def test_a_claim_of_more_than_is_found_does_not_reproduce() -> None:
    said = {"overstated": True, "published_arithmetic": "exact", "arithmetic": "measured"}
    outcome = {"model": "x", "different": [], "images": 9, "broken": [], "out": "runs/x", **said}
    with pytest.raises(ClaimError, match="published as exact, it is measured: the claim does not reproduce"):
        reproduce.check(outcome)


def test_what_a_sample_proves() -> None:
    assert reproduce.bound(0) == 1
    assert reproduce.bound(500) == pytest.approx(0.00597, abs=1e-5)
    assert (1 - reproduce.bound(60)) ** 60 == pytest.approx(0.05)


ROWS = {7: PublishedRecord(1, 1, (True, False), (0.25, None)), 3: PublishedRecord(2, 0, (False, False), (-1.5, 0.0))}
BOOK = PublishedRecords("a" * 64, "mnist", "test", (ClaimKey(Patch(5, 5), "interval"), ClaimKey(Sparse(4), "interval")), ROWS)


def test_a_ledger_reads_back_and_has_the_same_bytes_for_the_same_content(tmp_path: Path) -> None:
    (tmp_path / files.PUBLISHED_RECORDS).write_bytes(BOOK.pack())
    assert PublishedRecords.read(tmp_path / files.PUBLISHED_RECORDS) == BOOK
    assert replace(BOOK, rows=dict(reversed(ROWS.items()))).pack() == BOOK.pack()
    assert BOOK.counts(0) == (1, 1)
    assert BOOK.counts(1) == (1, 0)
    assert BOOK.position(Patch(5, 5)) == 0
    with pytest.raises(DataError, match="records for patch:5x5, sparse:4"):
        BOOK.position(Patch(6, 6))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"images": 2', '"images": 3'),
        ('"certified":[true,false]', '"certified":[true]'),
        ('"certified":[true,false]', '"certified":[1,0]'),
        ('"label":2', '"lable":2'),
        ('"index":7', '"index":3'),
        ('"margin":[0.25,null]', '"margin":[0.25,"x"]'),
        ('"threat": "patch:5x5"', '"treat": "patch:5x5"'),
    ],
)
def test_a_damaged_ledger_is_refused_whole(tmp_path: Path, old: str, new: str) -> None:
    import gzip

    text = gzip.decompress(BOOK.pack()).decode()
    assert old in text
    (tmp_path / files.PUBLISHED_RECORDS).write_bytes(gzip.compress(text.replace(old, new).encode()))
    with pytest.raises(IntegrityError, match="holds no published records"):
        PublishedRecords.read(tmp_path / files.PUBLISHED_RECORDS)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / files.PUBLISHED_RECORDS).write_bytes(BOOK.pack())
    monkeypatch.setattr(published, "MAX_BYTES", 100)
    with pytest.raises(IntegrityError, match="holds no published records"):
        PublishedRecords.read(tmp_path / files.PUBLISHED_RECORDS)


@pytest.mark.parametrize("name", [name for name, card in bundled.cards().items() if card.results])
def test_every_bundled_claim_follows_from_its_records(name: str) -> None:
    from patchcert_cli.catalog.claims import check_results

    check_results(bundled.card(name), bundled.folder() / name)
