"""HiCert's rule, and what published metrics count, for both rules of detection: against an enemy who shows anything wherever a
mask does not hide the patch.

Rules and enemy are written here from their words, for one image in plain values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from patchcert_cli.certificate import ALERT
from patchcert_cli.certifiers.masks import hicert, masked_detection
from patchcert_cli.certifiers.masks.masked_detection import MaskedOutputs
from tests.certifiers.test_masked_detection import HIDING, rows

View = tuple[int, float]  # label and confidence
LEVELS = (0.3, 0.5, 0.8)
ANY = (0.01, 0.9999)  # confidences that the enemy shows
THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.9, 1.0)  # none of the levels
RULES = {"hicert": hicert, "minority": masked_detection}


def warns(rule: str, whole: int, views: tuple[View, ...], threshold: float) -> bool:
    if rule == "minority":
        return any(label != whole and confidence >= threshold for label, confidence in views)
    agreeing = [confidence for label, confidence in views if label == whole]
    return len(agreeing) < len(views) or min(agreeing) < threshold


@cache
def reached(rule: str, kept: tuple[View, ...], free: int, classes: int, threshold: float) -> frozenset[int]:
    """The answers without an alarm that an enemy gets who leaves the views ``kept`` as they are and writes all others."""
    shown = list(product(range(classes), ANY))
    return frozenset(
        whole
        for whole, written in product(range(classes), product(shown, repeat=free))
        if not warns(rule, whole, (*kept, *written), threshold)
    )


def answers(rule: str, views: tuple[View, ...], hiding: list[set[int]], classes: int, threshold: float) -> frozenset[int]:
    """The same, at the place that suits the enemy best."""
    parts = [reached(rule, tuple(views[i] for i in sorted(kept)), len(views) - len(kept), classes, threshold) for kept in hiding]
    return frozenset().union(*parts)


Image = tuple[int, tuple[View, ...]]


@cache
def every_image(masks: int, classes: int) -> list[Image]:
    return list(product(range(classes), product(product(range(classes), LEVELS), repeat=masks)))


def seen(images: list[Image], threshold: float, logit_margin: float = 1.0) -> MaskedOutputs:
    confidence = torch.tensor([[one for _, one in views] for _, views in images], dtype=torch.float64)
    label = torch.tensor([[one for one, _ in views] for _, views in images])
    return MaskedOutputs(
        torch.tensor([whole for whole, _ in images]),
        label,
        (label == 0).long(),
        torch.full_like(confidence, logit_margin),
        confidence - threshold,
        confidence[..., None].expand(-1, -1, 2),
    )


def within(ends: Tensor, threshold: float) -> Tensor:
    return (ends[..., 0] < threshold) & (threshold < ends[..., 1])


Holds = Callable[[MaskedOutputs, Tensor, int, float], Tensor]


def proven(rule: str) -> Holds:
    return lambda found, by, classes, threshold: within(RULES[rule].or_alarm(found, by, 0.0, classes), threshold)


def compare(rule: str, holds: Holds, thresholds: tuple[float, ...] = THRESHOLDS) -> tuple[int, int, int, int]:
    """Over all tables, sets, classes and thresholds: verdicts that are unsound, lazy, right, and about an image with an alarm."""
    unsound = lazy = right = alarmed = 0
    for (masks, hiding), classes in product(HIDING, (2, 3)):
        if masks == 3 and classes == 3:
            continue
        images = every_image(masks, classes)
        for threshold in thresholds:
            if rule == "minority" and threshold == 1:
                continue
            found = holds(seen(images, threshold), rows(hiding, masks), classes, threshold).tolist()
            for (whole, views), verdicts in zip(images, found, strict=True):
                possible, alarm = answers(rule, views, hiding, classes, threshold), warns(rule, whole, views, threshold)
                for y, held in enumerate(verdicts):
                    true = possible <= {y}
                    unsound, lazy = unsound + (held and not true), lazy + (true and not held)
                    right, alarmed = right + (held and true), alarmed + (held and true and alarm)
    return unsound, lazy, right, alarmed


@pytest.mark.parametrize("rule", RULES)
def test_a_class_or_an_alarm_is_the_answer_if_and_only_if_no_attack_exists(rule: str) -> None:
    unsound, lazy, right, alarmed = compare(rule, proven(rule))
    assert (unsound, lazy) == (0, 0)
    assert right > alarmed > 1000, "images that raise an alarm themselves count too"
    unsound, lazy, _, _ = compare(rule, proven(rule), LEVELS)
    assert unsound == 0 and (lazy > 0) == (rule == "minority"), "a confidence that equals its threshold may be rounded"


@pytest.mark.parametrize("threshold", [*THRESHOLDS, *LEVELS])
def test_answers_and_certificates_are_those_of_the_rule(threshold: float) -> None:
    """An answer is certified unless a confidence equals the threshold; an alarm never is."""
    for masks, hiding in HIDING:
        images = every_image(masks, 2)
        found, by = seen(images, threshold), rows(hiding, masks)
        expected = [ALERT if warns("hicert", *one, threshold) else one[0] for one in images]
        assert hicert.answer(found).tolist() == expected
        proof, silent = hicert.prove(found, by), torch.tensor(expected) != ALERT
        certified = proof.margin > 0
        equal = (found.confidence_margin == 0).any(dim=1)
        assert torch.equal(certified, silent & ~equal)
        assert all(
            answers("hicert", views, hiding, 2, threshold) <= {whole}
            for (whole, views), sure in zip(images, certified.tolist(), strict=True)
            if sure
        )
        assert torch.equal(within(hicert.silent(found), threshold), silent & ~equal)
        assert torch.equal(within(hicert.thresholds(found, by, 0.0), threshold), certified)
        published = within(hicert.or_alarm(found, by, 0.0, 2), threshold)
        assert bool(published[torch.arange(len(images)), found.whole][certified].all()), "certified answers count as published"
        if threshold == 1:
            assert not bool(silent.any()) and bool(published.all()), "an alarm for every image, and every image counts"
        if threshold == 0:
            same = masked_detection.answer(seen(images, 0.0))
            assert torch.equal(hicert.answer(found), same), "threshold 0 is that of the other rule"


def test_the_published_condition_is_that_of_every_mask_alone() -> None:
    """``max p_i of f_i != y`` below the threshold, written out; sets of masks certify more."""
    gained = 0
    for masks, hiding in HIDING:
        images = every_image(masks, 2)
        for threshold in (0.0, 0.4, 0.6, 1.0):
            found = seen(images, threshold)
            every = within(hicert.or_alarm(found, torch.eye(masks, dtype=torch.bool), 0.0, 2), threshold).tolist()
            wanted = [[all(p < threshold for label, p in views if label != y) for y in range(2)] for _, views in images]
            assert every == wanted
            some = within(hicert.or_alarm(found, rows(hiding, masks), 0.0, 2), threshold)
            assert not bool((torch.tensor(every) & ~some).any())
            gained += int((some & ~torch.tensor(every)).sum())
    assert gained > 0


@pytest.mark.parametrize("rule", RULES)
def test_labels_that_rounding_may_decide_count_for_no_class(rule: str) -> None:
    found = seen([(0, ((0, 0.5), (0, 0.8)))], 0.6, logit_margin=0.25)
    by = torch.tensor([[True, False], [True, True]])
    kept = RULES[rule].or_alarm(found, by, 0.2, 3)
    lost = RULES[rule].or_alarm(found, by, 0.25, 3)
    if rule == "hicert":
        assert kept[0].tolist() == [[-1, 2], [0.5, 2], [0.5, 2]] and lost[0].tolist() == [[0.5, 2]] * 3
        assert hicert.thresholds(found, by, 0.25).tolist() == [[-1, -1]]
        assert hicert.thresholds(found, by, 0.2).tolist() == [[-1, 0.5]]
    else:
        assert kept[0].tolist() == [[-1, 0.5], [-1, -1], [-1, -1]] and lost[0].tolist() == [[-1, -1]] * 3


def test_no_confidence_reaches_the_threshold_of_one() -> None:
    """One that is rounded to 1 neither; a location that no mask hides is never covered."""
    found = seen([(0, ((0, 1.0),))], 1.0)
    assert within(hicert.or_alarm(found, torch.ones(1, 1, dtype=torch.bool), 0.0, 2), 1.0).tolist() == [[True, True]]
    empty = torch.zeros(1, 1, dtype=torch.bool)
    assert not bool(within(hicert.or_alarm(found, empty, 0.0, 2), 1.0).any())
    assert float(hicert.prove(found, empty).margin) == -torch.inf
    assert not bool(within(masked_detection.or_alarm(found, empty, 0.0, 2), 0.0).any())


def of(rule: str, change: Callable[[MaskedOutputs, Tensor], tuple[MaskedOutputs, Tensor]]) -> Holds:
    """The proof, with something wrong in what it reads."""

    def holds(found: MaskedOutputs, by: Tensor, classes: int, threshold: float) -> Tensor:
        return proven(rule)(*change(found, by), classes, threshold)

    return holds


def cut(found: MaskedOutputs, by: Tensor) -> tuple[MaskedOutputs, Tensor]:
    return found, by[:-1] if len(by) > 1 else by


def merged(found: MaskedOutputs, by: Tensor) -> tuple[MaskedOutputs, Tensor]:
    return found, by.any(dim=0, keepdim=True)


def reaching(found: MaskedOutputs, by: Tensor, classes: int, threshold: float) -> Tensor:
    """A confidence that equals the threshold taken for one below it."""
    return hicert.or_alarm(found, by, 0.0, classes)[..., 0] <= threshold


def whole_trusted(found: MaskedOutputs, by: Tensor, classes: int, threshold: float) -> Tensor:
    """The label of the unmasked image counts, which the patch changes."""
    return proven("hicert")(found, by, classes, threshold) | (torch.arange(classes) == found.whole[:, None])


def other_rule(found: MaskedOutputs, by: Tensor, classes: int, threshold: float) -> Tensor:
    """What is right with the other rule: low confidence raises an alarm."""
    return proven("hicert")(found, by, classes, threshold)


BREAKS: dict[str, tuple[str, Holds, tuple[float, ...]]] = {
    "a set forgotten": ("hicert", of("hicert", cut), THRESHOLDS),
    "any mask for all sets": ("hicert", of("hicert", merged), THRESHOLDS),
    "equality counted": ("hicert", reaching, LEVELS),
    "the unmasked label trusted": ("hicert", whole_trusted, THRESHOLDS),
    "a set forgotten, minority": ("minority", of("minority", cut), THRESHOLDS),
    "any mask for all sets, minority": ("minority", of("minority", merged), THRESHOLDS),
    "HiCert's proof of the other rule": ("minority", other_rule, THRESHOLDS),
    "the other rule's proof of HiCert's": ("hicert", lambda *given: ~proven("minority")(*given), THRESHOLDS),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_proofs_are_caught(name: str) -> None:
    rule, holds, thresholds = BREAKS[name]
    assert compare(rule, holds, thresholds)[0] > 0
