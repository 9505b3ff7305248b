"""Double masking, held against loops written from the published algorithm and against every adversary of a label table.

f(i, j) is a table [M, M] of labels. An adversary at a place that the masks S hide writes what he likes into every entry without a
mask of S, and nothing into the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain, combinations, product

import pytest
import torch
from torch import Tensor

from patchcert_cli.certifiers.masks import double_masking
from patchcert_cli.certifiers.masks.double_masking import Proof, Table, answer, prove
from patchcert_cli.certifiers.masks.masked_predictions import MaskedPredictions

TOLERANCE = 0.125
Labels = list[list[int]]


def slow_answer(f: Labels) -> int:
    """Algorithm 1 of the paper, with ties to the lowest class."""
    masks = range(len(f))
    votes = Counter(f[i][i] for i in masks)
    if len(votes) == 1:
        return f[0][0]
    majority = min(votes, key=lambda label: (-votes[label], label))
    for i in masks:
        if f[i][i] != majority and all(f[i][j] == f[i][i] for j in masks):
            return f[i][i]
    return majority


def slow_condition(right: list[list[bool]], sets: list[set[int]]) -> bool:
    """For each set of masks some mask of it has a whole row."""
    return all(any(all(right[i]) for i in one) for one in sets)


def table(labels: Tensor, logit_margins: Tensor | None = None, *, classes: int = 3) -> Table:
    """A table [B, M, M] that is told entry by entry, and no entry twice."""
    logit_margins = torch.full(labels.shape, 0.5) if logit_margins is None else logit_margins
    seen = torch.zeros(labels.shape, dtype=torch.bool)

    def ask(image: Tensor, first: Tensor, second: Tensor) -> MaskedPredictions:
        codes = (image * labels.shape[1] + torch.minimum(first, second)) * labels.shape[1] + torch.maximum(first, second)
        assert len(codes.unique()) == len(codes), "asked twice at once"
        assert not bool(seen[image, first, second].any()), "asked twice"
        seen[image, first, second] = seen[image, second, first] = True
        label = labels[image, first, second]
        return MaskedPredictions(label, (label + 1) % classes, logit_margins[image, first, second].double())

    return Table(ask, len(labels), labels.shape[1])


def symmetric(entries: Tensor, masks: int) -> Tensor:
    """[B, M (M + 1) / 2] -> [B, M, M]."""
    rows, columns = torch.triu_indices(masks, masks)
    found = torch.zeros(len(entries), masks, masks, dtype=entries.dtype)
    found[:, rows, columns] = found[:, columns, rows] = entries
    return found


def every_table(masks: int, classes: int) -> Tensor:
    """All labellings: int64 [B, M, M]."""
    entries = masks * (masks + 1) // 2
    return symmetric(torch.tensor(list(product(range(classes), repeat=entries))), masks)


def subsets(masks: int) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(range(masks), size) for size in range(1, masks + 1)))


def matrix(sets: list[set[int]], masks: int) -> Tensor:
    return torch.tensor([[i in one for i in range(masks)] for one in sets])


def random_tables(generator: torch.Generator, count: int, masks: int, *, agree: float) -> tuple[Tensor, Tensor]:
    """Tables in which an entry is class 1 with probability ``agree``, and logit margins, some of them below the tolerance."""
    entries = masks * (masks + 1) // 2
    labels = torch.where(
        torch.rand(count, entries, generator=generator) < agree, 1, torch.randint(3, (count, entries), generator=generator)
    )
    logit_margins = torch.rand(count, entries, generator=generator).clamp(min=0.01) ** 0.5
    return symmetric(labels, masks), symmetric(logit_margins, masks)


@pytest.mark.parametrize(("masks", "classes"), [(1, 3), (2, 3), (3, 3), (4, 2)])
def test_the_answer_is_the_published_one_on_every_table(masks: int, classes: int) -> None:
    labels = every_table(masks, classes)
    assert answer(table(labels), classes).tolist() == [slow_answer(f) for f in labels.tolist()]


def broken_by(
    masks: int, classes: int, decide: Callable[[Tensor, Tensor, Tensor], Tensor], respond: Callable[[Tensor], Tensor]
) -> int:
    """How many (table, set of masks) are certified by ``decide`` although some adversary alters what ``respond`` answers.

    All adversaries: tables that agree wherever a mask of the set is involved are each other's attacks.
    """
    labels = every_table(masks, classes)
    answers, wrong = respond(labels), 0
    rows, columns = torch.triu_indices(masks, masks)
    codes = classes ** torch.arange(len(rows))
    for one in subsets(masks):
        fixed = torch.tensor([int(i) in one or int(j) in one for i, j in zip(rows, columns, strict=True)])
        group = (labels[:, rows, columns] * codes * fixed).sum(dim=1)
        lowest, highest = (torch.zeros(int(group.max()) + 1, dtype=torch.int64) for _ in range(2))
        lowest = lowest.scatter_reduce(0, group, answers, "amin", include_self=False)
        highest = highest.scatter_reduce(0, group, answers, "amax", include_self=False)
        moved = lowest[group] != highest[group]
        wrong += int((decide(labels, answers, matrix([set(one)], masks)) & moved).sum())
    return wrong


def published(labels: Tensor) -> Tensor:
    return answer(table(labels), 3)


def certified(labels: Tensor, answers: Tensor, by: Tensor) -> Tensor:
    return prove(table(labels), answers, by, TOLERANCE).certified


@pytest.mark.parametrize(("masks", "classes"), [(2, 3), (3, 3), (4, 2)])
def test_no_adversary_alters_a_certified_answer(masks: int, classes: int) -> None:
    labels = every_table(masks, classes)
    proven = certified(labels, published(labels), matrix([{0}], masks))
    assert 0 < int(proven.sum()) < len(labels)
    assert broken_by(masks, classes, certified, published) == 0


def test_the_condition_asks_for_no_more_than_it_must() -> None:
    """With one location and one mask over it there is an adversary wherever the row is not whole, on some table of its labels."""
    labels = every_table(3, 3)
    answers = published(labels)
    whole = (labels[:, 0] == answers[:, None]).all(dim=1)
    assert torch.equal(certified(labels, answers, matrix([{0}], 3)), whole)
    strict = certified(labels, answers, torch.eye(3, dtype=torch.bool))
    assert bool((strict <= whole).all()) and int(strict.sum()) < int(whole.sum())


def rows_of_half(labels: Tensor, answers: Tensor, by: Tensor) -> Tensor:
    """Wrong: a row needs to be whole only where it meets masks over the location."""
    right = (labels == answers[:, None, None]) | ~by[0][None, None, :]
    return (right.all(dim=2) & by[0]).any(dim=1)


def one_per_column(labels: Tensor, answers: Tensor, by: Tensor) -> Tensor:
    """Wrong, the other axis: for every mask some mask over the location with which it is right."""
    right = labels == answers[:, None, None]
    return (right & by[0][None, :, None]).any(dim=1).all(dim=1)


def one_mask_only(labels: Tensor, answers: Tensor, by: Tensor) -> Tensor:
    """Wrong: round one is enough."""
    return (labels.diagonal(dim1=1, dim2=2) == answers[:, None]).all(dim=1)


def other_location(labels: Tensor, answers: Tensor, by: Tensor) -> Tensor:
    """Wrong: a whole row of any mask, wherever it lies."""
    return certified(labels, answers, torch.ones_like(by))


@pytest.mark.parametrize("decide", [rows_of_half, one_per_column, one_mask_only, other_location])
def test_wrong_conditions_are_caught(decide: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    assert broken_by(3, 3, decide, published) > 0


def test_answers_other_than_the_published_one_are_caught() -> None:
    """The theorem is about this very rule: an unmasked prediction that is trusted, or a second round left out, breaks it."""

    def majority_only(labels: Tensor) -> Tensor:
        one = labels.diagonal(dim1=1, dim2=2)
        return torch.stack([(one == label).sum(dim=1) for label in range(3)], dim=1).argmax(dim=1)

    def last_disagreer(labels: Tensor) -> Tensor:
        """Wrong: a disagreer is believed without his row."""
        majority = majority_only(labels)
        one = labels.diagonal(dim1=1, dim2=2)
        differs = one != majority[:, None]
        return torch.where(differs.any(dim=1), one.gather(1, differs.int().argmax(dim=1, keepdim=True))[:, 0], majority)

    for respond in (majority_only, last_disagreer):
        assert broken_by(3, 3, certified, respond) > 0


@pytest.mark.parametrize("masks", [3, 6, 9])
def test_proofs_equal_loops_on_random_tables_and_sets(masks: int) -> None:
    generator = torch.Generator().manual_seed(masks)
    found = 0
    for agree in (0.5, 0.9, 0.98):
        labels, logit_margins = random_tables(generator, 60, masks, agree=agree)
        for _ in range(4):
            sets = [set(row.nonzero()[:, 0].tolist()) or {0} for row in torch.rand(4, masks, generator=generator) < 0.4]
            by, known = matrix(sets, masks), table(labels, logit_margins)
            answers = answer(known, 3)
            assert answers.tolist() == [slow_answer(f) for f in labels.tolist()]
            proof = prove(known, answers, by, TOLERANCE)
            right = (labels == answers[:, None, None]) & (logit_margins > TOLERANCE)
            expected = [slow_condition(one, sets) for one in right.tolist()]
            assert proof.certified.tolist() == expected
            assert torch.equal(proof.certified, proof.margin > TOLERANCE)
            found += sum(expected)
            check_told(proof, labels, logit_margins, answers, by)
            assert bool((known.passes <= masks * (masks + 1) // 2).all())
    assert found > 20


def check_told(proof: Proof, labels: Tensor, logit_margins: Tensor, answers: Tensor, by: Tensor) -> None:
    """Margins of certified images come from rows that are whole, and the rival is another class."""
    signed = torch.where(labels == answers[:, None, None], logit_margins, -logit_margins)
    best = torch.where(by, signed.amin(dim=2)[:, None, :], -torch.inf).amax(dim=2)  # [B, U]
    sure = proof.certified
    assert bool((proof.margin[sure] <= best.amin(dim=1)[sure].double() + 1e-6).all())
    assert bool((proof.rival != answers).all())
    at = torch.arange(len(labels))[~sure]
    assert bool((best[at, proof.weakest[~sure]] <= TOLERANCE).all()), "the set that is named has no whole row"


def test_overlapping_masks_certify_more_than_the_published_condition_and_never_less() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, logit_margins = random_tables(generator, 400, 4, agree=0.75)
    logit_margins += TOLERANCE
    by = matrix([{0, 1}, {2, 3}], 4)
    answers = published(labels)
    rows, pairs = (
        prove(table(labels, logit_margins), answers, sets, TOLERANCE).certified for sets in (by, torch.eye(4, dtype=torch.bool))
    )
    assert bool((pairs <= rows).all())
    assert int(rows.sum()) > 2 * int(pairs.sum()) > 0


def test_what_one_claim_asked_is_known_to_the_next_and_images_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(1)
    labels, logit_margins = random_tables(generator, 50, 8, agree=0.97)
    sets, all_ = matrix([{0, 1}, {2, 3, 4}, {5}, {6, 7}], 8), torch.eye(8, dtype=torch.bool)
    together = table(labels, logit_margins)
    answers = answer(together, 3)
    seen = together.label >= 0
    proofs = [prove(together, answers, by, TOLERANCE, seen) for by in (sets, all_, sets)]
    asked = together.passes.clone()
    assert torch.equal(proofs[0].margin, proofs[2].margin), "another claim changed what this one rests on"
    assert torch.equal(proofs[0].weakest, proofs[2].weakest)
    prove(together, answers, all_, TOLERANCE, seen)
    assert torch.equal(together.passes, asked)
    for at in range(50):
        alone = table(labels[at : at + 1], logit_margins[at : at + 1])
        assert int(answer(alone, 3)) == int(answers[at])
        known = alone.label >= 0
        single = [prove(alone, answers[at : at + 1], by, TOLERANCE, known) for by in (sets, all_)]
        for one, many in zip(single, proofs, strict=False):
            assert bool(one.certified) == bool(many.certified[at]) and float(one.margin) == float(many.margin[at])
            assert int(one.weakest) == int(many.weakest[at]) and int(one.rival) == int(many.rival[at])
        assert int(alone.passes) == int(together.passes[at])


def test_failures_are_found_early_and_few_rows_are_asked_for() -> None:
    """Masks that are in doubt alone are in doubt together; where all is well, overlapping masks need not all be asked."""
    masks = 25
    doubt = torch.rand(40, masks, generator=torch.Generator().manual_seed(2))
    doubt[:, 3] = 0.01
    logit_margins = doubt[:, :, None] + doubt[:, None, :]
    labels = torch.ones(40, masks, masks, dtype=torch.int64)
    labels[:20] = torch.where(logit_margins[:20] > 0.05, 1, 2)
    labels[:20, 3, 3] = 1
    labels[:20, 3, 7] = labels[:20, 7, 3] = 2  # one pair that is wrong, and in doubt
    logit_margins[:20, 3, 7] = logit_margins[:20, 7, 3] = 0.2
    all_ = torch.eye(masks, dtype=torch.bool)
    known = table(labels, logit_margins)
    answers = answer(known, 3)
    assert answers.tolist() == [1] * 40
    proof = prove(known, answers, all_, 0.001)
    assert proof.certified.tolist() == [False] * 20 + [True] * 20
    assert bool((known.passes[20:] == masks * (masks + 1) // 2).all())
    assert float(known.passes[:20].float().mean()) < 0.5 * masks * (masks + 1) // 2
    sets = matrix([{i, i + 1, i + 2, i + 3, i + 4} for i in range(0, masks, 5)], masks)
    fewer = table(labels, logit_margins)
    prove(fewer, answer(fewer, 3), sets, 0.001)
    five_rows = 5 * masks - 5 * 4 // 2 + (masks - 5)  # their pairs, and what is left of round one
    assert bool((fewer.passes[20:] <= five_rows).all())


@pytest.mark.parametrize("logit_margin", [0.0, TOLERANCE])
def test_a_label_that_rounding_may_decide_counts_as_wrong(logit_margin: float) -> None:
    labels, logit_margins = torch.ones(3, 4, 4, dtype=torch.int64), torch.full((3, 4, 4), 0.5)
    logit_margins[1, 2, 2] = logit_margins[2, 0, 1] = logit_margins[2, 1, 0] = logit_margin
    proof = prove(table(labels, logit_margins), torch.ones(3, dtype=torch.int64), torch.eye(4, dtype=torch.bool), TOLERANCE)
    assert proof.certified.tolist() == [True, False, False]
    assert proof.margin.tolist() == [0.5, logit_margin, logit_margin]
    loose = prove(table(labels, logit_margins), torch.ones(3, dtype=torch.int64), matrix([{3}], 4), TOLERANCE)
    assert loose.certified.tolist() == [True, True, True]


def test_whole_rows_of_every_mask() -> None:
    labels, logit_margins = random_tables(torch.Generator().manual_seed(3), 30, 5, agree=0.8)
    known = table(labels, logit_margins)
    answers = answer(known, 3)
    least = double_masking.lowest(known, answers)
    for b, i in product(range(30), range(5)):
        signed = [float(logit_margins[b, i, j]) * (1 if labels[b, i, j] == answers[b] else -1) for j in range(5)]
        assert float(least[b, i]) == pytest.approx(min(signed))
    assert known.passes.tolist() == [15] * 30


def test_no_images() -> None:
    known = table(torch.zeros(0, 4, 4, dtype=torch.int64))
    answers = answer(known, 3)
    assert answers.shape == (0,)
    assert prove(known, answers, torch.eye(4, dtype=torch.bool), TOLERANCE).margin.shape == (0,)


def test_passes_and_margins_of_an_image_do_not_depend_on_the_others() -> None:
    """Labels of few kinds, so that round two is long for some images and short for others."""
    generator = torch.Generator().manual_seed(0)
    masks, count = 24, 60
    kinds = torch.randint(3, (count, masks * (masks + 1) // 2), generator=generator)
    rare = torch.rand(kinds.shape, generator=generator) < torch.rand(count, 1, generator=generator) * 0.1
    labels, by = symmetric(torch.where(rare, kinds, 0), masks), torch.eye(masks, dtype=torch.bool)
    logit_margins = symmetric(torch.rand(kinds.shape, generator=generator), masks)

    def told(labels: Tensor, logit_margins: Tensor) -> tuple[list[int], ...]:
        asked = table(labels, logit_margins)
        found = answer(asked, 3)
        proof = prove(asked, found, by, 0.0, asked.label >= 0)
        kept = (found, asked.passes, proof.certified, proof.margin, proof.weakest, proof.rival)
        return tuple(one.tolist() for one in kept)

    together = told(labels, logit_margins)
    alone = [told(labels[at : at + 1], logit_margins[at : at + 1]) for at in range(count)]
    assert [list(column) for column in together] == [[one[0] for one in column] for column in zip(*alone, strict=True)]
    assert len(set(together[1])) > 5


def test_many_rows_that_fail_one_after_the_other_come_to_an_end() -> None:
    """The number of pairs doubled with each row once, overflowed after 60 of them, and then nothing was evaluated anymore."""
    masks = 150
    half, at = masks // 2 + 1, torch.arange(masks // 2 - 1)
    labels = torch.ones(1, masks, masks, dtype=torch.int64)
    labels[0, :half, :half] = 0  # the majority; each other row has its only fault under a mask of its own
    labels[0, half + at, at] = labels[0, at, half + at] = 0
    assert answer(table(labels), 3).tolist() == [slow_answer(labels[0].tolist())] == [0]
    faulty, at = torch.zeros(1, masks, masks, dtype=torch.int64), torch.arange(masks // 2)
    faulty[0, at, at + masks // 2] = faulty[0, at + masks // 2, at] = 1  # two rows at a time
    known, by = table(faulty), torch.ones(1, masks, dtype=torch.bool)  # any whole row would do
    proof = prove(known, answer(known, 3), by, TOLERANCE)
    assert proof.certified.tolist() == [slow_condition((faulty[0] == 0).tolist(), [set(range(masks))])] == [False]
