"""Several models of one data set under evaluation as one: ``RULE:NAME+NAME``, such as ``sum:cifar-bagcert-rf7+runs/mine``.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from patchcert_cli.catalog.resolve import resolve
from patchcert_cli.data import datasets
from patchcert_cli.data.datasets import Dataset
from patchcert_cli.data.resize_crop import ResizeCrop
from patchcert_cli.defenses.ensemble import RULES, Ensemble
from patchcert_cli.errors import UsageError
from patchcert_cli.evaluation.models import DefenseRequest, ModelSource, ZooModel
from patchcert_cli.evaluation.task import EvaluatedModel
from patchcert_cli.threats import Threat


def is_combined(name: str) -> bool:
    """Whether a name is that of several models as one."""
    rule, _, members = name.partition(":")
    return rule in RULES and "+" in members


def find(name: str, request: DefenseRequest, device: str) -> CombinedModels:
    """The models of a combination.

    Raises:
        UnknownName, UsageError, HubError, IntegrityError: as :func:`patchcert_cli.evaluation.models.find`.
    """
    rule, _, members = name.partition(":")
    return CombinedModels(name, rule, [ZooModel(resolve(one), one, request, device) for one in members.split("+")])


class CombinedModels(ModelSource):
    """Several models of one data set as one: ``RULE:NAME+NAME``, see :class:`patchcert_cli.defenses.ensemble.Ensemble`."""

    def __init__(self, name: str, rule: str, members: Sequence[ZooModel]) -> None:
        first = members[0]
        for member in members:
            if datasets.base_name(member.dataset) != datasets.base_name(first.dataset):
                raise UsageError(
                    f"{member.name} was trained on {member.dataset}, but {first.name} on {first.dataset}.",
                    hint="Combine models of one data set.",
                )
        self.name, self.rule, self.members = name, rule, members
        self.note = "; ".join(member.note for member in members)
        self.threat, self.dataset, self.names = first.threat, first.dataset, first.names

    @property
    def channels(self) -> int:
        return self.members[0].channels

    def resize_crop(self) -> ResizeCrop | None:
        return self.members[0].resize_crop()

    def shape(self, dataset: Dataset) -> tuple[int, int, int]:
        return self.members[0].shape(dataset)

    def evaluated(self, shape: tuple[int, int, int], threats: Sequence[Threat], device: str) -> EvaluatedModel:
        each = [member.evaluated(shape, threats, device) for member in self.members]
        defense = Ensemble([one.defense for one in each], self.rule).eval()
        known = [{"model": one.name, "sha256": one.sha256, **one.setting} for one in each]
        digest = hashlib.sha256("".join(one.sha256 for one in each).encode()).hexdigest()
        return EvaluatedModel(defense, self.name, "ensemble", digest, each[0].source, {"rule": self.rule, "members": known})

    def matched(self, classes: Sequence[str], dataset: Dataset, evaluated: EvaluatedModel) -> list[int] | None:
        return self.members[0].matched(classes, dataset, evaluated)
