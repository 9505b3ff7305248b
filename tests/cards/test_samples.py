"""Measurements on pictures that are no test split: told on the card with their number and origin, and nowhere else."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from patchcert_cli import cards, checkpoint, defenses
from patchcert_cli.cards import Card, File, Sample
from patchcert_cli.catalog import bundled, claims
from patchcert_cli.cli.main import app
from patchcert_cli.errors import ClaimError, IntegrityError, UsageError
from patchcert_cli.reporting import site
from patchcert_cli.storage import files
from patchcert_cli.training.recipe import Recipe

NAME, WORDS = "mnist-tiny", "20 digits of the test split of MNIST, example.org/digits"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of a zoo, and a result of it on 20 images."""
    place = tmp_path_factory.mktemp("samples")
    recipe = Recipe("patch:1x1", network_options={"hidden": [4]}, epochs=1, options={"ramp_epochs": 1, "bounded_epochs": 0})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        defense, folder = defenses.build(recipe.config()["deployed"]).eval(), place / "zoo" / NAME
    checkpoint.save_defense(folder, defense, recipe.config())
    card = cards.card_for_run(
        recipe.to_dict(),
        folder,
        network="MLP 784-4-10",
        kept=55000,
        validation={"images": 5000, "clean": 4000, "certified": 100},
        trained={"date": "2026-01-31", "seconds": 1.0, "device": "cpu", "threads": 1, "torch": "2.6.0", "patchcert": "0.1.0"},
        command=recipe.command,
        name=NAME,
    )
    public = replace(card, status="public weights", origin="Somebody (MIT)", trained=None, validation=None)
    (folder / files.CARD).write_text(public.render())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv(bundled.ENVIRONMENT, str(place / "zoo"))
        done = CliRunner().invoke(app, ["certify", NAME, "--limit", "20", "--patch", "1..2", "--out", "out"])
        assert done.exit_code == 0, (done.output, done.exception)
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may spoil, and which is the zoo."""
    for path in made.rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(bundled.ENVIRONMENT, str(tmp_path / "zoo"))
    return tmp_path


def add(*more: str, name: str = NAME, sample: str = f"out/result.json={WORDS}") -> Result:
    return CliRunner().invoke(app, ["zoo", "add", f"zoo/{NAME}", "--name", name, "--sample", sample, "--force", *more])


def test_a_sample_stands_on_the_card_and_on_no_board(place: Path) -> None:
    done = add()
    assert done.exit_code == 0, (done.output, done.exception)
    assert "public weights, 0 results, 2 on other" in done.stdout
    folder = place / "zoo" / NAME
    card = Card.read(folder)
    assert card.public and not card.results and len(card.samples) == 2 and Card.from_text(card.render()) == card
    result = files.read_json(place / "out" / "result.json")
    for one, claim in zip(card.samples, result["claims"], strict=True):
        assert (one.images, one.clean, str(one.threat)) == (20, result["counts"]["clean"], claim["threat"])
        assert (one.certified, one.records, one.pictures) == (claim["counts"]["certified"], "sample-1.jsonl.gz", WORDS)
    card.verify(folder)
    claims.check_samples(card, folder)
    text = cards.prose(card)
    assert text.count(f"| {WORDS} | 20 | `patch:") == 2
    assert "No figure for the test split of mnist is known" in text and "Somebody (MIT)" in text
    assert "model-index" not in card.render() and card.result() is None
    page = site.render([card])
    assert WORDS in page and "no leaderboard" in page and 'id="board' not in page.split(WORDS)[0][-200:]
    listed = CliRunner().invoke(app, ["zoo", "list", "--json"])
    assert [(one["clean"], one["certified"], one["status"]) for one in json.loads(listed.stdout)] == [
        (None, None, "public weights")
    ]


def test_the_same_pictures_replace_and_others_stay_beside(place: Path) -> None:
    assert add().exit_code == 0 and add(sample="out/result.json=others, elsewhere").exit_code == 0
    folder = place / "zoo" / NAME
    card = Card.read(folder)
    assert [one.records for one in card.samples] == ["sample-1.jsonl.gz"] * 2 + ["sample-2.jsonl.gz"] * 2
    assert add().exit_code == 0
    card = Card.read(folder)
    assert sorted({(one.pictures, one.records) for one in card.samples}) == [
        (WORDS, "sample-3.jsonl.gz"),
        ("others, elsewhere", "sample-2.jsonl.gz"),
    ]
    assert sorted(path.name for path in folder.glob("*.gz")) == ["sample-2.jsonl.gz", "sample-3.jsonl.gz"]
    card.verify(folder)
    claims.check_samples(card, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_sha256": "0" * 64}, "is about other weights"),
        ({"defense": "minority"}, "is about minority with these weights"),
        ({"clean_accuracy": 0.5001}, "clean_accuracy is not its count"),
        ({"images": 21}, "has records of 20 images|is not its count"),
    ],
)
def test_a_sample_that_its_records_do_not_bear_out_is_refused(place: Path, change: dict[str, Any], message: str) -> None:
    path = place / "out" / "result.json"
    result = files.read_json(path)
    said = [{**claim, **{key: value for key, value in change.items() if key in claim}} for claim in result["claims"]]
    path.write_text(json.dumps({**result, **change, "claims": said}))
    done = add()
    assert isinstance(done.exception, ClaimError)
    assert any(words in str(done.exception) for words in message.split("|"))
    assert not Card.read(place / "zoo" / NAME).samples


def test_other_counts_than_the_records_are_refused(place: Path) -> None:
    assert add().exit_code == 0
    folder = place / "zoo" / NAME
    card = Card.read(folder)
    first = card.samples[0]
    more = replace(first, certified=first.certified, clean=first.clean + 1)
    with pytest.raises(ClaimError, match="but its records have"):
        claims.check_samples(replace(card, samples=(more, *card.samples[1:])), folder)


def test_pictures_need_words(place: Path) -> None:
    for text in ("out/result.json", "out/result.json= ", "=words"):
        done = add(sample=text)
        assert isinstance(done.exception, UsageError) and "--sample" in str(done.exception)


def sample(**changes: Any) -> Sample:
    values: dict[str, Any] = {
        "pictures": "five birds",
        "images": 5,
        "threat": "patch:2x2",
        "clean": 4,
        "certified": 2,
        "certified_interval": (0.05, 0.86),
        "method": "rows",
        "date": "2026-02-01",
        "command": "patchcert certify x",
        "patchcert": "0.1.0",
        "records": "sample-1.jsonl.gz",
    }
    return Sample(**{**values, **changes})


@pytest.mark.parametrize(
    ("samples", "held", "problem"),
    [
        ((sample(),), (), "files has no sample-1.jsonl.gz, which a sample names"),
        ((), (1,), "no sample names sample-1.jsonl.gz"),
        ((sample(), sample()), (1,), "more than once"),
        ((sample(certified=5),), (1,), "certified 5, clean 4, images 5"),
        ((sample(certified_interval=(0.5, 0.6)),), (1,), "does not hold 2/5"),
        ((sample(records="../x.gz"),), (1,), "not a file such as sample-1.jsonl.gz"),
        ((sample(pictures=""),), (1,), "pictures is ''"),
    ],
)
def test_what_is_wrong_with_a_sample_is_told(
    made: Path, samples: tuple[Sample, ...], held: tuple[int, ...], problem: str
) -> None:
    card = Card.read(made / "zoo" / NAME)
    more = {f"sample-{n}.jsonl.gz": File("0" * 64, 9) for n in held}
    with pytest.raises(IntegrityError, match=problem):
        replace(card, samples=samples, files={**card.files, **more}).render()


def test_every_bundled_sample_is_borne_out_by_its_records() -> None:
    zoo = Path(__file__).parents[2] / "zoo"
    counted = 0
    for name, card in bundled.cards(zoo=zoo).items():
        claims.check_samples(card, zoo / name)
        counted += len(card.samples)
    assert counted >= 2


def test_the_table_of_the_zoo_holds_no_sample() -> None:
    path = Path(__file__).parents[2] / "docs" / "make_zoo.py"
    spec = importlib.util.spec_from_file_location("make_zoo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with_samples = {name for name, card in bundled.cards().items() if card.samples}
    assert with_samples and not any(f"`{name}`" in module.tables() for name in with_samples)
    drawn = {card.name for card, _ in module.rows()}
    assert drawn and not drawn & with_samples
