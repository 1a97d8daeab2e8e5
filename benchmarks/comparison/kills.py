"""Probes of a save that does not end: ranks killed at instants spread over it, and a disk that takes no more."""

from __future__ import annotations

import resource
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison.candidates import CANDIDATES, Candidate
from benchmarks.comparison.damage import files_below
from benchmarks.comparison.trial import NEWEST, OLDER, REFUSED, WRONG, Tally, judged, outlived, together
from distvsd.parallel.collectives import barrier
from distvsd.parallel.world import World

SIZE = 2
FULL_AT = 2**19  # bytes a file may have on the full disk; a particle has six times as many


@dataclass(frozen=True)
class Killed:
    """new: verdicts on kills in the save of a new step. again: in that of a step which is there. left: the fewest
    complete checkpoints at any of the instants. seconds: a save takes, without kills."""

    new: Tally
    again: Tally
    left: int
    seconds: float


def killed(name: str, folder: Path, instants: int) -> Killed:
    """Kills all ranks in a save, `instants` times each in two kinds of save, and starts again each time."""
    template = folder / "template"
    template.mkdir(parents=True)
    seconds = max(together(SIZE, _prepare, name, template))
    sizes = {file: (template / file).stat().st_size for file in files_below(template)}
    new, again, left = [], [], []
    for index in range(instants):
        moment = seconds * (index + 0.5) / instants
        trial = folder / "trial"
        _start_from(template, trial)
        died = outlived(SIZE, _die_saving, name, trial, 30, 0, moment) is None
        whole = sum(_is_there(trial, _of_step(sizes, step)) for step in (10, 20))
        verdict, step = _looked(name, trial, [(10, 0), (20, 0), (30, 0)])
        new.append(verdict)
        if died:
            left.append(whole + (step == 30))
        _start_from(template, trial)
        outlived(SIZE, _die_saving, name, trial, 20, 1, moment)
        again.append(_looked(name, trial, [(10, 0), (20, 0), (20, 1)])[0])
    return Killed(Tally(new), Tally(again), min(left, default=0), seconds)


def full(name: str, folder: Path) -> str:
    """What a disk that takes no more, in the save of step 30, leaves of the run and of its checkpoints."""
    folder.mkdir(parents=True)
    together(SIZE, _prepare, name, folder)
    went_on = outlived(SIZE, _save_on_full_disk, name, folder) is not None
    run = "the run goes on and saves later" if went_on else "the run ends"
    steps = [(10, 0), (20, 0), (30, 0), (40, 0)]
    after, _ = _looked(name, folder, steps)
    return f"{run}; started again: {Tally([after]).text().partition(': 1 ')[2]}"


def _prepare(world: World, name: str, folder: Path) -> float:
    """Saves steps 10 and 20; returns the seconds of the second."""
    candidate = CANDIDATES[name](folder, world)
    seconds = 0.0
    for step in (10, 20):
        candidate.task.fill(step)
        barrier(world)
        began = time.perf_counter()
        candidate.save(step)
        seconds = time.perf_counter() - began
    return seconds


def _die_saving(world: World, name: str, folder: Path, step: int, variant: int, moment: float) -> None:
    """A program that was started again, and dies `moment` seconds after the start of its save."""
    candidate = CANDIDATES[name](folder, world)
    candidate.load()
    candidate.task.fill(step, variant)
    barrier(world)
    # The kernel ends the process at this moment as kill -9 does: nobody handles the signal.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, moment)
    candidate.save(step)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _look(world: World, name: str, folder: Path, known: list[tuple[int, int]]) -> list[str]:
    """What a fresh program loads: 'STEP VARIANT' for each known state that all of this rank's tensors are of."""
    loaded: list[str] = []

    def is_right(candidate: Candidate, step: int) -> bool:
        task = candidate.task
        loaded.extend(f"{at} {variant}" for at, variant in known if at == step and not task.differing(at, variant))
        return bool(loaded)

    verdict = judged(lambda: CANDIDATES[name](folder, world), is_right)
    return loaded or [verdict]


def _looked(name: str, folder: Path, known: list[tuple[int, int]]) -> tuple[str, int]:
    """One verdict from what fresh ranks find, and the step; ranks of different states are wrong, each whole or not."""
    by_rank = outlived(SIZE, _look, name, folder, known)
    if by_rank is None:
        return f"{REFUSED}: hangs or crashes", 0
    if refused := [found[0] for found in by_rank if found[0].startswith(REFUSED)]:
        return refused[0], 0
    common = set(by_rank[0]).intersection(*by_rank) - {WRONG}
    if not common:
        return WRONG, 0
    step = max(int(state.split()[0]) for state in common)
    return OLDER if step == 10 else NEWEST, step


def _save_on_full_disk(world: World, name: str, folder: Path) -> None:
    candidate = CANDIDATES[name](folder, world)
    candidate.load()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    candidate.task.fill(30)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT, hard))
    try:
        candidate.save(30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    candidate.task.fill(40)
    candidate.save(40)


def _start_from(template: Path, trial: Path) -> None:
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(template, trial)


def _of_step(sizes: dict[str, int], step: int) -> dict[str, int]:
    return {file: size for file, size in sizes.items() if str(step) in file.partition("/")[0]}


def _is_there(trial: Path, sizes: dict[str, int]) -> bool:
    return all((trial / file).is_file() and (trial / file).stat().st_size == size for file, size in sizes.items())
