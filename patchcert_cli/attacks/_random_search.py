"""What random searches share: a budget of candidates in rounds of proposals, and a share of change that falls along the run."""

from __future__ import annotations

from dataclasses import dataclass

from patchcert_cli.attacks._base import Attack, Effort, require
from patchcert_cli.defenses import Defense
from patchcert_cli.threats import Threat

FIRST_STREAM = 1 << 24  # random numbers of the first round


@dataclass(frozen=True, kw_only=True)
class RandomSearch(Attack):
    """Rounds of proposals, of which the best is kept if it raises the margin.

    Attributes:
        seed: source of all randomness, together with each image's number.
        budget: candidates of an image, 10,000 in the paper.
        proposals: candidates of a round; more of them keep a GPU busy, fewer climb in more rounds.
    """

    budget: int = 3000
    proposals: int = 16

    def __post_init__(self) -> None:
        require("budget", self.budget, 1)
        require("proposals", self.proposals, 1, 4096)

    @property
    def candidates(self) -> int:
        return min(self.proposals, self.budget)

    @property
    def rounds(self) -> int:
        """How many rounds follow the first one."""
        return max(0, -(-self.budget // self.candidates) - 1)

    def most(self, defense: Defense, threat: Threat, *, hinted: bool) -> Effort:
        rounds = 1 + self.rounds
        return Effort(rounds * (self.candidates + 1), 2 + rounds)

    def part(self, number: int) -> float:
        """How much of the run has passed before round ``number``, 0 to 1."""
        return number / max(1, self.rounds)


def share(part: float, schedule: tuple[tuple[float, float], ...]) -> float:
    """The share of change after ``part`` of the run; the schedule lists until when which share applies."""
    return next(value for until, value in schedule if part < until)
