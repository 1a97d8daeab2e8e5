"""Tests every candidate under every fault and writes benchmarks/comparison.md: `python -m benchmarks.comparison`.

It takes minutes on idle cores. It writes some GB to the folder given by --scratch, a few hundred MB at a time.
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
# Four ways to save a run, under the same faults

Four programs save and resume one small task: seven particles divided among the ranks, and one network that all ranks
train (CPU, gloo, forked ranks). The programs other than distvsd follow the documentation of their library, and no
weakness was added. They could be hardened; this page shows what they do as documented. All four keep two checkpoints
and save their random state. G1 to G32 are the numbers of [the guarantees](../docs/guarantees.md).
"""
METHOD = """
How it is measured:
- kill -9 (G1, G2, G6): a kernel timer ends all ranks at {instants} instants, evenly spaced over the time that a save
  takes. The process cannot handle it, as it cannot handle `kill -9`. Kills that came after the save had ended are not
  counted. Every tensor and the random state contain the step, so a state mixed from two steps is detected.
- damage (G3, G4), one rank: {flips} flips of a single bit, in each file of the newest checkpoint in turn, half of them
  anywhere and half in the first or last 256 bytes; each file cut in half; each file deleted. There is one damage at a
  time, and an undamaged checkpoint before it. After a flip, "loaded the newest checkpoint" means that the bit changed
  nothing in the loaded state. The kind of error is not judged.
- full disk (G5): no file can grow beyond 512 kB (`RLIMIT_FSIZE`) while one step is saved.
- resumed (G9, G11): the run is killed after 4 rounds and resumed. After 8 rounds the bits of all particles, the network
  and all optimisers are compared with an uninterrupted run on the first number of ranks. The results of the other three
  programs differ on 3 and 4 ranks. The cause is probably DDP, which lays out its buckets again after the first round of
  a program, and then sums in another order.
- NaN (G15): a NaN in the second of 4 rounds. The final state is compared with that of a run in which the particle skips
  the second round.
- a lost rank (G19, G20): one of three ranks of a training is killed or stopped. Collectives have a limit of {limit:g} s
  in every column. The default limit is 30 minutes in torch (gloo) and 2 minutes in distvsd.
- code (G32): each file is replaced by a pickle that makes a folder, and by a `torch.save` of the same object.
- seconds: the median of five saves. distvsd hashes every file, forces it to the disk and reads it back before it
  renames the checkpoint to its final name. Of the others only DCP forces files to the disk. distvsd's trainer writes in
  the background.
- distvsd's cells for G15, G19 and G20 are from its own trainer with a tiny random prior, because the trainer implements
  these guarantees.
"""


def measure(name: str, folder: Path, prior: Path, instants: int) -> Iterator[tuple[str, Cell]]:
    """Yields (row, cell) of one candidate after each measurement."""
    rows, seconds = killed(name, folder / "kills", instants)
    yield from rows.items()
    yield from damaged(name, folder / "damage").items()
    yield "a full disk does not end the run (G5)", full(name, folder / "full")
    for before, after in PAIRS:
        row = f"on {before} ranks (G9)" if before == after else f"from {before} on {after} ranks (G11)"
        yield f"killed and resumed {row}", resumed(name, folder / f"resume-{before}-{after}", before, after)
    yield "a NaN in one particle changes nothing else (G15)", broken(name, folder / "nan", prior)
    yield "after a killed rank the others end and name it (G19)", lost(name, folder / "killed", prior, signal.SIGKILL)
    yield "after a stopped rank the others end and name it (G20)", lost(name, folder / "stopped", prior, signal.SIGSTOP)
    yield "no file of a checkpoint can run code (G32)", unpickled(name, folder / "pickle")
    megabytes = sum(tensor.nbytes for tensor in Task(0, 1).state().values()) / 1e6
    yield f"seconds per save, {SIZE} ranks, {megabytes:.0f} MB", Cell(None, f"{seconds:.2f}")


def page(columns: dict[str, dict[str, Cell]], instants: int, minutes: float) -> str:
    """The text of benchmarks/comparison.md."""
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
    parser.add_argument("--instants", type=int, default=40, help="kills per kind of save (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, default=None, help="a folder with 1 GB free (default: the system's)")
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
