"""Recipes as files: the ``recipe.yaml`` of a zoo model or of a run folder, and any other one that a user wrote.

A file has some or all entries of :class:`patchcert_cli.training.recipe.Recipe`; those that are left out have their defaults.
``docs/recipes.md`` lists them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from patchcert_cli.catalog import bundled, resolve
from patchcert_cli.errors import IntegrityError, UnknownName, UsageError
from patchcert_cli.storage import files
from patchcert_cli.training.recipe import Recipe

RECIPE = "recipe.yaml"
SUFFIXES = (".yaml", ".yml")
LARGEST_FILE = 1 << 20  # bytes that a recipe may have
HEADER = "# The recipe of this model, with every default. Train it again: patchcert train --recipe {source}\n"

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")  # the whole text: a digest may begin like a number


class _Loader(yaml.SafeLoader):
    """Plain YAML in which ``1e-3`` is a number, as in YAML 1.2, and a name that occurs twice in a table is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} is given more than once")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that :class:`_Loader` would read as a number, such as a digest of digits with one e."""


for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def text(recipe: Recipe, source: str = RECIPE) -> str:
    """A recipe as YAML; ``source`` is what ``--recipe`` takes to read it again."""
    return HEADER.format(source=source) + yaml.dump(
        recipe.to_dict(), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120
    )


def write(recipe: Recipe, folder: Path) -> None:
    """Write the recipe into a run folder."""
    files.write_atomically(folder / RECIPE, text(recipe, str(folder / RECIPE)).encode())


def read(path: Path) -> dict[str, Any]:
    """The entries that a file has, as they are.

    Raises:
        UnknownName: there is no such file.
        UsageError: it is not a table in YAML.
    """
    if not path.is_file():
        raise UnknownName(f"there is no recipe '{path}'.", hint="Use a YAML file, a model of patchcert zoo list or a run folder.")
    if path.stat().st_size > LARGEST_FILE:
        raise UsageError(f"'{path}' has more than {LARGEST_FILE} bytes.", hint="See docs/recipes.md for what a recipe holds.")
    try:
        values = yaml.load(files.read(path).decode("utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        said = " ".join(str(problem).split())
        raise UsageError(f"'{path}' is not YAML: {said}.", hint="Write one entry a line, such as epochs: 3.") from problem
    if not isinstance(values, dict):
        raise UsageError(f"'{path}' is not a table of entries.", hint="Write one entry a line, such as epochs: 3.")
    return {str(name): value for name, value in values.items()}


def entries_of(name_or_path: str) -> dict[str, Any]:
    """The entries of the recipe that a file, a zoo model, a run folder or a model on the Hub has.

    Raises:
        UnknownName: there is no such file or model.
        UsageError: the file is not a recipe, or the model was not trained here.
        IntegrityError: the configuration of the model has no recipe.
    """
    if name_or_path.endswith(SUFFIXES):
        return read(Path(name_or_path))
    if name_or_path in bundled.names():
        path = bundled.folder() / name_or_path / RECIPE
        if path.is_file():
            return read(path)
        card = bundled.card(name_or_path)
        if card.classifier:
            raise UsageError(f"{card.name} is not trained, because its weights are public.", hint=f"Measure them: {card.command}")
        return card.recipe
    config = files.read_json(resolve.resolve(name_or_path).folder / files.CONFIG)
    if not isinstance(config.get("recipe"), dict):
        raise IntegrityError(f"'{name_or_path}' does not say how it was trained.", hint="Give --patch or --threat instead.")
    recipe: dict[str, Any] = config["recipe"]
    return recipe


def recipe_of(name_or_path: str) -> Recipe:
    """The recipe of :func:`entries_of`, checked."""
    return Recipe.from_dict(entries_of(name_or_path), where=f"the recipe of '{name_or_path}'")
