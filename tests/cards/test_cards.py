from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import COMMIT, make_run, make_zoo, measured

from patchcert_cli import cards
from patchcert_cli.cards import Card, Hub, Published, valid_name
from patchcert_cli.catalog import bundled
from patchcert_cli.errors import IntegrityError, UnknownName, UsageError
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, parse_threat

BUNDLED = bundled.folder()


def front_of(text: str) -> dict[str, Any]:
    values = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(values, dict)
    return values


@pytest.fixture
def card(tmp_path: Path) -> Card:
    return make_zoo(tmp_path / "zoo", revision=COMMIT)


def test_a_card_reads_back_exactly(card: Card, tmp_path: Path) -> None:
    text = card.render()
    again = Card.from_text(text)
    assert again == card
    assert again.render() == text
    assert Card.read(tmp_path / "zoo" / card.name) == card


def test_every_field_differs_from_its_default_in_some_round_trip(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    unreliable = replace(run, status="unreliable", reason="an attack broke it", notes="One.\n\n---\n\nTwo: 'quoted' # é", seed=3)
    recipe_only = replace(
        run,
        status="recipe only",
        files={},
        trained=None,
        validation=None,
        published=(Published(parse_threat("sparse:4"), 1.0, 0, "t"),),
    )
    detection = replace(
        run,
        status="measured",
        files={**run.files, files.PUBLISHED_RECORDS: cards.File("0" * 64, 7)},
        results=(measured(guarantee="detection", certified=0, certified_interval=(0, 1e-3)),),
    )
    public = replace(recipe_only, status="public weights", classifier="timm:resnet18.a1_in1k")
    for card in (run, unreliable, recipe_only, detection, public):
        assert Card.from_text(card.render()) == card


@settings(max_examples=60, deadline=None)
@given(notes=st.text(alphabet=st.characters(codec="utf-8")), command=st.text(min_size=1, alphabet=st.characters(codec="ascii")))
def test_any_text_reads_back_exactly(notes: str, command: str) -> None:
    card = Card(
        "a",
        "recipe only",
        "ibp",
        "MLP",
        "mnist",
        Patch(5, 5),
        "train[1]",
        0,
        {"x": [1.5, None, True]},
        command,
        "mit",
        Hub("a/b"),
        notes=notes,
    )
    assert Card.from_text(card.render()) == card


def test_numbers_are_numbers_and_the_hub_reads_them(card: Card) -> None:
    from huggingface_hub import ModelCard

    values = front_of(card.render())
    assert values["patchcert"]["results"][0]["certified"] == 6000
    assert values["patchcert"]["recipe"]["learning_rate"] == 1e-05
    data = ModelCard(card.render(), ignore_metadata_errors=False).data
    certified = [one for one in data.eval_results or [] if one.metric_type == "certified_accuracy"]
    assert [(one.metric_value, one.metric_args["threat"]) for one in certified] == [(0.6, "patch:2x2"), (0.5, "sparse:1")]
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "patchcert", "image-classification")


def test_the_prose_tells_measured_beside_published(card: Card) -> None:
    text = card.render()
    measured = "93.00% (9300/10000) | 60.00% (6000/10000) | 59.03% to 60.96%"
    row = f"| `patch:2x2`, recovery (interval) | mnist test | bounded | {measured} | 92.00% | 60.40% |"
    assert row in text
    assert "| `patch:3x3` | mnist |  | not measured | not measured |  | 90.00% | 30.00% |" in text
    assert f"patchcert certify {card.name} --patch 2" in text
    assert "Not proven:" in text


def broken(card: Card, **changes: Any) -> list[str]:
    values = card.to_dict()
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = values
        for key in parents:
            target = target[int(key)] if key.isdigit() else target[key]
        if value is KeyError:
            del target[last]
        else:
            target[last] = value
    with pytest.raises(IntegrityError) as caught:
        Card.from_dict(values)
    assert caught.value.code == 5
    return caught.value.message.split(" card: ", 1)[1].rstrip(".").split("; ")


def test_every_problem_is_listed_at_once(card: Card) -> None:
    problems = broken(
        card,
        name="../x",
        seed="3",
        threat="patch",
        hub__revision="main",
        license=KeyError,
        results__0__clean="9300",
        results__0__certified_interval=[0.1, 0.2, 0.3],
        results__1__certified=9301,
        published__0__clean=92.0,
        color="red",
        recipe__learning_rate="1e-3",
    )
    expected = [
        "color is not a known entry",
        "name is '../x', not lower-case letters, digits, '-' and '.'",
        "seed is '3', not a whole number",
        "license is missing",
        "hub.revision is 'main', not a commit of 40 hex digits",
        "results[0].clean is '9300', not a whole number",
        "results[0].certified_interval has 3 entries, not 2",
        "results[1].certified 9301, clean 9300, images 10000: each must be at most the next",
        "results[1].certified_interval [0.49, 0.51] does not hold 9301/10000",
        "published[0].clean is 92.0, not a fraction in [0, 1]",
        "recipe.learning_rate is '1e-3', a number written as text",
    ]
    (threat,) = [problem for problem in problems if problem.startswith("threat is 'patch': ")]
    assert sorted(problems) == sorted([threat, *expected])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"status": "trained"}, "results is not empty, so status must be measured"),
        ({"status": "unreliable"}, "reason is for status unreliable, which needs one"),
        ({"results": []}, "results is empty, so status must be trained"),
        ({"trained": None}, "trained is missing"),
        ({"files": {}}, "files has no model.safetensors"),
        ({"files": {"../x.json": {"sha256": "0" * 64, "size": 1}}}, "'../x.json' is not records.jsonl.gz or a plain name"),
        ({"files": {"weights.pt": {"sha256": "0" * 64, "size": 1}}}, "'weights.pt' is not records.jsonl.gz or a plain name"),
        ({"files": 3}, "files is 3, not a table"),
        ({"seed": True}, "seed is True, not a whole number"),
        ({"seed": 4}, "recipe.seed is 3, but the card has 4"),
        ({"recipe": {"when": __import__("datetime").date(2026, 1, 1)}}, "recipe.when is datetime.date(2026, 1, 1), not plain"),
        ({"split": "train"}, "split is 'train', not a split and how many"),
        ({"trained__seconds": float("nan")}, "trained.seconds is nan, not a number"),
        ({"trained__date": "31.1.2026"}, "trained.date is '31.1.2026', not a date"),
        ({"results__1__threat": "patch:2"}, "results has mnist test patch:2x2 recovery interval more than once"),
        ({"published__0__certified": 0.95}, "published[0].certified 0.95 exceeds clean 0.92"),
    ],
)
def test_each_problem_is_found(card: Card, changes: dict[str, Any], problem: str) -> None:
    assert any(problem in one for one in broken(card, **changes))


@pytest.mark.parametrize("address", ["timm:resnet18.a1_in1k", "hf-hub:org/net@main"])
def test_a_card_of_public_weights_says_so_and_says_how_to_measure_them(tmp_path: Path, address: str) -> None:
    run = make_run(tmp_path / "run")
    bare: dict[str, Any] = {"status": "public weights", "files": {}, "trained": None, "validation": None}
    card = replace(run, **bare, classifier=address, command="patchcert certify small --data imagenet")
    text = cards.prose(card)
    for words in (
        f"The weights are public, `{address}`: nothing is trained. Measure them:",
        "Made for: `patch:2x2`",
        card.command,
    ):
        assert words in text
    assert "Train" not in text.split("## Use")[1].split("## How")[0] and "seed" not in text.split("## How it was made")[1][:90]
    with pytest.raises(IntegrityError, match=r"no weights are published yet. Try: patchcert certify small"):
        card.verify(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"classifier": "timm:resnet18"}, "classifier is for status public weights"),
        ({"status": "public weights", "files": {}}, "status public weights needs a classifier, or files instead of one"),
        ({"status": "public weights"}, "origin is for public weights in files, which need one"),
        ({"status": "public weights", "origin": "us"}, "results must be empty while status is public weights"),
        ({"origin": "us"}, "origin is for public weights in files"),
        ({"status": "public weights", "classifier": "mine:build"}, "classifier is 'mine:build', not timm:NAME or hf-hub"),
        ({"status": "public weights", "classifier": "timm:a"}, "needs a classifier, or files instead of one"),
        ({"status": "recipe only"}, "files must be empty while status is recipe only"),
    ],
)
def test_no_card_names_code_or_weights_that_are_not_public(card: Card, changes: dict[str, Any], problem: str) -> None:
    assert any(problem in one for one in broken(card, **changes))


def test_an_invalid_card_is_never_written(card: Card) -> None:
    with pytest.raises(IntegrityError, match="seed"):
        replace(card, seed=-1).render()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("value: 0.6\n", "value: 0.7\n", "model-index does not follow"),
        ("license: apache-2.0\nd", "license: mit\nd", "license does not follow"),
        ("library_name", "base_model: x\nlibrary_name", "base_model does not follow"),
        ("patchcert:\n", "other:\n", "has no patchcert table"),
        ("---\n", "", "does not begin with YAML"),
        ("pipeline_tag:", "pipeline_tag: [", "is not a model card"),
    ],
)
def test_metadata_that_says_something_else_is_refused(card: Card, old: str, new: str, problem: str) -> None:
    text = card.render()
    assert old in text
    with pytest.raises(IntegrityError, match=problem):
        Card.from_text(text.replace(old, new, 1))


def test_a_missing_card_is_an_integrity_error(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="no model card"):
        Card.read(tmp_path)


@pytest.mark.parametrize("name", ["mnist-ibp-p5", "a", "v1.2-x"])
def test_valid_names(name: str) -> None:
    assert valid_name(name)


@pytest.mark.parametrize(
    "name", ["", "../x", "/abs", "a/b", "a\\b", ".", "..", ".x", "x..y", "-x", "x-", "Mnist", "x y", "x\n", "é", "a" * 97]
)
def test_invalid_names(name: str) -> None:
    assert not valid_name(name)


@pytest.mark.parametrize(("folder", "name"), [("My run_2", "my-run-2"), ("..", "run"), ("p5", "p5")])
def test_every_folder_name_has_a_valid_model_name(folder: str, name: str) -> None:
    assert cards.slug(folder) == name
    assert valid_name(cards.slug(folder))


def test_the_zoo_is_filtered_by_data_set_and_threat(card: Card, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    for arguments in ({}, {"dataset": "mnist"}, {"threat": "patch"}, {"threat": "patch:2"}):
        assert bundled.cards(**arguments, zoo=zoo) == {card.name: card}
    for arguments in ({"dataset": "cifar10"}, {"threat": "sparse"}, {"threat": "patch:3"}):
        assert bundled.cards(**arguments, zoo=zoo) == {}
    with pytest.raises(UnknownName, match="mnist"):
        bundled.cards(dataset="mnis", zoo=zoo)
    with pytest.raises(UsageError, match="patch or sparse"):
        bundled.cards(threat="linf", zoo=zoo)


def test_a_card_in_a_folder_of_another_name_is_refused(card: Card, tmp_path: Path) -> None:
    (tmp_path / "zoo" / card.name).rename(tmp_path / "zoo" / "renamed")
    with pytest.raises(IntegrityError, match="small-ibp-p2"):
        bundled.cards(zoo=tmp_path / "zoo")


def test_defaults() -> None:
    assert bundled.default_model() == bundled.default_model("cifar10") == "cifar-bagcert-rf7"
    assert bundled.default_model("mnist") == "mnist-ibp-p5"
    with pytest.raises(UnknownName, match="patchcert zoo list --data svhn"):
        bundled.default_model("svhn")


def test_a_measurement_is_found_by_what_its_threat_means(card: Card) -> None:
    found = card.result(Patch(2, 2)), card.report()
    assert found == (card.results[0], card.published[0])
    assert card.result(Patch(9, 9)) is None


def folders() -> list[str]:
    return sorted(path.name for path in BUNDLED.iterdir() if path.is_dir() and path.name != "__pycache__")


def test_the_zoo_has_one_sound_card_for_each_folder() -> None:
    found = bundled.cards()
    assert len(found) == len(folders())
    assert sorted(found) == folders()


@pytest.mark.parametrize("name", folders())
def test_bundled_models_are_what_their_cards_say(name: str) -> None:
    card = bundled.card(name)
    assert (BUNDLED / name / files.CARD).read_text(encoding="utf-8") == card.render()
    if (BUNDLED / name / files.WEIGHTS).is_file():
        assert card.verify(BUNDLED / name) == card.files[files.WEIGHTS].sha256


def test_the_zoo_folder_is_found_through_the_package_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BUNDLED.name == "zoo"
    monkeypatch.setenv(bundled.ENVIRONMENT, str(tmp_path))
    assert bundled.folder() == tmp_path
    assert bundled.cards() == {}
    assert bundled.cards(zoo=tmp_path / "absent") == {}


def test_cards_import_no_torch() -> None:
    code = "import sys, patchcert_cli.catalog.bundled as c; c.cards(); assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


BOMBS = {
    "laughs": "\n".join(f"a{at}: &a{at} [{', '.join([f'*a{at - 1}'] * 9) if at else 'lol'}]" for at in range(9)),
    "one alias": "a: &a 1\nb: *a",
    "deep": "a: " + "[" * 5000 + "]" * 5000,
    "many": "a: [" + "1, " * 100_000 + "]",
    "digits": "a: " + "9" * 5000,
    "no date": "a: 2024-13-45",
}


@pytest.mark.parametrize("name", BOMBS)
def test_front_matter_that_is_a_burden_is_refused_at_once(name: str) -> None:
    with pytest.raises(IntegrityError, match="is not a model card") as caught:
        Card.from_text(f"---\n{BOMBS[name]}\n---\n")
    assert "\n" not in str(caught.value)
