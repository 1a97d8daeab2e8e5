"""One rank: every collective is the identity, no group is opened, accelerate is not imported."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from distvsd.errors import RankError
from distvsd.parallel import collectives
from distvsd.parallel.reduce import reduce_gradients
from distvsd.parallel.world import World, open_world

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def test_collectives_return_what_they_were_given() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert collectives.all_reduce_sum_(ALONE, tensor) is tensor
    assert torch.equal(collectives.all_gather_rows(ALONE, tensor).wait(), tensor[None])
    assert collectives.gather_objects(ALONE, {"a": [1, None]}) == [{"a": [1, None]}]
    assert collectives.max_flags(ALONE, 0b101) == 0b101
    collectives.meet(ALONE, torch.device("cuda"), "nothing")
    assert collectives.agreed(ALONE, lambda: tensor) is tensor
    collectives.barrier(ALONE)
    collectives.set_timeout(ALONE, 5.0)
    assert not dist.is_initialized()


def test_a_failure_is_the_very_error_that_was_raised() -> None:
    failure = RankError("the disk is full")

    def fail() -> None:
        raise failure

    with pytest.raises(RankError, match=r"^the disk is full$") as caught:
        collectives.agreed(ALONE, fail)
    assert caught.value is failure
    assert collectives.attempt(ALONE, fail) == ([None], [("RankError", "the disk is full")], failure)


def test_the_timeout_of_devices_leaves_the_hosts_time_to_say_who_is_silent() -> None:
    """A gather may start a whole timeout before a host waits for it, and finding the silent rank takes seconds."""
    for timeout_s in (0.5, 120.0, 86_400.0):
        assert collectives.device_timeout(timeout_s) >= 2 * timeout_s + 30


def test_a_flag_word_that_cannot_travel_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 62 bits"):
        collectives.max_flags(ALONE, 1 << 62)


def test_a_gradient_of_another_length_or_dtype_is_refused() -> None:
    for numerics in ("fast", "exact"):
        with pytest.raises(ValueError, match=r"\[3\] torch.float32.*\[2\]"):
            reduce_gradients(ALONE, [torch.zeros(3)], 2, numerics, torch.zeros(1))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"torch\.float64"):
            reduce_gradients(ALONE, [torch.zeros(2).double()], 2, numerics, torch.zeros(1))  # type: ignore[arg-type]


def test_a_world_of_one_opens_no_group_and_imports_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # an import would raise
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with open_world(5) as world:
        assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with open_world(5) as world:
        assert world.size == 1 and not dist.is_initialized()
