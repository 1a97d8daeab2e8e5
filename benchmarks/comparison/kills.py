"""Probes of a save that does not end: ranks killed at instants spread over it, and a disk that takes no more."""

from __future__ import annotations

import resource
import shutil
import signal
import statistics
import time
from pathlib import Path

from benchmarks.comparison.candidates import CANDIDATES
from benchmarks.comparison.trial import (
    LATER,
    NEW,
    NEWEST,
    OLD,
    REFUSED,
    STRUCK,
    WRONG,
    Cell,
    Tally,
    die,
    files_of,
    looked,
    together,
    two_saves,
)
from distvsd.errors import RankError
from distvsd.parallel.collectives import barrier
from distvsd.parallel.world import World

SIZE = 2
FULL_AT = 2**19  # bytes a file may have on the full disk; a particle has three times as many


def killed(name: str, folder: Path, instants: int) -> tuple[dict[str, Cell], float]:
    """Kills all ranks in a save, `instants` times each in two kinds of save, and starts again each time. Returns the
    rows on it, and the seconds of a save that nobody disturbs."""
    template, trial = folder / "template", folder / "trial"
    template.mkdir(parents=True)
    together(SIZE, two_saves, name, template)
    before = {step: files_of(template, step) for step in (OLD, NEW)}
    times = []
    for _ in range(5):
        _start_from(template, trial)
        times.append(max(together(SIZE, _save, name, trial, STRUCK, 0, 0.0)))
    seconds = statistics.median(times)
    new, again, left = [], [], []
    for index in range(instants):
        moment = seconds * (index + 0.5) / instants
        _start_from(template, trial)
        if die(signal.SIGALRM, SIZE, _save, name, trial, STRUCK, 0, moment):
            whole = sum(files.items() <= files_of(trial, step).items() for step, files in before.items())
            new.append(looked(SIZE, name, trial, [(OLD, 0), (NEW, 0), (STRUCK, 0)]))
            left.append(whole + (new[-1].step == STRUCK))
        _start_from(template, trial)
        if die(signal.SIGALRM, SIZE, _save, name, trial, NEW, 1, moment):
            again.append(looked(SIZE, name, trial, [(OLD, 0), (NEW, 0), (NEW, 1)]))
    after_new, after_again = Tally(new), Tally(again)
    rows = {
        "kill -9 in a save loses no more than that save (G1)": Cell(after_new[NEWEST] == len(new), str(after_new)),
        "kill -9 in a save of a step that is there mixes nothing (G2)": Cell(
            not after_again[WRONG] and not after_again[REFUSED], str(after_again)
        ),
        "two whole checkpoints at any instant of a save (G6)": Cell(min(left) >= 2, f"{min(left)} at the worst"),
    }
    return rows, seconds


def full(name: str, folder: Path) -> Cell:
    """What a disk that takes no more, in one save, leaves of the run and of its checkpoints."""
    folder.mkdir(parents=True)
    together(SIZE, two_saves, name, folder)
    try:
        together(SIZE, _save_on_full_disk, name, folder)
        goes_on = True
    except RankError:
        goes_on = False
    after = looked(SIZE, name, folder, [(OLD, 0), (NEW, 0), (STRUCK, 0), (LATER, 0)])
    run = "the run goes on, and its next save works" if goes_on else "the run ends"
    resumed = f"started again it resumes from step {after.step}" if after.step else "started again it ends in an error"
    return Cell(goes_on and after.step == LATER, f"{run}; {resumed}")


def _save(world: World, name: str, folder: Path, step: int, variant: int, moment: float) -> float:
    """A program that was started again saves, and dies `moment` seconds after the start of that save; with 0 it lives.
    Returns the seconds it took."""
    candidate = CANDIDATES[name](folder, world)
    candidate.load()
    candidate.fill(step, variant)
    barrier(world)
    # The kernel ends the process at this moment as kill -9 does: nobody handles the signal.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    began = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, moment)
    candidate.save(step)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return time.perf_counter() - began


def _save_on_full_disk(world: World, name: str, folder: Path) -> None:
    candidate = CANDIDATES[name](folder, world)
    candidate.load()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    candidate.fill(STRUCK)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, hard))
    try:
        candidate.save(STRUCK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    candidate.fill(LATER)
    candidate.save(LATER)


def _start_from(template: Path, trial: Path) -> None:
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(template, trial)
