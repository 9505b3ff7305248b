"""Batches by measured pace, and the time to the end: with a clock that the test moves."""

from __future__ import annotations

import pytest

from patchcert_cli.evaluation.pace import GOAL, GROWTH, LONGEST, Left, Pace, spoken


def sizes(pace: Pace, seconds_each: float, batches: int, passes: int = 0) -> list[int]:
    found = []
    for _ in range(batches):
        found.append(pace.size)
        pace.took(pace.size, seconds_each * pace.size, passes * pace.size)
    return found


def test_batches_grow_from_one_image_to_the_most_allowed() -> None:
    assert sizes(Pace(1000), 1e-4, 6) == [1, 8, 64, 512, 1000, 1000]
    assert sizes(Pace(1000), 0, 3) == [1, 8, 64]
    assert sizes(Pace(5), 1e-4, 3) == [1, 5, 5]


@pytest.mark.parametrize("each", [0.02, 0.3, 1.0, 4.0, 9.0, 200.0])
def test_a_batch_takes_seconds_and_never_less_than_one_image(each: float) -> None:
    for size in sizes(Pace(1000), each, 9):
        assert size == 1 or size * each <= GOAL
    assert sizes(Pace(1000), each, 9)[-1] >= min(GOAL / each / 2, GROWTH**8)


def test_images_of_the_most_passes_fit_into_a_batch() -> None:
    """Measured on images that left early: 40 passes in 0.4 s, where 666 are possible."""
    size = sizes(Pace(1000, (36, 666)), 0.4, 5, passes=40)[-1]
    assert size == 2 and size * 666 * 0.01 <= LONGEST
    assert sizes(Pace(1000, (36, 666)), 0.4, 5)[-1] == 16  # passes that nobody tells are not counted


def test_units_stay_whole() -> None:
    assert sizes(Pace(1000, unit=27), 1e-4, 4) == [27, 216, 999, 999]
    assert sizes(Pace(16, unit=27), 1e-4, 2) == [16, 16]
    assert sizes(Pace(1000, unit=27), 60.0, 2) == [27, 27]


def test_after_an_out_of_memory_error_batches_stay_small() -> None:
    pace = Pace(1000)
    sizes(pace, 0, 3)
    pace.halve(512)
    assert pace.size == 256 and sizes(pace, 0, 2) == [256, 256]
    pace.halve(256)
    pace.halve(128)
    assert sizes(pace, 0, 2) == [64, 64]
    unit = Pace(1000, unit=27)
    unit.halve(27)
    assert unit.size == 13 and sizes(unit, 0, 2) == [13, 13]


def test_the_time_to_the_end_follows_the_pace() -> None:
    now = [0.0]
    left = Left(lambda: now[0])
    assert left.seconds(500, 1000) is None  # resumed: what was done before says nothing
    now[0] = 10
    assert left.seconds(500, 1000) is None
    assert left.seconds(510, 1000) == 490
    now[0] = 20
    assert left.seconds(510, 1000) == 980  # nothing since: it looks slower
    for second in range(20, 400, 10):
        now[0] = second
        left.seconds(510 + second // 10, 1000)
    assert left.seconds(549, 1000) == pytest.approx(4510, rel=0.1)  # a tenth of an image each second, not the first one each
    assert left.seconds(3, 50) is None  # another piece of work


def test_looking_back_costs_nothing() -> None:
    """Each sample is kept once and dropped once: what is kept does not grow with the run beyond half of it."""
    now = [0.0]
    left = Left(lambda: now[0])
    for done in range(2000):
        now[0] = float(done)
        left.seconds(done, 2000)
    assert len(left._seen) <= 1002


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (8, "8 s"), (99, "99 s"), (100, "2 min"), (720, "12 min"), (12_000, "3 h 20 min"), (190_800, "2 days 5 h")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert spoken(seconds) == words
