"""Collectives on tensors and on JSON values. Every rank calls each of them in the same order; with one rank they are
the identity.

Differences between versions of torch.distributed are handled here. Values travel as JSON bytes, never as pickles. A
collective that fails (a peer died, or was silent for longer than the timeout) raises `RankError`.

Hosts run a collective on the CPU before they wait for NCCL. A wait for a device cannot raise an error, and NCCL's own
watchdog ends the process without a message. So a rank that hangs or died is found by the host's timeout. NCCL's timeout
is longer; it is for a device that hangs while its host is alive.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distvsd import errors
from distvsd.errors import RankError, RunError

if TYPE_CHECKING:
    from distvsd.parallel.world import World

# torch 2.13 renamed all_gather_into_tensor and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

MAX_FLAG_BITS = 62
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
_meanwhile: Callable[[], None] | None = None

T = TypeVar("T")


class Problem(NamedTuple):
    """Why one rank's work failed: the name of the error's class, and its text."""

    kind: str
    text: str


class GatheredRows:
    """Rows that are being gathered from all ranks."""

    def __init__(self, world: World, gathered: Tensor, source: Tensor, work: Any | None) -> None:
        self._world, self._gathered, self._work = world, gathered, work
        self._source: Tensor | None = source  # kept alive: the transport still reads it

    def wait(self) -> Tensor:
        """`[size, n, F]`, the rows of rank r at index r. May be called again."""
        if self._work is not None:
            meet(self._world, self._gathered.device, "the gather of rows")
            with talking(self._world, "the gather of rows"):
                _finish(self._work, self._gathered.device)
            self._work = self._source = None
        return self._gathered


def all_gather_rows(world: World, rows: Tensor) -> GatheredRows:
    """Starts to gather `[n, F]` rows, the same n and F on every rank; asynchronous, on `rows`' device, bits unchanged.

    `rows` must not be written to before `wait` has returned.
    """
    if world.size == 1:
        return GatheredRows(world, rows[None], rows, None)
    rows = rows.contiguous()
    gathered = rows.new_empty((world.size, *rows.shape))
    with talking(world, "the gather of rows"):
        work = _all_gather(gathered.flatten(0, 1), rows, async_op=True)
    return GatheredRows(world, gathered, rows, work)


def all_to_all_rows(world: World, rows: Tensor, give: Sequence[int], take: Sequence[int]) -> Tensor:
    """`[sum(take), F]`: sends `rows` `[sum(give), F]`, give[r] of them to rank r in order, and returns the rows of all
    ranks, take[r] of them from rank r; bits unchanged. give[r] on rank s must be take[s] on rank r.
    """
    if world.size == 1:
        return rows
    taken = rows.new_empty((sum(take), *rows.shape[1:]))
    meet(world, rows.device, "the exchange of rows")
    with talking(world, "the exchange of rows"):
        work = dist.all_to_all_single(taken, rows.contiguous(), list(take), list(give), async_op=True)
        _finish(work, rows.device)
    return taken


def all_reduce_sum_(world: World, tensor: Tensor) -> Tensor:
    """Replaces a contiguous tensor by its sum over ranks, the same bits on every rank; returns it."""
    return _all_reduce_(world, tensor, dist.ReduceOp.SUM, "the sum over ranks")


def max_flags(world: World, flags: int) -> int:
    """The union of every rank's flag bits (a word of at most 62 bits)."""
    if not 0 <= flags < 1 << MAX_FLAG_BITS:
        raise ValueError(f"flags is {flags}; it must be a word of at most {MAX_FLAG_BITS} bits")
    # One element a bit: MAX is what both gloo and NCCL have, NCCL knows no bitwise OR.
    bits = torch.tensor([flags >> bit & 1 for bit in range(MAX_FLAG_BITS)], dtype=torch.uint8)
    bits = _all_reduce_(world, bits.to(_control_device(world)), dist.ReduceOp.MAX, "the exchange of flags")
    return sum(1 << bit for bit, is_set in enumerate(bits.tolist()) if is_set)


def gather_objects(world: World, value: Any) -> list[Any]:
    """The JSON values of all ranks, by rank, on every rank; as JSON returns them (tuples become lists)."""
    return [json.loads(data) for data in _gather_bytes(world, json.dumps(value).encode())]


def attempt(world: World, work: Callable[[], Any]) -> tuple[list[Any], list[Problem | None], Exception | None]:
    """Runs `work` on this rank and learns how it ended on the others. Communicates once, also after an error.

    Returns, by rank, what the work returned (JSON) and the problem it had; then this rank's own error. Use it where one
    rank may fail before a collective in which the others would wait.
    """
    value, problem = "null", None
    try:
        value = json.dumps(work())
    except Exception as error:  # any error: the other ranks wait in the next line
        problem = error
    reports = gather_objects(world, [value, None if problem is None else Problem(type(problem).__name__, str(problem))])
    values = [json.loads(value) for value, _ in reports]
    return values, [told and Problem(*told) for _, told in reports], problem


def agreed(world: World, action: Callable[[], T]) -> T:
    """What `action` returns on this rank, if it succeeds on all ranks; otherwise all raise the first rank's error.

    The text is the same on every rank, and so is the class if it is one of `distvsd.errors`. Collective.
    """
    results: list[T] = []
    _, problems, mine = attempt(world, lambda: results.append(action()))
    first = next((problem for problem in problems if problem is not None), None)
    if first is None:
        return results[0]
    if mine is not None and str(mine) == first.text:
        raise mine
    kind = getattr(errors, first.kind, RunError)
    raise kind(first.text) from mine


def barrier(world: World) -> None:
    """Returns when every rank has called it. Hosts only: does not wait for work queued on devices."""
    all_reduce_sum_(world, torch.zeros(1, device=_control_device(world)))


def meet(world: World, device: torch.device, what: str) -> None:
    """Returns when every host is about to wait for tensors on `device`; does nothing if that wait has a timeout itself.

    what: the name of the wait in errors.
    """
    if _waits_for_device(world, device):
        with talking(world, what):
            flag = torch.zeros(1)
            _finish(dist.all_reduce(flag, async_op=True), flag.device)


def set_timeout(world: World, timeout_s: float, meanwhile: Callable[[], None] | None = None) -> None:
    """Sets how long every later collective of this rank waits for the others before it fails. Does not communicate.

    meanwhile: called repeatedly while a collective waits on the host; an error that it raises ends the wait.
    """
    global _meanwhile
    _meanwhile = meanwhile
    if world.size > 1:
        # There is no public setter yet (torch 2.13), only an argument at the opening of a group.
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s))
    if _waits_for_device(world, world.device):
        backend = dist.distributed_c10d._get_default_group()._get_backend(world.device)
        backend._set_default_timeout(timedelta(seconds=device_timeout(timeout_s)))


def device_timeout(timeout_s: float) -> float:
    """NCCL's timeout in seconds for the host's. NCCL's clock starts with the gather, before the host waits, and the
    host must have found and named the hung rank before it ends."""
    return 2 * timeout_s + 60


def _all_reduce_(world: World, tensor: Tensor, operation: Any, what: str) -> Tensor:
    if world.size > 1:
        meet(world, tensor.device, what)
        with talking(world, what):
            _finish(dist.all_reduce(tensor, op=operation, async_op=True), tensor.device)
    return tensor


def _finish(work: Any, device: torch.device) -> None:
    """Waits for a collective on tensors of that device. On the host it calls `meanwhile` of `set_timeout`
    repeatedly."""
    pause = _SHORTEST_PAUSE_S
    while _meanwhile is not None and device.type == "cpu" and not work.is_completed():
        _meanwhile()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    work.wait()


def _waits_for_device(world: World, device: torch.device) -> bool:
    """Whether tensors on `device` travel by NCCL in a group that also has a backend for the host."""
    return world.size > 1 and device.type == "cuda" and _control_device(world).type == "cpu"


def _gather_bytes(world: World, data: bytes) -> list[bytes]:
    device = _control_device(world)
    lengths = all_gather_rows(world, torch.tensor([[len(data)]], device=device)).wait().flatten().tolist()
    rows = all_gather_rows(world, _to_tensor(data, max(lengths), device)[None]).wait()[:, 0].cpu()
    return [bytes(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]


def _to_tensor(data: bytes, length: int, device: torch.device) -> Tensor:
    """Bytes as uint8 `[length]`, zeros at the end."""
    return torch.tensor(list(data.ljust(length, b"\0")), dtype=torch.uint8, device=device)


def _control_device(world: World) -> torch.device:
    """Where small messages are put: the host, so that they wait for no kernel, unless the group has NCCL only."""
    return world.device if world.size > 1 and dist.get_backend() == "nccl" else torch.device("cpu")


@contextmanager
def talking(world: World, what: str) -> Iterator[None]:
    """Turns the transport's error, for torch always a RuntimeError, into a RankError that says what it means."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].partition(". ")[0]
        raise RankError(
            f"rank {world.rank} of {world.size} lost the others in {what}: another rank died, or was silent for longer "
            f"than parallel.timeout_s; its own log says why, this is a consequence ({reason})"
        ) from error
