"""Ensembles of two to five defenses, certified by what an attacker can force of each member at the same location.

``majority`` (MajorCert), ``cross`` (CrossCert: an alarm where members disagree, so certified detection) and ``sum`` (the votes
of all members are added up). Proofs: :mod:`patchcert_cli.certifiers.ensembles`; of sums
:mod:`patchcert_cli.certifiers.cells.by_location`, since the cells of all members together are cells: the ranges of their sums
add up, and so do whole weights of members.

Shapes: R members, B images, C channels, H x W pixels, K classes, A = P * Q locations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn

from patchcert_cli import defenses
from patchcert_cli.arithmetic import Arithmetic, weakest
from patchcert_cli.certificate import Claim, Proof
from patchcert_cli.certifiers import ensembles
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.cells.by_location import Ranges, can_win
from patchcert_cli.certifiers.ensembles import Combined
from patchcert_cli.defenses._attackable import Surrogate, activations, surrogates
from patchcert_cli.defenses._base import Defense, MarginMaps, own_entries
from patchcert_cli.defenses._cells import VotingDefense
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.layers.precision import exact_arithmetic, first_largest
from patchcert_cli.schema import Must, Positive
from patchcert_cli.threats import ALERT, Guarantee, Patch, PatchPercent, Threat

RULES = ("majority", "cross", "sum")
SMALL = 1e-6  # added to the range of scores, which may be 0
ENTRIES = 1 << 25  # of the sets of all members of a group of images, at most

Rule = Annotated[str, Must(RULES.__contains__, f"{', '.join(RULES[:-1])} or {RULES[-1]}")]


@dataclass(frozen=True)
class Combination:
    """How members are combined, as it is deployed.

    Attributes:
        members: the section ``deployed`` of each.
        rule: ``majority``, ``cross`` or ``sum``.
        weights: how much each member's votes count in a sum; empty to let all members count about alike.
    """

    members: tuple[dict[str, Any], ...]
    rule: Rule = "majority"
    weights: tuple[Positive, ...] = ()


class Ensemble(MarginMaps, Defense):
    """Some defenses of the same images and classes, combined.

    Attributes:
        members: the defenses.
        rule: ``majority``: the class that most members give, of several the one of the earliest member. ``cross``: the class
            that all give, else an alarm; its guarantee is detection. ``sum``: the class with the most votes of all members, which
            must be voting defenses, the lowest index among equals.
        weights: how much each member's votes count in a sum; empty to let all members count about alike.
    """

    source = "Zhou et al., A Majority Invariant Approach to Patch Robustness Certification, ASE 2023; CrossCert, FSE 2024"
    methods = ("combined",)

    def __init__(self, members: Sequence[Defense], rule: str = "majority", *, weights: Sequence[int] = ()) -> None:
        """Combine ``members``.

        Raises:
            UsageError: fewer than 2 or more than 5, of different images or classes, or of a rule that does not exist or that a
                member has no proof for.
        """
        problem = _problem(members, rule, weights)
        if problem is not None:
            raise problem
        super().__init__(input_shape=members[0].input_shape, classes=members[0].classes)
        self.members, self.rule, self.weights = nn.ModuleList(members), rule, tuple(weights)
        self.guarantee = Guarantee.DETECTION if rule == "cross" else Guarantee.RECOVERY
        self.unit = "votes" if rule == "sum" else "members"
        self.precision = {
            f"member {at}: {name}": value for at, one in enumerate(members, 1) for name, value in one.precision.items()
        }

    @classmethod
    def from_config(cls, deployed: Mapping[str, Any]) -> Ensemble:
        own = own_entries(Combination, deployed)
        try:
            return cls([defenses.build(one) for one in own.members], own.rule, weights=own.weights)
        except UsageError as problem:
            raise IntegrityError(f"ensemble cannot be built: {problem.message}", hint=problem.hint) from problem

    @staticmethod
    def deployed(members: Sequence[Mapping[str, Any]], rule: str = "majority", weights: Sequence[int] = ()) -> dict[str, Any]:
        """The section ``deployed`` of an ensemble, from those of its members."""
        first = members[0]
        return {
            "defense": "ensemble",
            "input_shape": list(first["input_shape"]),
            "classes": list(first["classes"]),
            "rule": rule,
            **({"weights": list(weights)} if weights else {}),
            "members": [dict(one) for one in members],
        }

    @property
    def _each(self) -> list[Defense]:
        return [cast(Defense, one) for one in self.members]

    @property
    def _voting(self) -> list[VotingDefense]:
        """The members of a sum."""
        return [cast(VotingDefense, one) for one in self.members]

    @property
    def locates(self) -> bool:
        return self.rule != "cross"

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        self.check_input(x)
        self.test_once()
        if self.rule == "sum":
            return self._sums(x)[0]
        return self._combined(torch.stack([member.predict(x) for member in self._each]))

    def _combined(self, answers: Tensor) -> Tensor:
        return ensembles.majority(answers) if self.rule == "majority" else ensembles.cross_check(answers)

    @exact_arithmetic()
    def _sums(self, x: Tensor) -> tuple[Tensor, list[Votes]]:
        """The answer of a sum, int64 [B], and the votes of each member."""
        votes = [member.votes(x) for member in self._voting]
        totals = [weight * one.sums() for weight, one in zip(self._counts(votes), votes, strict=True)]
        return first_largest(torch.stack(totals).sum(dim=0)), votes

    def _counts(self, votes: Sequence[Votes]) -> tuple[int, ...]:
        """How much the votes of each member count."""
        if self.weights:
            return self.weights
        most = [int(math.prod(one.scores.shape[2:]) if one.weight is None else one.weight.sum()) for one in votes]
        return tuple(max(1, round(max(most) / one)) for one in most)

    def _certify(self, x: Tensor, claims: Sequence[Claim]) -> list[Proof]:
        """A group of images at a time: the sets of all members are held together."""
        parts: list[list[Proof]] = [[] for _ in claims]
        threats = [claim.threat for claim in claims]
        for some in self._groups(x, threats):
            answer, combined, arithmetic, passes = self._found(some, threats)
            for mine, found, claim in zip(parts, combined, claims, strict=True):
                margin, location, rival = ensembles.smallest(found.margins, answer)
                mine.append(
                    Proof(
                        answer=answer,
                        margin=margin,
                        location=location,
                        runner_up=rival,
                        arithmetic=arithmetic,
                        passes=passes,
                        or_alarm=found.or_alarm if self.guarantee is Guarantee.DETECTION else None,
                        forced=found.forced if claim.forced else None,
                    )
                )
        return [Proof.cat(mine) for mine in parts]

    def _groups(self, x: Tensor, threats: Sequence[Threat]) -> tuple[Tensor, ...]:
        most = max(threat.count(*self.input_shape[1:]) for threat in threats)
        return torch.split(x, max(1, ENTRIES // (most * len(self.classes) * len(self.members) * len(threats))))

    def _found(self, x: Tensor, threats: Sequence[Threat]) -> tuple[Tensor, list[Combined], Arithmetic, Tensor | None]:
        """The answers int64 [B], what is proven under each threat, and arithmetic and passes of all members."""
        if self.rule == "sum":
            answer, votes = self._sums(x)
            ranges = [self._ranges(votes, threat) for threat in threats]
            return answer, [Combined(one.margins(answer), can_win(one)) for one in ranges], Arithmetic.EXACT, None
        claims = [Claim(threat, forced=True) for threat in threats]
        each = [member.certify_claims(x, claims) for member in self._each]
        answer = self._combined(torch.stack([mine[0].prediction for mine in each]))
        passes = [mine[0].passes for mine in each if mine[0].passes is not None]
        combined = []
        for of_threat in zip(*each, strict=True):
            sets = [cast(Tensor, one.forced) for one in of_threat]
            majority = self.rule == "majority"
            combined.append(ensembles.prove_majority(answer, sets) if majority else ensembles.prove_cross_check(sets))
        arithmetic = weakest(one.arithmetic for mine in each for one in mine)
        return answer, combined, arithmetic, torch.stack(passes).sum(dim=0) if passes else None

    @exact_arithmetic()
    def _ranges(self, votes: Sequence[Votes], threat: Threat) -> Ranges:
        """What the sums of all members' votes can be at each location."""
        parts = [
            Ranges.cat(one.ranges(mine, one.cover_of(threat), threat)) for one, mine in zip(self._voting, votes, strict=True)
        ]
        none = Ranges(torch.zeros_like(parts[0].low), torch.zeros_like(parts[0].high))
        return reduce(lambda total, pair: total.plus(*pair), zip(parts, self._counts(votes), strict=True), none)

    def check_wishes(self, claim: Claim) -> None:
        super().check_wishes(claim)
        if claim.threat.budget != 1:
            raise UnsupportedThreat(
                f"an ensemble is certified location by location, and with {claim.threat} an attacker has {claim.threat.budget}.",
                hint="Use one patch, or sparse:1.",
            )
        for member in self._each:
            member.check_wishes(Claim(claim.threat, forced=True))

    @torch.no_grad()
    def margin_map(self, x: Tensor, patch: Threat) -> Tensor:
        self.check_input(x)
        if not isinstance(patch, Patch | PatchPercent):
            raise UsageError(f"a map needs one patch, not {patch}.", hint="Use --patch, for example --patch 5.")
        height, width = self.input_shape[1:]
        sides, maps = patch.resolve(height, width), []
        for some in self._groups(x, [patch]):
            answer, (found,), _, _ = self._found(some, [patch])
            own = torch.arange(found.margins.shape[2], device=x.device) == answer[:, None]
            least = found.margins.double().masked_fill(own[:, None], float("inf")).amin(dim=2)
            maps.append(least.masked_fill((answer == ALERT)[:, None], 0))
        return torch.cat(maps).reshape(-1, height - sides.height + 1, width - sides.width + 1)

    def group(self, claims: Sequence[Claim]) -> int:
        """The largest that a member wishes for."""
        return max(member.group(claims) for member in self._each)

    def passes_per_image(self) -> tuple[int, int] | None:
        """Those of the members that count them."""
        known = [passes for member in self._each if (passes := member.passes_per_image()) is not None]
        return (sum(least for least, _ in known), sum(most for _, most in known)) if known else None

    def note(self, threat: Threat) -> str:
        said = [f"member {at}: {text}" for at, member in enumerate(self._each, 1) if (text := member.note(threat))]
        return "; ".join(said)

    def settings(self) -> dict[str, Any]:
        own = {"rule": self.rule, **({"weights": list(self.weights)} if self.weights else {})}
        return own | {"members": [member.settings() for member in self._each]}

    def self_test(self) -> None:
        for member in self._each:
            member.test_once()

    def forward(self, x: Tensor) -> Tensor:
        """The mean over members of their most faithful surrogates, each brought to a range of 1: [B, K]."""
        parts = [surrogates(member)[0].whole(x).float() for member in self._each]
        ranges = [(part.amax(dim=1, keepdim=True) - part.amin(dim=1, keepdim=True)).detach() for part in parts]
        return torch.stack([part / (width + SMALL) for part, width in zip(parts, ranges, strict=True)]).mean(dim=0)

    def surrogates(self) -> tuple[Surrogate, ...]:
        """The mean of the members' surrogates, and the most faithful one of each."""
        mean = Surrogate(self)
        mean.tolerance = 1.0  # the members decide, so any candidate may succeed
        return mean, *(surrogates(member)[0] for member in self._each)

    @property
    def activations(self) -> int:
        return max(activations(member) for member in self._each)


def _problem(members: Sequence[Defense], rule: str, weights: Sequence[int]) -> UsageError | None:
    """What is wrong with an ensemble."""
    if rule not in RULES:
        return UsageError(f"no rule '{rule}' for an ensemble.", hint=f"Use {', '.join(RULES[:-1])} or {RULES[-1]}.")
    if not 2 <= len(members) <= ensembles.MOST:
        return UsageError(f"an ensemble of {len(members)} members.", hint=f"Use 2 to {ensembles.MOST} members.")
    first = members[0]
    for at, member in enumerate(members, 1):
        if member.input_shape != first.input_shape or member.classes != first.classes:
            said = f"member {at} takes {member.input_shape} and has the classes {_few(member.classes)}"
            return UsageError(
                f"{said}, but member 1 {first.input_shape} and {_few(first.classes)}.", hint="Combine models of one data set."
            )
        if not member.locates:
            return UsageError(
                f"member {at} ({type(member).__name__}) cannot say what can be forced at each location.",
                hint="Votes, interval bounds, double masking and robust masking can.",
            )
        if rule == "sum" and not isinstance(member, VotingDefense):
            return UsageError(
                f"member {at} ({type(member).__name__}) has no votes that could be added.", hint="Use the rule majority or cross."
            )
    if len(weights) not in (0, len(members)) or any(one < 1 for one in weights) or (weights and rule != "sum"):
        return UsageError(
            f"weights {list(weights)} do not fit {len(members)} members and the rule {rule}.",
            hint="Give one whole number of 1 or more for each member of a sum, or none.",
        )
    if rule == "majority" and len(members) == 2:
        return UsageError(
            "a majority of 2 members is the answer of the first one.", hint="Use 3 or more members, or the rule cross or sum."
        )
    return None


def _few(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
