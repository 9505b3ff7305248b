"""From a recipe and what the user changes of it to the recipe of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from patchcert_cli import cards, data, defenses, models
from patchcert_cli.catalog import resolve
from patchcert_cli.classifiers import addresses
from patchcert_cli.data import datasets
from patchcert_cli.errors import IntegrityError, UnknownName, UsageError
from patchcert_cli.threats import Threat
from patchcert_cli.training import recipe_files
from patchcert_cli.training.recipe import ROLES, Recipe, default_entries, typed, usual_defense

FINE_TUNING: dict[str, Any] = {  # few steps at a low rate: the published course of networks that were trained before
    "epochs": 10,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "optimizer": "sgd",
    "weight_decay": 0.0,
    "stored": "float32",
}
HELD_OUT = 10  # at most one in this many images of the user's own data set, or of a limited one, is held out


@dataclass(frozen=True)
class Overrides:
    """Entries of a recipe that the user changes; None leaves an entry as it is. Tables are merged entry by entry.

    Attributes:
        model: address of published weights to begin with, ``timm:NAME`` or ``hf-hub:ORG/REPO@COMMIT``.
        weights: safetensors file for ``model``, or ``none`` for random weights.
    """

    threat: Threat | None = None
    dataset: str | None = None
    defense: str | None = None
    network: str | None = None
    network_options: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    steps: tuple[int, ...] | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    optimizer: str | None = None
    weight_decay: float | None = None
    precision: str | None = None
    stored: str | None = None
    validation: int | None = None
    limit: int | None = None
    seed: int | None = None
    start: str | None = None
    teacher: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    weights: str | None = None

    def entries(self) -> dict[str, Any]:
        """The entries that are changed, without the tables."""
        apart = ("network_options", "options", "model", "weights")
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in apart}
        return {name: value for name, value in values.items() if value is not None}


def pairs(texts: list[str] | None, flag: str) -> dict[str, Any]:
    """``NAME=VALUE`` texts, as they are typed after ``flag``, as a table.

    Raises:
        UsageError: a text has no name or no value, or a name comes twice.
    """
    table: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not name or not value:
            raise UsageError(f"{flag} '{text}' cannot be read.", hint=f"Use NAME=VALUE, for example {flag} {name or 'NAME'}=3.")
        if name in table:
            raise UsageError(f"{flag} {name} is given more than once.", hint="Give it once; a list has commas: 512,256.")
        table[name] = typed(value)
    return table


def resolved(
    basis: str | None, changes: Overrides, *, fetch: bool = True, say: Callable[[str], None] = lambda text: None
) -> Recipe:
    """The recipe of a run, checked as a whole.

    Args:
        basis: a recipe file, zoo model or run folder to begin with; None for the default recipe of the threat model.
        changes: what the user changes.
        fetch: whether published weights to begin with may be fetched now, to know what they are.
        say: hears which defense was chosen, where it is not the one that is trained elsewhere.

    Raises:
        UsageError: no threat model is given, or the recipe is not valid; everything that is wrong is listed.
        UnknownName, IntegrityError: the basis, or the model to start from, does not exist or is not what it was.
    """
    given = changes.entries()
    if basis is not None:
        values = dict(recipe_files.entries_of(basis))
    elif changes.threat is not None:
        values = default_entries(
            changes.threat, changes.defense or _usual_defense(changes.threat, changes, say), changes.dataset or ""
        )
    else:
        raise UsageError("no threat model given.", hint="Use --patch 5, or --threat sparse --k 10, or --recipe NAME.")
    _begin_with_published(values, given, changes, fetch=fetch)
    _hold_out_fewer(values, given)
    _leave_other_networks_options(values, changes)
    _let_shorthands_decide(values, changes)
    for table in ("network_options", "options"):
        before = values.get(table) or {}
        values[table] = {**before, **getattr(changes, table)} if isinstance(before, Mapping) else before
    values |= given
    for role in ROLES:
        digest = f"{role}_sha256"
        if getattr(changes, role) is not None:
            values[digest] = ""
        if isinstance(values.get(role), str) and values[role]:
            values[digest] = hash_of_model(values[role], str(values.get(digest, "")), role)
    return Recipe.from_dict(values, where=f"the recipe of '{basis}'" if basis else "").fitted()


def _leave_other_networks_options(values: dict[str, Any], changes: Overrides) -> None:
    """Where the user names another network than the recipe's, leave out the options that only the recipe's network has.

    What neither has is kept, so that a slip in the user's file is refused.
    """
    options, former = values.get("network_options"), values.get("network")
    if not former and values.get("defense") in defenses.trained():
        former = defenses.trainable(values["defense"]).default_network
    if changes.network in (None, former) or former not in models.names() or not isinstance(options, Mapping):
        return
    values["network_options"] = {
        key: value
        for key, value in options.items()
        if not models.problems(str(changes.network), {key: value}) or models.problems(former, {key: value})
    }


def _usual_defense(threat: Threat, changes: Overrides, say: Callable[[str], None]) -> str:
    """The defense for a threat model on a data set; ``say`` hears of it where it is another one than elsewhere."""
    usual, elsewhere = usual_defense(threat, changes.dataset or ""), usual_defense(threat)
    other_network = changes.model is not None or changes.network not in (None, defenses.trainable(usual).default_network)
    if usual == elsewhere or other_network:
        return elsewhere
    say(
        f"{threat} on {changes.dataset}: {usual} is trained, which certifies more here than {elsewhere};"
        f" --defense {elsewhere} trains that"
    )
    return usual


def hash_of_model(name: str, expected: str, role: str) -> str:
    """The hash of the weights of a model that a recipe names as its ``start`` or ``teacher``; ``expected`` is empty if unknown.

    Raises:
        IntegrityError: it is not the one that the recipe expects.
        UnknownName: there is no such model.
    """
    try:
        folder = resolve.resolve(name).folder
    except UnknownName as problem:
        if not expected:  # it was typed
            raise
        raise UnknownName(
            f"the recipe's {role}, '{name}' with weights {expected[:12]}…, is not here.",
            hint=f"Say where it is with --{role} NAME|PATH.",
        ) from problem
    actual = cards.weights_sha256({name: cards.File.of(folder / name) for name in cards.weights_of(folder)})
    if expected not in ("", actual):
        raise IntegrityError(
            f"'{name}' has weights {actual[:12]}…, but the recipe has {expected[:12]}… as its {role}.",
            hint=f"Name the model that it was trained with by --{role}.",
        )
    return actual


def _begin_with_published(values: dict[str, Any], given: dict[str, Any], changes: Overrides, *, fetch: bool) -> None:
    """Enter a network of timm that begins with published weights, and the resize and crop that these want."""
    if changes.model is None:
        if changes.weights is not None:
            raise UsageError("--weights goes with --model.", hint="Name their network: --model timm:NAME.")
        return
    if changes.network is not None:
        raise UsageError("--model and --network both name a network.", hint="Give one of them.")
    beginning = addresses.beginning(changes.model, changes.weights, fetch=fetch)
    values |= {"network": "timm", "network_options": beginning.options, **FINE_TUNING}
    dataset = str(given.get("dataset", values.get("dataset", Recipe.dataset)))
    if datasets.is_custom(dataset):
        given["dataset"] = data.open_dataset(dataset).resized(beginning.source.resize_crop).name


def _let_shorthands_decide(values: dict[str, Any], changes: Overrides) -> None:
    """Leave out of the basis what follows from a shorthand that the user gives, such as kernels from ``rf``."""
    defense = changes.defense or values.get("defense", Recipe.defense)
    network = changes.network or values.get("network")
    if not network and defense in defenses.trained():
        network = defenses.trainable(defense).default_network
    if network not in models.names():  # which the recipe refuses
        return
    follows = {option for name, option in models.shorthands(network).items() if name in changes.network_options}
    if follows and isinstance(values.get("network_options"), Mapping):
        values["network_options"] = {name: value for name, value in values["network_options"].items() if name not in follows}


def _hold_out_fewer(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Hold out fewer images where there are few: of the user's own image folders, and of a limited data set."""
    dataset = str(given.get("dataset", values.get("dataset", Recipe.dataset)))
    held = values.get("validation", Recipe.validation)
    if type(held) is not int:  # which the recipe refuses
        return
    limit = given.get("limit", 0 if "validation" in values else values.get("limit", 0))
    if datasets.is_custom(dataset):
        images = data.open_dataset(dataset)
        given["dataset"] = images.name
        held = min(held, max(1, len(images.image_files("train")) // HELD_OUT))
    if limit and type(limit) is int:
        held = min(held, max(1, limit // HELD_OUT))
    given.setdefault("validation", held)
