"""Threat models, compared with loops over every location and subset of a 3x3 image."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchcert_cli.cli.threat_options import threat_from
from patchcert_cli.errors import UsageError
from patchcert_cli.threats import (
    Patch,
    Patches,
    PatchPercent,
    Sparse,
    Threat,
    as_options,
    parse_patch,
    parse_sparse,
    parse_threat,
)

PATCHES = st.builds(Patch, st.integers(1, 99_999), st.integers(1, 99_999))
PERCENTS = st.builds(lambda millionths: PatchPercent(Fraction(millionths, 10**6)), st.integers(1, 100 * 10**6))
SEVERAL = st.builds(Patches, st.integers(2, 99), st.one_of(PATCHES, PERCENTS))
SPARSE = st.builds(Sparse, st.integers(1, 999_999_999), st.sampled_from(["pixel", "value"]))
every = settings(max_examples=300, derandomize=True, deadline=None)


@pytest.mark.parametrize(
    ("text", "threat", "canonical"),
    [
        ("patch:5", Patch(5, 5), "patch:5x5"),
        ("patch:3x7", Patch(3, 7), "patch:3x7"),
        ("patch:3X7", Patch(3, 7), "patch:3x7"),
        ("patch:05", Patch(5, 5), "patch:5x5"),
        ("patch:2%", PatchPercent(Fraction(2)), "patch:2%"),
        ("patch:2.50%", PatchPercent(Fraction(5, 2)), "patch:2.5%"),
        ("patch:100%", PatchPercent(Fraction(100)), "patch:100%"),
        ("sparse:10", Sparse(10), "sparse:10"),
        ("sparse:10:pixel", Sparse(10), "sparse:10"),
        (" sparse:4:value ", Sparse(4, "value"), "sparse:4:value"),
        ("patches:2:5", Patches(2, Patch(5, 5)), "patches:2:5x5"),
        ("patches:03:3x7", Patches(3, Patch(3, 7)), "patches:3:3x7"),
        ("patches:2:1.50%", Patches(2, PatchPercent(Fraction(3, 2))), "patches:2:1.5%"),
    ],
)
def test_parse_and_print(text: str, threat: Threat, canonical: str) -> None:
    assert parse_threat(text) == threat
    assert str(threat) == canonical
    assert parse_threat(canonical) == threat


@every
@given(st.one_of(PATCHES, SPARSE, SEVERAL))
def test_printing_and_parsing_are_inverse(threat: Threat) -> None:
    assert parse_threat(str(threat)) == threat
    assert len({threat, parse_threat(str(threat))}) == 1


@every
@given(PERCENTS)
def test_printing_and_parsing_percentages_are_inverse(threat: PatchPercent) -> None:
    assert parse_threat(str(threat)) == threat


def test_tiny_percentages_print_without_an_exponent() -> None:
    assert parse_threat(str(parse_threat("patch:0.000001%"))) == PatchPercent(Fraction(1, 10**6))


BAD_PATCHES = [*("", "abc", "0", "5x", "x5", "-3", "0%", "101%", "5x0", "0x5", "5 x 5", "5x5x5", "5.5", "%", "1e3", "+5"),
               *("999999", "99999999999999999999", "100.000001%", "-1%", "5%%", "5\n", "\uff15\uff05")]  # fmt: skip


@pytest.mark.parametrize("text", BAD_PATCHES)
def test_bad_patches_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="invalid patch") as caught:
        parse_patch(text)
    assert "5, 3x7 or 2%" in str(caught.value)
    assert caught.value.code == 2


@pytest.mark.parametrize("text", ["", "0", "-1", "abc", "1.5", "10:", "10:pixels", "10:VALUE", "9999999999", "1:value:x", "1e3"])
def test_bad_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="invalid"):
        parse_sparse(text)


@pytest.mark.parametrize(
    "text", ["", "abc", "patch", "patch:", "Patch:5", "sparse", "linf:8", "5x5", "patch:5:5", ":5", "sparse:x"]
)
def test_bad_threats_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_threat(text)


@pytest.mark.parametrize(("percent", "side"), [(1, 23), (2, 32), (3, 39), (100, 224)])
def test_percentages_of_an_imagenet_image(percent: int, side: int) -> None:
    assert parse_threat(f"patch:{percent}%").count(224, 224) == (224 - side + 1) ** 2
    assert PatchPercent(Fraction(percent)).resolve(224, 224) == Patch(side, side)


@every
@given(st.integers(1, 10**8), st.integers(1, 60), st.integers(1, 60))
def test_a_percentage_is_the_smallest_square_that_covers_it(millionths: int, height: int, width: int) -> None:
    percent = Fraction(millionths, 10**6)
    side = next(s for s in range(1, 100) if s * s * 100 >= percent * height * width)
    if side <= min(height, width):
        assert PatchPercent(percent).resolve(height, width) == Patch(side, side)
    else:
        with pytest.raises(UsageError, match="does not fit"):
            PatchPercent(percent).check(height, width)


@pytest.mark.parametrize(("height", "width"), [(3, 3), (4, 6), (5, 2)])
def test_atoms_are_all_places_in_order(height: int, width: int) -> None:
    for h, w in product(range(1, height + 1), range(1, width + 1)):
        patch = Patch(h, w)
        expected = [[t, le, h, w] for t in range(height) for le in range(width) if t + h <= height and le + w <= width]
        locations = patch.locations(height, width)
        assert locations.tolist() == expected
        assert locations.dtype == torch.int64
        assert len(expected) == patch.count(height, width)
        assert locations[-1].tolist() == [height - h, width - w, h, w]
        assert patch.budget == 1


def test_atoms_of_sparse_and_percentages() -> None:
    assert Sparse(3).locations(2, 3).tolist() == [[r, c, 1, 1] for r in range(2) for c in range(3)]
    assert Sparse(3).count(2, 3) == 6
    assert Sparse(3).budget == 3
    assert PatchPercent(Fraction(20)).locations(4, 5).tolist() == Patch(2, 2).locations(4, 5).tolist()
    assert PatchPercent(Fraction(20)).count(4, 5) == 12
    assert PatchPercent(Fraction(20)).budget == 1


def test_mnist_and_cifar_counts() -> None:
    assert Patch(5, 5).count(28, 28) == 576
    assert Patch(2, 2).count(32, 32) == 961
    assert Patch(5, 5).count(32, 32) == 784


def every_change(channels: int) -> torch.Tensor:
    """All sets of changed entries of a 3x3 image, and a spread of them for two channels: bool [M, C, 3, 3]."""
    entries = channels * 9
    assert entries <= 18
    codes = torch.arange(2**entries) if entries == 9 else torch.arange(0, 2**entries, 257)
    return ((codes[:, None] >> torch.arange(entries)) & 1).bool().reshape(-1, channels, 3, 3)


@pytest.mark.parametrize("channels", [1, 2])
def test_contains_equals_brute_force(channels: int) -> None:
    changed = every_change(channels)
    pixels = [{(r, c) for r, c in product(range(3), repeat=2) if bool(change[:, r, c].any())} for change in changed]
    for h, w in product(range(1, 4), repeat=2):
        places = [{(t + i, le + j) for i, j in product(range(h), range(w))} for t in range(4 - h) for le in range(4 - w)]
        expected = [any(found <= place for place in places) for found in pixels]
        assert Patch(h, w).contains(changed).tolist() == expected
    assert PatchPercent(Fraction(40)).contains(changed).tolist() == Patch(2, 2).contains(changed).tolist()
    for k in range(1, 6):
        assert Sparse(k).contains(changed).tolist() == [len(found) <= k for found in pixels]
        values = [sum(map(int, change.flatten().tolist())) <= k for change in changed]
        assert Sparse(k, "value").contains(changed).tolist() == values


@pytest.mark.parametrize("number", [2, 3])
def test_several_patches_contain_what_some_places_of_them_hide(number: int) -> None:
    codes = torch.arange(0, 2**16, 97)
    changed = ((codes[:, None] >> torch.arange(16)) & 1).bool().reshape(-1, 1, 4, 4)
    pixels = [{(r, c) for r, c in product(range(4), repeat=2) if bool(change[0, r, c])} for change in changed]
    seen = set()
    for h, w in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (2, 3), (1, 4)):
        places = [{(t + i, le + j) for i, j in product(range(h), range(w))} for t in range(5 - h) for le in range(5 - w)]
        unions = [set().union(*chosen) for chosen in combinations(places, min(number, len(places)))]
        expected = [any(found <= union for union in unions) for found in pixels]
        assert Patches(number, Patch(h, w)).contains(changed).tolist() == expected
        seen |= set(expected)
    assert seen == {True, False}


def test_several_patches_are_refused_where_one_would_be_and_as_one() -> None:
    with pytest.raises(UsageError, match="one patch is patch:5x5"):
        parse_threat("patches:1:5")
    for text in ("patches:2", "patches:5x5", "patches:2:", "patches:2:0", "patches:x:5", "patches:2:5:5", "patches:100:5"):
        with pytest.raises(UsageError, match="invalid patch"):
            parse_threat(text)
    with pytest.raises(UsageError, match="does not fit a 3x3 image"):
        parse_threat("patches:2:4").check(3, 3)
    two = parse_threat("patches:2:2x3")
    assert (two.budget, two.count(4, 4), two.locations(4, 4).tolist()) == (2, 6, Patch(2, 3).locations(4, 4).tolist())


def test_contains_every_subset_of_k_pixels_and_no_larger_one() -> None:
    for k, size in product((1, 2, 3), range(5)):
        for chosen in combinations(range(9), size):
            change = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
            change.view(-1)[list(chosen)] = True
            assert bool(Sparse(k).contains(change)) == (size <= k)


@pytest.mark.parametrize(
    ("threat", "shape"),
    [
        (Patch(4, 1), (3, 3, 1)),
        (Patch(1, 4), (3, 3, 1)),
        (Sparse(10), (3, 3, 1)),
        (Sparse(10), (3, 3, 3)),
        (Sparse(28, "value"), (3, 3, 3)),
    ],
    ids=str,
)
def test_threats_that_do_not_fit_are_refused_with_the_largest_allowed(threat: Threat, shape: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError) as caught:
        threat.check(*shape)
    assert str({1: "3x3", 10: "9", 28: "27", 4: "3x3"}[getattr(threat, "k", 4)]) in str(caught.value)


def test_threats_that_just_fit_are_accepted() -> None:
    Patch(3, 3).check(3, 3)
    Sparse(9).check(3, 3, 3)
    Sparse(27, "value").check(3, 3, 3)
    PatchPercent(Fraction(100)).check(3, 3)
    for threat in (Patch(3, 3), Sparse(9), Sparse(27, "value"), PatchPercent(Fraction(100))):
        assert isinstance(threat, Threat)
        with pytest.raises(AttributeError):
            threat.kind = "other"  # type: ignore[misc]


def test_patch_atoms_refuse_images_that_are_too_small() -> None:
    with pytest.raises(UsageError, match="does not fit a 3x3 image"):
        Patch(4, 4).locations(3, 3)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("patch:5x5", "--patch 5"),
        ("patch:3x7", "--patch 3x7"),
        ("patch:2.5%", "--patch 2.5%"),
        ("sparse:10", "--threat sparse --k 10"),
        ("sparse:4:value", "--threat sparse --k 4 --unit value"),
        ("patches:2:5x5", "--threat patches:2:5x5"),
    ],
)
def test_options_name_the_same_threat(text: str, options: str) -> None:
    words = options.split()
    typed: dict[str, str] = dict(zip(words[::2], words[1::2], strict=True))
    meant = parse_threat(text)
    assert as_options(meant) == options
    assert (
        threat_from(threat=typed.get("--threat"), patch=typed.get("--patch"), k=typed.get("--k"), unit=typed.get("--unit"))
        == meant
    )
