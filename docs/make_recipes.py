"""Write ``docs/recipes.md``, which lists every entry of a recipe, and the ``recipe.yaml`` of every zoo model that is trained.

Run ``python docs/make_recipes.py`` after an option was added or changed, or a model was added to the zoo.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchcert_cli import defenses, models, schema
from patchcert_cli.catalog import bundled
from patchcert_cli.defenses import TaughtOptions
from patchcert_cli.training import recipe_files
from patchcert_cli.training.recipe import Recipe, written

ROOT = Path(__file__).parents[1]
INTRODUCTION = """# Recipes

A recipe is everything that decides a training run. It is a YAML file of the entries below; those that are left out have the
defaults of these tables, for every defense. Every model of the zoo that is trained here has one, `zoo/NAME/recipe.yaml`, and
every run folder gets one.

```
patchcert train --patch 5 --dry-run                     # the default recipe for a threat model, and what it would cost
patchcert train --recipe my.yaml                        # a file
patchcert train --recipe mnist-ibp-p5 --epochs 3        # that of a zoo model; flags override it
patchcert train --recipe runs/mnist-ibp-p5/recipe.yaml  # that of a run: the same weights again
```

A file may be as short as this:

```yaml
threat: patch:5x5
dataset: cifar10
defense: bagcert
network_options: {rf: 9}
options: {shift: 2}
```

Everything that is wrong with a recipe is listed at once. `--network-option NAME=VALUE` and `--option NAME=VALUE` set single
options of the two tables. `--dry-run` lists all of them, with the values of this recipe.

`rf` of the network `region` is the receptive field in pixels: `rf: 9` gives the most even kernels that see 9x9 pixels with the
dilations of the recipe. Kernels that are given beside it must see as many.

## Teachers

`--teacher NAME|PATH` lets a model learn from the class probabilities of another one besides the labels:

```
patchcert train --recipe cifar-bagcert-rf7-balanced --start cifar-bagcert-rf7-balanced --teacher cifar-masked-cnn
```

- **Who teaches:** a model of `patchcleanser`, `minority`, `hicert`, `smoothing` or `ibp`, for the same images and classes. It
  sees each training image as the student gets it, mirrored and shifted, and its network computes a pass for it in every step.
- **Who learns:** `bagcert`, `roots`, `smoothing`, `patchcleanser`, `minority` and `hicert`. `teacher_weight` is the share of the
  teacher in the cross-entropy, at temperature 1. For `bagcert` and `roots` it is the weight of what is added to the margin loss:
  the cross-entropy of the softmax of `teacher_sharpness` times the mean votes (of `roots`: of roots of regional votes); nothing
  is added in `warm_up_epochs`.
- **Held-out images:** a teacher may have been trained on images that the student holds out. Then the student's validation is not
  quite fair; test images are never used.
- **Certificates** are about the student alone. What taught it does not matter for them.
- **A teacher that has moved:** the recipe keeps its digest. Say where it is with `--teacher`; other weights are refused.

Source: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015.

This page is made by `docs/make_recipes.py`.
"""


def meanings(kind: type) -> dict[str, str]:
    """What the docstring of a class, and those of its bases, say about each of its attributes."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        text = inspect.cleandoc(one.__dict__.get("__doc__") or "")
        _, _, attributes = text.partition("Attributes:\n")
        attributes = re.split(r"\n\S", attributes)[0]
        for match in re.finditer(r"^ {4}(\w[\w, ]*): (.*?)(?=^ {4}\w|\Z)", attributes, re.DOTALL | re.MULTILINE):
            found |= {
                name.strip(): " ".join(match[2].split()).replace("``", "`").replace("|", "\\|") for name in match[1].split(",")
            }
    return found


def table(rows: Iterable[tuple[str, str, str, str]]) -> str:
    """A table in Markdown: entry, what it takes, default, meaning."""
    lines = ["| entry | takes | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{name}` | {takes} | {default} | {meaning} |" for name, takes, default, meaning in rows)])


def shown(value: Any) -> str:
    """A default as it is written on the command line."""
    return f"`{written(value)}`" if written(value) else "empty"


def of_class(kind: type) -> str:
    """The table of a dataclass; what most defenses have comes last."""
    said, shared = meanings(kind), [one.name for one in schema.entries(TaughtOptions)]
    rows = [
        (one.name, one.allowed, "required" if one.required else shown(one.default), said.get(one.name, ""))
        for one in sorted(schema.entries(kind), key=lambda entry: entry.name in shared)
    ]
    return table(rows)


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Entries", of_class(Recipe)]
    for name in defenses.trained():
        options = defenses.trainable(name).options
        parts += [f"## Options of `{name}`", f"Default network: `{defenses.trainable(name).default_network}`.", of_class(options)]
    for name in models.names():
        rows = [(option, "", shown(default), "") for option, default in models.defaults(name).items()]
        listing = "\n".join(f"| `{option}` | {default} |" for option, _, default, _ in rows)
        parts += [f"## Options of network `{name}`", f"| option | default |\n| --- | --- |\n{listing}"]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def recipes(zoo: Path) -> dict[Path, str]:
    """The recipe files of the zoo: what each should hold."""
    files = {}
    for name in bundled.names(zoo):
        card = bundled.card(name, zoo)
        if not card.public:  # public weights are not trained here
            files[zoo / name / recipe_files.RECIPE] = recipe_files.text(Recipe.from_dict(card.recipe, where=name), name)
    return files


if __name__ == "__main__":
    (ROOT / "docs" / "recipes.md").write_text(page(), encoding="utf-8")
    for path, content in recipes(ROOT / "zoo").items():
        path.write_text(content, encoding="utf-8")
        print(path.relative_to(ROOT))
