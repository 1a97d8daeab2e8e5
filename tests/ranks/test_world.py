"""The behaviour of `run_ranks` with forked ranks, and of `open_world` inside an open group."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distvsd.errors import RankError
from distvsd.parallel import collectives
from distvsd.parallel.world import World, open_world
from distvsd.testing import ranks
from distvsd.testing.ranks import run_ranks


def test_every_rank_is_a_process_of_one_group() -> None:
    def describe(world: World) -> list[Any]:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return [world.rank, dist.get_world_size(), str(world.device), os.getpid(), *(os.environ[n] for n in names)]

    before = ranks.multi_rank_runs()
    described = run_ranks(describe, 3)
    assert ranks.multi_rank_runs() == before + 1
    assert len({pid for _, _, _, pid, *_ in described} | {os.getpid()}) == 4
    for rank, (seen, size, device, _, *environment) in enumerate(described):
        assert (seen, size, device) == (rank, 3, "cpu")
        assert environment == [str(rank), "3", str(rank), "3"]


def test_one_rank_has_no_group() -> None:
    assert run_ranks(lambda world: [world.size, dist.is_initialized()], 1) == [[1, False]]


def test_a_world_opened_inside_uses_the_group_and_leaves_it_open() -> None:
    def nested(world: World) -> list[Any]:
        with open_world(60) as inner:
            pass
        return [inner == world, collectives.gather_objects(world, world.rank)]

    assert run_ranks(nested, 2) == [[True, [0, 1]]] * 2


def test_a_world_that_is_not_what_the_environment_promises_is_refused() -> None:
    def nested(world: World) -> None:
        os.environ["WORLD_SIZE"] = "3"
        with open_world(60):
            pass

    with pytest.raises(RankError, match=r"WORLD_SIZE is 3, torch\.distributed counts 2 ranks"):
        run_ranks(nested, 2)


def test_ranks_compute_after_the_parent_used_many_threads() -> None:
    def compute(world: World) -> list[float]:
        x = torch.ones(400, 400, requires_grad=True)
        (x @ x).sum().backward()
        assert x.grad is not None
        return [float(x.grad.sum()), torch.get_num_threads()]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        x = torch.ones(600, 600, requires_grad=True)
        (x @ x).sum().backward()
        torch.rand(1 << 20).sum()
        # d/dx_ij of sum(x x) at ones is 2 * 400, over 400^2 elements.
        assert run_ranks(compute, 2) == [[400.0**2 * 800.0, 1]] * 2
    finally:
        torch.set_num_threads(threads)


def test_tensors_come_back_bit_for_bit() -> None:
    payload = torch.tensor([float("nan"), 0.1, -0.0])
    first, second = run_ranks(lambda world: {"x": payload * (world.rank + 1)}, 2)
    assert torch.equal(first["x"].view(torch.int32), payload.view(torch.int32))
    assert torch.equal(second["x"][1:], payload[1:] * 2)


def test_a_hung_rank_is_killed_and_named_with_the_place() -> None:
    def hang(world: World) -> None:
        if world.rank == 1:
            time.sleep(600)

    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(hang, 2, timeout_s=2)
    assert time.monotonic() - start < 20
    assert "rank 1 of 2 hangs: no result within 2 s; killed" in str(caught.value)
    assert "in hang" in str(caught.value)


def test_a_rank_that_exits_without_an_error_is_named_first() -> None:
    def leave(world: World) -> None:
        if world.rank == 1:
            os._exit(7)
        collectives.barrier(world)

    with pytest.raises(RankError, match=r"^rank 1 of 2 .*exit code 7\nrank 0 of 2 "):
        run_ranks(leave, 2)


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(RankError, match="rank 0 of 1 failed"):
        run_ranks(lambda world: lambda: None, 1)
