"""Square roots of regional votes: the worth of votes, and condition 3.1 against enumeration."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from patchcert_cli.certificate import Claim
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.geometry import Axis, CellCoverage
from patchcert_cli.defenses.roots import Roots, RootsOptions
from patchcert_cli.errors import UnsupportedThreat, UsageError
from patchcert_cli.schema import Invalid, read
from patchcert_cli.threats import Patch, Sparse
from tests.examples import tiny
from tests.soundness.arena import Arena, check, draw_images


def made(seed: int = 0) -> Roots:
    defense = tiny("roots", seed)
    assert isinstance(defense, Roots)
    return defense


def worth(votes: list[list[int]]) -> int:
    """Of one class, 3 x 3 cells in 2 x 2 regions: rows and columns 0 and 1 are the first, 2 is the second."""
    total = 0
    for rows, columns in product(((0, 1), (2,)), repeat=2):
        count = sum(votes[r][c] for r in rows for c in columns)
        total += next(root for root in range(2000) if (root + 1) ** 2 > count * 65536)
    return total


def test_worth_is_the_sum_of_roots_in_whole_steps_and_is_monotone() -> None:
    votes = (torch.rand(50, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5).int()
    found = made().worth(votes.double())
    assert found.tolist() == [worth(one) for one in votes.tolist()]
    for r, c in product(range(3), repeat=2):
        more = votes.clone()
        more[:, r, c] = 1
        assert bool((made().worth(more.double()) >= found).all())


def test_condition_31_is_what_no_votes_of_a_location_can_undo() -> None:
    """Every location and all votes of its cells for three classes; ties are not certified."""
    defense, generator = made(), torch.Generator().manual_seed(1)
    scores = (torch.rand(14, 3, 3, 3, generator=generator) < torch.tensor([0.9, 0.4, 0.2])[:, None, None]).int()
    axis, whole = Axis(3, ((0,), (2,))), Axis(3, ((0, 1), (1,)))  # locations of one and of two cells
    cover = CellCoverage(axis, whole)
    proof = defense.prove(Votes(scores), cover, Claim(Patch(2, 1)))
    for b, image in enumerate(scores.tolist()):
        values = [worth(plane) for plane in image]
        answer, least = values.index(max(values)), 10**6
        for row, columns in product((0, 2), ((0, 1), (1,))):
            for bits in product((0, 1), repeat=3 * len(columns)):
                changed = [[list(line) for line in plane] for plane in image]
                for (c, column), bit in zip(product(range(3), columns), bits, strict=True):
                    changed[c][row][column] = bit
                now = [worth(plane) for plane in changed]
                least = min(least, *(now[answer] - now[c] for c in range(3) if c != answer))
        assert int(proof.answer[b]) == answer and int(proof.margin[b]) == least
    assert 0 < int((proof.margin > 0).sum()) < 14


def test_no_patch_moves_a_certified_answer() -> None:
    arenas = [Arena(str(seed), made(seed), draw_images((1, 4, 4), 8, seed)) for seed in range(4)]
    score = check(arenas, [Patch(1, 1), Patch(2, 1)])
    assert score.violations == [] and score.unsupported == 0 and score.certified >= 3


def test_what_it_cannot_do_is_refused() -> None:
    defense, x = made(), torch.rand(2, 1, 4, 4)
    with pytest.raises(UnsupportedThreat):
        defense.certify(x, Sparse(2))
    with pytest.raises(UsageError):
        defense.margin_map(x, Patch(1, 1))
    with pytest.raises(UsageError, match="9x9 regions"):
        Roots(defense.scorer, input_shape=(1, 4, 4), classes=("a", "b", "c"), regions=9)
    with pytest.raises(Invalid, match="aggregate"):
        read(RootsOptions, {"aggregate": "weighted"})
