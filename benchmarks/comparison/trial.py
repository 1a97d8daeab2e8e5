"""One trial: fresh programs on forked ranks, and the verdict on what they loaded."""

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

# Steps that are saved: two that are there before the accident, one that it strikes, one after it.
OLD, NEW, STRUCK, LATER = 10, 20, 30, 40
NEWEST, OLDER, REFUSED, WRONG = "newest", "older", "refused", "WRONG"
State = tuple[int, int]  # step and variant


@dataclass(frozen=True)
class Cell:
    """One cell of the table: whether the guarantee of its row holds (None where the row promises nothing), and how."""

    holds: bool | None
    text: str

    def __str__(self) -> str:
        return {True: "yes: ", False: "**no**: ", None: ""}[self.holds] + self.text.replace("|", "/")


@dataclass(frozen=True)
class Verdict:
    """What a program that was started again had: a kind, and the step it goes on from."""

    kind: str
    step: int = 0


class Tally(collections.Counter[str]):
    """Verdicts by kind."""

    def __init__(self, verdicts: Iterable[Verdict] = ()) -> None:
        super().__init__(verdict.kind for verdict in verdicts)

    def __str__(self) -> str:
        said = {
            WRONG: "loaded a wrong state without a word",
            REFUSED: "error, no state",
            OLDER: "went back to the one before",
            NEWEST: "loaded the newest, whole",
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
    """The files of one step's checkpoint below a candidate's folder, with their sizes."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.stat().st_size for name, path in sorted(files.items()) if str(step) in name.parts[0]}


def looked(size: int, name: str, folder: Path, known: list[State]) -> Verdict:
    """What `size` fresh ranks find. Ranks of different states are wrong, each of them whole or not."""
    try:
        by_rank = (alone if size == 1 else together)(size, _look, name, folder, known)
    except RankError:  # one crashed, or hung
        return Verdict(REFUSED)
    if None in by_rank:
        return Verdict(REFUSED)
    common = set(by_rank[0]).intersection(*by_rank)
    if not common:
        return Verdict(WRONG)
    step = max(step for step, _ in common)
    return Verdict(OLDER if step == OLD else NEWEST, step)


def _look(world: World, name: str, folder: Path, known: list[State]) -> list[State] | None:
    """Those known states that all of this rank is of after it has loaded; None where that ended in an error."""
    try:
        candidate = CANDIDATES[name](folder, world)
        step = candidate.load()
    except KeyboardInterrupt:
        raise
    except BaseException:  # whatever it is, an error instead of a state; DCP's is no Exception
        return None
    return [state for state in known if state[0] == step and candidate.is_of(*state)]


def alone(size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """As `together`, for one process, which then is one that no launcher started."""

    def unlaunched(world: World, *given: Any) -> Any:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return fn(world, *given)

    return together(size, unlaunched, *args)


def together(size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn(world, *args)` on forked ranks, with what they print thrown away. Raises RankError."""
    with _quiet():
        return run_ranks(fn, size, *args, timeout_s=60)


def die(number: signal.Signals, size: int, fn: Callable[..., Any], *args: Any) -> bool:
    """As `together`, for ranks that a signal should end: whether it did, before they were done."""
    try:
        together(size, fn, *args)
    except RankError as error:
        if f"exit code -{number.value}" not in str(error):
            raise
        return True
    return False


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
