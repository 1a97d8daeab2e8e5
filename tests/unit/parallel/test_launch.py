"""The environment that launchers set, and which of their worlds are refused (recorded from accelerate 1.15)."""

from __future__ import annotations

import pytest

from distvsd.errors import RankError
from distvsd.parallel.launch import Launch, launched_rank, read_launch
from distvsd.parallel.world import refuse_other_world, refuse_shared_devices

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}


def test_an_empty_environment_is_one_process() -> None:
    assert read_launch({}, has_cuda=False) == Launch(0, 1, 0, 1, use_cpu=True)
    assert read_launch({}, has_cuda=True) == Launch(0, 1, 0, 1, use_cpu=False)


def test_torchrun_is_read_on_either_kind_of_machine() -> None:
    assert read_launch(TORCHRUN, has_cuda=False) == Launch(3, 4, 1, 2, use_cpu=True)
    assert read_launch(TORCHRUN, has_cuda=True) == Launch(3, 4, 1, 2, use_cpu=False)
    assert read_launch(TORCHRUN | {"ACCELERATE_USE_CPU": "true"}, has_cuda=True).use_cpu


def test_accelerate_on_cpu_is_read_when_it_was_told_so() -> None:
    environment = TORCHRUN | ACCELERATE | {"ACCELERATE_USE_CPU": "true"}
    assert read_launch(environment, has_cuda=False) == Launch(3, 4, 1, 2, use_cpu=True)
    assert read_launch(TORCHRUN | ACCELERATE, has_cuda=True) == Launch(3, 4, 1, 2, use_cpu=False)


def test_a_rank_is_one_only_where_a_launcher_started_several_that_can_meet() -> None:
    assert launched_rank(TORCHRUN) == 3
    assert launched_rank(TORCHRUN | {"RANK": "0"}) == 0
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        assert launched_rank({key: value for key, value in TORCHRUN.items() if key != name}) is None
    for change in ({"WORLD_SIZE": "1"}, {"RANK": "4"}, {"RANK": "-1"}, {"RANK": "x"}, {"WORLD_SIZE": "9" * 5000}):
        assert launched_rank(TORCHRUN | change) is None


@pytest.mark.parametrize("size", ["0", "-1", "5"])
def test_a_share_of_a_machine_that_cannot_be_is_refused(size: str) -> None:
    with pytest.raises(RankError, match="LOCAL_WORLD_SIZE"):
        read_launch(TORCHRUN | {"LOCAL_WORLD_SIZE": size}, has_cuda=False)


@pytest.mark.guarantee("G31")
def test_accelerate_with_gpu_processes_and_no_gpu_is_refused_with_the_right_command() -> None:
    """accelerate's GPU processes without a GPU, which would each train alone, are refused."""
    with pytest.raises(RankError, match="ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 4"):
        read_launch(TORCHRUN | ACCELERATE, has_cuda=False)


@pytest.mark.guarantee("G31")
def test_deepspeed_of_accelerate_is_refused_for_our_own() -> None:
    """accelerate's own DeepSpeed, which would open another group, is refused; the message names the program's own."""
    configured = TORCHRUN | ACCELERATE | {"ACCELERATE_USE_DEEPSPEED": "true"}
    with pytest.raises(RankError, match=r"launch/accelerate/deepspeed\.yaml.*parallel\.strategy=deepspeed"):
        read_launch(configured, has_cuda=True)


@pytest.mark.guarantee("G31")
def test_the_one_process_of_a_multi_cpu_config_is_refused() -> None:
    """The one process that accelerate starts for a MULTI_CPU configuration is refused."""
    environment = ACCELERATE | {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(RankError, match=r"MASTER_ADDR.*alone.*num_processes"):
        read_launch(environment, has_cuda=False)


def test_one_process_of_accelerate_is_fine() -> None:
    assert read_launch(ACCELERATE | {"ACCELERATE_USE_CPU": "False"}, has_cuda=False).size == 1


def test_half_an_environment_is_refused_by_name() -> None:
    with pytest.raises(RankError, match=r"WORLD_SIZE is 4 .*RANK and LOCAL_RANK"):
        read_launch({"WORLD_SIZE": "4"}, has_cuda=False)
    with pytest.raises(RankError, match="RANK is 4 in a world of 4"):
        read_launch(TORCHRUN | {"RANK": "4"}, has_cuda=False)
    with pytest.raises(RankError, match="WORLD_SIZE is 'two'"):
        read_launch({"WORLD_SIZE": "two"}, has_cuda=False)


@pytest.mark.guarantee("G31")
def test_three_counts_of_the_world_must_agree() -> None:
    """The launcher's, torch's and accelerate's number of ranks must be equal."""
    refuse_other_world(4, 4, 4)
    for counts in ((4, 1, 1), (4, 4, 1), (2, 4, 4)):
        with pytest.raises(RankError, match=r"WORLD_SIZE is \d, torch\.distributed counts \d"):
            refuse_other_world(*counts)


@pytest.mark.guarantee("G31")
def test_ranks_on_one_device_are_named() -> None:
    """Ranks that share a GPU are refused by name."""
    refuse_shared_devices([None, None])
    refuse_shared_devices(["GPU-a of h", "GPU-a of i"])
    with pytest.raises(RankError, match="ranks 0, 2 share GPU-a of h"):
        refuse_shared_devices(["GPU-a of h", "GPU-b of h", "GPU-a of h"])
