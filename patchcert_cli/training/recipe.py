"""Recipes: everything that decides a training run, validated as a whole before anything is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from patchcert_cli import data, defenses, models, schema
from patchcert_cli.defenses import Options
from patchcert_cli.errors import PatchcertError, UsageError
from patchcert_cli.threats import Patch, Patches, Sparse, Threat, as_options, parse_threat

OPTIMIZERS = ("adam", "adamw", "muon", "sgd")
PRECISIONS = ("float32", "bfloat16")
STORED = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """A training run. Two runs with equal recipes on the same machine give the same weights.

    Attributes:
        threat: threat model to train against, for example ``patch:5x5`` or ``sparse:10``.
        dataset: data set name, or ``imagefolder:PATH``.
        defense: defense name.
        network: network name; empty for the defense's default.
        network_options: keywords of the network's ``build`` besides shapes and normalization.
        epochs: passes over the training images.
        batch_size: images per step.
        learning_rate: the highest; its course is the defense's.
        optimizer: ``adam``, ``adamw``, ``muon`` (matrices; AdamW at a tenth of the rate for the rest) or ``sgd`` (Nesterov
            momentum 0.9).
        weight_decay: of every parameter.
        precision: what the network computes in while it trains; ``bfloat16`` means autocast.
        stored: what the weights of the finished model are rounded to; it is validated and certified as stored.
        validation: training images held out.
        limit: only so many training images, the held-out ones included: a fixed subset; 0 for all.
        seed: of weights, held-out images, order of images and all else that is random.
        start: the model whose weights the run begins with, as ``--start`` names it; empty for fresh ones.
        start_sha256: those weights' digest, so that equal recipes begin alike.
        options: the defense's own, see its ``Options``; those left out have their defaults.
    """

    threat: str
    dataset: str = "mnist"
    defense: str = "ibp"
    network: str = ""
    network_options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 80
    batch_size: int = 256
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    weight_decay: float = 0.0
    precision: str = "float32"
    stored: str = "float32"
    validation: int = 5000
    limit: int = 0
    seed: int = 0
    start: str = ""
    start_sha256: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def threat_model(self) -> Threat:
        """The parsed threat."""
        return parse_threat(self.threat)

    def validate(self) -> Recipe:
        """This recipe with every default filled in, or one :class:`UsageError` that lists everything wrong with it."""
        problems: list[str] = []

        def attempt(action: Any) -> Any:
            try:
                return action()
            except PatchcertError as problem:
                problems.append(str(problem))

        facts = attempt(lambda: data.open_dataset(self.dataset))
        if facts is not None:
            channels, height, width = facts.shape
            attempt(lambda: self.threat_model.check(height, width, channels))
        else:
            attempt(lambda: self.threat_model)
        defense = attempt(lambda: defenses.by_name(self.defense))
        network = self.network or (defense.default_network if defense else "")
        if network not in models.names():
            problems.append(f"no network '{network}'; known: {', '.join(models.names())}.")
        else:
            problems += models.problems(network, self.network_options)
        given = asdict(self)
        least = {"epochs": 1, "batch_size": 1, "validation": 1, "limit": 0, "seed": 0, "weight_decay": 0}
        problems += [f"{name} {given[name]} must be {low} or more." for name, low in least.items() if given[name] < low]
        if self.seed > schema.LARGEST_SEED:
            problems.append(f"seed {self.seed} must be at most {schema.LARGEST_SEED}.")
        if 0 < self.limit <= self.validation:
            problems.append(f"limit {self.limit} must be more than the {self.validation} images of validation.")
        if not 0 < self.learning_rate <= 1:
            problems.append(f"learning_rate {self.learning_rate} must be in (0, 1].")
        for name, allowed in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS), ("stored", STORED)):
            if given[name] not in allowed:
                problems.append(f"{name} '{given[name]}' must be one of {', '.join(allowed)}.")
        options = attempt(lambda: _options(defense.options, self.options, self.defense)) if defense else None
        if problems:
            raise UsageError(" ".join(problems))
        assert options is not None
        return replace(
            self, network=network, network_options=models.listed(network, self.network_options), options=_plain(options)
        )

    @property
    def training(self) -> Options:
        """The defense's own options."""
        return _options(defenses.by_name(self.defense).options, self.options, self.defense)

    def fitted(self) -> Recipe:
        """With phases shortened where the run is too short for them."""
        return replace(self, options=_plain(self.training.fitted(self.epochs)))

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`; unknown keys are refused."""
        known = {item.name for item in fields(cls)}
        strange = sorted(set(values) - known)
        if strange:
            raise UsageError(f"unknown recipe entries: {', '.join(strange)}.", hint=f"Allowed: {', '.join(sorted(known))}.")
        return cls(**values)

    def config(self) -> dict[str, Any]:
        """The ``config.json`` of the defense that this recipe trains."""
        ready, facts = self.validate(), data.open_dataset(self.dataset)
        options = {"mean": list(facts.mean), "std": list(facts.std), **self.network_options}  # a network may have its own
        return {
            "format": 1,
            "defense": self.defense,
            "dataset": self.dataset,
            "threat": self.threat,
            "input_shape": list(facts.shape),
            "classes": list(facts.classes),
            "network": {"name": ready.network, "options": options},
            "options": ready.options,
            **defenses.by_name(self.defense).deploy_config(ready.threat_model, ready.training),
            "recipe": ready.to_dict(),
        }

    @property
    def name(self) -> str:
        """Short name of what this recipe trains, such as ``mnist-ibp-p5`` or ``cifar10-ibp-k4-value``."""
        threat = self.threat_model
        if isinstance(threat, Sparse):
            tail = f"k{threat.k}" + ("-value" if threat.unit == "value" else "")
        elif isinstance(threat, Patches):
            tail = f"{threat.number}x{_patch_name(threat.each)}"
        else:
            tail = _patch_name(threat)
        return f"{data.open_dataset(self.dataset).label}-{self.defense}-{tail}"

    @property
    def command(self) -> str:
        """The ``patchcert train`` command that makes this very recipe: what differs from the defaults is spelled out."""
        threat = self.threat_model
        words = (["--threat patch"] if threat.kind == "patch" else []) + [as_options(threat)]
        given, default = self.validate().to_dict(), for_threat(threat, self.defense, self.dataset).validate().to_dict()
        default["dataset"] = for_threat(threat, self.defense).dataset
        own = models.defaults(given["network"])  # a command that did not say them would get the recipe's
        for key, value in default["network_options"].items():
            if (
                key in own
                and key not in given["network_options"]
                and models.listed(given["network"], {key: own[key]})[key] != value
            ):
                given["network_options"][key] = own[key]
        if {self.defense} != {usual_defense(threat), usual_defense(threat, self.dataset)}:
            words.append(f"--defense {self.defense}")
        for name, value in given.items():
            flag = {"network_options": "network-option", "options": "option"}.get(name)
            if flag:
                changed = {key: item for key, item in value.items() if default[name].get(key) != item}
                words += [f"--{flag} {key}={shlex.quote(written(item))}" for key, item in changed.items()]
            elif name not in ("threat", "defense", "start_sha256") and value != default[name]:
                words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
        return " ".join(["patchcert train", *words])


def _patch_name(threat: Threat) -> str:
    """Such as ``p5``, ``p3x7`` or ``p2pct``."""
    if isinstance(threat, Patch) and threat.height == threat.width:
        return f"p{threat.height}"
    return "p" + str(threat).removeprefix("patch:").replace("%", "pct")


def _options(kind: type[Options], values: Mapping[str, Any], defense: str) -> Options:
    lists = {item.name for item in fields(kind) if isinstance(item.default, tuple)}
    given = {name: [value] if name in lists and isinstance(value, int | float | str) else value for name, value in values.items()}
    try:
        return schema.read(kind, given)  # a list of one is typed as one value
    except schema.Invalid as problem:
        known = ", ".join(item.name for item in fields(kind)) or "none"
        raise UsageError(f"training options of {defense}: {problem}.", hint=f"Known: {known}.") from problem


def _plain(options: Options) -> dict[str, Any]:
    """Options as JSON knows them, with lists for tuples, so that what was written and read again is the same recipe."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(options).items()}


def written(value: Any) -> str:
    """A value as it is typed after ``--option name=``; :func:`read` is its inverse."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def read(text: str) -> Any:
    """A typed value: numbers, ``True`` and ``False``, lists with commas, else text."""
    if "," in text:
        return [read(part) for part in text.split(",") if part]
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def usual_defense(threat: Threat, dataset: str | None = None) -> str:
    """The defense that is trained for a threat model on a data set unless the user names one.

    On CIFAR-10 votes of sets of pixels certify more against k changed pixels than interval bounds; on MNIST they certify less.
    """
    pixels = isinstance(threat, Sparse) and threat.unit == "pixel"
    return "partition" if pixels and dataset == "cifar10" else "ibp"


def for_threat(threat: Threat, defense: str = "ibp", dataset: str | None = None) -> Recipe:
    """The recipe that trains ``defense`` for this threat model, by default on the data set that it is best known for."""
    if defense == "partition":
        return Recipe(
            str(threat),
            dataset or "cifar10",
            defense,
            epochs=56,
            batch_size=512,
            learning_rate=0.02,
            optimizer="muon",
            stored="float16",
            validation=2000,
            options={"drawn": 16} | ({"flip": False, "shift": 2} if dataset == "mnist" else {}),  # a mirrored digit is none
        )
    if defenses.by_name(defense).default_network == "masked":
        digits = dataset == "mnist"  # a mirrored digit is none, and small
        return Recipe(
            str(threat),
            dataset or "cifar10",
            defense,
            network_options={"bits": 8} | ({"stem": 16, "widths": [32, 64, 128], "takes_mask": True} if digits else {}),
            epochs=20,
            learning_rate=0.25,
            optimizer="sgd",
            weight_decay=5e-4,
            precision="bfloat16",
            stored="float16",
            validation=500,  # certifying them costs the most here
            options={"flip": not digits, "shift": 1 if digits else 2},
        )
    if defense != "ibp":
        return Recipe(
            str(threat), "cifar10", defense, precision="bfloat16", optimizer="adamw", weight_decay=1e-4, stored="float16"
        )
    if isinstance(threat, Sparse):
        options = {"ramp_epochs": 8, "bounded_epochs": 12}
        return Recipe(str(threat), network_options={"hidden": [512]}, epochs=32, options=options)
    return Recipe(str(threat), network_options={"hidden": [255]})
