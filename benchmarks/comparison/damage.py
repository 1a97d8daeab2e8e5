"""Probes of one damaged checkpoint: flipped bits, cut and missing files, files that want to run code. One rank."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.candidates import CANDIDATES, Candidate
from benchmarks.comparison.trial import Tally, alone, judged
from distvsd.parallel.world import World

FLIPS = 36
EDGE = 256  # bytes at a file's start and end, where headers lie; half of the flips go there


def damaged(name: str, folder: Path) -> dict[str, Tally]:
    """What came of flipping single bits, cutting each file in half, and deleting each file."""
    newest = alone(_two_saves, name, folder)
    return {
        "flipped": Tally(alone(_each, name, folder, newest, _flips)),
        "cut": Tally(alone(_each, name, folder, newest, _cuts)),
        "missing": Tally(alone(_each, name, folder, newest, _losses)),
    }


def unpickled(name: str, folder: Path) -> list[str]:
    """Names of the files of a checkpoint whose loading ran code that was put into them."""
    newest = alone(_two_saves, name, folder)
    mark = folder.parent / f"{folder.name}-ran"
    ran: list[str] = []
    for file in newest:
        original = (folder / file).read_bytes()
        for evil in (_raw_pickle, _torch_archive):
            evil(folder / file, mark)
            alone(_load_quietly, name, folder)
            if mark.is_dir():
                mark.rmdir()
                ran.append(file)
        (folder / file).write_bytes(original)
    return sorted(set(ran))


def _two_saves(world: World, name: str, folder: Path) -> list[str]:
    """Saves steps 10 and 20; returns the files of 20."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    candidate = CANDIDATES[name](folder, world)
    before: set[str] = set()
    for step in (10, 20):
        before = set(files_below(folder))
        candidate.task.fill(step)
        candidate.save(step)
    return sorted(set(files_below(folder)) - before)


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _each(
    world: World, name: str, folder: Path, newest: list[str], accidents: Callable[[Path, list[str]], Iterator[None]]
) -> list[str]:
    """A verdict for each accident, each on the otherwise sound checkpoint of step 20."""
    verdicts = []
    for _ in accidents(folder, newest):
        verdicts.append(judged(lambda: CANDIDATES[name](folder, world), _is_whole))
    return verdicts


def _is_whole(candidate: Candidate, step: int) -> bool:
    return step in (10, 20) and not candidate.task.differing(step)


def _flips(folder: Path, newest: list[str]) -> Iterator[None]:
    draw = random.Random(1)
    for index in range(FLIPS):
        path = folder / newest[index % len(newest)]
        original = path.read_bytes()
        changed = bytearray(original)
        place = draw.randrange(len(changed))
        if index % 2:
            place = min(len(changed) - 1, draw.randrange(EDGE))
            place = len(changed) - 1 - place if draw.random() < 0.5 else place
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        yield
        path.write_bytes(original)


def _cuts(folder: Path, newest: list[str]) -> Iterator[None]:
    for file in newest:
        original = (folder / file).read_bytes()
        (folder / file).write_bytes(original[: len(original) // 2])
        yield
        (folder / file).write_bytes(original)


def _losses(folder: Path, newest: list[str]) -> Iterator[None]:
    for file in newest:
        original = (folder / file).read_bytes()
        (folder / file).unlink()
        yield
        (folder / file).write_bytes(original)


class _Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _raw_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(_Evil(mark)))


def _torch_archive(path: Path, mark: Path) -> None:
    torch.save(_Evil(mark), path)


def _load_quietly(world: World, name: str, folder: Path) -> None:
    judged(lambda: CANDIDATES[name](folder, world), _is_whole)
