"""Faults of one particle or one rank, and their effect on the others: a NaN in one render; a killed or stopped rank."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

from torch import Tensor

from benchmarks.comparison.candidates import CANDIDATES, Distvsd, Loop
from benchmarks.comparison.task import PARTICLES
from benchmarks.comparison.trial import Cell, together
from benchmarks.kill_campaign import small_training
from distvsd.errors import RankError
from distvsd.faults import injected
from distvsd.parallel.collectives import set_timeout
from distvsd.parallel.world import World
from distvsd.particles import Views
from distvsd.run.build import build_run
from distvsd.run.train import train
from distvsd.vsd.samples import Samples

BROKEN, ROUND, ROUNDS = 2, 1, 4
LOST, SIZE = 1, 3
LIMIT_S = 5.0  # timeout of collectives, the same for every candidate
Content = dict[str, tuple[str, bool]]  # tensor name: SHA-256, and whether all numbers are finite


def broken(name: str, folder: Path, prior: Path) -> Cell:
    """Compares a run with a NaN in one render of one particle with a run in which that particle skips the round."""
    folder.mkdir(parents=True)
    rounds = _rounds_of_distvsd if name == Distvsd.name else _rounds_of_loop
    struck, reference = (_elsewhere(together(2, rounds, name, folder, prior, is_nan)) for is_nan in (True, False))
    changed = sum(struck[key] != reference[key] for key in reference)
    lost = sum(not is_finite for _, is_finite in struck.values())
    return Cell(not changed, f"{changed} of {len(reference)} other tensors change, {lost} become non-finite")


def lost(name: str, folder: Path, prior: Path, number: signal.Signals) -> Cell:
    """Signals one rank in a training; reports when the others end, and whether their errors name that rank."""
    folder.mkdir(parents=True)
    said: list[str] = []
    try:
        together(SIZE, _train_to_the_signal, name, folder, prior, number)
    except RankError as error:
        said.append(str(error))
    if not (folder / "struck").exists():
        raise RankError(f"{name} did not train until the signal: {said}")
    reports = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
    if len(reports) < SIZE - 1:
        return Cell(False, f"{SIZE - 1 - len(reports)} of {SIZE - 1} other ranks still wait at the end of the trial")
    seconds = max(report["time"] for report in reports) - float((folder / "struck").read_text())
    is_named = all(re.search(rf"\brank {LOST}\b", report["text"]) for report in reports)
    return Cell(is_named, f"the others end after {seconds:.1f} s and {'name' if is_named else 'do not name'} it")


def _rounds_of_loop(world: World, name: str, folder: Path, prior: Path, is_nan: bool) -> Content:
    candidate = CANDIDATES[name](folder, world)
    assert isinstance(candidate, Loop), f"{name} has a trainer of its own"
    for number in range(ROUNDS):
        struck = BROKEN if number == ROUND else None
        candidate.step(number, nan=struck if is_nan else None, absent=None if is_nan else struck)
    return {key: _content(tensor) for key, tensor in candidate.task.state().items()}


def _rounds_of_distvsd(world: World, name: str, folder: Path, prior: Path, is_nan: bool) -> Content:
    """Rounds of the trainer. A particle skips a round by samples of weight 0, and its state is restored afterwards."""
    config = small_training(prior, folder / "run", False, **{"particles.count": PARTICLES})
    parts = build_run(config, world, lambda done: False)

    def without(views: list[Views], resolution: int) -> Samples:
        samples = parts.loop.encode(views, resolution)
        return dataclasses.replace(samples, weight=samples.weight * (samples.ids != BROKEN))

    for number in range(ROUNDS):
        sits_out = number == ROUND and not is_nan
        state = parts.ensemble.state().get(BROKEN, {})
        before = {key: tensor.clone() for key, tensor in state.items()}
        loop = dataclasses.replace(parts.loop, encode=without) if sits_out else parts.loop
        with injected(f"nan@render:particle={BROKEN}:step={ROUND}" if is_nan else ""):
            loop.round(number)
        for key, tensor in before.items() if sits_out else ():
            parts.ensemble.state()[BROKEN][key].copy_(tensor)
    found = {
        f"particle/{particle}/{key}": _content(tensor)
        for particle, tensors in parts.ensemble.state().items()
        for key, tensor in tensors.items()
    }
    for file, tensors in (parts.training.state() if parts.training else {}).items():
        found |= {f"{file}/{key}": _content(tensor) for key, tensor in tensors.items()}
    return found


def _content(tensor: Tensor) -> tuple[str, bool]:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest(), bool(tensor.isfinite().all())


def _elsewhere(by_rank: list[Content]) -> Content:
    """The tensors of all ranks without those of the particle with the NaN."""
    union = {key: value for content in by_rank for key, value in content.items()}
    return {key: value for key, value in union.items() if not key.startswith(f"particle/{BROKEN}/")}


def _train_to_the_signal(world: World, name: str, folder: Path, prior: Path, number: signal.Signals) -> None:
    """Trains until an error. Each of the other ranks writes the error and its time to a file."""
    work = _train_distvsd if name == Distvsd.name else _train_loop
    if world.rank == LOST:
        threading.Thread(target=_strike, args=(folder, number), daemon=True).start()
    try:
        work(world, name, folder, prior)
    except Exception as error:
        report = {"time": time.monotonic(), "text": str(error)}
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(report))
        raise


def _train_loop(world: World, name: str, folder: Path, prior: Path) -> None:
    candidate = CANDIDATES[name](folder, world)
    set_timeout(world, LIMIT_S)
    (folder / "run").mkdir(exist_ok=True)
    for step in itertools.count():
        candidate.step(step)
        if world.rank == LOST:
            with (folder / "run/metrics.jsonl").open("a") as log:
                log.write(f"{step}\n")


def _train_distvsd(world: World, name: str, folder: Path, prior: Path) -> None:
    limits = {"parallel.timeout_s": LIMIT_S, "checkpoint.every": 0, "particles.count": PARTICLES}
    train(small_training(prior, folder / "run", False, rounds=100_000, **limits))


def _strike(folder: Path, number: signal.Signals) -> None:
    """Sends the signal to its own process after the training has logged three rounds."""
    log = folder / "run/metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < 3:
        time.sleep(0.01)
    (folder / "struck").write_text(str(time.monotonic()))
    os.kill(os.getpid(), number)
