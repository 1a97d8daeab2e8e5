"""Time per particle update with all particles on the device, with some there and the rest in host memory, and with most
of the rest in files.

    python -m benchmarks.paging --particles 2048 --resident 64 --host 128 [--passes 3] [--folder DIR] [key=value]

The three runs are in one process and take turns, so that the ratios do not depend on what else the machine does. A pass
moves every particle once: one round where all are on the device, particles / resident rounds where they take turns. The
whole loop is timed, with prior and score network. --folder: on the disk that is to hold the pages.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import machine
from distvsd.config import load_config
from distvsd.parallel.world import World, open_world
from distvsd.plan.needs import page_bytes, particle_bytes
from distvsd.run.build import Run, build_run

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def made(world: World, folder: Path, overrides: list[str]) -> Run:
    """A run of this configuration with sizes that are fixed, because a measurement of sizes would be in the times."""
    fixed = ["particles.micro_batch=8", "score.micro_batch=64", f"run.dir={folder}", "schedule.rounds=1000000"]
    return build_run(load_config(CONFIG, [*fixed, *overrides]), world, lambda done: False)


def seconds_an_update(run: Run, first: int) -> float:
    """Of one pass, whose first round is number `first` times the turns."""
    turns = run.config.particles.turns
    began, moved = time.perf_counter(), 0
    for step in range(first * turns, (first + 1) * turns):
        moved += len(run.loop.round(step).update.healthy)
    if run.world.device.type == "cuda":
        torch.cuda.synchronize(run.world.device)
    return (time.perf_counter() - began) / moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=2048)
    parser.add_argument("--resident", type=int, default=64)
    parser.add_argument("--host", type=int, default=128)
    parser.add_argument("--passes", type=int, default=3, help="timed passes of each run, after one that is not timed")
    parser.add_argument("--folder", type=Path, help="where the pages are; empty: the system's temporary folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    turns = [f"particles.resident={args.resident}"]
    kinds = {
        "all on the device": [],
        f"{args.resident} on the device, the rest in host memory": turns,
        f"{args.resident} on the device, {args.host} in host memory, the rest in files": [
            *turns,
            f"particles.host={args.host}",
        ],
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder, open_world(600) as world:
        common = [f"particles.count={args.particles}", *args.overrides]
        runs = {
            kind: made(world, Path(folder) / str(at), [*common, *own]) for at, (kind, own) in enumerate(kinds.items())
        }
        seconds: dict[str, list[float]] = {kind: [] for kind in runs}
        for number in range(args.passes + 1):
            for kind, run in runs.items():
                found = seconds_an_update(run, number)
                if number:
                    seconds[kind].append(found)
        one = next(iter(runs.values()))
        particle = one.ensemble.particle
        print(machine())
        print(
            f"{args.particles} particles of {particle_bytes(particle, one.config) / 2**20:.2f} MiB in training, "
            f"{page_bytes(particle, one.config) / 2**20:.2f} MiB kept elsewhere; {args.passes} passes each, medians"
        )
        base = statistics.median(seconds["all on the device"])
        for kind, values in seconds.items():
            middle = statistics.median(values)
            spread = f"{1000 * min(values):.1f} to {1000 * max(values):.1f}"
            print(f"{1000 * middle:9.2f} ms an update ({spread}), {middle / base:5.2f} x   {kind}")
        for run in runs.values():
            run.ensemble.close()


if __name__ == "__main__":
    main()
