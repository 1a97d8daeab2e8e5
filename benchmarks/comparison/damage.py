"""Faults of a checkpoint on one rank: flipped bits, cut and missing files, files with code in them."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.comparison.trial import (
    NEW,
    OLD,
    REFUSED,
    WRONG,
    Cell,
    Tally,
    Verdict,
    alone,
    files_of,
    looked,
    two_saves,
)

FLIPS = 120
EDGE = 256  # bytes at the start and end of a file, where headers are; half of the flips are there


def damaged(name: str, folder: Path) -> dict[str, Cell]:
    """The rows for flipping single bits, cutting each file in half, and deleting each file."""
    folder.mkdir(parents=True)
    alone(1, two_saves, name, folder)
    newest = list(files_of(folder, NEW))
    draw = random.Random(1)
    # The files take turns, and the flips of each file alternate between anywhere and an edge.
    flips = [(newest[n % len(newest)], _flip(draw, n // len(newest) % 2 == 1)) for n in range(FLIPS)]
    accidents: dict[str, list[tuple[str, Callable[[bytes], bytes | None]]]] = {
        "a flipped bit is detected (G3)": [*flips],
        "a file cut in half is detected (G3)": [(file, lambda data: data[: len(data) // 2]) for file in newest],
        "a missing file is detected (G3)": [(file, lambda data: None) for file in newest],
    }
    tallies = {
        row: Tally(_after(name, folder, file, change) for file, change in changes) for row, changes in accidents.items()
    }
    found = {row: Cell(not tally[WRONG], str(tally)) for row, tally in tallies.items()}
    total, refused = (sum(map(count, tallies.values())) for count in (Tally.total, lambda tally: tally[REFUSED]))
    stuck = Cell(not refused, f"{refused} of {total} faults cause an error until somebody deletes the checkpoint")
    return found | {"a damaged checkpoint is skipped for an undamaged one (G4)": stuck}


def unpickled(name: str, folder: Path) -> Cell:
    """Which files of a checkpoint run code when they are loaded, if code is put into them."""
    folder.mkdir(parents=True)
    alone(1, two_saves, name, folder)
    mark = folder.parent / f"{folder.name}-ran"
    ran = set()
    for file in files_of(folder, NEW):
        for evil in (_raw_pickle, _torch_archive):
            _after(name, folder, file, lambda data, evil=evil: evil(mark))  # type: ignore[misc]
            if mark.is_dir():
                mark.rmdir()
                ran.add(Path(file).name)
    return Cell(not ran, f"code in {', '.join(sorted(ran))} runs" if ran else "no code runs")


def _after(name: str, folder: Path, file: str, change: Callable[[bytes], bytes | None]) -> Verdict:
    """What a program loads while one file is changed. `change` returns None to delete the file."""
    path = folder / file
    original = path.read_bytes()
    changed = change(original)
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    try:
        return looked(1, name, folder, [(OLD, 0), (NEW, 0)])
    finally:
        path.write_bytes(original)


def _flip(draw: random.Random, at_an_edge: bool) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        changed = bytearray(data)
        place = draw.randrange(min(EDGE, len(changed)) if at_an_edge else len(changed))
        if at_an_edge and draw.random() < 0.5:
            place = len(changed) - 1 - place
        changed[place] ^= 1 << draw.randrange(8)
        return bytes(changed)

    return change


class _Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _raw_pickle(mark: Path) -> bytes:
    return pickle.dumps(_Evil(mark))


def _torch_archive(mark: Path) -> bytes:
    archive = mark.with_suffix(".pt")
    torch.save(_Evil(mark), archive)
    return archive.read_bytes()
