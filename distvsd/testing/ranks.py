"""Runs a function on N ranks from inside a test: forked processes with a gloo group, in a fraction of a second.

A launcher costs seconds a rank for imports; a fork has them already. Launchers are for the few tests of launching.
"""

from __future__ import annotations

import copyreg
import faulthandler
import gc
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch

from distvsd.errors import RankError
from distvsd.parallel.world import World, open_local_world

# How long the other ranks may take to notice that a rank has failed and to report it.
AFTERMATH_S = 5.0

_multi_rank_runs = 0


def multi_rank_runs() -> int:
    """How many times this process has really had several ranks finish together; a suite can insist that it is not 0."""
    return _multi_rank_runs


def run_ranks(fn: Callable[..., Any], size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Calls `fn(world, *args)` on `size` forked ranks and returns their results, by rank.

    Each rank has RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in its environment, one torch thread, the CPU, and a
    gloo group whose collectives give up after `timeout_s`. `fn` may be a closure; a result must be a value that
    multiprocessing can send. Raises `RankError` with the rank and its traceback if a rank fails (the first to fail
    comes first) or has no result after `timeout_s`, with the place where it hangs; no process is left behind. On a
    machine with GPUs the caller must not have run a backward pass before: autograd's device threads do not survive a
    fork. Hide the devices (CUDA_VISIBLE_DEVICES=) from suites that use this.
    """
    global _multi_rank_runs
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="distvsd-ranks-") as folder:
        ranks = []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(sender, fn, rank, size, args, Path(folder), timeout_s), daemon=False
            )
            process.start()
            sender.close()
            ranks.append(_Rank(rank, process, receiver))
        try:
            _collect(ranks, timeout_s)
            _refuse_failures(ranks, Path(folder), timeout_s)
        finally:
            for of_rank in ranks:
                of_rank.end()
    _multi_rank_runs += size > 1
    return [of_rank.result for of_rank in ranks]


@dataclass
class _Rank:
    """A child as its parent sees it."""

    rank: int
    process: ForkProcess
    receiver: Connection
    done: bool = False
    result: Any = None
    failure: str | None = None
    failed_at: float = 0.0

    def receive(self) -> None:
        """Takes what the child sent, or records that it died without sending anything."""
        self.done = True
        try:
            self.failure, self.failed_at, self.result = self.receiver.recv()
        except EOFError:
            self.process.join()
            self.failure = f"died without a word, exit code {self.process.exitcode}"
            self.failed_at = 0.0  # sorts before the other failures, which are its consequence

    def end(self) -> None:
        self.process.join(AFTERMATH_S if self.done else 0)
        if self.process.is_alive():
            self.process.kill()  # not terminate: a hung rank may be stopped, or deep in a collective
            self.process.join()
        self.receiver.close()


def _collect(ranks: list[_Rank], timeout_s: float) -> None:
    """Receives until all ranks are done, the time is over, or `AFTERMATH_S` have passed since a failure."""
    deadline = time.monotonic() + timeout_s
    while waiting := {of_rank.receiver: of_rank for of_rank in ranks if not of_rank.done}:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for connection in ready:
            of_rank = waiting[connection]  # type: ignore[index]
            of_rank.receive()
            if of_rank.failure:
                deadline = min(deadline, time.monotonic() + AFTERMATH_S)


def _refuse_failures(ranks: list[_Rank], folder: Path, timeout_s: float) -> None:
    """Raises what the ranks reported: the first failure in full, then the last line of the others' (consequences)."""
    failures = sorted((rank.failed_at, rank.rank, rank.failure) for rank in ranks if rank.failure)
    texts = [
        f"rank {rank} of {len(ranks)} {failure if index == 0 else failure.strip().splitlines()[-1]}"
        for index, (_, rank, failure) in enumerate(failures)
    ]
    for rank in (of_rank.rank for of_rank in ranks if not of_rank.done):
        stack = _stack_file(folder, rank)
        why = f"did not notice within {AFTERMATH_S:g} s" if failures else f"hangs: no result within {timeout_s:g} s"
        texts.append(
            f"rank {rank} of {len(ranks)} {why}; killed\n{stack.read_text() if stack.exists() else ''}".strip()
        )
    if texts:
        raise RankError("\n".join(texts))


def _child(
    sender: Connection,
    fn: Callable[..., Any],
    rank: int,
    size: int,
    args: tuple[Any, ...],
    folder: Path,
    timeout_s: float,
) -> None:
    # First: OpenMP's worker threads did not survive the fork, and a parallel region would wait for them forever.
    torch.set_num_threads(1)
    gc.freeze()  # a collection would visit, and so copy, every object that the parent has
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    os.environ.update(dict(zip(names, map(str, (rank, size, rank, size)), strict=True)))
    with _stack_file(folder, rank).open("w") as stack:
        faulthandler.dump_traceback_later(timeout_s * 0.9, file=stack)
        try:
            with open_local_world(rank, size, str(folder / "rendezvous"), timeout_s) as world:
                result = _call(sender, fn, world, args)
            _send(sender, result=result)
        except _Reported:
            pass
        except BaseException:
            _send(sender, failure=f"failed:\n{traceback.format_exc()}")
        finally:
            faulthandler.cancel_dump_traceback_later()


class _Reported(BaseException):
    """A failure that the parent has already received."""


def _call(sender: Connection, fn: Callable[..., Any], world: World, args: tuple[Any, ...]) -> Any:
    """Reports a failure before the group closes, so that it arrives before the failures that this causes elsewhere."""
    try:
        return fn(world, *args)
    except BaseException as error:
        _send(sender, failure=f"failed:\n{traceback.format_exc()}")
        raise _Reported from error


def _send(sender: Connection, failure: str | None = None, result: Any = None) -> None:
    message = io.BytesIO()
    _ByValue(message).dump((failure, time.monotonic(), result))
    sender.send_bytes(message.getvalue())


class _ByValue(ForkingPickler):
    """Sends tensors by value: the reducers that torch registers share memory, which ends with the sending process."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dispatch_table = copyreg.dispatch_table.copy()


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stack-{rank}.txt"
