"""The proof about voting cells: against the theorem's loops, and exactly what an enemy who tries everything cannot break."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from patchcert_cli.certifiers.cells import additive
from patchcert_cli.certifiers.cells.additive import METHODS, Aggregate, Proof, Votes, prove, prove_aggregate
from patchcert_cli.certifiers.geometry import Axis, CellCoverage

from . import ballots
from .ballot_breaks import BREAKS, SPARSE_BREAKS
from .ballots import Ballots, Line

SLIDING = [
    (Line(4, 1, 2), Line(4, 1, 2)),  # 3x3 cells, a pixel reaches 1 to 4 of them
    (Line(3, 1, 1), Line(4, 2, 2)),
    (Line(5, 2, 2), Line(3, 1, 1)),
    (Line(4, 2, 1), Line(3, 1, 1)),
    (Line(5, 1, 3, 2, 1), Line(5, 2, 1, 2)),  # strides, padding, patches between cells
    (Line(7, 2, 3, 2), Line(4, 1, 1, 3)),
    (Line(2, 2, 1), Line(5, 1, 1)),
    (Line(3, 3, 3), Line(5, 1, 1)),
    (Line(4, 1, 1), Line(4, 1, 1)),
    (Line(9, 1, 1), Line(1, 1, 1)),
    (Line(2, 2, 2, 1, 1), Line(4, 2, 3)),
]
BANDS = [
    (Line(5, 1, 2, wraps=True), Line(1, 1, 1)),
    (Line(6, 2, 1, wraps=True), Line(2, 1, 1, wraps=True)),
    (Line(4, 1, 1, wraps=True), Line(4, 1, 2, 2, wraps=True)),
    (Line(7, 1, 3, 2, wraps=True), Line(3, 1, 1)),  # the stride does not divide the length
    (Line(8, 1, 2, 3, wraps=True), Line(3, 1, 1, wraps=True)),
]


@cache
def some_ballots(kind: str) -> list[Ballots]:
    """A few dozen geometries with many images each: ``free``, ``one`` class per cell, or ``weighted``."""
    drawn = []
    for at, ((rows, columns), classes) in enumerate(product([*SLIDING, *BANDS], (2, 3))):
        options: dict[str, Any] = {"classes": classes, "count": 45, "seed": at, "one": kind == "one"}
        if kind == "weighted":
            options |= {"heaviest": 3 if classes == 2 else 2}
        drawn.append(ballots.draw(rows, columns, **options))
    return drawn


def votes(given: Ballots) -> Votes:
    return Votes(given.scores, given.unknown, given.weight)


@dataclass
class Verdicts:
    """How a proof compares with the enemy."""

    unsound: list[str] = field(default_factory=list)
    lazy: list[str] = field(default_factory=list)
    certified: int = 0
    broken: int = 0


@cache
def _truth(kind: str, at: int) -> tuple[bool, ...]:
    given = some_ballots(kind)[at]
    return tuple(ballots.breakable(given, index) for index in range(len(given.scores)))


def compare(
    kinds: tuple[str, ...] = ("free", "one", "weighted"), method: str = "exact", *, until_found: bool = False
) -> Verdicts:
    found = Verdicts()
    for kind in kinds:
        for at, given in enumerate(some_ballots(kind)):
            broken, certified = _truth(kind, at), (additive.prove(votes(given), given.cover(), method).margin > 0).tolist()
            for index, (bad, good) in enumerate(zip(broken, certified, strict=True)):
                if bad == good:
                    (found.unsound if bad else found.lazy).append(f"{kind} {given.rows} {given.columns} image {index}")
            found.certified += sum(certified)
            found.broken += sum(broken)
            if until_found and found.unsound:
                return found
    return found


@pytest.mark.parametrize("kind", ["free", "one", "weighted"])
def test_certified_if_and_only_if_no_attack_exists(kind: str) -> None:
    found = compare((kind,))
    assert (found.unsound, found.lazy) == ([], [])
    assert found.certified >= 300
    assert found.broken >= 300


def test_the_enemy_tries_every_replacement() -> None:
    """Its sums per class are those of all replacements, written out one by one."""
    for one, weights in product((False, True), ((1, 1, 1), (2, 0, 1), (3,))):
        written = set()
        for values in product(*(range(weight + 1) for weight in weights for _ in range(2))):
            cells = list(zip(values[::2], values[1::2], strict=True))
            if not one or all(sorted(cell) == [0, weight] for cell, weight in zip(cells, weights, strict=True)):
                written.add((sum(cell[0] for cell in cells), sum(cell[1] for cell in cells)))
        assert {tuple(row) for row in ballots.replacements(weights, 2, one).tolist()} == written


@pytest.mark.parametrize("kind", ["free", "weighted"])
def test_margins_are_those_of_the_theorem(kind: str) -> None:
    """The margin, a location and a rival that attain it, and the map of all locations, against loops."""
    ties = 0
    for given in some_ballots(kind):
        proof, chart = prove(votes(given), given.cover()), additive.margin_map(votes(given), given.cover())
        plain = prove(votes(given), given.cover(), "3.2")
        assert torch.equal(proof.margin, chart.flatten(1).amin(dim=1))
        assert torch.equal(votes(given).sums(), given.scores.sum(dim=(2, 3)))
        assert proof.answer.tolist() == [ballots.answer(total) for total in given.scores.sum(dim=(2, 3)).tolist()]
        assert torch.equal(proof.answer, votes(given).answer())
        for index in range(len(given.scores)):
            slow = ballots.margins(given, index)
            assert chart[index].flatten().tolist() == [min(of.values()) for of in slow]
            assert slow[int(proof.worst[index])][int(proof.rival[index])] == float(proof.margin[index])
            dropped = ballots.margins(given, index, credit=False)
            assert min(min(of.values()) for of in dropped) == float(plain.margin[index])
            assert dropped[int(plain.worst[index])][int(plain.rival[index])] == float(plain.margin[index])
            ties += bool(proof.margin[index] > 0 >= plain.margin[index])
    assert ties >= 20, "the tie's credit never decided"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float32, torch.float64])
def test_the_type_of_the_scores_does_not_matter(dtype: torch.dtype) -> None:
    given = some_ballots("free")[1]
    for method in METHODS:
        expected = prove(votes(given), given.cover(), method)
        assert_same(prove(Votes(given.scores.to(dtype)), given.cover(), method), expected)


def assert_same(one: Proof, other: Proof) -> None:
    assert torch.equal(one.answer, other.answer)
    assert torch.equal(one.margin, other.margin)
    assert torch.equal(one.worst, other.worst)
    assert torch.equal(one.rival, other.rival)


@pytest.mark.parametrize("kind", ["free", "one", "weighted"])
def test_published_conditions_imply_each_other(kind: str) -> None:
    certified = dict.fromkeys(METHODS, 0)
    for given in some_ballots(kind):
        proofs = {method: prove(votes(given), given.cover(), method) for method in METHODS}
        yes = {method: proof.margin > 0 for method, proof in proofs.items()}
        assert torch.equal(yes["3.1"], yes["3.2"])
        assert torch.equal(proofs["3.1"].margin, proofs["3.2"].margin)
        assert not bool((yes["3.3"] & ~yes["3.2"]).any())
        assert not bool((yes["3.2"] & ~yes["exact"]).any())
        gained = proofs["exact"].margin - proofs["3.2"].margin
        assert bool(((gained == 0) | (gained == 1)).all())
        assert bool((proofs["3.2"].margin[yes["exact"] & ~yes["3.2"]] == 0).all()), "more than the tie's credit"
        for method in METHODS:
            certified[method] += int(yes[method].sum())
    assert certified["3.3"] < certified["3.2"] < certified["exact"]
    assert certified["3.3"] > 50


def test_conditions_on_larger_maps() -> None:
    line = Line(14, 3, 3)
    given = ballots.draw(line, Line(12, 2, 4), classes=5, count=400, seed=0)
    counts = [int((prove(votes(given), given.cover(), method).margin > 0).sum()) for method in ("3.3", "3.2", "exact")]
    assert counts == sorted(counts)
    assert 20 < counts[0] < counts[1] <= counts[2] < 380


LEARNED = torch.tensor([[2, 0, 1], [1, 3, 1]], dtype=torch.float64)
AGGREGATES: dict[str, Aggregate] = {
    "sum": lambda scores: scores.sum(dim=(-1, -2)),
    "learned": lambda scores: (scores * LEARNED).sum(dim=(-1, -2)),
    "maximum": lambda scores: scores.amax(dim=(-1, -2)),
    "median": lambda scores: scores.flatten(-2).median(dim=-1).values,
    "rows": lambda scores: scores.sum(dim=-1).amin(dim=-1),
}


@pytest.mark.parametrize("name", AGGREGATES)
@pytest.mark.parametrize("heaviest", [0, 2])
def test_any_monotone_aggregate(name: str, heaviest: int) -> None:
    """Condition 3.1 holds iff no replacement brings a rival level; all replacements of 2x3 cells, one by one."""
    aggregate, certified, broken = AGGREGATES[name], 0, 0
    for seed, columns in enumerate((Line(3, 1, 1), Line(4, 1, 2), Line(4, 2, 2, 1))):
        given = ballots.draw(Line(2, 1, 1), columns, classes=3 if heaviest == 0 else 2, count=40, seed=seed, heaviest=heaviest)
        proof = prove_aggregate(votes(given), given.cover(), aggregate)
        total = aggregate(given.scores.double())
        weight = torch.tensor(given.weights())
        for index, scores in enumerate(given.scores.double()):
            y = ballots.answer(total[index].tolist())
            smallest = []
            for cells in given.locations():
                where = [(c, row, column) for row, column in sorted(cells) for c in range(len(scores))]
                options = [range(int(weight[row, column]) + 1) for _, row, column in where]
                tried = torch.cartesian_prod(*(torch.tensor(list(o), dtype=torch.float64) for o in options)).reshape(
                    -1, len(where)
                )
                attacked = scores.expand(len(tried), *scores.shape).clone()
                for at, (c, row, column) in enumerate(where):
                    attacked[:, c, row, column] = tried[:, at]
                after = aggregate(attacked)  # [T, K]
                gaps = torch.cat([after[:, [y]] - after[:, :y], after[:, [y]] - after[:, y + 1 :]], dim=1)
                smallest.append(float(gaps.min()))
            assert float(proof.margin[index]) == min(smallest)
            assert smallest[int(proof.worst[index])] == min(smallest)
            certified, broken = certified + (min(smallest) > 0), broken + (min(smallest) <= 0)
    assert broken >= 10
    assert certified >= (10 if name in ("sum", "learned") else 0)  # a few cells may hold what the others need


def test_condition_3_1_is_for_one_location() -> None:
    given = some_ballots("free")[0]
    with pytest.raises(ValueError, match="one location"):
        prove(votes(given), given.cover(2), "3.1")


@pytest.mark.parametrize("budget", [2, 3, 50])  # 50: more than there are locations, the attacker has everything
def test_several_locations_are_certified_soundly(budget: int) -> None:
    certified, broken = dict.fromkeys(("exact", "3.2", "3.3"), 0), 0
    lines = [(Line(9, 1, 1), Line(1, 1, 1)), (Line(4, 1, 2), Line(3, 1, 1)), (Line(10, 1, 1, wraps=True), Line(1, 1, 1))]
    lines += [(Line(9, 1, 2), Line(2, 1, 1)), (Line(16, 1, 1, 2), Line(2, 1, 1))]
    for seed, (rows, columns) in enumerate(lines):
        given = ballots.draw(rows, columns, classes=2, count=40, seed=seed, heaviest=seed % 2)
        truth = [ballots.breakable(given, index, budget) for index in range(len(given.scores))]
        broken += sum(truth)
        for method in certified:
            yes = (prove(votes(given), given.cover(budget), method).margin > 0).tolist()
            assert not [index for index, (good, bad) in enumerate(zip(yes, truth, strict=True)) if good and bad]
            certified[method] += sum(yes)
    assert broken >= 30
    assert certified["exact"] >= certified["3.2"] >= certified["3.3"] >= {2: 15, 3: 4, 50: 0}[budget]


def test_a_budget_of_one_is_one_patch_and_more_are_never_easier() -> None:
    for rows, columns in ((Line(4, 1, 2), Line(4, 1, 2)), (Line(6, 1, 3, 2), Line(5, 1, 2, 3, wraps=True))):
        given = ballots.draw(rows, columns, classes=3, count=50, seed=3)
        for method in ("exact", "3.2", "3.3"):
            proofs = [prove(votes(given), given.cover(budget), method) for budget in range(1, 6)]
            assert_same(proofs[0], prove(votes(given), given.cover(), method))
            lower = [bool((few.margin >= many.margin).all()) for few, many in pairwise(proofs)]
            assert all(lower)


@pytest.mark.parametrize(("classes", "heaviest"), [(2, 0), (3, 0), (2, 2)])
def test_unknown_scores_are_the_attackers_everywhere(classes: int, heaviest: int) -> None:
    """Certified iff no setting of the unknown scores and no attack gives another answer; the published conditions are sound."""
    certified = broken = doubtful = 0
    for seed, (rows, columns) in enumerate([*SLIDING[:9], *BANDS[:4]]):
        given = ballots.draw(rows, columns, classes=classes, count=25, seed=seed, heaviest=heaviest, doubts=2)
        yes = {method: (prove(votes(given), given.cover(), method).margin > 0).tolist() for method in METHODS}
        truth = [ballots.breakable(given, index) for index in range(len(given.scores))]
        assert yes["exact"] == [not bad for bad in truth]
        for method in METHODS:
            assert not any(good and bad for good, bad in zip(yes[method], truth, strict=True)), method
        known = (prove(votes(replace(given, unknown=None)), given.cover()).margin > 0).tolist()
        doubtful += sum(without and not within for without, within in zip(known, yes["exact"], strict=True))
        certified, broken = certified + sum(yes["exact"]), broken + sum(truth)
    assert certified >= 30
    assert broken >= 30
    assert doubtful >= 5, "no doubt ever mattered"


def test_nothing_unknown_is_the_same_as_no_mask() -> None:
    given = some_ballots("weighted")[2]
    masked = Votes(given.scores, torch.zeros_like(given.scores, dtype=torch.bool), given.weight)
    assert_same(prove(masked, given.cover()), prove(votes(given), given.cover()))


def larger() -> list[tuple[Votes, CellCoverage]]:
    """Maps of some size, so that sums run long; one with gaps between touched cells and starts that touch nothing."""
    found = []
    for rows, columns in [(Line(30, 5, 4), Line(26, 3, 7)), (Line(20, 1, 2, 3), Line(31, 4, 6, 2, wraps=True))]:
        for heaviest in (0, 9):
            given = ballots.draw(rows, columns, classes=4, count=4, seed=1, heaviest=heaviest, doubts=3)
            found.append((votes(given), given.cover()))
            found.append((votes(given), given.cover(3)))
    return found


@pytest.mark.parametrize(("name", "value"), [("CHUNK", 1), ("CHUNK", 5000), ("DENSE", 0), ("DENSE", 10**9)])
def test_chunks_and_summation_change_nothing(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def proofs() -> list[Proof]:
        return [
            prove(given, cover, method)
            for (given, cover), method in product(larger(), METHODS)
            if method != "3.1" or cover.budget == 1
        ]

    def charts() -> list[Tensor]:
        return [additive.margin_map(given, cover) for given, cover in larger()]

    before, maps = proofs(), charts()
    monkeypatch.setattr(additive, name, value)
    for one, other in zip(proofs(), before, strict=True):
        assert_same(one, other)
    assert all(torch.equal(one, other) for one, other in zip(charts(), maps, strict=True))


def test_box_sums_equal_loops() -> None:
    for rows, columns in [*SLIDING, *BANDS, (Line(20, 1, 2, 3), Line(4, 1, 1, 3))]:
        given = ballots.draw(rows, columns, classes=2, count=3, seed=0, heaviest=3)
        found = additive.location_sums(given.scores.float(), rows.axis(), columns.axis()).flatten(2)
        for location, cells in enumerate(given.locations()):
            slow = sum((given.scores[:, :, row, column] for row, column in cells), torch.zeros(3, 2))
            assert torch.equal(found[:, :, location], slow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_around_the_proof_changes_nothing(dtype: torch.dtype) -> None:
    """Autocast would multiply sums by the 0/1 matrix in 8 bits."""
    given = ballots.draw(Line(40, 20, 3), Line(40, 22, 3), classes=3, count=6, seed=0)
    expected, chart = prove(votes(given), given.cover()), additive.margin_map(votes(given), given.cover())
    with torch.autocast("cpu", dtype=dtype):
        assert_same(prove(votes(given), given.cover()), expected)
        assert torch.equal(additive.margin_map(votes(given), given.cover()), chart)


@pytest.mark.parametrize("method", METHODS)
def test_a_patch_as_large_as_the_image_certifies_nothing(method: str) -> None:
    for seen in (1, 2, 5):
        given = ballots.draw(Line(5, 5, seen), Line(5, 5, seen), classes=3, count=30, seed=0)
        proof = prove(votes(given), given.cover(), method)
        assert int((proof.margin > 0).sum()) == 0
        assert bool((proof.worst == 0).all())
    whole = Votes(torch.ones(2, 3, 1, 1))
    assert int((prove(whole, CellCoverage(Axis.whole(5, 2), Axis.whole(5, 2)), method).margin > 0).sum()) == 0


@pytest.mark.parametrize("method", METHODS)
def test_no_images(method: str) -> None:
    proof = prove(Votes(torch.zeros(0, 3, 3, 3)), CellCoverage(Line(4, 1, 2).axis(), Line(4, 1, 2).axis()), method)
    assert proof.answer.shape == proof.margin.shape == proof.worst.shape == proof.rival.shape == (0,)
    assert proof.margin.dtype == torch.float64


def test_cells_without_weight_decide_nothing() -> None:
    """With no weight anywhere the answer is class 0 whatever happens, which is certified."""
    empty = Votes(torch.zeros(2, 3, 2, 2), weight=torch.zeros(2, 2))
    proof = prove(empty, CellCoverage(Line(2, 2, 1).axis(), Line(2, 2, 1).axis()))
    assert proof.margin.tolist() == [1, 1]


def test_sums_beyond_float32_are_refused() -> None:
    heavy = Votes(torch.zeros(1, 2, 2, 2), weight=torch.full((2, 2), 2**22))
    with pytest.raises(ValueError, match="too large"):
        prove(heavy, CellCoverage(Line(2, 1, 1).axis(), Line(2, 1, 1).axis()))


@pytest.mark.parametrize("name", BREAKS)
def test_broken_proofs_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, method = BREAKS[name]
    assert compare(method=method).unsound == []
    apply(monkeypatch)
    assert compare(method=method, until_found=True).unsound != []


@pytest.mark.parametrize("name", SPARSE_BREAKS)
def test_broken_budgets_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ballots.draw(Line(9, 1, 1), Line(1, 1, 1), classes=2, count=60, seed=0)
    broken = [ballots.breakable(given, index, 2) for index in range(60)]

    def unsound() -> bool:
        yes = (additive.prove(votes(given), given.cover(2)).margin > 0).tolist()
        return any(good and bad for good, bad in zip(yes, broken, strict=True))

    assert not unsound()
    SPARSE_BREAKS[name](monkeypatch)
    assert unsound()


def test_votes_of_one_class() -> None:
    given = some_ballots("weighted")[1]
    label = torch.arange(len(given.scores)) % 3
    own = Votes(given.scores, given.scores > 0, given.weight).of(label)
    assert torch.equal(own.scores[:, 0], torch.stack([scores[c] for scores, c in zip(given.scores, label, strict=True)]))
    assert own.unknown is not None and torch.equal(own.unknown, own.scores > 0)
    assert own.weight is given.weight and votes(given).of(label).unknown is None
