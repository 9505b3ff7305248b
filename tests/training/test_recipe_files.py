"""Recipes as files: what is read, what is refused, and that the same file gives the same run."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from patchcert_cli import data, defenses, models, schema
from patchcert_cli.catalog import bundled
from patchcert_cli.errors import UnknownName, UnsupportedThreat, UsageError
from patchcert_cli.storage import files
from patchcert_cli.threats import Patch, Sparse
from patchcert_cli.training import loop, recipe_files
from patchcert_cli.training.overrides import Overrides, pairs, resolved
from patchcert_cli.training.recipe import Recipe, default_recipe

ROOT = Path(__file__).parents[2]


def file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_has_some_entries_and_options_override_it(tmp_path: Path) -> None:
    path = file(tmp_path, "threat: patch:3x3\nlearning_rate: 1e-3\nnetwork_options: {hidden: 40}\noptions:\n  shift: 1\n")
    recipe = recipe_files.recipe_of(path)
    assert (recipe.threat, recipe.learning_rate, recipe.network_options) == (Patch(3, 3), 1e-3, {"hidden": [40]})
    changed = resolved(path, Overrides(threat=Sparse(2), epochs=100, options={"flip": True}))
    assert (changed.threat, changed.epochs) == (Sparse(2), 100)
    assert changed.to_dict()["options"] == recipe.to_dict()["options"] | {"flip": True}


def test_the_file_in_a_run_folder_is_the_same_recipe_and_takes_the_same_first_step(tmp_path: Path) -> None:
    made = resolved(None, Overrides(Patch(3, 3), network_options={"hidden": [6]}, epochs=3, batch_size=20, validation=20))
    recipe_files.write(made, tmp_path)
    again = resolved(str(tmp_path / "recipe.yaml"), Overrides())
    assert again == made and again.to_dict() == made.to_dict()
    images, states = data.load("mnist", "test").limit(60, 0), []
    for number, recipe in enumerate((made, again)):
        folder = tmp_path / str(number)
        with pytest.raises(loop.Interrupted):
            loop.train(recipe, images, folder, progress=StopAfterAnEpoch())
        states.append((folder / files.STATE).read_bytes())
    assert states[0] == states[1]


class StopAfterAnEpoch:
    def update(self, done: int, total: int, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", [path.parent.name for path in sorted((ROOT / "zoo").glob("*/recipe.yaml"))])
def test_the_recipe_of_a_zoo_model_is_that_of_its_card(name: str) -> None:
    recipe = recipe_files.recipe_of(name)
    assert recipe == Recipe.from_dict(bundled.card(name).recipe)
    assert recipe_files.recipe_of(str(ROOT / "zoo" / name / "recipe.yaml")) == recipe


def test_every_zoo_model_that_is_trained_here_has_a_recipe_file() -> None:
    for name in bundled.names():
        assert (ROOT / "zoo" / name / "recipe.yaml").is_file() is not bundled.card(name).public


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "threat: patch:40x40\nepochs: '3'\ncolour: red\noptions: {flip: 1, shfit: 2}\n",
            ("40x40", "epochs", "colour", "flip", "shfit"),
        ),
        ("epochs: 3\n", ("threat is missing",)),
        ("- threat\n", ("table",)),
        ("threat: [\n", ("YAML",)),
        ("threat: patch:2x2\nepochs: 3\nepochs: 4\n", ("more than once",)),
        ("threat: patch:2x2\nlearning_rate: .nan\n", ("learning_rate",)),
        ("threat: patch:2x2\nbatch_size: true\n", ("batch_size",)),
        ("threat: patch:2x2\nnetwork: cnn2\n", ("cnn2",)),
        ("threat: patch:2x2\nnetwork_options: [1]\n", ("network_options",)),
        ("threat: patch:2x2\noptions: 3\n", ("options",)),
        ("threat: patch:2x2\nlimit: 300\nvalidation: 400\n", ("limit", "400")),
        ("threat: patch:2x2\nstart: !!python/name:os.system\n", ("YAML",)),
    ],
)
def test_everything_wrong_with_a_file_is_one_line(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(file(tmp_path, text), Overrides())
    assert caught.value.hint and "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message


def test_a_file_that_is_missing_or_names_a_public_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"my\.yaml"):
        resolved(str(tmp_path / "my.yaml"), Overrides())
    with pytest.raises(UsageError, match="public"):
        resolved("imagenet-patchcleanser-vit-b16", Overrides())
    with pytest.raises(UsageError, match="threat"):
        resolved(None, Overrides())


def test_no_recipe_is_invalid() -> None:
    with pytest.raises(UsageError, match=r"epochs.*flip"):
        Recipe(Patch(2, 2), epochs=0, options={"flip": 3})  # type: ignore[arg-type]
    assert type(Recipe(Patch(2, 2)).options) is defenses.trainable("ibp").options


@pytest.mark.parametrize("field", [1, 2, 5, 7, 9, 17, 33])
def test_a_receptive_field_gives_kernels(field: int) -> None:
    recipe = resolved(None, Overrides(Patch(2, 2), defense="bagcert", network_options={"rf": field}))
    kernels, dilations = recipe.network_options["kernels"], models.defaults("region")["dilations"]
    assert 1 + sum((kernel - 1) * dilation for kernel, dilation in zip(kernels, dilations, strict=True)) == field
    assert "rf" not in recipe.network_options
    if field == 7:
        assert kernels == models.defaults("region")["kernels"]


def test_a_receptive_field_overrides_a_recipe_and_contradicts_no_kernels() -> None:
    changed = resolved("cifar-bagcert-rf7", Overrides(network_options={"rf": 9}))
    assert changed.network_options == recipe_files.recipe_of("cifar-bagcert-rf7").network_options | {"kernels": [3, 3, 3]}
    for options in ({"rf": 9, "kernels": [3, 3, 2]}, {"rf": 4, "dilations": [2, 2, 2]}, {"rf": 0}, {"rf": "9"}):
        with pytest.raises(UsageError, match="rf"):
            resolved(None, Overrides(Patch(2, 2), defense="bagcert", network_options=options))
    same = {"rf": 7, "kernels": [3, 3, 2]}
    assert resolved(None, Overrides(Patch(2, 2), defense="bagcert", network_options=same)).network_options == {
        "kernels": [3, 3, 2]
    }
    with pytest.raises(UsageError, match="rf"):
        resolved(None, Overrides(Patch(2, 2), network_options={"rf": 9}))  # of another network


def test_typed_pairs() -> None:
    assert pairs(["a=3", "b-c=1,2.5", "d=True"], "--option") == {"a": 3, "b_c": [1, 2.5], "d": True}
    for texts in (["a"], ["=3"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(UsageError, match="--option"):
            pairs(texts, "--option")


def test_defaults_are_those_of_the_defense() -> None:
    assert (default_recipe(Sparse(3), "ibp", "cifar10").dataset, default_recipe(Sparse(3)).dataset) == ("cifar10", "mnist")
    for name in defenses.trained():
        recipe = default_recipe(Patch(2, 2), name)
        assert recipe.defense == name and recipe.network == defenses.trainable(name).default_network


def test_another_network_takes_what_it_knows_of_the_recipes_options(tmp_path: Path) -> None:
    """The default recipe's ``hidden`` is no reason to refuse a network that has no such option; a value that is typed is."""
    assert resolved(None, Overrides(Patch(2, 2), defense="ibp", network="region")).network_options == {}
    cnn = resolved(None, Overrides(Patch(2, 2), defense="ibp", network="cnn"))
    assert cnn.network_options == {"hidden": [255]}
    mixed = resolved("cifar-ibp-p2", Overrides(network="mlp", network_options={"hidden": 9}))
    assert mixed.network_options == {"hidden": [9]}  # channels and strides are the convolutional network's
    slip = file(tmp_path, "threat: patch:3x3\nnetwork_options: {hiden: 40}\n")
    with pytest.raises(UsageError, match="no option 'hiden'"):
        resolved(slip, Overrides(network="cnn"))
    with pytest.raises(UsageError, match="network 'region' has no option 'hidden'"):
        resolved(None, Overrides(Patch(2, 2), defense="ibp", network="region", network_options={"hidden": 9}))
    with pytest.raises(UnknownName, match="no network 'nosuch'"):
        resolved(None, Overrides(Patch(2, 2), network="nosuch"))


@pytest.mark.parametrize("network", ["region", "resnet", "masked", "setwise"])
def test_a_network_without_interval_bounds_is_refused_before_the_first_step(network: str) -> None:
    recipe = resolved(None, Overrides(Patch(2, 2), defense="ibp", network=network))
    options = models.defaults(network) | {"input_shape": [1, 28, 28], "classes": 10, "mean": [0.5], "std": [0.5]}
    defense = defenses.trainable("ibp")(models.build(network, options), input_shape=(1, 28, 28), classes=tuple("0123456789"))
    with pytest.raises(UnsupportedThreat, match="no interval rule for layer"):
        defense.init_weights(recipe.options)


def test_the_document_lists_every_entry_and_option() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert text == runpy.run_path(str(ROOT / "docs" / "make_recipes.py"))["page"](), "run docs/make_recipes.py"
    for kind in (Recipe, *(defenses.trainable(name).options for name in defenses.trained())):
        for entry in schema.entries(kind):
            assert f"| `{entry.name}` | " in text, f"run {Path(sys.executable).name} docs/make_recipes.py"
    for name in models.names():
        assert f"## Options of network `{name}`" in text


@pytest.mark.parametrize("name", defenses.trained())
def test_digits_are_not_mirrored_unless_the_user_says_so(name: str) -> None:
    """A mirrored digit is not a digit; pictures of CIFAR-10 may be mirrored."""
    recipe = resolved(None, Overrides(Patch(5, 5), dataset="mnist", defense=name))
    assert not vars(recipe.options).get("flip")
    assert vars(resolved(None, Overrides(Patch(5, 5), dataset="mnist", defense=name, options={"flip": True})).options)["flip"]


@pytest.mark.parametrize("digest", ["2e90d6" + "0" * 58, "1" * 30 + "e" + "2" * 33, "1" * 64, "0x" + "1" * 62, "12e5"])
def test_a_digest_that_looks_like_a_number_stays_text(digest: str, tmp_path: Path) -> None:
    recipe = replace(Recipe("patch:5x5"), start="mnist-ibp-p5", start_sha256=digest)
    recipe_files.write(recipe, tmp_path)
    assert recipe_files.recipe_of(str(tmp_path / "recipe.yaml")) == recipe
    (tmp_path / "typed.yaml").write_text(
        f"threat: patch:5x5\nlearning_rate: 1e-3\nstart: mnist-ibp-p5\nstart_sha256: {'2e90d6' + '0' * 58}\n"
    )
    assert recipe_files.read(tmp_path / "typed.yaml")["start_sha256"] == "2e90d6" + "0" * 58
