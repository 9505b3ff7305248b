"""Recipes: everything that decides a training run, validated as a whole when one is made."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from patchcert_cli import checkpoint, data, defenses, models, schema
from patchcert_cli.data import Dataset
from patchcert_cli.defenses import Options, TaughtOptions
from patchcert_cli.errors import PatchcertError, UsageError
from patchcert_cli.schema import Count, Must, NonNegative, Parsed, Positive, Rule, Seed
from patchcert_cli.threats import Patch, Patches, Sparse, Threat, as_options, parse_threat

Result = TypeVar("Result")
ROLES = ("start", "teacher")  # entries that name other models
OPTIONAL = ("steps", "teacher", "teacher_sha256")  # entries that are left out where they are empty


def _one_or_all(steps: tuple[int, ...], epochs: int) -> Iterator[str]:
    if len(steps) not in (0, 1, epochs):
        yield f"steps has {len(steps)} numbers, neither 1 nor one for each of {epochs} epochs"
    if steps and not any(steps):
        yield "steps has no step"


def _more_than_validation(limit: int, validation: int) -> Iterator[str]:
    if 0 < limit <= validation:
        yield f"limit is {limit}, not more than the {validation} images of validation"


def _hash_of_nothing(start: str, start_sha256: str, teacher: str, teacher_sha256: str) -> Iterator[str]:
    for name, model, digest in (("start", start, start_sha256), ("teacher", teacher, teacher_sha256)):
        if digest and not model:
            yield f"{name}_sha256 is given without {name}"


@dataclass(frozen=True)
class Recipe:
    """A training run. Two runs with equal recipes on the same machine give the same weights.

    Every recipe that exists is valid: making one checks all of it, reads the threat and the options from the text and tables of a
    file where they are given as such, and fills in the defaults.

    Attributes:
        threat: threat model to train against, for example ``patch:5x5`` or ``sparse:10``.
        dataset: data set name, or ``imagefolder:PATH``.
        defense: defense name.
        network: network name; empty for the defense's default.
        network_options: options of the network besides shapes and normalization; those left out have the network's defaults.
        epochs: passes over the training images.
        steps: steps of each epoch, one number for all or a list of one for each, where an epoch is a random part of the images;
            empty for all images.
        batch_size: images per step.
        learning_rate: the highest; the defense's options say how it rises and falls.
        optimizer: ``adam``, ``adamw``, ``muon`` (matrices; AdamW at a tenth of the rate for the rest) or ``sgd`` (Nesterov
            momentum 0.9).
        weight_decay: of every parameter.
        precision: what the network computes in while it trains; ``bfloat16`` means autocast, or float32 on a processor without
            it.
        stored: what the weights of the finished model are rounded to; it is validated and certified as stored.
        validation: training images held out.
        limit: training images to use, the held-out ones included: a fixed subset; 0 for all.
        seed: of weights, held-out images, order of images and all else that is random.
        start: the model whose weights the run begins with, as ``--start`` names it; empty for fresh ones.
        start_sha256: the hash of those weights, so that equal recipes begin alike.
        teacher: the model whose class probabilities the run also learns from, as ``--teacher`` names it; empty for none. The
            defense's ``teacher_weight`` says how much.
        teacher_sha256: the hash of its weights, so that equal recipes learn alike.
        options: the defense's own; those left out have the defense's defaults.
        images: what is known of the data set; follows from ``dataset``.

    Raises:
        UsageError: lists everything that is wrong.
    """

    threat: Annotated[Threat, Parsed(parse_threat)]
    dataset: str = "mnist"
    defense: str = "ibp"
    network: str = ""
    network_options: dict[str, Any] = field(default_factory=dict)
    epochs: Positive = 80
    steps: tuple[Count, ...] = ()
    batch_size: Positive = 256
    learning_rate: Annotated[float, Must(lambda rate: 0 < rate <= 1, "in (0, 1]")] = 1e-3
    optimizer: Literal["adam", "adamw", "muon", "sgd"] = "adam"
    weight_decay: NonNegative = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    stored: Literal["float32", "float16", "bfloat16"] = "float32"
    validation: Positive = 5000
    limit: Count = 0
    seed: Seed = 0
    start: str = ""
    start_sha256: str = ""
    teacher: str = ""
    teacher_sha256: str = ""
    options: Options = field(default_factory=Options)
    images: Dataset = field(init=False, repr=False, compare=False)
    rules: ClassVar[tuple[Rule, ...]] = (_more_than_validation, _one_or_all, _hash_of_nothing)

    def __post_init__(self) -> None:
        entries, problems = _read({item.name: getattr(self, item.name) for item in fields(self) if item.init})
        _refuse(problems)
        for name, value in entries.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "") -> Recipe:
        """Inverse of :meth:`to_dict`; ``where`` names the file that the entries are from.

        Raises:
            UsageError: lists everything that is wrong, unknown entries included.
        """
        known = [entry.name for entry in schema.entries(cls)]
        problems = [f"{name} is not a known entry" for name in values if name not in known]
        if "threat" not in values:
            problems.append("threat is missing")
        if problems:
            problems += _read({name: value for name, value in values.items() if name in known})[1]
            _refuse(problems, where, hint=f"The entries of a recipe are: {', '.join(known)}.")
        try:
            return cls(**values)
        except UsageError as problem:
            raise UsageError(problem.message.replace("this recipe", where or "this recipe", 1), hint=problem.hint) from problem

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON and YAML; ``steps`` and a teacher only if there are any."""
        plain: dict[str, Any] = schema.plain(self)
        return {name: value for name, value in plain.items() if name not in OPTIONAL or value}

    def fitted(self) -> Recipe:
        """With phases shortened where the run is too short for them."""
        options = self.options.fitted(self.epochs)
        return self if options == self.options else replace(self, options=options)

    def steps_of(self, epoch: int, images: int) -> int:
        """How many steps epoch number ``epoch``, from 0, takes with ``images`` training images."""
        most = images // self.batch_size or 1
        return min(self.steps[epoch % len(self.steps)], most) if self.steps else most

    def all_network_options(self) -> dict[str, Any]:
        """Every option of the network with its value, besides shapes and normalization."""
        return {**models.defaults(self.network), **self.network_options}

    def defaults(self) -> dict[str, dict[str, Any]]:
        """The defaults of every option of the network and of the defense, in two tables."""
        return {"network_options": models.defaults(self.network), "options": schema.plain(type(self.options)())}

    def config(self) -> dict[str, Any]:
        """The ``config.json`` of the defense that this recipe trains."""
        statistics = {"mean": list(self.images.mean), "std": list(self.images.std)}
        network = {"name": self.network, "options": {**statistics, **self.network_options}}  # a network may have its own
        return checkpoint.configuration(self.defense, network, self.images, self.threat, self.options, self.to_dict())

    @property
    def name(self) -> str:
        """Short name of what this recipe trains, such as ``mnist-ibp-p5`` or ``cifar10-ibp-k4-value``."""
        if isinstance(self.threat, Sparse):
            tail = f"k{self.threat.k}" + ("-value" if self.threat.unit == "value" else "")
        elif isinstance(self.threat, Patches):
            tail = f"{self.threat.number}x{_patch_name(self.threat.each)}"
        else:
            tail = _patch_name(self.threat)
        return f"{self.images.label}-{self.defense}-{tail}"

    @property
    def command(self) -> str:
        """The ``patchcert train`` command that makes this very recipe: what differs from the defaults is spelled out."""
        words = (["--threat patch"] if self.threat.kind == "patch" else []) + [as_options(self.threat)]
        given = self.to_dict()
        default = Recipe.from_dict(default_entries(self.threat, self.defense, self.dataset)).to_dict()
        default["dataset"] = default_entries(self.threat, self.defense).get("dataset", Recipe.dataset)
        own = models.defaults(given["network"])  # a command without them would get the default recipe's
        for key, value in default["network_options"].items():
            if (
                key in own
                and key not in given["network_options"]
                and models.listed(given["network"], {key: own[key]})[key] != value
            ):
                given["network_options"][key] = own[key]
        if {self.defense} != {usual_defense(self.threat), usual_defense(self.threat, self.dataset)}:
            words.append(f"--defense {self.defense}")
        for name, value in given.items():
            flag = {"network_options": "network-option", "options": "option"}.get(name)
            if flag:
                changed = {key: item for key, item in value.items() if default[name].get(key) != item}
                words += [f"--{flag} {key}={shlex.quote(written(item))}" for key, item in changed.items()]
            elif name not in ("threat", "defense", "start_sha256", "teacher_sha256") and value != default.get(name):
                words.append(f"--{name.replace('_', '-')} {shlex.quote(written(value))}")
        return " ".join(["patchcert train", *words])


def default_entries(threat: Threat, defense: str = Recipe.defense, dataset: str = "") -> dict[str, Any]:
    """The entries of the recipe that trains ``defense`` against ``threat`` unless the user says otherwise.

    Args:
        threat: the threat model.
        defense: name of the defense.
        dataset: the data set that the user chose; empty for the defense's default.

    Raises:
        UnknownName: no such defense.
    """
    chosen = {"dataset": dataset} if dataset else {}
    return {"threat": str(threat), "defense": defense, **defenses.trainable(defense).default_recipe(threat, dataset), **chosen}


def usual_defense(threat: Threat, dataset: str = "") -> str:
    """The defense that is trained for a threat model on a data set unless the user names one.

    On CIFAR-10 votes of sets of pixels certify more against k changed pixels than interval bounds; on MNIST they certify less.
    """
    pixels = isinstance(threat, Sparse) and threat.unit == "pixel"
    return "partition" if pixels and dataset == "cifar10" else Recipe.defense


def default_recipe(threat: Threat, defense: str = Recipe.defense, dataset: str = "") -> Recipe:
    """The recipe of :func:`default_entries`."""
    return Recipe.from_dict(default_entries(threat, defense, dataset))


def written(value: Any) -> str:
    """A value as it is typed after ``--option name=``; :func:`typed` is its inverse."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def typed(text: str) -> Any:
    """A typed value: numbers, ``True`` and ``False``, lists with commas, else text."""
    if "," in text:
        return [typed(part) for part in text.split(",") if part]
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _read(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The entries of a recipe with every default filled in, and everything that is wrong with them."""
    entries, problems = schema.read_fields(Recipe, {name: value for name, value in values.items() if name != "options"})

    def attempt(action: Callable[[], Result]) -> Result | None:
        try:
            return action()
        except PatchcertError as problem:
            problems.append(str(problem).rstrip("."))
            return None

    images = attempt(lambda: data.open_dataset(entries["dataset"])) if "dataset" in entries else None
    if images is not None:
        entries["images"] = images
        channels, height, width = images.shape
        if "threat" in entries:
            attempt(lambda: entries["threat"].check(height, width, channels))
    defense = attempt(lambda: defenses.trainable(entries["defense"])) if "defense" in entries else None
    if defense is not None:
        entries["network"] = entries.get("network") or defense.default_network
        options = _options(defense.options, values.get("options", {}), problems)
        if options is not None:
            entries["options"] = options
        if entries.get("teacher") and not issubclass(defense.options, TaughtOptions):
            problems.append(f"{entries['defense']} cannot learn from a teacher; those that can: {', '.join(defenses.taught())}")
    if entries.get("network") and "network_options" in entries:
        _read_network(entries, problems)
    return entries, problems


def _read_network(entries: dict[str, Any], problems: list[str]) -> None:
    """Check the options of the network, with shorthands replaced, and numbers made lists where lists are wanted."""
    network = entries["network"]
    try:
        options = models.expanded(network, entries["network_options"])
        wrong = models.problems(network, options)
    except PatchcertError as problem:
        wrong = [str(problem)]
    problems += [problem.rstrip(".") for problem in wrong]
    if not wrong:
        entries["network_options"] = models.listed(network, options)


def _options(kind: type[Options], value: Any, problems: list[str]) -> Options | None:
    """The defense's own options, from a table or as they are; a list of one may be given as one value."""
    if isinstance(value, kind) or value == Options():
        return value if isinstance(value, kind) else kind()
    lists = {item.name for item in fields(kind) if isinstance(item.default, tuple)}
    if isinstance(value, Mapping):
        value = {name: [one] if name in lists and isinstance(one, int | float | str) else one for name, one in value.items()}
    try:
        return schema.read(kind, value, "options")
    except schema.Invalid as invalid:
        problems += invalid.problems
        if any("not a known entry" in problem for problem in invalid.problems):
            problems.append(f"known options: {', '.join(item.name for item in fields(kind)) or 'none'}")
        return None


def _refuse(problems: list[str], where: str = "", *, hint: str = "") -> None:
    if problems:
        hint = hint or "patchcert train --dry-run lists the entries of a recipe."
        raise UsageError(f"{where or 'this recipe'} is not valid: {'; '.join(problems)}.", hint=hint)


def _patch_name(threat: Threat) -> str:
    """Such as ``p5``, ``p3x7`` or ``p2pct``."""
    if isinstance(threat, Patch) and threat.height == threat.width:
        return f"p{threat.height}"
    return "p" + str(threat).removeprefix("patch:").replace("%", "pct")
