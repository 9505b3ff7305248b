"""Mask sets, held against loops over every location, in sets of pixels; and sets that are wrong in one known way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations_with_replacement, product

import pytest
import torch
from torch import nn

from patchcert_cli.certifiers.masks import mask_sets
from patchcert_cli.certifiers.masks.mask_sets import MaskCoverage, MaskSet, MaskSpec, axis_masks
from patchcert_cli.defenses.patchcleanser import PatchCleanser
from patchcert_cli.errors import IntegrityError, UnsupportedThreat, UsageError
from patchcert_cli.threats import Threat, parse_threat

Pixels = set[tuple[int, int]]


def pixels(top: int, left: int, rows: int, columns: int) -> Pixels:
    return {(top + i, left + j) for i in range(rows) for j in range(columns)}


def occluded(made: MaskSet) -> list[Pixels]:
    return [set().union(*(pixels(*box) for box in union)) for union in made.boxes]


def places(threat: Threat, height: int, width: int) -> list[Pixels]:
    """Everything that the attacker may touch at once, in the order of the first location."""
    locations = [pixels(*location) for location in threat.locations(height, width).tolist()]
    return [set().union(*some) for some in combinations_with_replacement(locations, threat.budget)]


def covered(made: MaskSet, threat: Threat) -> bool:
    found = occluded(made)
    return all(any(place <= mask for mask in found) for place in places(threat, made.height, made.width))


LINES = [(n, p) for n in (1, 2, 5, 8, 13, 28, 32) for p in range(1, n + 1)]


def uncovered(build: Callable[..., tuple[int, list[int]]]) -> list[tuple[int, ...]]:
    """Every axis, patch, stride and widening for which some location lies behind no mask."""
    wrong = []
    for n, p in LINES:
        for stride, wider in product(range(1, n + 2), (0, 1, 3)):
            size, starts = build(n, p, stride=stride, wider=wider)
            assert all(start >= 0 and start + size <= n for start in starts)
            if not all(any(t <= a and a + p <= t + size for t in starts) for a in range(n - p + 1)):
                wrong.append((n, p, stride, wider))
    return wrong


def test_every_location_on_every_axis_lies_behind_a_mask() -> None:
    assert uncovered(axis_masks) == []


def test_masks_one_pixel_short_and_sets_without_the_last_mask_are_caught() -> None:
    def short(length: int, side: int, *, stride: int, wider: int = 0) -> tuple[int, list[int]]:
        size, starts = axis_masks(length, side, stride=stride, wider=wider)
        return max(size - 1, 1), starts

    def without_the_last(length: int, side: int, *, stride: int, wider: int = 0) -> tuple[int, list[int]]:
        size, _ = axis_masks(length, side, stride=stride, wider=wider)
        return size, list(range(0, length - size + 1, stride))

    assert len(uncovered(short)) > 100
    missing = uncovered(without_the_last)
    assert len(missing) > 100
    for n, p, stride, wider in missing:
        assert (n - min(p + stride - 1 + wider, n)) % stride != 0  # the only case in which a border mask is needed


def test_as_many_masks_as_said_and_no_smaller_stride_would_do() -> None:
    for n, p in LINES:
        for k in range(1, n + 1):
            stride = -(-(n - p + 1) // k)
            size, starts = axis_masks(n, p, stride=stride)
            assert len(starts) <= k
            assert starts[0] == 0 and starts[-1] + size == n
            if stride > 1:
                assert len(axis_masks(n, p, stride=stride - 1)[1]) > k


def test_published_numbers() -> None:
    assert axis_masks(224, 32, stride=33) == (64, [0, 33, 66, 99, 132, 160])
    made = MaskSpec(("patch:2%",)).masks(224, 224)
    assert (len(made), made.passes) == (36, 666)
    assert {box[2:] for union in made.boxes for box in union} == {(64, 64)}
    cifar = MaskSpec(("patch:5x5",)).masks(32, 32)
    assert (len(cifar), cifar.boxes[-1]) == (36, ((23, 23, 9, 9),))


PLANS = [
    MaskSpec(("patch:2x2",), per_axis=2),
    MaskSpec(("patch:2x2",), per_axis=3),
    MaskSpec(("patch:2x2",), stride=1),
    MaskSpec(("patch:1x3",), stride=1, wider=1),
    MaskSpec(("patch:3x1", "patch:1x3", "patch:2x2"), per_axis=3),
    MaskSpec(("patch:10%",), per_axis=3),
    MaskSpec(("patch:2x2",), passes=50),
    MaskSpec(("patches:2:1x2",), per_axis=2),
    MaskSpec(("sparse:2", "patch:2x2"), per_axis=3),
    MaskSpec(("patch:2x2",), per_axis=3, shape="column"),
    MaskSpec(("patch:1x3", "patch:2x2"), stride=1, shape="row"),
    MaskSpec(("patch:2x2",), passes=10, shape="column"),
    MaskSpec(("patches:2:1x2",), per_axis=4, shape="row"),
    MaskSpec(("patch:2x2",), passes=21, shape="any"),
]
THREATS = (
    "patch:1x1",
    "patch:2x2",
    "patch:1x3",
    "patch:3x1",
    "patch:2x3",
    "patch:10%",
    "patches:2:1x1",
    "patches:2:1x2",
    "sparse:2",
)


@pytest.mark.parametrize(
    "plan", PLANS, ids=lambda plan: "-".join(map(str, plan.covers)) + f"-{plan.per_axis}{plan.stride}{plan.passes}{plan.shape}"
)
@pytest.mark.parametrize("size", [(5, 5), (4, 6)], ids=str)
def test_covers_are_those_of_loops_over_places(plan: MaskSpec, size: tuple[int, int]) -> None:
    made = plan.masks(*size)
    found = occluded(made)
    assert [set(map(tuple, one.nonzero().tolist())) for one in made.occluded] == found
    assert all(covered(made, threat) for threat in plan.covers), "a plan covers what it says"
    for text in THREATS:
        threat = parse_threat(text)
        if not covered(made, threat):
            with pytest.raises(UnsupportedThreat, match=f"do not cover {threat}. Choose masks that do"):
                made.cover(threat)
            continue
        sets = {frozenset(i for i, mask in enumerate(found) if place <= mask) for place in places(threat, *size)}
        least = {one for one in sets if not any(other < one for other in sets)}
        cover = made.cover(threat)
        assert {frozenset(row.nonzero()[:, 0].tolist()) for row in cover.by} == least
        assert len(cover.by) == len(least)
        locations = [pixels(*location) for location in threat.locations(*size).tolist()]
        for row, location in zip(cover.by, cover.location.tolist(), strict=True):
            assert all(locations[location] <= found[i] for i in row.nonzero()[:, 0].tolist())
        if threat.budget == 1:
            behind = made.hides(threat)
            assert behind.tolist() == [[location <= mask for mask in found] for location in locations]


def test_a_set_that_lost_a_mask_or_a_row_of_pixels_covers_its_threat_no_more() -> None:
    made, threat = MaskSpec(("patch:2x2",), per_axis=3).masks(7, 7), parse_threat("patch:2x2")
    made.cover(threat)
    assert (len(made), made.boxes[-1]) == (9, ((4, 4, 3, 3),))
    for lost in range(len(made)):
        boxes = made.boxes[:lost] + made.boxes[lost + 1 :]
        with pytest.raises(UnsupportedThreat):
            replace(made, boxes=boxes).cover(threat)
        (top, left, rows, columns), others = made.boxes[lost][0], boxes
        for short in ((top, left, rows - 1, columns), (top, left, rows, columns - 1)):
            with pytest.raises(UnsupportedThreat):
                replace(made, boxes=(*others, (short,))).cover(threat)


def test_two_patches_lie_behind_pairs_of_masks() -> None:
    one, two = MaskSpec(("patch:2x2",), per_axis=2).masks(6, 6), MaskSpec(("patches:2:2x2",), per_axis=2).masks(6, 6)
    assert (len(one), len(two)) == (4, 6)
    assert {frozenset(union) for union in two.boxes} == {
        frozenset(first + second) for i, first in enumerate(one.boxes) for second in one.boxes[i + 1 :]
    }
    with pytest.raises(UnsupportedThreat, match="do not cover patches:2:2x2"):
        one.cover(parse_threat("patches:2:2x2"))


def test_a_budget_of_passes_buys_as_many_masks_as_it_can_pay() -> None:
    for passes in (10, 45, 666, 1000, 5050):
        made = MaskSpec(("patch:5x5",), passes=passes).masks(32, 32)
        assert made.passes <= passes
        axis = round(len(made) ** 0.5)
        more = next(
            found for k in range(axis + 1, 33) if len(found := MaskSpec(("patch:5x5",), per_axis=k).masks(32, 32)) > len(made)
        )
        assert more.passes > passes
    with pytest.raises(UsageError, match="passes 9 is too few for masks against patch:5x5. Allow 10 or more"):
        MaskSpec(("patch:5x5",), passes=9).masks(32, 32)


def test_any_is_the_shape_whose_masks_hide_the_fewest_pixels_within_the_budget() -> None:
    for passes in (10, 28, 45, 105, 136, 666):
        plan = MaskSpec(("patch:5x5",), passes=passes, shape="any")
        spec, why = plan.chosen(32, 32)
        each = {shape: replace(plan, shape=shape).masks(32, 32) for shape in ("square", "column", "row")}
        hidden = {shape: max(len(mask) for mask in occluded(made)) for shape, made in each.items()}
        assert spec == replace(plan, shape=min(hidden, key=lambda shape: hidden[shape])), "the first of equal ones"
        assert all(f"{shape} {hidden[shape]} ({len(made)} masks)" in why for shape, made in each.items())
        assert plan.masks(32, 32).boxes == each[spec.shape].boxes and spec.chosen(32, 32) == (spec, "")
    assert [MaskSpec(("patch:5x5",), passes=p, shape="any").chosen(32, 32)[0].shape for p in (28, 105, 666)] == [
        "column",
        "column",
        "square",
    ]
    assert MaskSpec(("patch:2x9",), passes=28, shape="any").chosen(32, 32)[0].shape == "row", "a low patch"


def test_any_needs_a_budget_that_some_shape_fits() -> None:
    one_axis = MaskSpec(("patch:5x5",), passes=3, shape="any")
    assert one_axis.chosen(32, 32)[0].shape == "column", "two squares along each axis are ten passes"
    with pytest.raises(UsageError, match="passes 2 is too few for masks against patch:5x5. Allow 10 or more"):
        replace(one_axis, passes=2).masks(32, 32)
    with pytest.raises(IntegrityError, match="shape any is chosen for a budget, so it needs passes"):
        MaskSpec.read({"covers": ["patch:5x5"], "per_axis": 3, "shape": "any"})
    assert MaskSpec.read(one_axis.to_dict()) == one_axis


@pytest.mark.parametrize(("per_axis", "strips", "width", "pairs"), [(7, 7, 8, 28), (14, 14, 6, 105)])
def test_strips_have_few_pairs_and_cover_patches_of_any_height(per_axis: int, strips: int, width: int, pairs: int) -> None:
    columns = MaskSpec(("patch:5x5",), per_axis=per_axis, shape="column").masks(32, 32)
    assert (len(columns), columns.passes) == (strips, pairs)
    assert {box[2:] for union in columns.boxes for box in union} == {(32, width)}
    columns.cover(parse_threat("patch:32x5"))
    with pytest.raises(UnsupportedThreat, match="do not cover patch:5x"):
        columns.cover(parse_threat(f"patch:5x{width + 1}"))
    rows = MaskSpec(("patch:5x5",), per_axis=per_axis, shape="row").masks(32, 32)
    assert {box[2:] for union in rows.boxes for box in union} == {(width, 32)}
    rows.cover(parse_threat("patch:5x32"))
    with pytest.raises(UnsupportedThreat):
        rows.cover(parse_threat("patch:32x5"))


def test_masks_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="hide all of a 8x8 image"):
        MaskSpec(("patch:5x5",), per_axis=1).masks(8, 8)
    with pytest.raises(UsageError, match="hide all of a 8x8 image"):
        MaskSpec(("patch:8x8",)).masks(8, 8)
    with pytest.raises(UsageError, match="hide all of a 8x8 image"):
        MaskSpec(("patch:5x8",), shape="column").masks(8, 8)
    with pytest.raises(UsageError, match="does not fit a 8x8 image"):
        MaskSpec(("patch:9x9",)).masks(8, 8)
    with pytest.raises(UsageError, match="cover nothing"):
        MaskSpec(()).masks(8, 8)


@pytest.mark.parametrize("threat", ["sparse:4", "patches:4:1x1"])
def test_masks_that_together_hide_the_whole_image_are_refused(threat: str) -> None:
    """Two boxes along each axis are four in all, and a mask of four boxes is the whole image: no answer depends on it."""
    with pytest.raises(UsageError, match=f"masks against {threat} hide all of a 8x8 image"):
        MaskSpec((threat,), per_axis=2).masks(8, 8)
    with pytest.raises(UsageError, match=f"masks against {threat} hide all of a 8x8 image"):
        MaskSpec((threat,), passes=1).masks(8, 8)
    found = MaskSpec((threat,), per_axis=3).masks(8, 8)
    assert found.most_hidden < 64
    found.cover(parse_threat(threat))


@pytest.mark.parametrize(
    ("plan", "together"),
    [
        (MaskSpec(("patch:2x2",), per_axis=2, shape="column"), True),
        (MaskSpec(("patch:2x2",), per_axis=4, shape="column"), False),
        (MaskSpec(("patch:2x2",), per_axis=2), False),
        (MaskSpec(("patches:2:3x3",), per_axis=2), True),
    ],
)
def test_pairs_of_masks_that_hide_the_whole_image(plan: MaskSpec, together: bool) -> None:
    found = plan.masks(8, 8)
    every = [bool((one | other).all()) for one in found.occluded for other in found.occluded]
    assert found.pair_hides_all is any(every) is together
    made = partial(PatchCleanser, nn.Flatten(), input_shape=(1, 8, 8), classes=("a", "b"), masks=plan, fill=(0.5,))
    assert ("Two of these masks hide the whole image" in made().note(plan.covers[0])) is together


def test_too_many_masks_are_refused() -> None:
    with pytest.raises(UsageError, match=f"more than {mask_sets.MAX_MASKS} masks are needed"):
        MaskSpec(("patches:3:5x5",), per_axis=6).masks(32, 32)
    MaskSpec(("patch:1x8",), per_axis=3).masks(8, 8).cover(parse_threat("patch:1x8"))


def test_a_table_of_covers_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made, threat = MaskSpec(("sparse:3",), per_axis=3).masks(6, 6), parse_threat("sparse:3")
    assert len(made.cover(threat).by) == 84  # three of nine
    monkeypatch.setattr(mask_sets, "MAX_TABLE_ENTRIES", 1 << 12)
    with pytest.raises(UnsupportedThreat, match="sparse:3 is too many changes at once for masks. Two patches are possible"):
        made.cover(threat)


def test_plans_are_plain_values() -> None:
    for plan in (*PLANS, MaskSpec(("patch:5x5",))):
        assert MaskSpec.read(plan.to_dict()) == plan
    assert MaskSpec.read({"covers": ["patch:5x5"], "per_axis": 6}) == MaskSpec(("patch:5x5",), per_axis=6)
    for values, said in [
        ({}, "masks.covers is missing"),
        ({"covers": []}, "names no threat"),
        ({"covers": ["5x5"]}, "invalid threat '5x5'"),
        ({"covers": ["patch:5"], "per_axis": 3, "stride": 2}, "exclude each other"),
        ({"covers": ["patch:5"], "per_axis": -1}, "not 0 or more"),
        ({"covers": ["patch:5"], "shape": "strip"}, "not square or column or row"),
        ({"covers": ["patch:5"], "colour": 1}, "colour is not a known entry"),
        (7, "not a table"),
    ]:
        with pytest.raises(IntegrityError, match=said):
            MaskSpec.read(values)


def test_equal_sets_of_masks_are_told_once_with_their_first_atom() -> None:
    by = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 1]]).bool()
    found = mask_sets._smallest(MaskCoverage(by, torch.tensor([9, 8, 7, 6, 5, 4])))
    assert found.by.tolist() == [[True, False, False], [False, True, True]]
    assert found.location.tolist() == [8, 6]
