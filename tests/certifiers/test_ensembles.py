"""Combinations of members against every choice from their sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from patchcert_cli.certificate import ALERT
from patchcert_cli.certifiers import ensembles
from patchcert_cli.certifiers.ensembles import cross_check, majority, prove_cross_check, prove_majority, smallest

CLASSES = 3


def slow_majority(answers: tuple[int, ...]) -> int:
    """The most frequent answer, of several the one that comes first."""
    counts = Counter(answers)
    return max(answers, key=lambda answer: (counts[answer], -answers.index(answer)))


def slow_cross_check(answers: tuple[int, ...]) -> int:
    return answers[0] if len(set(answers)) == 1 else ALERT


def draw(members: int, count: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Answers int64 [R, B] and sets bool [B, A, K] around them, from single answers to all."""
    generator = torch.Generator().manual_seed(seed)
    favourite = torch.randint(CLASSES, (count,), generator=generator)
    other = torch.randint(CLASSES, (members, count), generator=generator)
    answers = torch.where(torch.rand(members, count, generator=generator) < 0.8, favourite, other)
    chance = torch.rand(members, count, 1, 1, generator=generator) * 0.6
    sets = torch.rand(members, count, 3, CLASSES, generator=generator) < chance
    sets |= torch.nn.functional.one_hot(answers, CLASSES).bool()[:, :, None]
    return answers, list(sets)


def outcomes(rule: Callable[[tuple[int, ...]], int], sets: list[Tensor], image: int, place: int) -> set[int]:
    """The answers of all choices at a location."""
    return {rule(chosen) for chosen in product(*(one[image, place].nonzero()[:, 0].tolist() for one in sets))}


@pytest.mark.parametrize("members", [2, 3, 4, 5])
def test_majorities_stay_iff_no_choice_changes_them(members: int) -> None:
    answers, sets = draw(members, 60, members)
    answer = majority(answers)
    assert answer.tolist() == [slow_majority(tuple(one)) for one in answers.t().tolist()]
    found = prove_majority(answer, sets)
    margin, worst, rival = smallest(found.margins, answer)
    forced = found.forced
    assert forced is not None
    for image, y in enumerate(answer.tolist()):
        real = [outcomes(slow_majority, sets, image, place) for place in range(3)]
        assert bool(margin[image] > 0) == all(one == {y} for one in real)
        assert [bool(forced[image, place].sum() == 1) for place in range(3)] == [one == {y} for one in real]
        assert all(one <= set(forced[image, place].nonzero()[:, 0].tolist()) for place, one in enumerate(real))
        if not margin[image] > 0:
            assert real[int(worst[image])] != {y} and int(rival[image]) != y
    assert 5 <= int((margin > 0).sum()) <= 55


@pytest.mark.parametrize("members", [2, 3, 5])
def test_cross_checks_answer_or_alarm_iff_no_choice_agrees_on_another_class(members: int) -> None:
    answers, sets = draw(members, 60, members)
    answer = cross_check(answers)
    assert answer.tolist() == [slow_cross_check(tuple(one)) for one in answers.t().tolist()]
    margin, _, _ = smallest(prove_cross_check(sets).margins, answer)
    unwavering = 0
    for image, y in enumerate(answer.tolist()):
        real = set().union(*(outcomes(slow_cross_check, sets, image, place) for place in range(3)))
        assert bool(margin[image] > 0) == (y != ALERT and real <= {y, ALERT})
        if y != ALERT:
            assert bool(margin[image] == members) == (real == {y})
            unwavering += real == {y}
    assert (unwavering > 0 or members == 5) and 5 <= int((margin > 0).sum()) <= 55


def test_every_small_case() -> None:
    """Three members, all sets that hold an answer, all answers in them; of the first member class 0 or 1."""
    every = [[bool(number >> j & 1) for j in range(CLASSES)] for number in range(1, 8)]
    cases = [
        (one, chosen) for one in product(every[:3], every, every) for chosen in product((0, 1), range(CLASSES), range(CLASSES))
    ]
    cases = [(one, chosen) for one, chosen in cases if all(held[j] for held, j in zip(one, chosen, strict=True))]
    sets = [torch.tensor([one[at] for one, _ in cases])[:, None] for at in range(3)]
    answer = majority(torch.tensor([chosen for _, chosen in cases]).t())
    margin, _, _ = smallest(prove_majority(answer, sets).margins, answer)
    for image in range(len(cases)):
        assert bool(margin[image] > 0) == (outcomes(slow_majority, sets, image, 0) == {int(answer[image])})


Break = Callable[[pytest.MonkeyPatch], None]


def _counted(change: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> Break:
    original = ensembles._counted

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ensembles, "_counted", lambda sets: change(*original(sets), len(sets)))

    return apply


BREAKS: dict[str, Break] = {
    "the first member is not asked": lambda patch: patch.setattr(
        ensembles, "_counted", (lambda original: lambda sets: original([sets[0] & False, *sets[1:]]))(ensembles._counted)
    ),
    "ties to the last member": _counted(lambda number, first, members: (number, members - first)),
    "no ties": _counted(lambda number, first, members: (number, first * 0)),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_majorities_are_caught(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[broken](monkeypatch)
    with pytest.raises(AssertionError):
        test_every_small_case()
