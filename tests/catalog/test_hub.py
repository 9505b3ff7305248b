from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import quick_process
import torch
from model_folders import COMMIT, make_run, make_zoo, write_result

import patchcert_cli
from patchcert_cli import checkpoint
from patchcert_cli.cards import Card, Published
from patchcert_cli.cards.published import PublishedRecords
from patchcert_cli.catalog import add_to_zoo, bundled, claims, resolve
from patchcert_cli.errors import ClaimError, IntegrityError, PatchcertError, UnknownName, UsageError
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, parse_threat

NAME = "small-ibp-p2"
FIVE = {"counts": {"clean": 9300, "certified": 5000}, "certified_accuracy": 0.5, "certified_interval": [0.49, 0.51]}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    make_zoo(tmp_path / "zoo")
    return tmp_path / "zoo"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "p2")
    return tmp_path / "runs" / "p2"


def given(tmp_path: Path, run: Path, **changes: object) -> dict[str, dict[str, object]]:
    """A result of certify about ``run``, as ``add`` takes it."""
    path = write_result(tmp_path / "certify", run, **changes)
    return {str(path): files.read_json(path)}


def flip(path: Path) -> None:
    """Damage the last byte, which leaves a file that loads without complaint."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_a_name_is_served_by_the_bundled_copy(zoo: Path) -> None:
    found = resolve.resolve(NAME, zoo=zoo)
    assert (found.folder, found.source, found.name) == (zoo / NAME, "bundled", NAME)
    assert found.card == Card.read(zoo / NAME)
    assert found.sha256 == files.sha256(zoo / NAME / files.WEIGHTS)
    assert "\n" not in found.note


def test_a_folder_or_its_weights_are_served_as_they_are(run: Path) -> None:
    for given in (run, str(run), os.path.relpath(run), run / files.WEIGHTS, str(run / files.WEIGHTS)):
        found = resolve.resolve(given)
        assert (found.folder.resolve(), found.source) == (run, "folder")
    (run / files.CARD).unlink()
    found = resolve.resolve(run)
    assert (found.card, found.name) == (None, "p2")
    assert "without a card" in found.note


def test_a_folder_in_the_working_directory_needs_no_separator(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    assert resolve.resolve("p2").source == "folder"


def test_load_rebuilds_the_defense(zoo: Path, run: Path) -> None:
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = checkpoint.load_defense(run)[0].predict(x)
    for defense in (resolve.load(run), resolve.load(NAME, zoo=zoo), patchcert_cli.load(str(run))):
        assert torch.equal(defense.predict(x), expected)
        assert not defense.training


def test_a_model_is_loaded_with_its_card(zoo: Path, run: Path) -> None:
    model = patchcert_cli.load_model(NAME, zoo=zoo)
    assert model.card == Card.read(zoo / NAME) and (model.name, model.revision) == (NAME, None)
    assert model.files.sha256 == files.sha256(zoo / NAME / files.WEIGHTS)
    (run / files.CARD).unlink()
    assert patchcert_cli.load_model(run).card is None


def test_models_are_listed_by_pattern_data_set_and_threat(zoo: Path) -> None:
    make_zoo(zoo, "other-model")
    assert patchcert_cli.list_models(zoo=zoo) == ["other-model", NAME]
    assert patchcert_cli.list_models("small*", zoo=zoo) == [NAME] == patchcert_cli.list_models("*p2", dataset="mnist", zoo=zoo)
    assert patchcert_cli.list_models("*", threat="sparse", zoo=zoo) == [] == patchcert_cli.list_models("SMALL*", zoo=zoo)


def test_a_card_is_decoded_again_only_if_its_file_changes(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, text = bundled.card(NAME, zoo), (zoo / NAME / files.CARD).read_text()
    assert bundled.card(NAME, zoo) is first
    (zoo / NAME / files.CARD).write_text(replace(first, notes="changed").render())
    assert bundled.card(NAME, zoo).notes == "changed"
    (zoo / NAME / files.CARD).write_text(text)
    assert bundled.card(NAME, zoo) == first


@pytest.mark.parametrize(("given", "near"), [("small-ibp-p3", NAME), ("small", NAME), ("Small_IBP_p2", NAME), ("", "zoo list")])
def test_unknown_names_come_with_suggestions(zoo: Path, given: str, near: str) -> None:
    for action in (resolve.resolve, resolve.pull):
        with pytest.raises(UnknownName, match=near) as caught:
            action(given, zoo=zoo)
        assert "patchcert zoo list" in str(caught.value)
        assert caught.value.code == 3


@pytest.mark.parametrize("given", ["../x", "/nowhere/x", "runs/none"])
def test_missing_folders_are_unknown(given: str) -> None:
    with pytest.raises(UnknownName, match="no folder"):
        resolve.resolve(given)


@pytest.mark.parametrize("name", ["../zoo/small-ibp-p2", "/etc", "Small-ibp-p2", ".."])
def test_pull_takes_names_and_no_paths(zoo: Path, name: str) -> None:
    with pytest.raises(UnknownName):
        resolve.pull(name, zoo=zoo)


@pytest.mark.parametrize("suffix", files.PICKLES)
def test_pickles_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    for given in (f"weights{suffix}", str(tmp_path / f"absent{suffix.upper()}")):
        with pytest.raises(IntegrityError, match="not opened") as caught:
            resolve.resolve(given)
        assert caught.value.code == 5
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"weights{suffix}").write_bytes(b"\x80\x04")
    with pytest.raises(IntegrityError, match="not opened"):
        resolve.resolve(tmp_path / "run")


def test_other_files_and_empty_folders_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is a file"):
        resolve.resolve(run / files.CONFIG)
    with pytest.raises(IntegrityError, match=r"holds no model\.safetensors"):
        resolve.resolve(tmp_path)


@pytest.mark.parametrize("file", [files.WEIGHTS, files.CONFIG])
def test_a_file_that_is_not_what_its_card_says_is_refused(zoo: Path, run: Path, file: str) -> None:
    flip(zoo / NAME / file)
    flip(run / file)
    for action in (
        lambda: resolve.resolve(NAME, zoo=zoo),
        lambda: resolve.pull(NAME, zoo=zoo),
        lambda: resolve.resolve(run),
        lambda: resolve.load(run),
    ):
        with pytest.raises(IntegrityError, match="sha256") as caught:
            action()
        assert caught.value.code == 5


def test_a_recipe_without_weights_says_how_to_train(tmp_path: Path) -> None:
    card = make_zoo(tmp_path / "zoo")
    bare = replace(card, status="recipe only", files={}, trained=None, validation=None, results=())
    (tmp_path / "zoo" / NAME / files.CARD).write_text(bare.render())
    for action in (resolve.resolve, resolve.pull):
        with pytest.raises(UnknownName, match=f"no weights are published yet. Train it: patchcert train --recipe {NAME}"):
            action(NAME, zoo=tmp_path / "zoo")


def test_pull_of_an_unpublished_model_says_so(zoo: Path) -> None:
    found = resolve.pull(NAME, zoo=zoo)
    assert found.source == "bundled"
    assert "not published on the Hub yet" in found.note


def test_pull_needs_a_whole_commit(zoo: Path) -> None:
    with pytest.raises(UsageError, match="full commit"):
        resolve.pull(NAME, revision="main", zoo=zoo)


NO_WAITING = "import sys, time\ntime.sleep = lambda seconds: sys.exit(f'waited {seconds} s before another try')"


def client(zoo: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own: the Hub client reads its environment once."""
    variables = {**os.environ, "PATCHCERT_ZOO": str(zoo), "HF_HOME": str(zoo.parent / "hf"), **environment}
    program = f"{NO_WAITING}\nfrom patchcert_cli import errors\nfrom patchcert_cli.catalog import resolve\n{code}"
    return quick_process.run([""], variables, program)


SHOW = f"found = resolve.pull('{NAME}'); print(found.source, found.note)"
DEAD = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}


@pytest.mark.parametrize(
    ("environment", "code", "reason"),
    [
        (DEAD, SHOW, "the Hub is out of reach (http://127.0.0.1:9)"),
        ({"HF_HUB_OFFLINE": "1"}, SHOW, "HF_HUB_OFFLINE forbids fetching it"),
        (DEAD, SHOW.replace("')", "', offline=True)"), "--offline forbids fetching it"),
    ],
)
def test_an_unreachable_hub_is_answered_by_the_bundled_copy(
    tmp_path: Path, environment: dict[str, str], code: str, reason: str
) -> None:
    make_zoo(tmp_path / "zoo", revision=COMMIT)
    done = client(tmp_path / "zoo", code, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bundled small-ibp-p2: the copy that is bundled")
    assert reason in done.stdout


def test_without_a_bundled_copy_an_unreachable_hub_is_an_error(tmp_path: Path) -> None:
    make_zoo(tmp_path / "zoo", revision=COMMIT, weights=False)
    code = f"try: resolve.resolve('{NAME}')\nexcept errors.HubError as problem: print(problem.code, problem)"
    done = client(tmp_path / "zoo", code, **DEAD)
    assert done.stdout.startswith("4 the Hub is out of reach (http://127.0.0.1:9)"), done.stderr


def test_add_makes_a_measured_zoo_model(run: Path, tmp_path: Path) -> None:
    report = Published(Patch(2, 2), 0.92, 0.604, "table 1")
    card = add_to_zoo.add(run, "mnist-small", given(tmp_path, run), published=[report], to=tmp_path / "new")
    assert bundled.cards(zoo=tmp_path / "new") == {"mnist-small": card}
    assert (card.status, card.hub.repo, card.published) == ("measured", "patchcert/mnist-small", (report,))
    assert (card.results[0].clean, card.results[0].certified) == (9300, 6000)
    assert sorted(path.name for path in (tmp_path / "new" / "mnist-small").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "records.jsonl.gz",
    ]
    assert resolve.resolve("mnist-small", zoo=tmp_path / "new").sha256 == files.sha256(run / files.WEIGHTS)


@pytest.mark.parametrize(
    "typed",
    [
        "patchcert certify runs/p5 --patch 1..10 --out runs/certify",
        "patchcert certify --data-dir '/my data' --patch 1..10 ./runs/p5/ --plot=curve.png",
        "patchcert certify p5 --patch 1..10",
        "patchcert certify mnist-ibp-p5 --patch 1..10 --json -",
    ],
)
def test_commands_of_a_card_name_the_model_and_no_place_of_the_machine(typed: str) -> None:
    told = add_to_zoo.for_readers(typed, Path("runs/p5"), "mnist-ibp-p5").split()
    assert sorted(told) == sorted(["patchcert", "certify", "mnist-ibp-p5", "--patch", "1..10"])


def test_the_value_of_an_option_is_not_taken_for_the_folder_of_the_model() -> None:
    told = add_to_zoo.for_readers("patchcert certify runs/5 --patch 5", Path("runs/5"), "mnist-ibp-p5")
    assert told == "patchcert certify mnist-ibp-p5 --patch 5"


def test_add_replaces_only_with_force_and_keeps_the_revision_of_the_same_files(run: Path, tmp_path: Path) -> None:
    zoo = tmp_path / "new"
    card = add_to_zoo.add(run, "x", given(tmp_path, run), to=zoo)
    pushed = replace(card, hub=replace(card.hub, revision=COMMIT))
    (zoo / "x" / files.CARD).write_text(pushed.render())
    with pytest.raises(UsageError, match="--force"):
        add_to_zoo.add(run, "x", {}, to=zoo)
    assert add_to_zoo.add(run, "x", given(tmp_path, run), to=zoo, force=True).hub.revision == COMMIT
    assert add_to_zoo.add(run, "x", {}, to=zoo, force=True).hub.revision is None  # without its records it is something else
    assert bundled.card("x", zoo).status == "trained"


def test_add_keeps_what_the_zoo_has_measured_before(run: Path, tmp_path: Path) -> None:
    zoo = tmp_path / "new"
    add_to_zoo.add(run, "x", given(tmp_path, run), to=zoo)
    with_three = add_to_zoo.add(zoo / "x", "x", given(tmp_path, run, threat="patch:3x3", **FIVE), to=zoo, force=True)
    assert [(str(one.threat), one.certified) for one in with_three.results] == [("patch:2x2", 6000), ("patch:3x3", 5000)]
    assert with_three.hub.revision is None
    claims.check_results(with_three, zoo / "x")
    records = PublishedRecords.read(zoo / "x" / files.PUBLISHED_RECORDS)
    assert [records.counts(records.position(parse_threat(threat))) for threat in ("patch:2x2", "patch:3x3")] == [
        (9300, 6000),
        (9300, 5000),
    ]
    again = add_to_zoo.add(zoo / "x", "x", given(tmp_path, run, **FIVE), to=zoo, force=True)  # 2x2, certified anew
    assert [(str(one.threat), one.certified) for one in again.results] == [("patch:3x3", 5000), ("patch:2x2", 5000)]
    assert add_to_zoo.add(zoo / "x", "y", {}, to=zoo).results == again.results  # nothing is lost by a copy


def test_add_refuses_results_with_other_predictions_than_before(run: Path, tmp_path: Path) -> None:
    zoo = tmp_path / "new"
    add_to_zoo.add(run, "x", given(tmp_path, run), to=zoo)
    before = (zoo / "x" / files.CARD).read_text()
    other = given(
        tmp_path, run, threat="patch:3x3", **FIVE | {"clean_accuracy": 0.92, "counts": {"clean": 9200, "certified": 5000}}
    )
    with pytest.raises(ClaimError, match="predictions differ"):
        add_to_zoo.add(zoo / "x", "x", other, to=zoo, force=True)
    assert (zoo / "x" / files.CARD).read_text() == before


@pytest.mark.parametrize(
    ("changes", "kind", "problem"),
    [
        ({"model_sha256": "0" * 64}, ClaimError, "other weights"),
        ({"defense": "minority", "guarantee": "detection"}, ClaimError, "about minority with these weights, but the model is"),
        ({"full_split": False, "images": 200}, ClaimError, "not about the full test split"),
        ({"split": "validation"}, ClaimError, "not about the full test split"),
        ({"dataset": "cifar10"}, ClaimError, "trained on mnist"),
        ({"certified_accuracy": 0.9}, ClaimError, "certified_accuracy is not its count"),
        ({"counts": {"clean": 9300}}, IntegrityError, "not a result of patchcert certify"),
        ({"attack": {}}, IntegrityError, "not a result of patchcert certify"),
        ({"certified_interval": [0.7, 0.8]}, IntegrityError, "does not hold 6000/10000"),
        ({"date": 3}, IntegrityError, "date is 3"),
    ],
)
def test_add_refuses_results_that_prove_nothing_about_the_weights(
    run: Path, tmp_path: Path, changes: dict[str, object], kind: type[PatchcertError], problem: str
) -> None:
    with pytest.raises(kind, match=problem):
        add_to_zoo.add(run, "x", given(tmp_path, run, **changes), to=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_add_refuses_a_damaged_run_and_a_bad_name(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot name a model"):
        add_to_zoo.add(run, "../x", {}, to=tmp_path / "new")
    flip(run / files.WEIGHTS)
    with pytest.raises(IntegrityError, match="sha256"):
        add_to_zoo.add(run, "x", {}, to=tmp_path / "new")
    (run / files.CARD).unlink()
    with pytest.raises(IntegrityError, match="no model card"):
        add_to_zoo.add(run, "x", {}, to=tmp_path / "new")


@pytest.mark.parametrize(("masks", "own"), [({"covers": ["patch:5x5"], "per_axis": 6}, False), (None, True)])
def test_other_masks_are_another_predictor_and_no_result_of_the_model(tmp_path: Path, masks: object, own: bool) -> None:
    found = resolve.resolve("cifar-masked-cnn")
    assert found.card is not None
    used = masks or {"covers": ["patch:5x5"], "per_axis": 7}
    path = write_result(tmp_path, found.folder, dataset="cifar10", defense="patchcleanser", threat="patch:5x5")
    (tmp_path / files.MANIFEST).write_text(json.dumps({"setting": {"masks": used}}))
    results = {str(path): files.read_json(path)}
    bare = replace(found, card=replace(found.card, results=()))
    (tmp_path / "runs").mkdir()
    for name in ("result.json", "records.jsonl", files.MANIFEST):  # as zoo push looks for it
        (tmp_path / "runs" / "one").mkdir(exist_ok=True)
        (tmp_path / "runs" / "one" / name).write_bytes((tmp_path / name).read_bytes())
    if own:
        assert len(claims.results_about(bare, [tmp_path / "runs"])) == 1
        assert claims.card_with_results(bare, results)[0].results[0].certified == 6000
    else:
        with pytest.raises(ClaimError, match=r"other masks than those of the model: .*\"per_axis\": 6"):
            claims.card_with_results(bare, results)
        with pytest.raises(ClaimError, match="no result of these weights"):
            claims.results_about(bare, [tmp_path / "runs"])
