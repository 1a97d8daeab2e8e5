"""Resumes on the same and on another number of ranks, and compares the bits with an uninterrupted run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from benchmarks.comparison.candidates import CANDIDATES
from benchmarks.comparison.task import PARTICLES
from benchmarks.comparison.trial import Cell, die, together
from distvsd.errors import RankError
from distvsd.parallel.world import World

HALF, WHOLE = 4, 8
Digests = dict[str, str]


def resumed(name: str, folder: Path, before: int, after: int) -> Cell:
    """Trains the first half on `before` ranks, kills them, and trains the second half on `after` ranks. Compares the
    result with an uninterrupted run on `before` ranks."""
    (folder / "whole").mkdir(parents=True)
    (folder / "parts").mkdir()
    expected = _union(together(before, _train, name, folder / "whole", 0, WHOLE, False))
    die(signal.SIGKILL, before, _train, name, folder / "parts", 0, HALF, True)
    try:
        found = _union(together(after, _train, name, folder / "parts", HALF, WHOLE, False))
    except RankError as error:
        return Cell(False, f"error, {_complaint(str(error).replace(f'{folder}/parts/', ''))}")
    lost = {key.split("/")[1] for key in expected.keys() - found.keys()}
    if lost:
        return Cell(False, f"resumes without {len(lost)} of {PARTICLES} particles")
    different = sum(expected[key] != found[key] for key in expected)
    return Cell(not different, f"resumes, {different} of {len(expected)} tensors differ" if different else "same bits")


def _train(world: World, name: str, folder: Path, first: int, last: int, dies: bool) -> Digests:
    candidate = CANDIDATES[name](folder, world)
    if first:
        candidate.load()
    for number in range(first, last):
        candidate.step(number)
    if dies:
        candidate.save(last)
        os.kill(os.getpid(), signal.SIGKILL)
    return candidate.task.digests()


def _union(by_rank: list[Digests]) -> Digests:
    """The particles of all ranks, and the network of rank 0."""
    shared = dict(by_rank[0])
    for digests in by_rank[1:]:
        shared |= {key: value for key, value in digests.items() if key.startswith("particle/")}
    return shared


def _complaint(text: str) -> str:
    """The error of the first rank: the last line of its traceback."""
    lines = [line for line in text.split("\nrank ")[0].strip().splitlines() if line.strip()]
    return f"`{lines[-1][:120]}`"
