"""Collectives on real gloo ranks. A failure of one rank never leaves the others waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distvsd.checkpoint.ranks import together
from distvsd.errors import CheckpointError, RankError, RunError
from distvsd.parallel import collectives
from distvsd.parallel.world import World
from distvsd.testing.ranks import run_ranks


def test_values_reach_every_rank_in_rank_order() -> None:
    def talk(world: World) -> list[Any]:
        return [
            collectives.gather_objects(world, {"rank": world.rank, "text": "\u00e9" * world.rank, "none": None}),
            collectives.max_flags(world, 0b100 if world.rank == 2 else 0b001),
            collectives.all_reduce_sum_(world, torch.tensor([1.0, float(world.rank)])).tolist(),
            collectives.all_gather_rows(world, torch.full((2, 1), world.rank)).wait().flatten().tolist(),
        ]

    objects = [{"rank": 0, "text": "", "none": None}, {"rank": 1, "text": "\u00e9", "none": None}]
    objects.append({"rank": 2, "text": "\u00e9\u00e9", "none": None})
    expected = [objects, 0b101, [3.0, 3.0], [0, 0, 1, 1, 2, 2]]
    assert run_ranks(talk, 3) == [expected] * 3


def test_an_empty_value_is_gathered() -> None:
    assert run_ranks(lambda world: collectives.gather_objects(world, ""), 2) == [["", ""]] * 2


FULL, OTHER, STRANGE = CheckpointError("the disk is full"), RunError("other"), KeyError("strange")


def failing(world: World, errors: list[Exception | None]) -> Callable[[], int]:
    """Work that raises the error of this rank, or returns the rank if it has none."""

    def work() -> int:
        error = errors[world.rank]
        if error is not None:
            raise error
        return world.rank

    return work


def test_a_failure_of_one_rank_is_the_same_error_on_all() -> None:
    def answer(world: World, errors: list[Exception | None]) -> list[Any]:
        try:
            return [collectives.agreed(world, failing(world, errors))]
        except Exception as error:
            return [type(error).__name__, str(error)]

    # All ranks raise the error of the lowest failing rank. If its class is not one of distvsd's, the other ranks raise
    # RunError.
    full, other = ["CheckpointError", "the disk is full"], ["RunError", "other"]
    foreign, raised = ["RunError", "'strange'"], ["KeyError", "'strange'"]
    expected: list[tuple[list[Exception | None], list[list[Any]]]] = [
        ([None, None, None], [[0], [1], [2]]),
        ([None, FULL, None], [full, full, full]),
        ([FULL, None, FULL], [full, full, full]),
        ([FULL, FULL, FULL], [full, full, full]),
        ([FULL, OTHER, None], [full, full, full]),
        ([None, OTHER, FULL], [other, other, other]),
        ([None, STRANGE, OTHER], [foreign, raised, foreign]),
    ]
    answers = run_ranks(lambda world: [answer(world, errors) for errors, _ in expected], 3)
    assert [list(by_rank) for by_rank in zip(*answers, strict=True)] == [by_rank for _, by_rank in expected]


def test_every_rank_gets_the_results_and_the_errors_of_all() -> None:
    def answer(world: World, errors: list[Exception | None]) -> list[Any]:
        values, problems, mine = collectives.attempt(world, failing(world, errors))
        return [values, problems, str(mine)]

    told = [[0, None, 2], [None, ("RunError", "other"), None]]
    answers = run_ranks(answer, 3, [None, OTHER, None])
    assert answers == [[*told, "None"], [*told, "other"], [*told, "None"]]


def test_what_all_ranks_did_together_is_one_error_that_names_the_ranks() -> None:
    def answer(world: World, errors: list[Exception | None]) -> list[Any]:
        try:
            return together(world, "saving", failing(world, errors))
        except CheckpointError as error:
            return [type(error).__name__, str(error)]

    disk = OSError(28, "No space left on device")
    hint = (
        "[Errno 28] No space left on device; check the free space, the quota and the permissions of the run directory"
    )
    expected: list[tuple[list[Exception | None], list[Any]]] = [
        ([None, None, None], [0, 1, 2]),
        ([None, FULL, None], ["CheckpointError", "saving failed: rank 1: the disk is full"]),
        ([FULL, None, FULL], ["CheckpointError", "saving failed: rank 0, 2: the disk is full"]),
        (
            [FULL, STRANGE, None],
            ["CheckpointError", "saving failed: rank 0: the disk is full; rank 1: KeyError: 'strange'"],
        ),
        ([disk, None, disk], ["StorageError", f"saving failed: rank 0, 2: {hint}"]),
        ([disk, FULL, None], ["CheckpointError", f"saving failed: rank 0: {hint}; rank 1: the disk is full"]),
    ]
    answers = run_ranks(lambda world: [answer(world, errors) for errors, _ in expected], 3)
    assert answers == [[told for _, told in expected]] * 3


def test_hosts_meet_before_they_wait_for_devices_and_the_silent_one_is_found_there() -> None:
    """A wait for a device cannot raise, so the hosts synchronize before it. A wait for CPU tensors has a timeout and
    needs no such step."""

    def wait(world: World) -> str:
        collectives.set_timeout(world, 0.5)
        collectives.meet(world, torch.device("cuda"), "the sum over ranks")
        collectives.meet(world, torch.device("cpu"), "the sum over ranks")  # returns without waiting for the others
        if world.rank == 1:
            time.sleep(2)
            return "late"
        with pytest.raises(RankError, match=r"rank 0 of 2 .*sum over ranks"):
            collectives.meet(world, torch.device("cuda"), "the sum over ranks")
        raise TimeoutError("found")

    with pytest.raises(RankError, match="TimeoutError: found"):
        run_ranks(wait, 2)


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
        with pytest.raises(RankError, match=r"rank 0 of 2 .*sum over ranks"):
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
