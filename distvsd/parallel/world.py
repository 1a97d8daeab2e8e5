"""The world of a run: opens the process group and refuses a group other than the launcher announced.

`torchrun` and `accelerate launch` describe the world in the environment, and accelerate opens the group. A single
process needs no group and does not import accelerate.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distvsd.errors import RankError
from distvsd.parallel.collectives import barrier, gather_objects, set_timeout
from distvsd.parallel.launch import Launch, how_to_start_on_cpu, read_launch
from distvsd.parallel.opening import fresh_store

# Ranks arrive at very different times (imports from a shared disk), so the opening has a long timeout of its own.
OPENING_TIMEOUT_S = 600.0
LEAVING_S = 3.0

# Read by torch when an NCCL group opens. 3: a collective that timed out ends the process without waiting for kernels
# that never end. The other two keep the last collectives of every rank and write them at that moment, one file a rank,
# to TORCH_NCCL_DEBUG_INFO_TEMP_FILE.
_NCCL = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "2000",
}


@dataclass(frozen=True)
class World:
    """This process among all ranks. local_*: among the ranks of its machine. device: where its tensors are."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device


@contextmanager
def open_world(
    timeout_s: float, while_waiting: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[World]:
    """Opens the group of all ranks for the block. Collective: every rank calls it.

    timeout_s: how long a collective waits for the others. while_waiting: a context for the wait for all ranks, which is
    inside torch, where Python runs no signal handler. A single process opens nothing. A group that is already open is
    used and left open, with its own timeout. Raises `RankError` for a world other than the environment describes, and
    for ranks that share a CUDA device.
    """
    launch = read_launch(os.environ, torch.cuda.is_available())
    if dist.is_initialized():
        device = torch.device("cpu") if dist.get_backend() == "gloo" else _device(launch)
        yield _audited(launch, device, dist.get_world_size())
    elif launch.size == 1:
        yield World(0, 1, 0, 1, _device(launch))
    else:
        _share_cores(launch.local_size)
        with _told_to_the_launcher(), _group_of_accelerate(launch, while_waiting) as (device, num_processes):
            world = _audited(launch, device, num_processes)
            set_timeout(world, timeout_s)
            yield world
            barrier(world)


@contextmanager
def open_local_world(rank: int, size: int, rendezvous: str, timeout_s: float) -> Iterator[World]:
    """Joins a gloo group of processes of this machine without a launcher; always on the CPU. Collective.

    rendezvous: the path of a file, the same on all ranks, that did not exist before.
    """
    world = World(rank, size, rank, size, torch.device("cpu"))
    if size == 1:
        yield world
        return
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timeout)
    with _closing_group():
        yield world
        barrier(world)


def refuse_other_world(promised: int, group: int, accelerate: int) -> None:
    """Raises `RankError` unless launcher, torch and accelerate have the same world size."""
    if not promised == group == accelerate:
        raise RankError(
            f"the world sizes differ: WORLD_SIZE is {promised}, torch.distributed counts {group} ranks and accelerate "
            f"{accelerate}; {how_to_start_on_cpu(promised)} (on GPUs: one process for each visible device)"
        )


def refuse_shared_devices(devices: Sequence[str | None]) -> None:
    """Raises `RankError` if two ranks have one CUDA device. devices: by rank, its identity, None for the CPU."""
    ranks: dict[str, list[str]] = {}
    for rank, device in enumerate(devices):
        if device is not None:
            ranks.setdefault(device, []).append(str(rank))
    shared = [f"ranks {', '.join(of)} share {device}" for device, of in ranks.items() if len(of) > 1]
    if shared:
        raise RankError(
            f"{'; '.join(shared)}; start at most one process for each GPU (torchrun --nproc-per-node, accelerate "
            "launch --num_processes) and check CUDA_VISIBLE_DEVICES"
        )


def _audited(launch: Launch, device: torch.device, num_processes: int) -> World:
    """The world of the open group, after all ranks have checked it. Collective."""
    group = dist.get_world_size() if dist.is_initialized() else 1
    refuse_other_world(launch.size, group, num_processes)
    world = World(dist.get_rank(), group, launch.local_rank, launch.local_size, device)
    refuse_shared_devices(gather_objects(world, _identity(device)))
    return world


@contextmanager
def _group_of_accelerate(
    launch: Launch, while_waiting: Callable[[], AbstractContextManager[None]]
) -> Iterator[tuple[torch.device, int]]:
    """The device and the number of processes, as accelerate sees them, while its group is open."""
    from accelerate import PartialState

    # With both backends, messages of the host wait for no kernel, and the check of devices needs no NCCL, which would
    # fail on a shared device without saying so.
    backend = "gloo" if launch.use_cpu else "cpu:gloo,cuda:nccl"
    if not launch.use_cpu:
        for name, value in _NCCL.items():
            os.environ.setdefault(name, value)
    try:
        with while_waiting():
            state = PartialState(
                cpu=launch.use_cpu,
                backend=backend,
                store=fresh_store(launch.rank, launch.size, OPENING_TIMEOUT_S),
                rank=launch.rank,
                world_size=launch.size,
                timeout=timedelta(seconds=OPENING_TIMEOUT_S),
            )
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {launch.rank} of {launch.size} could not join the others: {error}; check that all of them started "
            "and that MASTER_ADDR and MASTER_PORT are reachable and belong to this job alone"
        ) from error
    try:
        with _closing_group():
            # accelerate's CPU is "cpu:0", which torch does not count as equal to "cpu".
            yield torch.device("cpu") if launch.use_cpu else state.device, state.num_processes
    finally:
        # A singleton: it would still refer to the closed group when a world is opened again.
        PartialState._reset_state()


@contextmanager
def _closing_group() -> Iterator[None]:
    """Closes the group after the block. After an error it waits at most `LEAVING_S` for pending collectives."""
    try:
        yield
    except BaseException:
        if dist.is_initialized():
            # Dropping a gloo group joins the threads of its pending collectives, which run until their timeout if a
            # peer never joins (torch 2.13, measured). In a daemon thread that does not delay the exit.
            abort = getattr(dist.distributed_c10d, "_abort_process_group", dist.destroy_process_group)
            leaving = threading.Thread(target=abort, name="leave-group", daemon=True)
            leaving.start()
            leaving.join(LEAVING_S)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _told_to_the_launcher() -> Iterator[None]:
    """Writes an error where torchrun looks for it, so that its summary shows the error and not only an exit code. Does
    nothing under other launchers."""
    try:
        yield
    except Exception as error:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            with suppress(OSError):
                get_error_handler().record_exception(error)
        raise


def _share_cores(local_size: int) -> None:
    """Gives this process its share of the machine's cores, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, torch.get_num_threads() // local_size)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # else accelerate decides anew, and warns


def _device(launch: Launch) -> torch.device:
    if launch.use_cpu:
        return torch.device("cpu")
    device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _identity(device: torch.device) -> str | None:
    """A unique name of the device. The index is not unique: every process may see its own GPU as number 0."""
    if device.type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {getattr(properties, 'uuid', device)} of {socket.gethostname()}"
