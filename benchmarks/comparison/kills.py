"""Faults during a save: ranks killed at instants spread over it, and a full disk."""

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
FULL_AT = 2**19  # largest file in bytes on the full disk; the file of a particle needs three times as many


def killed(name: str, folder: Path, instants: int) -> tuple[dict[str, Cell], float]:
    """Kills all ranks in a save of a new step and in a save of an existing step, `instants` times each, and starts
    again after every kill. Returns the rows of the table, and the seconds of an undisturbed save."""
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
        "kill -9 during a save loses at most that save (G1)": Cell(after_new[NEWEST] == len(new), str(after_new)),
        "kill -9 while an existing step is saved again mixes no states (G2)": Cell(
            not after_again[WRONG] and not after_again[REFUSED], str(after_again)
        ),
        "two complete checkpoints at any instant of a save (G6)": Cell(min(left) >= 2, f"at least {min(left)}"),
    }
    return rows, seconds


def full(name: str, folder: Path) -> Cell:
    """Whether the run and its checkpoints survive one save on a full disk."""
    folder.mkdir(parents=True)
    together(SIZE, two_saves, name, folder)
    try:
        together(SIZE, _save_on_full_disk, name, folder)
        goes_on = True
    except RankError:
        goes_on = False
    after = looked(SIZE, name, folder, [(OLD, 0), (NEW, 0), (STRUCK, 0), (LATER, 0)])
    run = "the run continues, and its next save works" if goes_on else "the run ends"
    resumed = f"started again, it resumes from step {after.step}" if after.step else "started again, it fails"
    return Cell(goes_on and after.step == LATER, f"{run}; {resumed}")


def _save(world: World, name: str, folder: Path, step: int, variant: int, moment: float) -> float:
    """A restarted program saves, and is killed `moment` seconds after the start of that save, unless `moment` is 0.
    Returns the seconds of the save."""
    candidate = CANDIDATES[name](folder, world)
    candidate.load()
    candidate.fill(step, variant)
    barrier(world)
    # With the default action the kernel ends the process when the timer fires, as it does on kill -9.
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
