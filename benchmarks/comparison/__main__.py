"""Runs every probe on every candidate and writes benchmarks/comparison.md: `python -m benchmarks.comparison`.

Minutes on idle cores; it writes some GB to the folder given by --scratch, a few hundred MB at a time.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch

from benchmarks.comparison.candidates import CANDIDATES
from benchmarks.comparison.damage import FLIPS, damaged, unpickled
from benchmarks.comparison.kills import SIZE, full, killed
from benchmarks.comparison.neighbours import LIMIT_S, broken, lost
from benchmarks.comparison.resume import resumed
from benchmarks.comparison.task import Task
from benchmarks.comparison.trial import Cell
from benchmarks.kill_campaign import small_training, warm_up
from benchmarks.machine import machine
from distvsd.testing.pipelines import tiny_pipeline

PAGE = Path(__file__).parents[1] / "comparison.md"
PAIRS = ((2, 2), (3, 3), (4, 4), (4, 3), (2, 3))
INTRODUCTION = """\
# The same accidents, four ways to save a run

One small task (seven particles that belong to ranks, one network that all of them train; CPU, gloo, forked ranks),
saved and resumed by four programs. Each is written as its own documentation writes it; none is given a weakness that
its pattern does not have by itself. All keep two checkpoints and save their random state. The other loops could be
hardened; this is what they do as written. G1 to G32 are the numbers of [the guarantees](../docs/guarantees.md).
"""
METHOD = """
How it is measured:
- kill -9 (G1, G2, G6): all ranks end at {instants} instants spread over the time that a save takes, by a kernel timer,
  which leaves the process as little as `kill -9`; kills that came too late are not counted. Every state names its step
  in every tensor and in the random state, so that a mixed one is seen.
- damage (G3, G4), one rank: {flips} single bits, in each file of the newest checkpoint in turn, half of them anywhere
  and half in the first or last 256 bytes; each file cut, each deleted; one at a time, with a sound checkpoint before
  it. "Whole" after a flip: a bit that changed nothing that was loaded. Which error is raised is not judged.
- full disk (G5): no file may grow beyond 512 kB (`RLIMIT_FSIZE`) while one step is saved.
- resumed (G9, G11): bits of all particles, of the network and both optimisers after 8 rounds, killed after 4, against
  the number of ranks of the beginning, not interrupted. That the three loops differ on 3 and 4 is probably DDP's
  doing: it lays out its buckets anew after the first round of a program, and so sums in another order.
- NaN (G15): after 4 rounds, NaN in the second, against a run in which the particle sits the second round out.
- a lost rank (G19, G20): one of three, in a training, with a limit of {limit:g} s for collectives in every column. By
  default torch waits 30 minutes (gloo), distvsd 2.
- code (G32): each file replaced by a pickle that makes a folder, and by a `torch.save` of the same.
- seconds: the median of five saves. distvsd hashes every file, forces it to the disk and reads it back before it gives
  it a checkpoint's name; of the others DCP forces files to the disk. distvsd's trainer writes in the background.
- distvsd's columns for G15, G19 and G20 are its own trainer with a tiny random prior, whose guards these are.
"""


def measure(name: str, folder: Path, prior: Path, instants: int) -> Iterator[tuple[str, Cell]]:
    """One candidate's cells, each with its row, as they are found."""
    rows, seconds = killed(name, folder / "kills", instants)
    yield from rows.items()
    yield from damaged(name, folder / "damage").items()
    yield "a full disk does not end the run (G5)", full(name, folder / "full")
    for before, after in PAIRS:
        row = f"on {before} ranks (G9)" if before == after else f"from {before} on {after} ranks (G11)"
        yield f"killed and resumed {row}", resumed(name, folder / f"resume-{before}-{after}", before, after)
    yield "a NaN in one particle changes nothing elsewhere (G15)", broken(name, folder / "nan", prior)
    yield "a killed rank ends the others, named (G19)", lost(name, folder / "killed", prior, signal.SIGKILL)
    yield "a stopped rank ends the others, named (G20)", lost(name, folder / "stopped", prior, signal.SIGSTOP)
    yield "no file of a checkpoint can run code (G32)", unpickled(name, folder / "pickle")
    megabytes = sum(tensor.nbytes for tensor in Task(0, 1).state().values()) / 1e6
    yield f"seconds of a save, {SIZE} ranks, {megabytes:.0f} MB", Cell(None, f"{seconds:.2f}")


def page(columns: dict[str, dict[str, Cell]], instants: int, minutes: float) -> str:
    """benchmarks/comparison.md."""
    names = list(columns)
    written = [f"- **{name}**: {CANDIDATES[name].written_as}." for name in names]
    rows = [f"| {row} | {' | '.join(str(columns[name][row]) for name in names)} |" for row in columns[names[0]]]
    table = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}", *rows]
    method = METHOD.format(instants=instants, flips=FLIPS, limit=LIMIT_S)
    packages = ", ".join(f"{package} {version(package)}" for package in ("distvsd", "accelerate", "safetensors"))
    ran = f"`python -m benchmarks.comparison --instants {instants}`, {minutes:.0f} minutes; {packages}; {machine()}"
    return "\n".join([INTRODUCTION, *written, "", *table, method, ran, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("--only", choices=list(CANDIDATES), nargs="+", default=list(CANDIDATES))
    parser.add_argument("--instants", type=int, default=40, help="kills in each of two kinds of save")
    parser.add_argument("--scratch", type=Path, default=None, help="a folder with 1 GB free; default: the system's")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    columns: dict[str, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory(prefix="comparison-", dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        prior = tiny_pipeline(folder / "prior", "shapes", "v_prediction", 0)
        warm_up(small_training(prior, folder / "warm", True))
        for name in arguments.only:
            columns[name] = {}
            for row, cell in measure(name, folder / name.replace(" ", "-"), prior, arguments.instants):
                columns[name][row] = cell
                print(f"{time.monotonic() - began:5.0f} s  {name}: {row}: {cell}", file=sys.stderr, flush=True)
    minutes = (time.monotonic() - began) / 60
    arguments.page.write_text(page(columns, arguments.instants, minutes), encoding="ascii")


if __name__ == "__main__":
    main()
