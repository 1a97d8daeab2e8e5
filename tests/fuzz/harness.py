"""A campaign of random bad input: each case is accepted or refused with a message, in bounded time and memory.

A kind of input is a module of this folder with one function, `attempt(draw, folder)`: it makes one case from the random
numbers of `draw`, in the empty folder `folder`, and reads it as the program would. It returns if the input was
accepted and lets a `DistvsdError` through if it was refused. Everything else is a finding.
"""

from __future__ import annotations

import random
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from distvsd.errors import DistvsdError

Attempt = Callable[[random.Random, Path], None]
MEMORY_BYTES = 4 * 2**30  # that a case may allocate beyond the memory of the process


class Hang(BaseException):
    """A case exceeded its time limit. A BaseException, so that no `except Exception` in the program catches it."""


@dataclass
class Tally:
    """The results of the cases. tracebacks, hangs: one text per finding, with the number that reproduces the case."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    tracebacks: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[str]:
        return self.tracebacks + self.hangs

    def __str__(self) -> str:
        return (
            f"{self.cases} cases: {self.refused} refused, {self.accepted} accepted, "
            f"{len(self.tracebacks)} tracebacks, {len(self.hangs)} hangs"
        )


def campaign(attempt: Attempt, first: int, last: int, seed: int = 0, limit_s: float = 10.0) -> Tally:
    """Runs the cases `first` to `last - 1`; case i depends on (seed, i) only."""
    tally = Tally()
    with _little_memory():
        for number in range(first, last):
            folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
            try:
                _one(attempt, number, seed, folder, limit_s, tally)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return tally


def _one(attempt: Attempt, number: int, seed: int, folder: Path, limit_s: float, tally: Tally) -> None:
    tally.cases += 1
    try:
        with limited(limit_s):
            attempt(random.Random(f"{seed}/{number}"), folder)
        tally.accepted += 1
    except DistvsdError:
        tally.refused += 1
    except Hang:
        tally.hangs.append(f"case {number}: no answer after {limit_s:g} s")
    except Exception:
        tally.tracebacks.append(f"case {number}:\n{traceback.format_exc()}")


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang if the block takes longer. Only for the main thread."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _little_memory() -> Iterator[None]:
    """Limits memory, so that an excessive allocation raises MemoryError and does not exhaust the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
