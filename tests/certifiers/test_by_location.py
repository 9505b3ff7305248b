"""What votes let an attacker force at one location, and top-k certificates of votes: against every change of what cells say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch

from patchcert_cli.certifiers.cells import additive, by_location
from patchcert_cli.certifiers.cells.additive import Votes
from patchcert_cli.certifiers.geometry import Axis, CellCoverage

from .ballots import Array, Ballots, Cells, Line, draw, replacements, unknown_sums

SHORT, WRAPS, SINGLE = Line(4, 1, 2), Line(5, 1, 2, wraps=True), Line(3, 1, 1)


def votes(ballots: Ballots) -> Votes:
    return Votes(ballots.scores, ballots.unknown, ballots.weight, one_hot=ballots.one and ballots.weight is None)


def after(ballots: Ballots, index: int, cells: Cells) -> Iterator[Array]:
    """The sums [R, K] that an attacker who owns ``cells`` can bring about."""
    scores, weight = ballots.scores[index].numpy(), np.array(ballots.weights())
    outside = np.ones_like(weight)
    for cell in cells:
        outside[cell] = 0
    added = replacements(tuple(sorted(int(weight[cell]) for cell in cells)), len(scores), ballots.one)
    for settings in unknown_sums(ballots, index, outside):
        yield (scores * outside).sum(axis=(1, 2)) + settings + added


def possible(ballots: Ballots, index: int) -> list[set[int]]:
    """The answers at each location; numpy's argmax is the first of equals."""
    return [
        set().union(*(found.argmax(axis=1).tolist() for found in after(ballots, index, cells))) for cells in ballots.locations()
    ]


def kept(ballots: Ballots, index: int, top: int, budget: int = 1) -> dict[int, bool]:
    """For each of the first ``top`` classes whether it stays among them under every replacement."""
    first = np.argsort(-ballots.scores[index].sum(dim=(1, 2)).numpy(), kind="stable")[:top].tolist()
    stays = dict.fromkeys(first, True)
    places = ballots.locations()
    for cells in {frozenset().union(*chosen) for chosen in combinations(places, min(budget, len(places)))}:
        for sums in after(ballots, index, cells):
            order = np.argsort(-sums, axis=1, kind="stable")[:, :top]
            for label in first:
                stays[label] &= bool((order == label).any(axis=1).all())
    return stays


CASES = {
    "one": draw(SHORT, SHORT, classes=3, count=40, seed=1, one=True),
    "one, four classes": draw(Line(2, 1, 1), Line(4, 2, 1), classes=4, count=40, seed=2, one=True),
    "one, wrapping": draw(WRAPS, Line(2, 2, 1), classes=4, count=40, seed=3, one=True),
    "independent": draw(SINGLE, SHORT, classes=3, count=40, seed=4),
    "weighted": draw(SINGLE, Line(5, 1, 1), classes=3, count=40, seed=5, heaviest=3),
    "in doubt": draw(SINGLE, SHORT, classes=3, count=40, seed=6, doubts=1),
}


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_forced_is_what_some_replacement_brings_about(name: str) -> None:
    ballots = CASES[name]
    found = by_location.forced(by_location.ranges(votes(ballots), ballots.cover()))
    certified = additive.prove(votes(ballots), ballots.cover()).margin > 0
    answers = votes(ballots).answer().tolist()
    for index, sets in enumerate(found):
        claimed, truth = [set(line.nonzero()[:, 0].tolist()) for line in sets], possible(ballots, index)
        assert all(real <= mine for real, mine in zip(truth, claimed, strict=True))
        if ballots.unknown is None:
            assert claimed == truth
        assert bool(certified[index]) == all(one == {answers[index]} for one in claimed)
    assert 4 <= int(certified.sum()) <= 36


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_class_stays_among_the_first_iff_no_replacement_expels_it(name: str, top: int) -> None:
    ballots = CASES[name]
    found = by_location.prove_first(votes(ballots), ballots.cover(), top)
    for index, (first, margins) in enumerate(zip(found.ranking.tolist(), found.margins.tolist(), strict=True)):
        claimed = {label: margin > 0 for label, margin in zip(first, margins, strict=True)}
        truth = kept(ballots, index, top)
        assert claimed.keys() == truth.keys()
        if ballots.unknown is None:
            assert claimed == truth
        assert all(truth[label] for label, stays in claimed.items() if stays)
    if top == 1:
        assert torch.equal(found.margin > 0, additive.prove(votes(ballots), ballots.cover()).margin > 0)


def test_single_votes_keep_more_than_independent_ones() -> None:
    ballots = CASES["one, four classes"]
    single, any_ = (by_location.prove_first(replace(votes(ballots), one_hot=one), ballots.cover(), 2) for one in (True, False))
    assert int((single.margins > 0).sum()) > int((any_.margins > 0).sum()) > 0
    assert bool((single.margins >= any_.margins).all())


@pytest.mark.parametrize("name", ["one, four classes", "independent"])
def test_several_locations_are_sound(name: str) -> None:
    ballots = CASES[name]
    found = by_location.prove_first(votes(ballots), ballots.cover(2), 2)
    for index, (first, margins) in enumerate(zip(found.ranking.tolist(), found.margins.tolist(), strict=True)):
        truth = kept(ballots, index, 2, budget=2)
        assert all(truth[label] for label, margin in zip(first, margins, strict=True) if margin > 0)
    assert bool((found.margins > 0).any())


def test_cells_that_are_locations_are_exact_for_single_votes() -> None:
    ballots = replace(draw(SINGLE, SINGLE, classes=4, count=40, seed=7, one=True), one=True)
    cells = CellCoverage(Axis(3, ((0,), (1,), (2,))), Axis(3, ((0,), (1,), (2,))), 2)
    found = by_location.prove_first(votes(ballots), cells, 2)
    proven = 0
    for index, (first, margins) in enumerate(zip(found.ranking.tolist(), found.margins.tolist(), strict=True)):
        truth = kept(ballots, index, 2, budget=2)
        for label, margin in zip(first, margins, strict=True):
            assert truth[label] >= (margin > 0)
            if int(ballots.scores[index, label].sum()) >= 2:
                assert truth[label] == (margin > 0)
                proven += margin > 0
    assert proven > 5


def test_votes_that_are_not_numbers_rule_nothing_out() -> None:
    scores = torch.zeros(2, 3, 2, 2)
    scores[:, 0] = 1
    scores[1, 2, 0, 0] = float("nan")
    cover = CellCoverage(Axis(2, ((0,), (1,))), Axis(2, ((0,), (1,))))
    sets = by_location.forced(by_location.ranges(Votes(scores), cover))
    assert sets[0].tolist() == [[True, False, False]] * 4
    assert bool(sets[1, :, 2].all())
    assert not bool((by_location.prove_first(Votes(scores), cover, 2).margins[1] > 0).any())


Break = Callable[[pytest.MonkeyPatch], None]


def _attribute(name: str, change: Callable[..., object]) -> Break:
    original = getattr(by_location, name)
    return lambda patch: patch.setattr(by_location, name, lambda *args, **more: change(original, *args, **more))


def _every(test: Callable[[str], None]) -> None:
    for name in ("one, four classes", "independent", "weighted"):
        test(name)


BREAKS: dict[str, Break] = {
    "no vote is won": _attribute("location_weights", lambda original, *args: original(*args) * 0),
    "half are won": _attribute("location_weights", lambda original, *args: (original(*args) / 2).floor()),
    "locations transposed": _attribute("location_sums", lambda original, *args: original(*args).flip(-1)),
    "nothing is lost": _attribute("location_sums", lambda original, *args: original(*args) * 0),
    "ties to the highest": _attribute("first_largest", lambda original, scores: scores.shape[1] - 1 - original(scores.flip(1))),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_sets_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[broken](monkeypatch)
    with pytest.raises(AssertionError):
        _every(test_what_can_be_forced_is_what_some_replacement_brings_about)


TOP_BREAKS: dict[str, Break] = {
    "no vote is won": BREAKS["no vote is won"],
    "nothing is lost": BREAKS["nothing is lost"],
    "one rival more is needed": _attribute("_cheapest", lambda original, need, top, *, add: original(need, top + 1, add=add)),
    "votes are added where each class has its own": _attribute(
        "_cheapest", lambda original, need, top, *, add: original(need, top, add=True)
    ),
}


@pytest.mark.parametrize("broken", TOP_BREAKS)
def test_broken_rankings_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    TOP_BREAKS[broken](monkeypatch)
    with pytest.raises(AssertionError):
        _every(partial(test_a_class_stays_among_the_first_iff_no_replacement_expels_it, top=2))
