"""benchmarks/scaling.py at tiny sizes: simulated jobs against what can be computed by hand, and a real store and merge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import SHARINGS, Cost, Sharing, simulated

FIXED, RULE, ONE = Sharing("fixed", fixed=True), Sharing("rule"), Sharing("one", chunk=1)
UNEVEN = Cost("uneven", [8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0])


def test_shares_of_two_workers_by_hand() -> None:
    images = range(8)
    assert simulated(UNEVEN, images, [1, 1], FIXED) == (11.0, [])  # 0, 2, 4, 6
    assert simulated(UNEVEN, images, [1, 1], ONE, add=0)[0] == 8.0
    assert simulated(UNEVEN, images, [1, 0.5], ONE, add=0)[0] == 11.0  # at 8 s three images are left: 1 s, 2 s, 2 s
    assert simulated(UNEVEN, images, [1], RULE, add=0)[0] == 16.0


def test_the_store_makes_one_addition_at_a_time() -> None:
    instant = Cost("instant", [0.0] * 10)
    assert simulated(instant, range(10), [1] * 5, ONE, add=0.25)[0] == 10 * scaling.ADDS * 0.25


@pytest.mark.parametrize("sharing", [FIXED, RULE, ONE])
def test_what_is_not_finished_when_all_are_stopped_is_left(sharing: Sharing) -> None:
    last, left = simulated(UNEVEN, range(8), [1, 1], sharing, until=4.0, add=0)
    assert 0 in left and last <= 4.0 and 0 < len(left) < 8
    again, none = simulated(UNEVEN, left, [1], sharing, add=0)
    assert not none and again == sum(UNEVEN.seconds[one] for one in left)


def test_units_are_never_divided() -> None:
    cost = Cost("bounds", [0.01] * 40, unit=8)
    assert simulated(cost, range(40), [1, 1], FIXED)[0] == pytest.approx(0.24)  # three units of eight, and two
    assert simulated(cost, range(40), [1, 1], RULE, add=0)[0] == pytest.approx(0.24)
    assert [sharing.fits(cost) for sharing in SHARINGS] == [True, True, False, True, True]


def test_what_images_take_is_drawn_from_what_was_measured() -> None:
    known = json.loads(scaling.COSTS.read_text())
    assert sum(known["counts"].values()) == known["images"] == 10_000
    passes = scaling.drawn(20_000, 0)
    assert sorted(passes[:10_000]) == sorted(passes[10_000:]) and passes[:10_000] != passes[10_000:]
    assert sum(passes) / 20_000 == pytest.approx(826, abs=1) and (min(passes), max(passes)) == (55, 1225)


def test_a_shared_counter_is_better_than_fixed_shares(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["simulate", "--images", "600", "--workers", "4"])
    heads, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert heads[4:] == [sharing.name for sharing in SHARINGS] and len(rows) == 9
    for row in rows[:6]:  # images of unequal cost
        fixed, rule = float(row[4]), float(row[5])
        assert fixed < rule <= 100.0, row


def test_counter_and_merge(tmp_path: Path) -> None:
    found = scaling.counted(4, 2, 0.05)
    assert found.rate > 0 and 0 < found.each < 1 and found.longest > 0 and found.connected > 0
    assert scaling.merged(7, 50, tmp_path / "run") > 0
