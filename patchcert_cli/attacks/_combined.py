"""Several attacks, one after the other: an image whose answer one has changed is left alone by the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from patchcert_cli.attacks._base import Attack, AttackResult, Effort
from patchcert_cli.attacks._target import Start
from patchcert_cli.defenses import Defense
from patchcert_cli.threats import Threat


@dataclass(frozen=True)
class Combined:
    """The best of several attacks for each image. It is called as one attack is.

    Attributes:
        names: what they are called, in the order in which they search.
        attacks: the same number of attacks.
    """

    names: tuple[str, ...]
    attacks: tuple[Attack, ...]
    judges_each: ClassVar[bool] = False

    def together(self, defense: Defense) -> int:
        """Images that they work on together: in batches of multiples of it, every image meets the same numbers to the bit."""
        return max(attack.together(defense) for attack in self.attacks)

    def most(self, defense: Defense, threat: Threat, *, hinted: bool) -> Effort | None:
        """The most that an image takes, if none of them changes its answer; None if unknown."""
        each = [attack.most(defense, threat, hinted=hinted) for attack in self.attacks]
        known = [effort for effort in each if effort is not None]
        if len(known) < len(each):
            return None
        return Effort(sum(effort.queries for effort in known), sum(effort.answers for effort in known))

    def __call__(
        self, defense: Defense, x: Tensor, threat: Threat, *, index: Tensor | None = None, start: Start | None = None
    ) -> AttackResult:
        """Try to change ``defense.predict(x)`` within ``threat``: see :meth:`Attack.__call__`.

        The queries of an image are those of all attacks that searched for it.
        """
        index = torch.arange(len(x)) if index is None else index
        groups = torch.split(torch.arange(len(x)), self.together(defense)) if len(x) else [torch.arange(0)]
        parts = []
        for group in groups:  # so that the images that are left over meet the same numbers in any batch
            hint = None if start is None else start.take(group.to(start.location.device))
            parts.append(self._group(defense, x[group.to(x.device)], threat, index[group.to(index.device)], hint))
        return AttackResult.cat(parts)

    def _group(self, defense: Defense, x: Tensor, threat: Threat, index: Tensor, start: Start | None) -> AttackResult:
        found = self.attacks[0](defense, x, threat, index=index, start=start)
        for number, attack in enumerate(self.attacks[1:], start=1):
            left = (~found.success).nonzero()[:, 0]
            if not len(left):
                return found
            hint = None if start is None else start.take(left.to(start.location.device))
            more = attack(defense, x[left.to(x.device)], threat, index=index[left.to(index.device)], start=hint)
            found = _joined(found, more, left, number)
        return found


def _joined(found: AttackResult, more: AttackResult, left: Tensor, number: int) -> AttackResult:
    """The result after attack ``number`` has searched for the images ``left``, int64 [n]."""
    spent = found.queries[left]

    def put(values: Tensor, new: Tensor) -> Tensor:
        values = values.clone()
        values[left] = new
        return values

    return replace(
        found,
        adversarial=put(found.adversarial, more.adversarial),
        success=put(found.success, more.success),
        prediction=put(found.prediction, more.prediction),
        queries=put(found.queries, spent + more.queries),
        flipped_at=put(found.flipped_at, torch.where(more.success, spent + more.flipped_at, 0)),
        by=put(found.by, torch.where(more.success, number, -1)),
    )
