"""Certified detection: against an enemy who shows anything wherever a mask does not hide his patch.

The rule (:func:`answer`) and the enemy (:func:`breakable`) are written here from their words, for one image in plain values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from patchcert_cli.certificate import ALERT
from patchcert_cli.certifiers.masks import masked_detection
from patchcert_cli.certifiers.masks.mask_sets import MaskSet, MaskSpec
from patchcert_cli.certifiers.masks.masked_detection import MaskedOutputs
from patchcert_cli.threats import Patch

View = tuple[int, float]  # label, and by how much its confidence exceeds the threshold
LEVELS = (-1.0, 0.0, 1.0)  # less confidence than the threshold, exactly as much, more


@dataclass(frozen=True)
class Observation:
    """One image: the label of the whole, and what is seen behind each mask."""

    whole: int
    views: tuple[View, ...]


def answer(seen: Observation) -> int:
    """An alarm (-1) if a mask contradicts the whole image with at least the threshold's confidence."""
    return -1 if any(label != seen.whole and confidence_margin >= 0 for label, confidence_margin in seen.views) else seen.whole


def breakable(seen: Observation, hiding: list[set[int]], classes: int) -> bool:
    """Whether an enemy who leaves only the masks of one of the sets as they are gets an answer that is neither y nor an alarm."""
    y = answer(seen)
    shown = list(product(range(classes), LEVELS))
    for kept in hiding:
        free = [i for i in range(len(seen.views)) if i not in kept]
        for whole, written in product(range(classes), product(shown, repeat=len(free))):
            views = list(seen.views)
            for at, view in zip(free, written, strict=True):
                views[at] = view
            if answer(Observation(whole, tuple(views))) not in (y, -1):
                return True
    return False


def reports(images: list[Observation]) -> MaskedOutputs:
    """What is seen of some images, with a logit margin of 1 everywhere and the lowest other class as rival."""
    label = torch.tensor([[label for label, _ in one.views] for one in images])
    confidence_margin = torch.tensor(
        [[confidence_margin for _, confidence_margin in one.views] for one in images], dtype=torch.float64
    )
    return MaskedOutputs(
        torch.tensor([one.whole for one in images]),
        label,
        (label == 0).long(),
        torch.ones_like(confidence_margin),
        confidence_margin,
    )


def rows(hiding: list[set[int]], masks: int) -> Tensor:
    by = torch.zeros(len(hiding), masks, dtype=torch.bool)
    for at, kept in enumerate(hiding):
        by[at, sorted(kept)] = True
    return by


HIDING: list[tuple[int, list[set[int]]]] = [
    (2, [{0}, {1}]),
    (2, [{0, 1}]),
    (3, [{0}, {1}, {2}]),
    (3, [{0, 1}, {1, 2}]),
    (3, [{0, 1, 2}]),
    (3, [{0}, {1, 2}]),
]


def every_image(masks: int, classes: int) -> list[Observation]:
    shown = list(product(range(classes), LEVELS))
    return [Observation(whole, views) for whole, views in product(range(classes), product(shown, repeat=masks))]


Certified = Callable[[MaskedOutputs, Tensor], Tensor]


def proven(found: MaskedOutputs, by: Tensor) -> Tensor:
    return masked_detection.prove(found, by).margin > 0


def compare(certified: Certified = proven, *, by_rule: Callable[[Observation], int] = answer) -> tuple[int, int, int, int]:
    """Unsound and lazy verdicts over every table of labels and confidences, certified and broken images."""
    unsound = lazy = good = bad = 0
    for masks, hiding in HIDING:
        images = every_image(masks, 2)
        yes = certified(reports(images), rows(hiding, masks)).tolist()
        for one, sure in zip(images, yes, strict=True):
            if by_rule(one) == -1:
                unsound += sure  # an alarm is no answer
                continue
            broken = breakable(one, hiding, 2)
            unsound, lazy = unsound + (sure and broken), lazy + (not sure and not broken)
            good, bad = good + sure, bad + broken
    return unsound, lazy, good, bad


def at_least(found: MaskedOutputs, by: Tensor) -> Tensor:
    return (masked_detection.prove(found, by).margin >= 0) & (masked_detection.answer(found) != ALERT)


def test_every_table_is_certified_if_and_only_if_no_attack_exists() -> None:
    """But for a confidence that equals the threshold, which rounding may decide."""
    unsound, lazy, good, bad = compare(at_least)
    assert (unsound, lazy) == (0, 0), "equality raises an alarm, so it may count"
    assert good >= 100 and bad >= 100
    unsound, lazy, fewer, _ = compare()
    assert unsound == 0 and lazy == good - fewer > 0


def test_the_answer_is_that_of_the_rule() -> None:
    for classes, masks in ((2, 3), (3, 2)):
        images = every_image(masks, classes)
        assert masked_detection.answer(reports(images)).tolist() == [answer(one) for one in images]
    assert ALERT == -1


def test_all_masks_ask_for_more_than_is_needed() -> None:
    gained = 0
    for masks, hiding in HIDING:
        found, by = reports(every_image(masks, 2)), rows(hiding, masks)
        some, every = proven(found, by), proven(found, torch.eye(masks, dtype=torch.bool))
        assert not bool((every & ~some).any())
        gained += int((some & ~every).sum())
        whole = masked_detection.prove(found, by)
        assert torch.equal(
            whole.margin, torch.where(by, masked_detection.mask_margins(found)[:, None], -torch.inf).amax(2).amin(1)
        )
        assert bool((whole.rival != found.whole).all() or classes_disagree(found, whole.rival))
    assert gained > 0


def classes_disagree(found: MaskedOutputs, rival: Tensor) -> bool:
    """A rival may be the answer only where there is an alarm."""
    return bool((masked_detection.answer(found)[rival == found.whole] == ALERT).all())


def test_the_weakest_set_and_the_rival_are_told() -> None:
    label = torch.tensor([[0, 0, 2], [0, 0, 0]])
    logit_margin = torch.tensor([[3.0, 1.0, 2.0], [3.0, 0.5, 2.0]], dtype=torch.float64)
    confidence_margin = torch.tensor([[9.0, 9.0, -1.0], [9.0, 9.0, 0.25]], dtype=torch.float64)
    found = MaskedOutputs(torch.tensor([0, 0]), label, torch.full((2, 3), 1), logit_margin, confidence_margin)
    proof = masked_detection.prove(found, torch.tensor([[True, True, False], [False, True, False], [False, False, True]]))
    assert proof.margin.tolist() == [-2.0, 0.25]
    assert proof.weakest.tolist() == [2, 2]
    assert proof.rival.tolist() == [2, 1]
    assert masked_detection.prove(
        replace(found, confidence_margin=confidence_margin.abs()), torch.ones(1, 3, dtype=torch.bool)
    ).margin.tolist() == [0, 3]


def trusted(found: MaskedOutputs, by: Tensor) -> Tensor:
    """The unmasked label is believed where any mask agrees."""
    return (found.label == found.whole[:, None]).any(dim=1) & (masked_detection.answer(found) != ALERT)


BREAKS: dict[str, Certified] = {
    "the unmasked label trusted": trusted,
    "confidence forgotten": lambda found, by: proven(replace(found, confidence_margin=found.confidence_margin.abs() + 1), by),
    "a set without its last mask's location": lambda found, by: proven(found, by[:-1] if len(by) > 1 else by),
    "any mask for all sets": lambda found, by: proven(found, by.any(dim=0, keepdim=True)),
    "alarms certified": lambda found, by: (found.label == found.whole[:, None]).any(dim=1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_proofs_are_caught(name: str) -> None:
    assert compare()[0] == 0
    assert compare(BREAKS[name])[0] > 0


def test_an_alarm_that_needs_more_than_the_certificate_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published convention: equal confidence certifies but raises no alarm."""

    def lenient(seen: Observation) -> int:
        return -1 if any(label != seen.whole and confidence_margin > 0 for label, confidence_margin in seen.views) else seen.whole

    assert breakable(Observation(0, ((0, 0.0), (0, 1.0))), [{0}], 2) is False
    monkeypatch.setattr(f"{__name__}.answer", lenient)
    assert breakable(Observation(0, ((0, 0.0), (0, 1.0))), [{0}], 2) is True


def misses(masks: MaskSet, patch: Patch) -> list[tuple[int, int]]:
    """Locations that no mask hides, counted pixel by pixel."""
    return [
        (top, left)
        for top, left in product(range(masks.height - patch.height + 1), range(masks.width - patch.width + 1))
        if not any(bool(occluded[top : top + patch.height, left : left + patch.width].all()) for occluded in masks.occluded)
    ]


def test_masks_that_leave_out_a_border_do_not_prove_anything_about_it() -> None:
    """A location that no mask hides has an empty set of masks, which never holds."""
    patch, whole = Patch(2, 2), MaskSpec(("patch:2x2",), per_axis=2).masks(5, 5)
    assert misses(whole, patch) == []
    cut = MaskSet(5, 5, tuple(one for one in whole.boxes if one != whole.boxes[-1]))
    assert (3, 3) in misses(cut, patch)
    by = torch.stack([cut.hides(patch)[at] for at in range(patch.count(5, 5))])
    unanimous = Observation(0, ((0, 1.0),) * len(cut))
    assert float(masked_detection.prove(reports([unanimous]), by).margin) == -float("inf")
    assert breakable(unanimous, [set(row.nonzero()[:, 0].tolist()) for row in by], 2)
