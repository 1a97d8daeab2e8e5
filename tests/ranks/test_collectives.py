"""Collectives on real gloo ranks: what one rank knows, all know; one rank's failure never leaves the others waiting."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from distvsd.errors import RankError
from distvsd.parallel import collectives
from distvsd.parallel.world import World
from distvsd.testing.ranks import run_ranks


def test_values_reach_every_rank_in_rank_order() -> None:
    def talk(world: World) -> list[Any]:
        return [
            collectives.gather_objects(world, {"rank": world.rank, "text": "\u00e9" * world.rank, "none": None}),
            collectives.broadcast_text(world, f"from {world.rank}: \u00e9"),
            collectives.max_flags(world, 0b100 if world.rank == 2 else 0b001),
            collectives.all_reduce_sum_(world, torch.tensor([1.0, float(world.rank)])).tolist(),
            collectives.all_gather_rows(world, torch.full((2, 1), world.rank)).wait().flatten().tolist(),
        ]

    objects = [{"rank": 0, "text": "", "none": None}, {"rank": 1, "text": "\u00e9", "none": None}]
    objects.append({"rank": 2, "text": "\u00e9\u00e9", "none": None})
    expected = [objects, "from 0: \u00e9", 0b101, [3.0, 3.0], [0, 0, 1, 1, 2, 2]]
    assert run_ranks(talk, 3) == [expected] * 3


def test_an_empty_text_and_an_empty_value_travel() -> None:
    def talk(world: World) -> list[Any]:
        return [collectives.broadcast_text(world, ""), collectives.gather_objects(world, "")]

    assert run_ranks(talk, 2) == [["", ["", ""]]] * 2


def test_a_problem_of_one_rank_is_the_same_error_on_all() -> None:
    def answer(world: World, problems: list[str | None]) -> str:
        try:
            collectives.agree(world, problems[world.rank])
        except RankError as error:
            return str(error)
        return "fine"

    full = "the disk is full"
    expected = {
        (None, None, None): "fine",
        (None, full, None): "rank 1 of 3: the disk is full",
        (full, None, full): "ranks 0, 2 of 3: the disk is full",
        (full, full, full): "all 3 ranks: the disk is full",
        (full, "other", None): "rank 0 of 3: the disk is full; rank 1 of 3: other",
    }
    answers = run_ranks(lambda world: [answer(world, list(problems)) for problems in expected], 3)
    assert answers == [list(expected.values())] * 3


def test_a_rank_that_dies_fails_the_others_at_once() -> None:
    def die(world: World) -> None:
        if world.rank == 1:
            raise ValueError("boom")
        collectives.barrier(world)

    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(die, 3)
    # Far below the group's timeout of 60 s: the others see the closed connection.
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert text.startswith("rank 1 of 3 failed") and "ValueError: boom" in text
    assert "rank 0 of 3 lost the others" in text and "rank 2 of 3 lost the others" in text


def test_a_silent_rank_fails_a_collective_after_the_timeout() -> None:
    def wait(world: World) -> str:
        collectives.set_timeout(world, 0.5)
        if world.rank == 1:
            time.sleep(2)
            return "late"
        start = time.monotonic()
        with pytest.raises(RankError, match="rank 0 of 2 lost the others in the sum over ranks"):
            collectives.barrier(world)
        raise TimeoutError(f"after {time.monotonic() - start:.0f} s")

    with pytest.raises(RankError, match=r"TimeoutError: after [01] s"):
        run_ranks(wait, 2)


def test_an_error_with_a_gather_in_flight_does_not_wait_for_it() -> None:
    def fail(world: World) -> None:
        if world.rank == 0:
            collectives.all_gather_rows(world, torch.zeros(2, 3))
            raise ValueError("boom")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 of 2 failed"):
        run_ranks(fail, 2)
    assert time.monotonic() - start < 30
