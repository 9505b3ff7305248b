"""Several defenses in one: the proofs that combine what an attacker can force of each member at the same location.

Shapes: R members, B images, A locations, K classes. F_r(L) is a set of answers that holds every one that an attacker who
changes nothing but location L can cause member r to give (:attr:`patchcert_cli.certificate.Certificate.forced`); the member's
answer to the unchanged image, a_r, is in it. The attacker has one location for all members, the same for all: this is what is
gained over the members' own certificates, which may fail at different locations.

**Majority** (MajorCert). The answer y is the class that most members give, of several the one that the earliest member gives.
At a location let ``u`` be the number of members with F_r = {y}, and ``n_j`` the number of those with j in F_r; let ``first`` be
the earliest of either kind. With

    m_j(L) = u - n_j + [first_y < first_j]

the answer is y for all choices from the sets iff m_j(L) > 0 for all j != y. Proof: let every member with j in F_r give j, every
other one with F_r != {y} give something else than y, and the rest y. If m_j <= 0 then j has more members than y, or as many and
an earlier one, so the answer is not y. Now let m_j > 0 for all j, and let z win some choice. z has at most n_z members and y at
least u. If z != y wins by number then n_z > u, against m_z > 0. If it wins by the earlier member, both have c members with n_z
>= c >= u. For m_z > 0 it must be that n_z = u = c, so that the members of z and of y are exactly those that count in n_z and u,
and the earlier one is y's: a contradiction. Choices are independent, so the proof needs nothing of R^K combinations. That every
choice can be had at once by one content of L is not known, so for the defense the condition is sufficient.

**What can be forced of a majority.** Let a class be ahead of another if it has more members, or as many and an earlier one. j can
be forced at L only if n_j > 0 and no class i != j is ahead of it when the members with F_r = {i} give i, and the n_j members give
j. Proof: the former give i in every choice, and j has at most the n_j.

**Cross-check** (CrossCert, detection). If all members give one class it is the answer, else an alarm is raised. Under an attack
at L the answer is another class than y without an alarm only if all members give it. So with ``m_j(L)`` the number of members
without j in F_r(L), every attack leads to y or to an alarm iff m_j(L) > 0 for all L and j != y. An m_j(L) of R for all of them
means that no member can be altered, so that no alarm can be raised either (their "unwavering" certification).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchcert_cli.certificate import ALERT

MOST = 5  # members


@dataclass(frozen=True)
class Combined:
    """What is proven of a combination.

    Attributes:
        margins: int64 [B, A, K], ``m_j(L)``; the answer's own column and alarms are not to be read.
        forced: bool [B, A, K], what can be forced of the combination; None for a cross-check, which may also raise an alarm.
    """

    margins: Tensor
    forced: Tensor | None = None

    @property
    def or_alarm(self) -> Tensor:
        """Of a cross-check, for each class whether every attack leads to it or to an alarm: bool [B, K]."""
        refused = (self.margins > 0).all(dim=1)
        return (refused.sum(dim=1, keepdim=True) - refused.long()) == refused.shape[1] - 1


def majority(answers: Tensor) -> Tensor:
    """The class that most members give, of several the one of the earliest member: int64 [R, B] -> [B]."""
    count = (answers[:, None] == answers).sum(dim=1)  # [R, B]
    return answers.gather(0, (count == count.amax(dim=0)).int().argmax(dim=0)[None])[0]


def cross_check(answers: Tensor) -> Tensor:
    """The class that all members give, else an alarm: int64 [R, B] -> [B]."""
    return torch.where((answers == answers[0]).all(dim=0), answers[0], ALERT)


def prove_majority(answer: Tensor, sets: Sequence[Tensor]) -> Combined:
    """The theorem on majorities for answers int64 [B] and the members' sets, bool [B, A, K] each."""
    number, first = _counted(sets)
    fixed, earliest = _counted([one & (one.sum(dim=2, keepdim=True) == 1) for one in sets])
    own = answer[:, None, None].expand(-1, number.shape[1], 1)
    margins = fixed.gather(2, own) - number + (earliest.gather(2, own) < first)
    members = len(sets)
    ahead, other = number * (members + 1) - first, fixed * (members + 1) - earliest
    return Combined(margins, (number > 0) & (ahead >= other.amax(dim=2, keepdim=True)))


def prove_cross_check(sets: Sequence[Tensor]) -> Combined:
    """The condition for cross-checks, from the members' sets, bool [B, A, K] each."""
    return Combined(len(sets) - _counted(sets)[0])


def _counted(sets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How many members have a class in their sets, and the first that does, R if none: int64 [B, A, K] each."""
    number = torch.zeros(sets[0].shape, dtype=torch.int64, device=sets[0].device)
    first = torch.full_like(number, len(sets))
    for at in reversed(range(len(sets))):
        number += sets[at]
        first.masked_fill_(sets[at], at)
    return number, first


def smallest(margins: Tensor, answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest margin of [B, A, K] over locations and other classes than ``answer``: float64, location and class, [B] each.

    Where the answer is an alarm nothing is certified, and the margin is 0.
    """
    classes = torch.arange(margins.shape[2], device=margins.device)
    others = margins.double().masked_fill((classes == answer[:, None])[:, None], float("inf")).flatten(1)
    least, where = others.min(dim=1)
    return least.masked_fill(answer == ALERT, 0), where // margins.shape[2], where % margins.shape[2]
