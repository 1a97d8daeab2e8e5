"""Numbers that depend on the round, with expected values worked out by hand."""

from __future__ import annotations

import pytest

from distvsd.config import RenderConfig, Schedule


def test_a_constant_is_the_same_in_every_round() -> None:
    schedule = Schedule.constant(0.25)
    assert [schedule.at(round) for round in (0, 1, 10**9)] == [0.25, 0.25, 0.25]


def test_a_step_changes_at_its_round_and_not_before() -> None:
    schedule = Schedule(((0, 0.98), (5000, 0.5)))
    assert [schedule.at(round) for round in (0, 4999, 5000, 25000)] == [0.98, 0.98, 0.5, 0.5]


def test_a_linear_schedule_interpolates_and_then_stays() -> None:
    schedule = Schedule(((0, 10.0), (10, 20.0), (20, 0.0)), "linear")
    # Half way up the first piece, at the corner, a quarter of the way down the second, past the end.
    assert [schedule.at(round) for round in (5, 10, 15, 20, 99)] == [15.0, 20.0, 10.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("round", "pixels"), [(0, 64), (1, 64), (62, 64), (63, 72), (499, 120), (500, 128), (900, 128)]
)
def test_a_linear_resolution_is_rounded_down_to_a_multiple_of_eight(round: int, pixels: int) -> None:
    # 64 + 64 round / 500 reaches 72 at round 62.5.
    render = RenderConfig(resolution=Schedule(((0, 64.0), (500, 128.0)), "linear"))
    assert render.resolution_at(round) == pixels
