"""A rank is named if it stays slow, and only if it is slow for its number of particles."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from distvsd.runtime.stragglers import Stragglers, tame_garbage_collector

EVEN, SLOW_2 = [1.0, 1.1, 1.0, 0.9], [1.0, 1.0, 2.0, 1.0]


def test_a_rank_that_is_slow_three_windows_in_a_row_is_named_once() -> None:
    stragglers = Stragglers()
    hosts = ["a", "a", "b", "b"]
    warnings = [stragglers.observe(SLOW_2, hosts) for _ in range(6)]
    assert warnings[:2] == [None] * 2 and warnings[3:] == [None] * 3
    assert warnings[2] is not None
    assert warnings[2].startswith("rank 2 of 4 on b is a straggler: 2.0 times as long as the median rank")
    assert "(2 s against 1 s)" in warnings[2]
    assert stragglers.ratio == 2.0


def test_a_good_window_begins_the_count_anew() -> None:
    stragglers = Stragglers()
    assert [stragglers.observe(window) for window in (SLOW_2, SLOW_2, EVEN, SLOW_2, SLOW_2)] == [None] * 5
    assert stragglers.observe(SLOW_2) is not None


def test_another_slow_rank_each_time_is_noise() -> None:
    stragglers = Stragglers()
    for window in range(12):
        seconds = [1.0] * 4
        seconds[window % 4] = 3.0
        assert stragglers.observe(seconds) is None
        assert stragglers.ratio == 3.0


def test_small_differences_are_no_news() -> None:
    stragglers = Stragglers()
    # 1.1 against the lower median of 0.9, 1, 1, 1.1.
    assert [stragglers.observe(EVEN) for _ in range(5)] == [None] * 5
    assert stragglers.ratio == pytest.approx(1.1)


def test_of_two_ranks_the_slow_one_is_compared_with_the_fast_one() -> None:
    stragglers = Stragglers()
    warnings = [stragglers.observe([1.0, 1.8]) for _ in range(3)]
    assert warnings[2] is not None and warnings[2].startswith("rank 1 of 2 is a straggler: 1.8 times")


def test_a_rank_that_owns_more_particles_is_not_to_blame() -> None:
    """7 particles on 4 ranks, and on 8 ranks of which one has none: the time per particle is the same everywhere."""
    stragglers = Stragglers([2, 2, 2, 1])
    assert [stragglers.observe([2.0, 2.0, 2.0, 1.0]) for _ in range(4)] == [None] * 4
    assert stragglers.ratio == 1.0
    stragglers = Stragglers([1, 1, 1, 1, 1, 1, 1, 0])
    assert [stragglers.observe([1.0] * 7 + [0.001]) for _ in range(4)] == [None] * 4
    assert stragglers.ratio == 1.0


def test_a_slow_rank_with_few_particles_is_still_found() -> None:
    stragglers = Stragglers([3, 3, 1])
    warnings = [stragglers.observe([3.0, 3.0, 3.0]) for _ in range(3)]
    assert warnings[2] is not None and warnings[2].startswith("rank 2 of 3 is a straggler: 3.0 times")
    assert "(3 s against 1 s a particle)" in warnings[2]


def test_nothing_to_compare_is_balance() -> None:
    for stragglers, seconds in ((Stragglers(), [0.0, 0.0]), (Stragglers([0, 0]), [1.0, 9.0]), (Stragglers(), [5.0])):
        assert [stragglers.observe(seconds) for _ in range(4)] == [None] * 4
        assert stragglers.ratio == 1.0


class Knot:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collector() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("collector")
def test_garbage_is_collected_in_the_same_round_everywhere_and_in_no_other() -> None:
    collect = tame_garbage_collector()
    assert not gc.isenabled()
    knot = weakref.ref(Knot())
    for round in range(1000):
        collect(round)
    assert knot() is not None
    collect(1000)
    assert knot() is None
