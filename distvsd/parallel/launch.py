"""Which rank of which world this process is, as its launcher says in the environment.

WORLD_SIZE decides whether there are several ranks; RANK alone may be left over from something else. Which process the
launcher is, and whether it still lives, is in `runtime.launcher`. Imports no torch: the command line asks before it
does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distvsd.errors import RankError


@dataclass(frozen=True)
class Launch:
    """The world that the environment describes."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    use_cpu: bool


def launched_rank(environment: Mapping[str, str]) -> int | None:
    """This process's rank among several; None for a process on its own.

    A launcher of several processes sets WORLD_SIZE, RANK and MASTER_ADDR. This function treats an incomplete or invalid
    set as "on its own": it only decides which process prints. `read_launch` refuses such a set.
    """
    try:
        size, rank = int(environment["WORLD_SIZE"]), int(environment["RANK"])
    except (KeyError, ValueError):
        return None
    return rank if 0 <= rank < size > 1 and environment.get("MASTER_ADDR") else None


def read_launch(environment: Mapping[str, str], has_cuda: bool) -> Launch:
    """The world of the environment. Raises `RankError` if the launcher did not start what it was asked for."""
    size = _integer(environment, "WORLD_SIZE", 1)
    asked_for_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes", "on", "y", "t"}
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if size == 1:
        # accelerate with a CPU configuration (distributed_type: MULTI_CPU, or --cpu) and num_processes: 2 sets
        # MASTER_ADDR and then starts a single process.
        if by_accelerate and "WORLD_SIZE" not in environment and "MASTER_ADDR" in environment:
            raise RankError(
                "accelerate launch was asked for several processes (it set MASTER_ADDR) but started this one alone, as "
                f"it does for CPU configurations; {how_to_start_on_cpu(2)} (for one process set num_processes to 1 and "
                "unset MASTER_ADDR)"
            )
        return Launch(0, 1, _integer(environment, "LOCAL_RANK", 0), 1, asked_for_cpu or not has_cuda)
    if by_accelerate and not has_cuda and not asked_for_cpu:
        raise RankError(
            f"accelerate launch started {size} processes for GPUs, but there is no CUDA device here, so each of them "
            f"would train alone; {how_to_start_on_cpu(size)}"
        )
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise RankError(
            "accelerate launch was configured for its own DeepSpeed (distributed_type: DEEPSPEED), which would open a "
            "second process group; use launch/accelerate/deepspeed.yaml and set parallel.strategy=deepspeed"
        )
    missing = [name for name in ("RANK", "LOCAL_RANK") if name not in environment]
    if missing:
        raise RankError(
            f"WORLD_SIZE is {size} but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; start "
            "through torchrun or accelerate launch, or unset WORLD_SIZE to train alone"
        )
    rank = _integer(environment, "RANK", 0)
    if not 0 <= rank < size:
        raise RankError(f"RANK is {rank} in a world of {size}; start through torchrun or accelerate launch")
    local_size = _integer(environment, "LOCAL_WORLD_SIZE", size)
    if not 1 <= local_size <= size:
        raise RankError(
            f"LOCAL_WORLD_SIZE is {local_size} in a world of {size}; start through torchrun or accelerate launch"
        )
    return Launch(rank, size, _integer(environment, "LOCAL_RANK", 0), local_size, asked_for_cpu or not has_cuda)


def how_to_start_on_cpu(size: int) -> str:
    """The commands that start `size` ranks without a GPU."""
    return (
        f"on CPUs start with `torchrun --standalone --nproc-per-node {size} ...` or "
        f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {size} ...`"
    )


def _integer(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise RankError(f"{name} is {text!r} in the environment; it must be an integer, set by the launcher") from None
