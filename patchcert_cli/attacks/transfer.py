"""The blind attack: what flips the classifier without its defense is given to the defended one.

It does not know that there is a defense. Accuracy under it is what empirical defenses are often published with; an attack that
goes through the defense usually leaves much less.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchcert_cli.attacks._base import Attack, Effort, require
from patchcert_cli.attacks._target import Target
from patchcert_cli.attacks.patch_pgd import PatchPGD
from patchcert_cli.attacks.sparse import SparseSearch
from patchcert_cli.defenses import Defense
from patchcert_cli.errors import UsageError
from patchcert_cli.threats import Threat


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """The default attack of the threat model against the undefended classifier; where it finds nothing, the clean image.

    Attributes:
        seed: source of all randomness, together with each image's number.
        steps: gradient steps of that attack.
    """

    steps: int = 40
    kinds: ClassVar[tuple[str, ...]] = ("patch", "sparse")

    def __post_init__(self) -> None:
        require("steps", self.steps, 1)

    @classmethod
    def suits(cls, defense: Defense) -> bool:
        return defense.undefended() is not None

    def most(self, defense: Defense, threat: Threat, *, hinted: bool) -> Effort | None:
        plain = defense.undefended()
        found = None if plain is None else self._search(threat).most(plain, threat, hinted=False)
        return None if found is None else Effort(found.queries + found.answers, 2)

    def _search(self, threat: Threat) -> Attack:
        if threat.kind == "patch":
            return PatchPGD(seed=self.seed, steps=self.steps)
        return SparseSearch(seed=self.seed, steps=self.steps)

    def run(self, target: Target, x: Tensor, threat: Threat, index: Tensor) -> Tensor:
        """Attack the classifier inside.

        Raises:
            UsageError: the defense has none.
        """
        plain = target.undefended
        if plain is None:
            raise UsageError(
                "this defense has no classifier that answers without it, so nothing is found without knowing of it.",
                hint="Use another --attack; --attack list prints them.",
            )
        found = self._search(threat)(plain, x, threat, index=index)
        target.queries += found.queries
        return found.adversarial
