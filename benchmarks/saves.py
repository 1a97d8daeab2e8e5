"""What a checkpoint costs: how long it blocks the run, how much it slows the run down, how long verification takes.

    python -m benchmarks.saves --disk FOLDER [--particles 16] [--megabytes 8] [--repeats 5] [--page benchmarks/saves.md]

One process saves the same state in the foreground and in the background, alternately. While a save in the background is
written, the process multiplies matrices in place of a run's work. The time of a multiplication is compared with the
time when nothing is written. All figures are medians from one call, so that their ratios are comparable.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import machine
from distvsd.checkpoint import Saver, newest, particle_file
from distvsd.parallel.world import World

METADATA = {"config": {}, "config_digest": "c", "prior_identity": "p", "metrics_bytes": 0}
ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def make_state(particles: int, megabytes: int) -> dict[str, dict[str, Tensor]]:
    """A state of `particles` particles, each of `megabytes` MiB: parameters and the two moments of Adam."""
    length = megabytes * 2**20 // 12
    draw = torch.Generator().manual_seed(0)
    return {
        particle_file(particle): {
            name: torch.randn(length, generator=draw) for name in ("param/grid", "adam_m/grid", "adam_v/grid")
        }
        for particle in range(particles)
    }


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_the_foreground(saver: Saver, step: int, state: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Seconds that a save in the foreground blocks the run."""
    return {"foreground_stall_s": seconds_of(lambda: saver.begin(step, state, {}, METADATA))}


def in_the_background(
    saver: Saver, step: int, state: dict[str, dict[str, Tensor]], work: Callable[[], object]
) -> dict[str, float]:
    """Seconds that a save in the background blocks the run and takes to write, and how much it slows `work` down."""
    quiet = statistics.median(seconds_of(work) for _ in range(30))
    began = time.perf_counter()
    copying = seconds_of(lambda: saver.begin(step, state, {}, METADATA))
    busy = []
    while saver.writing:
        busy.append(seconds_of(work))
    written = time.perf_counter() - began
    publishing = seconds_of(saver.finish)
    return {
        "background_stall_s": copying + publishing,
        "copy_s": copying,
        "publish_s": publishing,
        "background_write_s": written,
        "work_slowdown": statistics.median(busy) / quiet if busy else float("nan"),
    }


def verification(folder: Path, num_bytes: int) -> dict[str, float]:
    """Seconds per gigabyte to open the newest checkpoint and verify every file, and for SHA-256 alone."""
    gigabytes = num_bytes / 1e9
    data = bytes(min(num_bytes, 2**28))
    return {
        "verify_s_per_GB": seconds_of(lambda: newest(folder)) / gigabytes,
        "sha256_s_per_GB": seconds_of(lambda: hashlib.sha256(data).digest()) / (len(data) / 1e9),
    }


def measure(out: Path, particles: int, megabytes: int, repeats: int) -> dict[str, float]:
    """Medians over `repeats` repetitions of all measurements, after one that is not counted because it allocates."""
    state = make_state(particles, megabytes)
    num_bytes = sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())
    matrix = torch.randn(384, 384, generator=torch.Generator().manual_seed(0))
    foreground = Saver(out / "foreground", ALONE, asynchronous=False)
    background = Saver(out / "background", ALONE, asynchronous=True)
    rows = []
    for step in range(1, repeats + 2):
        row = in_the_foreground(foreground, step, state)
        row |= in_the_background(background, step, state, lambda: matrix @ matrix)
        rows.append(row | verification(out / "background", num_bytes))
    result = {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
    result["stall_ratio"] = result["background_stall_s"] / result["foreground_stall_s"]
    return {"gigabytes": num_bytes / 1e9} | {key: round(value, 5) for key, value in result.items()}


def page(arguments: argparse.Namespace, found: dict[str, float], load: float) -> str:
    """The results page."""
    command = (
        f"python -m benchmarks.saves --disk {arguments.disk} --particles {arguments.particles} --megabytes "
        f"{arguments.megabytes} --repeats {arguments.repeats} --page benchmarks/saves.md"
    )
    return f"""# What a checkpoint costs

{machine()} One torch thread. The load of the machine in the minute before was {load:.1f}.

    {command}

{arguments.particles} particles of {arguments.megabytes} MiB, {found["gigabytes"]:.3f} GB in total, one rank. Medians \
of {arguments.repeats} saves of each kind, alternately.

| | in the foreground | in the background |
|---|---:|---:|
| the run is blocked, ms per save | {found["foreground_stall_s"] * 1e3:.1f} | {found["background_stall_s"] * 1e3:.1f} |
| - of this, to copy the state | | {found["copy_s"] * 1e3:.1f} |
| - of this, for manifest, publication and pruning | | {found["publish_s"] * 1e3:.1f} |
| until all files are written and read back, ms | {found["foreground_stall_s"] * 1e3:.1f} | \
{found["background_write_s"] * 1e3:.1f} |
| the run's own work takes, while a save is written | | {found["work_slowdown"]:.2f} times as long |

A save in the background blocks the run for {found["stall_ratio"] * 100:.1f} % of the time of a save in the \
foreground. Verifying a checkpoint takes {found["verify_s_per_GB"]:.2f} s per GB on one rank (SHA-256 alone: \
{found["sha256_s_per_GB"]:.2f} s per GB). Several ranks divide the files of a checkpoint among them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.disk, prefix="saves-") as name:
        found = measure(Path(name), arguments.particles, arguments.megabytes, arguments.repeats)
    print(json.dumps(found, indent=1))
    if arguments.page:
        arguments.page.write_text(page(arguments, found, load), encoding="ascii")


if __name__ == "__main__":
    main()
