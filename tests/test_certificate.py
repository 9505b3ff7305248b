"""Counts and confidence intervals, compared with exact binomial sums in rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcert_cli.certificate import Certificate, Guarantee, Tally, clopper_pearson
from patchcert_cli.threats import Patch


def at_least(count: int, trials: int, p: float) -> Fraction:
    """P(X >= count) for X ~ Binomial(trials, p), exactly."""
    q = Fraction(p)
    return sum((comb(trials, i) * q**i * (1 - q) ** (trials - i) for i in range(count, trials + 1)), Fraction(0))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.3084971),
        (10, 10, 0.6915029, 1.0),
        (5, 10, 0.1870860, 0.8129140),
        (1, 10, 0.0025286, 0.4450161),
        (0, 1, 0.0, 0.975),
        (1, 1, 0.025, 1.0),
        (6185, 10000, 0.6088960, 0.6280350),
    ],
)
def test_known_intervals(successes: int, trials: int, low: float, high: float) -> None:
    found = clopper_pearson(successes, trials)
    assert found == pytest.approx((low, high), abs=1.5e-7)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 25), st.data())
def test_ends_have_the_tail_that_defines_them(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    level = data.draw(st.sampled_from([0.5, 0.9, 0.95, 0.99]))
    low, high = clopper_pearson(successes, trials, level)
    tail = (1 - level) / 2
    if successes:
        assert float(at_least(successes, trials, low)) == pytest.approx(tail, abs=1e-9)
    else:
        assert low == 0
    if successes < trials:
        assert 1 - float(at_least(successes + 1, trials, high)) == pytest.approx(tail, abs=1e-9)
    else:
        assert high == 1
    assert low <= successes / trials <= high
    assert clopper_pearson(trials - successes, trials, level) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_an_interval_of_many_trials_against_the_binomial_tail() -> None:
    """The ends for 6185 of 10000, checked by multiplying the binomial terms one after the other in high precision."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    low, high = clopper_pearson(6185, 10_000)

    def tail(count: int, p: float) -> float:
        odds = Decimal(p) / (1 - Decimal(p))
        term, total = (1 - Decimal(p)) ** 10_000, Decimal(0)
        for i in range(10_001):
            total += term if i >= count else 0
            term *= odds * (10_000 - i) / (i + 1)
        return float(total)

    assert tail(6185, low) == pytest.approx(0.025, rel=1e-7)
    assert 1 - tail(6186, high) == pytest.approx(0.025, rel=1e-7)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_counts_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        clopper_pearson(successes, trials)


def test_a_tally_counts_right_answers_only() -> None:
    label = torch.tensor([0, 1, 2, 2, 1])
    prediction = torch.tensor([0, 1, 1, 2, 0])
    certified = torch.tensor([True, False, True, True, True])
    tally = Tally.of(label, prediction, certified)
    assert tally == Tally(images=5, clean=3, certified=2)
    assert tally.clean_accuracy == 0.6
    assert tally.certified_accuracy == 0.4
    assert tally.certified_interval == clopper_pearson(2, 5)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), min_size=1, max_size=20))
def test_a_tally_equals_a_loop(rows: list[tuple[int, int, bool]]) -> None:
    label, prediction, certified = (torch.tensor(column) for column in zip(*rows, strict=True))
    expected = Tally(len(rows), sum(a == b for a, b, _ in rows), sum(a == b and c for a, b, c in rows))
    assert Tally.of(label, prediction, certified) == expected
    assert expected.certified <= expected.clean <= expected.images


def test_certificates_join_in_order() -> None:
    def part(values: list[int]) -> Certificate:
        column = torch.tensor(values)
        return Certificate(
            column, column > 1, column.double(), column.double() / 8, column[:, None] * torch.ones(4), column, Patch(2, 2), "m"
        )

    joined = Certificate.cat([part([0, 1]), part([2]), part([3, 4])])
    assert joined.prediction.tolist() == [0, 1, 2, 3, 4]
    assert joined.certified.tolist() == [False, False, True, True, True]
    assert joined.margin.tolist() == [0, 1, 2, 3, 4]
    assert joined.tolerance.tolist() == [0, 0.125, 0.25, 0.375, 0.5]
    assert joined.worst.shape == (5, 4)
    assert (joined.threat, joined.method, joined.guarantee) == (Patch(2, 2), "m", Guarantee.RECOVERY)
