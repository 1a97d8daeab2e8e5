"""Probes of resuming: the same bits as an uninterrupted run, on the same and on another number of ranks; and NaN."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from benchmarks.comparison.candidates import CANDIDATES, Distvsd
from benchmarks.comparison.task import PARTICLES
from benchmarks.comparison.trial import outlived, together
from distvsd.errors import RankError
from distvsd.parallel.world import World

HALF, WHOLE = 4, 8
BROKEN = 2
Digests = dict[str, str]


def resumed(name: str, folder: Path, before: int, after: int) -> str:
    """Trains half on `before` ranks, kills them, the rest on `after`; compares with `before` ranks uninterrupted."""
    (folder / "whole").mkdir(parents=True)
    (folder / "parts").mkdir()
    expected = _union(together(before, _train, name, folder / "whole", 0, WHOLE, False))
    outlived(before, _train, name, folder / "parts", 0, HALF, True)
    try:
        found = _union(together(after, _train, name, folder / "parts", HALF, WHOLE, False))
    except RankError as error:
        return f"error: {_last_line(str(error))}"
    lost = {int(key.split("/")[1]) for key in expected.keys() - found.keys()}
    if lost:
        return f"goes on without {len(lost)} of {PARTICLES} particles"
    different = sum(expected[key] != found[key] for key in expected)
    return "the same bits" if not different else f"goes on; {different} of {len(expected)} tensors differ"


def broken(name: str, folder: Path) -> str:
    """One render of one particle is NaN in one round: how many particles are still finite three rounds later."""
    folder.mkdir(parents=True)
    finite = _broken_in_distvsd(folder) if name == Distvsd.name else sum(together(2, _train_broken, name, folder))
    return f"{finite} of {PARTICLES} particles finite"


def _train(world: World, name: str, folder: Path, first: int, last: int, die: bool) -> Digests:
    candidate = CANDIDATES[name](folder, world)
    if first:
        candidate.load()
    for number in range(first, last):
        candidate.step(number)
    if die:
        candidate.save(last)
        os.kill(os.getpid(), signal.SIGKILL)
    return candidate.task.digests()


def _union(by_rank: list[Digests]) -> Digests:
    """All particles, and rank 0's network."""
    shared = dict(by_rank[0])
    for digests in by_rank[1:]:
        shared |= {key: value for key, value in digests.items() if key.startswith("particle/")}
    return shared


def _train_broken(world: World, name: str, folder: Path) -> int:
    """Finite particles of this rank."""
    candidate = CANDIDATES[name](folder, world)
    for number in range(4):
        candidate.step(number, broken=BROKEN if number == 1 else None)
    return sum(bool(value.isfinite().all()) for value in candidate.task.particles.values())


def _broken_in_distvsd(folder: Path) -> int:
    """The guard is the trainer's, not the saver's: a training of tiny NeRFs with the shipped prior."""
    from distvsd.build import load_particles
    from distvsd.config import load_config
    from distvsd.testing.faults import injected
    from distvsd.train import train

    smoke = Path(__file__).parents[2] / "configs" / "smoke.yaml"
    small = {"particles.count": PARTICLES, "schedule.rounds": 4, "checkpoint.every": 4, "render.resolution": 64}
    config = load_config(smoke, [f"{key}={value}" for key, value in ({"run.dir": folder / "run"} | small).items()])
    with injected(f"nan@render:particle={BROKEN}:step=1"):
        together(2, lambda world: train(config))
    ensemble = load_particles(folder / "run").ensemble
    return sum(
        all(bool(torch.isfinite(value).all()) for value in ensemble.parameters_of(particle).values())
        for particle in range(PARTICLES)
    )


def _last_line(text: str) -> str:
    """The first rank's own complaint: the last line of its traceback."""
    lines = [line for line in text.split("\nrank ")[0].strip().splitlines() if line.strip()]
    return lines[-1][:160]
