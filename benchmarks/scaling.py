"""A run of the paper's size on 8 to 512 ranks with 10^3 to 10^5 particles: the plan's figures, and a simulation of
stragglers and failures.

    python -m benchmarks.scaling [--ranks 8 64 512] [--particles 1000 10000 100000] [--page FILE] [key=value ...]

Nothing here was measured on a cluster. The times are the floor of `distvsd plan` at --gflops and --gbps, multiplied by
--above. A simulated round takes as long as its slowest rank. A failure anywhere ends the job: it is noticed, restarted,
and goes on from the newest checkpoint. Every figure follows from the assumptions on the page.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.machine import machine
from distvsd.config import load_config
from distvsd.plan.cluster import Assumptions
from distvsd.plan.floor import Ceilings
from distvsd.run.planned import plan_run

CONFIG = Path(__file__).parents[1] / "configs" / "prolificdreamer.yaml"
GPUS = 8  # of a node
DAY_S = 86_400.0


@dataclass(frozen=True)
class Cluster:
    """jitter: standard deviation of the logarithm of a rank's round. slow_share, slow: share of ranks that are always
    slower, and by what factor. network_gbps: 10^9 bytes a second of a rank. latency_s: of one step of a ring."""

    assumed: Assumptions
    jitter: float = 0.02
    slow_share: float = 0.005
    slow: float = 1.15
    network_gbps: float = 25.0
    latency_s: float = 20e-6


def collective_s(plan: Mapping[str, Any], ranks: int, cluster: Cluster) -> float:
    """Seconds in which a rank of a ring sends what the plan says, with two passes around it."""
    return float(plan["wire"]["rank"]) / (cluster.network_gbps * 1e9) + 2 * (ranks - 1) * cluster.latency_s


def waiting(ranks: int, cluster: Cluster, rounds: int, seed: int) -> float:
    """What waiting for the slowest rank makes of a round's time, mean over simulated rounds and clusters."""
    generator = torch.Generator().manual_seed(seed)
    factors = 1 + (cluster.slow - 1) * (torch.rand(rounds, ranks, generator=generator) < cluster.slow_share)
    jitter = torch.exp(cluster.jitter * torch.randn(rounds, ranks, generator=generator))
    return (factors * jitter).amax(1).mean().item()


def finished_s(rounds: int, round_s: float, every: int, plan: Mapping[str, Any], nodes: int, cluster: Cluster) -> float:
    """Seconds of one simulated run until its last round is saved; inf where it makes no way in a thousand failures."""
    assumed, done, elapsed, failures = cluster.assumed, 0, 0.0, 0
    write_s: float = plan["checkpoint"]["write_s"]
    load_s: float = plan["checkpoint"]["load_s"]
    # A save in the background holds the next one up where it takes longer than the rounds between them.
    cycle_s = max(every * round_s, write_s)
    late = min(math.ceil(write_s / cycle_s), 2)  # cycles after which a state is safe
    generator = random.Random(f"{rounds} {round_s} {nodes}")
    while done < rounds:
        until = generator.expovariate(nodes / (assumed.node_mtbf_days * DAY_S))
        left_s = (rounds - done) / every * cycle_s + write_s
        if until >= left_s:
            return elapsed + left_s
        safe = max(int(until / cycle_s) - late + 1, 0)
        done, failures = min(done + safe * every, rounds), failures + 1
        elapsed += until + assumed.restart_s + load_s
        if failures > 1000:
            return math.inf
    return elapsed


def row(ranks: int, particles: int, args: argparse.Namespace, cluster: Cluster) -> dict[str, Any]:
    """The figures of the first stage with so many ranks and particles."""
    nodes = max(ranks // GPUS, 1)
    config = load_config(CONFIG, [f"particles.count={particles}", *args.overrides])
    found = plan_run(
        config, nodes, ranks // nodes, cluster.assumed, "sd-2.1", Ceilings(args.gflops, args.gbps, "given")
    )
    plan = found["stages"][0]
    rounds = plan["rounds"]
    busy_s = plan["floor"]["rounds"][-1]["seconds"] * args.above
    waits, talk_s = waiting(ranks, cluster, 400, ranks), collective_s(plan, ranks, cluster)
    round_s = busy_s * waits + talk_s
    every = max(round(args.save_minutes * 60 / round_s), 1)
    whole_s = mean(finished_s(rounds, round_s * (1 + 1e-9 * i), every, plan, nodes, cluster) for i in range(20))
    return {
        "ranks": ranks,
        "particles": particles,
        "each": math.ceil(particles / ranks),
        "memory": plan["rank_memory"]["total"],
        "busy_s": busy_s,
        "waits": waits,
        "talk_s": talk_s,
        "round_s": round_s,
        "updates": particles / round_s,
        "checkpoint": plan["checkpoint"]["total"],
        "write_s": plan["checkpoint"]["write_s"],
        "days": rounds * round_s / DAY_S,
        "days_with_failures": whole_s / DAY_S,
        "useful": busy_s * rounds / whole_s,
    }


def page(args: argparse.Namespace, rows: list[dict[str, Any]], cluster: Cluster) -> str:
    """The results page."""
    lines = "\n".join(
        f"| {r['ranks']} | {r['particles']:,} | {r['each']} | {r['memory'] / 2**30:,.0f} | {r['busy_s']:.2f} "
        f"| {r['waits']:.3f} | {r['talk_s'] * 1e3:.1f} | {r['updates']:,.0f} | {r['checkpoint'] / 2**40:.2f} "
        f"| {r['write_s'] / 60:,.0f} | {r['days']:.1f} | {r['days_with_failures']:.1f} | {r['useful']:.0%} |"
        for r in rows
    )
    assumed = cluster.assumed
    return f"""# A run of the paper's size on many ranks, on paper

{machine()}

    python -m benchmarks.scaling --page docs/scaling.md {" ".join(args.overrides)}

**Nothing on this page was measured on a cluster or on a GPU.** It is the model of `distvsd plan`, and a simulation of
what the plan has no formula for. The run is the first stage of `configs/prolificdreamer.yaml` with the published sizes
of Stable Diffusion 2.1, at the resolution of its last round, one view a particle and round.

| ranks | particles | a rank has | GiB a rank | busy s a round | waits | talks, ms | updates a second \
| checkpoint, TiB | written in min | days | with failures | useful |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{lines}

GiB a rank: without activations. Busy: the rank with the most particles. Waits: what waiting for the slowest rank \
makes of a round. Talks: collectives. Useful: busy time of the rounds that count, of all time.

## Assumptions
- A rank makes {args.gflops:,.0f} GFLOP/s in large matrix products and copies {args.gbps:,.0f} GB/s; a round takes \
{args.above:g} times its floor at these rates (`benchmarks/floor.py` measures the factor on a machine).
- A rank's round varies by {cluster.jitter:.0%} (log-normal), and {cluster.slow_share:.1%} of ranks are always \
{cluster.slow:g} times slower. A round waits for the slowest: two sums over ranks are in it.
- A rank sends and receives {cluster.network_gbps:g} GB/s, with {cluster.latency_s * 1e6:g} us for each step of a ring.
- The shared disk takes {assumed.disk_mb_s:,.0f} MB/s from all ranks together. A checkpoint is written, read back and \
then published, in the background, every {args.save_minutes:g} minutes or as fast as the disk allows.
- A node of {GPUS} ranks fails every {assumed.node_mtbf_days:g} days. The job goes on {assumed.restart_s:g} s after a \
failure plus the time to load, from the newest published checkpoint. 20 simulated runs each.

## What it says
- Collectives do not limit such a run: a rank sends its part of one adapter gradient a round, whatever the number of
  particles, and with equal shards no latents (`parallel.exchange`).
- Memory does, first: without paging a rank holds all values and moments of its particles (`particles.resident` keeps
  the particles of a round on the device only).
- Then the checkpoint. Its bytes grow with the particles, and one shared disk does not grow with the ranks. Where a
  write takes longer than the time between failures, the run makes no way: more bandwidth, fewer saves or smaller
  particles.
- The slowest rank costs a fixed share from some tens of ranks on, because one slow rank is then nearly certain. Replace
  it: the run names ranks that are slow.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--particles", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--gflops", type=float, default=400_000.0)
    parser.add_argument("--gbps", type=float, default=3_000.0)
    parser.add_argument("--above", type=float, default=1.5, help="times its floor that a round takes")
    parser.add_argument("--save-minutes", type=float, default=30.0)
    parser.add_argument("--disk-mb-s", type=float, default=20_000.0)
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    cluster = Cluster(Assumptions(disk_mb_s=args.disk_mb_s))
    rows = [row(ranks, particles, args, cluster) for particles in args.particles for ranks in args.ranks]
    text = page(args, rows, cluster)
    print(text)
    if args.page:
        args.page.write_text(text, encoding="ascii")


if __name__ == "__main__":
    main()
