"""Time and memory of a particle's update by the number of particles on a rank, with groups that the run chooses itself.

    python -m benchmarks.groups [--particles 8 64 256] [--rounds 2] [--page FILE] [key=value ...]

Trains `configs/quickstart.yaml` in the trainer's own loop, each number in a process of its own. The groups are chosen
by measurement with the first number of particles from 64 on, and larger numbers get the same: to measure them again
would take hours. Memory a particle is the growth of the peak between two numbers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.phases import settle
from distvsd.config import load_config
from distvsd.parallel.world import open_world
from distvsd.run.build import build_run

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
MEASURED_UP_TO = 64


def work(count: int, rounds: int, overrides: list[str], sizes: dict[str, int]) -> dict[str, Any]:
    """One number of particles, in this process. sizes: of the calls; measured where empty."""
    config = load_config(QUICKSTART, [f"particles.count={count}", "checkpoint.every=0", *overrides])
    with open_world(config.parallel.timeout_s) as world:
        run = build_run(config, world, lambda done: False)
        run.sizes.load_state(sizes)
        settle(run)
        run.loop.round(0)
        began = time.perf_counter()
        for step in range(1, rounds + 1):
            run.loop.round(step)
        seconds = (time.perf_counter() - began) / rounds
        _, state = next(run.ensemble.stream())
        return {
            "particles": count,
            "update_s": seconds / count,
            "sizes": run.sizes.state(),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "state_bytes": sum(value.nbytes for value in state.values()),
        }


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of every number of particles."""
    rows: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}
    for count in args.particles:
        command = [sys.executable, "-m", "benchmarks.groups", "--worker", json.dumps([count, args.rounds, sizes])]
        done = subprocess.run([*command, *args.overrides], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if count >= MEASURED_UP_TO:
            sizes = rows[-1]["sizes"]
        print(rows[-1], flush=True)
    return rows


def page(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The results page."""
    lines = []
    for before, row in zip([None, *rows], rows, strict=False):
        grown = "-"
        if before is not None:
            more = (row["peak_bytes"] - before["peak_bytes"]) / (row["particles"] - before["particles"])
            grown = f"{more / 2**20:.2f} ({more / row['state_bytes']:.2f})"
        lines.append(
            f"| {row['particles']} | {row['sizes']['particles']}, {row['sizes']['samples']} "
            f"| {1000 * row['update_s']:.1f} | {row['update_s'] / rows[0]['update_s']:.2f} "
            f"| {row['peak_bytes'] / 2**20:,.0f} | {grown} |"
        )
    table = "\n".join(lines)
    return f"""# Many particles on a rank

{machine()}

    python -m benchmarks.groups --particles {" ".join(map(str, args.particles))} --rounds {args.rounds} --page \
benchmarks/groups.md {" ".join(args.overrides)}

`configs/quickstart.yaml` on one rank. Parameters and moments of a particle: {rows[0]["state_bytes"] / 2**20:.2f} MiB. \
The last column is the growth of the peak for each particle since the row above, in MiB, and in times the parameters \
and moments.

| particles | in one go, in a UNet call of the training | ms an update | against the first row | peak MiB | a particle |
|---:|---:|---:|---:|---:|---:|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.worker:
        count, rounds, sizes = json.loads(args.worker)
        print(json.dumps(work(count, rounds, args.overrides, sizes)))
        return
    text = page(args, measured(args))
    print(text)
    if args.page:
        args.page.write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
