"""One trial: starts programs on forked ranks, and judges what they loaded."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison.candidates import CANDIDATES
from distvsd.errors import RankError
from distvsd.parallel.world import World
from distvsd.testing.ranks import run_ranks

# The steps of the checkpoints: two saved before the fault, one during it, one after it.
OLD, NEW, STRUCK, LATER = 10, 20, 30, 40
NEWEST, OLDER, REFUSED, WRONG = "newest", "older", "refused", "WRONG"
State = tuple[int, int]  # step and variant


@dataclass(frozen=True)
class Cell:
    """One cell of the table: whether the guarantee of the row holds (None if the row is no guarantee), and details."""

    holds: bool | None
    text: str

    def __str__(self) -> str:
        return {True: "yes: ", False: "**no**: ", None: ""}[self.holds] + self.text.replace("|", "/")


@dataclass(frozen=True)
class Verdict:
    """What a restarted program loaded: the kind of result, and the step from which it continues."""

    kind: str
    step: int = 0


class Tally(collections.Counter[str]):
    """Counts of verdicts by kind."""

    def __init__(self, verdicts: Iterable[Verdict] = ()) -> None:
        super().__init__(verdict.kind for verdict in verdicts)

    def __str__(self) -> str:
        said = {
            WRONG: "loaded a wrong state without an error",
            REFUSED: "ended in an error",
            OLDER: "loaded the previous checkpoint",
            NEWEST: "loaded the newest checkpoint",
        }
        found = [f"{self[kind]} {text}" for kind, text in said.items() if self[kind]]
        return f"of {self.total()}: {'; '.join(found)}"


def two_saves(world: World, name: str, folder: Path) -> None:
    """A program that saves OLD and NEW."""
    candidate = CANDIDATES[name](folder, world)
    for step in (OLD, NEW):
        candidate.fill(step)
        candidate.save(step)


def files_of(folder: Path, step: int) -> dict[str, int]:
    """The files of the checkpoint of one step below a candidate's folder, with their sizes in bytes."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.stat().st_size for name, path in sorted(files.items()) if str(step) in name.parts[0]}


def looked(size: int, name: str, folder: Path, known: list[State]) -> Verdict:
    """What `size` restarted ranks load. The verdict is WRONG if they have no known state in common, even if each rank
    alone has a complete one."""
    try:
        by_rank = (alone if size == 1 else together)(size, _look, name, folder, known)
    except RankError:  # a rank crashed or hung
        return Verdict(REFUSED)
    if None in by_rank:
        return Verdict(REFUSED)
    common = set(by_rank[0]).intersection(*by_rank)
    if not common:
        return Verdict(WRONG)
    step = max(step for step, _ in common)
    return Verdict(OLDER if step == OLD else NEWEST, step)


def _look(world: World, name: str, folder: Path, known: list[State]) -> list[State] | None:
    """Loads, and returns the known states that this rank's state equals. None if loading raised an error."""
    try:
        candidate = CANDIDATES[name](folder, world)
        step = candidate.load()
    except KeyboardInterrupt:
        raise
    except BaseException:  # DCP raises errors that are not subclasses of Exception
        return None
    return [state for state in known if state[0] == step and candidate.is_of(*state)]


def alone(size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """As `together`, but as if no launcher had started the process. size: 1."""

    def unlaunched(world: World, *given: Any) -> Any:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return fn(world, *given)

    return together(size, unlaunched, *args)


def together(size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs `fn(world, *args)` on forked ranks and discards their output. Raises RankError."""
    with _quiet():
        return run_ranks(fn, size, *args, timeout_s=60)


def die(number: signal.Signals, size: int, fn: Callable[..., Any], *args: Any) -> bool:
    """As `together`, for ranks that a signal should end. Returns whether it ended them before they were done."""
    try:
        together(size, fn, *args)
    except RankError as error:
        if f"exit code -{number.value}" not in str(error):
            raise
        return True
    return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards the output of all libraries, which log hundreds of expected errors."""
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
