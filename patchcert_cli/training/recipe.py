"""Recipes: everything that decides a training run, validated as a whole before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from patchcert_cli import data, defenses, models
from patchcert_cli.errors import PatchcertError, UsageError
from patchcert_cli.threats import Patch, Sparse, Threat, parse_threat


@dataclass(frozen=True)
class Recipe:
    """A training run. Two runs with equal recipes on the same machine give the same weights.

    Attributes:
        threat: threat model to train against, for example ``patch:5x5`` or ``sparse:10``.
        dataset: data set name.
        defense: defense name.
        network: network name.
        network_options: keywords of the network's ``build`` besides shapes and normalization.
        epochs: passes over the training images.
        batch_size: images per step.
        learning_rate: Adam's, until the ramp is over.
        natural_epochs: first epochs, with the clean loss only.
        ramp_epochs: epochs over which the attacker grows from nothing to full strength.
        decay: ``cosine`` (to zero at the end) or ``step`` (halved every ``decay_every`` epochs), after the ramp.
        decay_every: epochs between halvings for ``decay=step``.
        locations: 0 trains on the exact worst location, otherwise on this many random ones per image.
        natural: weight of the clean cross-entropy once the ramp is over, in [0, 1).
        bounded_epochs: last epochs, in which an image's loss is bounded; the learning rate restarts at half.
        bounded_natural: weight of the clean cross-entropy in them, in [0, 1).
        bounded_shift: pixels by which an image is moved at random in them, at most; against memorizing.
        validation: training images held out.
        seed: of weights, held-out images, order of images and random locations.
    """

    threat: str
    dataset: str = "mnist"
    defense: str = "ibp"
    network: str = "mlp"
    network_options: dict[str, Any] = field(default_factory=lambda: {"hidden": [255]})
    epochs: int = 80
    batch_size: int = 256
    learning_rate: float = 1e-3
    natural_epochs: int = 1
    ramp_epochs: int = 15
    decay: str = "cosine"
    decay_every: int = 10
    locations: int = 0
    natural: float = 0.0
    bounded_epochs: int = 20
    bounded_natural: float = 0.1
    bounded_shift: int = 0
    validation: int = 5000
    seed: int = 0

    @property
    def threat_model(self) -> Threat:
        """The parsed threat."""
        return parse_threat(self.threat)

    def validate(self) -> Recipe:
        """This recipe, or one :class:`UsageError` that lists everything wrong with it."""
        problems: list[str] = []

        def attempt(action: Any) -> None:
            try:
                action()
            except PatchcertError as problem:
                problems.append(str(problem))

        attempt(lambda: data.info(self.dataset))
        if self.dataset in data.DATASETS:
            channels, height, width = data.info(self.dataset).shape
            attempt(lambda: self.threat_model.check(height, width, channels))
        else:
            attempt(lambda: self.threat_model)
        attempt(lambda: defenses.by_name(self.defense))
        if self.network not in models.names():
            problems.append(f"no network '{self.network}'; known: {', '.join(models.names())}.")
        least = dict.fromkeys(("epochs", "batch_size", "decay_every", "validation"), 1)
        least |= dict.fromkeys(("natural_epochs", "ramp_epochs", "locations", "bounded_epochs", "bounded_shift", "seed"), 0)
        given = self.to_dict()
        problems += [f"{name} {given[name]} must be {low} or more." for name, low in least.items() if given[name] < low]
        if not 0 < self.learning_rate <= 1:
            problems.append(f"learning_rate {self.learning_rate} must be in (0, 1].")
        problems += [
            f"{name} {given[name]} must be in [0, 1)." for name in ("natural", "bounded_natural") if not 0 <= given[name] < 1
        ]
        if self.decay not in ("cosine", "step"):
            problems.append(f"decay '{self.decay}' must be cosine or step.")
        if problems:
            raise UsageError(" ".join(problems))
        return self

    def fitted(self) -> Recipe:
        """With its phases shortened to a third each if the run is too short for them, as one of 3 epochs would be."""
        if self.natural_epochs + self.ramp_epochs + self.bounded_epochs < self.epochs:
            return self
        third = self.epochs // 3
        return replace(self, natural_epochs=0, ramp_epochs=third, bounded_epochs=min(self.bounded_epochs, third))

    def epsilon(self, progress: float) -> float:
        """Strength of the attacker at ``progress`` epochs (a fraction inside an epoch counts): 0 to 1."""
        if progress < self.natural_epochs:
            return 0.0
        if self.ramp_epochs == 0:
            return 1.0
        return min(1.0, (progress - self.natural_epochs) / self.ramp_epochs)

    def bounded(self, progress: float) -> bool:
        """Whether ``progress`` epochs lie in the phase of the bounded loss."""
        return progress >= self.epochs - self.bounded_epochs

    def rate(self, progress: float) -> float:
        """Learning rate at ``progress`` epochs: constant until the ramp is over, then falling; again in the bounded phase."""
        turn = self.epochs - self.bounded_epochs
        if progress < turn or not self.bounded_epochs:
            peak, start, end = self.learning_rate, self.natural_epochs + self.ramp_epochs, turn
        else:
            peak, start, end = self.learning_rate / 2, turn, self.epochs
        after = max(0.0, progress - start)
        if self.decay == "step":
            return float(peak * 0.5 ** int(after // self.decay_every))
        return peak * (1 + math.cos(math.pi * after / max(end - start, 1))) / 2

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON and YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`; unknown keys are refused."""
        known = {item.name for item in fields(cls)}
        strange = sorted(set(values) - known)
        if strange:
            raise UsageError(f"unknown recipe entries: {', '.join(strange)};", hint=f"allowed: {', '.join(sorted(known))}.")
        return cls(**values)

    def config(self) -> dict[str, Any]:
        """The ``config.json`` of the defense that this recipe trains."""
        facts = data.info(self.dataset)
        options = {**self.network_options, "mean": list(facts.mean), "std": list(facts.std)}
        return {
            "format": 1,
            "defense": self.defense,
            "dataset": self.dataset,
            "threat": self.threat,
            "input_shape": list(facts.shape),
            "classes": list(facts.classes),
            "network": {"name": self.network, "options": options},
            "recipe": self.to_dict(),
        }

    @property
    def name(self) -> str:
        """Short name of what this recipe trains, such as ``mnist-ibp-p5`` or ``cifar10-ibp-k4-value``."""
        threat = self.threat_model
        if isinstance(threat, Sparse):
            tail = f"k{threat.k}" + ("-value" if threat.unit == "value" else "")
        elif isinstance(threat, Patch) and threat.height == threat.width:
            tail = f"p{threat.height}"
        else:
            tail = "p" + str(threat).removeprefix("patch:").replace("%", "pct")
        return f"{self.dataset}-{self.defense}-{tail}"

    @property
    def command(self) -> str:
        """The ``patchcert train`` command that makes this very recipe: what differs from the threat's default is spelled out."""
        threat = self.threat_model
        if isinstance(threat, Sparse):
            words = f"--threat sparse --k {threat.k}" + (" --unit value" if threat.unit == "value" else "")
        else:
            shape = str(threat).removeprefix("patch:")
            square = isinstance(threat, Patch) and threat.height == threat.width
            words = f"--threat patch --patch {shape.split('x')[0] if square else shape}"
        default = for_threat(threat).to_dict()
        for name, value in self.to_dict().items():
            if name != "threat" and value != default[name]:
                flag = "hidden" if name == "network_options" else name.replace("_", "-")
                text = ",".join(map(str, value["hidden"])) if name == "network_options" else str(value)
                words += f" --{flag} {text}"
        return f"patchcert train {words}"


def for_threat(threat: Threat) -> Recipe:
    """The recipe that trains for this threat model unless told otherwise."""
    if isinstance(threat, Sparse):
        return Recipe(str(threat), network_options={"hidden": [512]}, epochs=32, ramp_epochs=8, bounded_epochs=12)
    return Recipe(str(threat))
