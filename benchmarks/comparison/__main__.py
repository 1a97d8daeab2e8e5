"""Runs every probe on every candidate and writes benchmarks/comparison.md: `python -m benchmarks.comparison`.

Minutes on idle cores; it writes some GB to the folder given by --scratch, a few hundred MB at a time.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ACCELERATE_USE_CPU"] = "true"

import torch

from benchmarks.comparison.candidates import CANDIDATES
from benchmarks.comparison.damage import damaged, unpickled
from benchmarks.comparison.kills import full, killed
from benchmarks.comparison.resume import broken, resumed
from benchmarks.comparison.task import Task

PAGE = Path(__file__).parents[1] / "comparison.md"
Column = dict[str, str]
INTRODUCTION = """\
# The same accidents, four ways to save a run

One small task (seven particles that belong to ranks, one network that all of them train; CPU, gloo, forked ranks),
saved and resumed by four programs. Each is written as its own documentation writes it; none is given a weakness that
its pattern does not have by itself. All keep two checkpoints and save their random state. The others' loops could be
hardened; this is what they do as written.
"""
METHOD = """
How it is measured:
- kills: all ranks end at {instants} instants spread over the time that a save takes, by a kernel timer, which leaves
  the process as little as `kill -9`. Every state names its step in every tensor, so that a mixed one is seen. "Went
  back" is one checkpoint more than the one being written.
- full disk: no file may grow beyond 512 kB (`RLIMIT_FSIZE`) while step 30 is saved.
- resumed: bits of all particles, of the network and both optimisers after 8 rounds, killed after 4, against the same
  number of ranks as at first, not interrupted.
- NaN: in distvsd's column by its own trainer, whose guard it is (tiny NeRFs); the others' loops have none.
- seconds: distvsd hashes every file and forces it to the disk (fsync) before it gives it a checkpoint's name, and reads
  it again; the others do not. Its trainer writes in the background.
"""


def measure(name: str, folder: Path, instants: int) -> Iterator[tuple[str, str]]:
    """One candidate's cells, each with its row, as they are found."""
    deaths = killed(name, folder / "kills", instants)
    yield "killed in the save of a new step", deaths.new.text()
    yield "killed in the save of a step that is there", deaths.again.text()
    yield "complete checkpoints at the worst instant of a save", str(deaths.left)
    accidents = damaged(name, folder / "damage")
    yield "one bit flipped", accidents["flipped"].text()
    yield "a file cut in half", accidents["cut"].text()
    yield "a file missing", accidents["missing"].text()
    yield "the disk is full during a save", full(name, folder / "full")
    ran = unpickled(name, folder / "pickle")
    yield "code in a checkpoint's file", f"runs ({', '.join(ran)})" if ran else "does not run"
    for before, after in ((2, 2), (3, 3), (4, 4), (4, 3), (2, 3)):
        on = f"on {before} ranks" if before == after else f"from {before} on {after} ranks"
        yield f"resumed {on} after kill -9", resumed(name, folder / f"resume-{before}-{after}", before, after)
    yield "a NaN in one render of one particle", broken(name, folder / "nan")
    megabytes = sum(tensor.nbytes for tensor in Task(0, 1).state().values()) / 1e6
    yield f"seconds of a save, 2 ranks, {megabytes:.0f} MB", f"{deaths.seconds:.2f}"


def page(columns: dict[str, Column], instants: int) -> str:
    """benchmarks/comparison.md."""
    names = list(columns)
    rows = [f"| {row} | {' | '.join(columns[name][row] for name in names)} |" for row in columns[names[0]]]
    written = [f"- **{name}**: {CANDIDATES[name].written_as}" for name in names]
    table = [f"| accident | {' | '.join(names)} |", f"|---|{'---|' * len(names)}", *rows]
    ran = f"Command: `python -m benchmarks.comparison --instants {instants}`, {datetime.date.today()}, {_machine()}"
    return "\n".join([INTRODUCTION, *written, "", *table, METHOD.format(instants=instants), ran, ""])


def _machine() -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "accelerate", "safetensors"))
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False, cwd=PAGE.parent).stdout.strip()
    hardware = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"commit {commit}, Python {platform.python_version()}, {versions}, {hardware}."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comparison", description=__doc__)
    parser.add_argument("--only", choices=list(CANDIDATES), nargs="+", default=list(CANDIDATES))
    parser.add_argument("--instants", type=int, default=16, help="kills in each of two kinds of save")
    parser.add_argument("--scratch", type=Path, default=None, help="a folder with 1 GB free; default: the system's")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns: dict[str, Column] = {}
    with tempfile.TemporaryDirectory(prefix="comparison-", dir=arguments.scratch) as folder:
        for name in arguments.only:
            columns[name] = {}
            for row, cell in measure(name, Path(folder) / name.replace(" ", "-"), arguments.instants):
                columns[name][row] = cell
                print(f"{name}: {row}: {cell}", file=sys.stderr, flush=True)
    arguments.page.write_text(page(columns, arguments.instants), encoding="utf-8")


if __name__ == "__main__":
    main()
