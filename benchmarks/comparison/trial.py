"""One trial: a fresh program on forked ranks, and the verdict on what it loaded."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.comparison.candidates import Candidate
from distvsd.errors import RankError
from distvsd.parallel.world import World
from distvsd.testing.ranks import run_ranks

NEWEST, OLDER, REFUSED, WRONG = "newest", "older", "refused", "WRONG"


class Tally(collections.Counter[str]):
    """Verdicts by kind."""

    def __init__(self, verdicts: Iterable[str] = ()) -> None:
        super().__init__(verdict.partition(":")[0] for verdict in verdicts)

    def text(self) -> str:
        """For a cell of a table; what is wrong comes first."""
        said = {
            WRONG: "loaded a wrong state without a word",
            REFUSED: "error, no state",
            OLDER: "went back to an older one",
            NEWEST: "loaded the newest",
        }
        found = [f"{self[kind]} {text}" for kind, text in said.items() if self[kind]]
        return f"of {self.total()}: {'; '.join(found)}"


def judged(make: Callable[[], Candidate], is_right: Callable[[Candidate, int], bool]) -> str:
    """Loads in a fresh program: 'newest' or 'older' for a right state, 'WRONG' for another, 'refused: ...' for none."""
    try:
        candidate = make()
        step = candidate.load()
    except BaseException as error:  # whatever it is, an error instead of a state; DCP's is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{REFUSED}: {type(error).__name__}: {error}"[:300]
    if not is_right(candidate, step):
        return WRONG
    return OLDER if step == 10 else NEWEST


def alone(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(world, *args)` in a forked process of its own, which no launcher started."""

    def unlaunched(world: World, *given: Any) -> Any:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return fn(world, *given)

    return together(1, unlaunched, *args)[0]


def together(size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn(world, *args)` on forked ranks, with what they print thrown away. Raises RankError."""
    with _quiet():
        return run_ranks(fn, size, *args, timeout_s=120)


def outlived(size: int, fn: Callable[..., Any], *args: Any) -> list[Any] | None:
    """As `together`; None where the ranks did not live to its end, which is what these trials are for."""
    try:
        return together(size, fn, *args)
    except RankError:
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries log their errors, hundreds of which are expected here."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for handle in (*kept, nowhere):
            os.close(handle)
