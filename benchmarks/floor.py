"""How far a round is from its floor: the least time that its operations and bytes take on this machine.

The floor is that of `distvsd plan` (`distvsd.plan.floor`), counted from the configuration alone. In one process
it takes turns with the rounds: the machine's ceilings, then rounds with a clock at every phase, and so on. One more
round counts its operations, to check the count:

    python -m benchmarks.floor configs/quickstart.yaml --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.phases import Clock, Flops, measured, settle
from distvsd.config import Config, digest, load_config
from distvsd.parallel.world import World, open_world
from distvsd.plan.ceilings import measure_ceilings
from distvsd.plan.floor import PHASE_OF
from distvsd.run.build import build_run
from distvsd.run.loop import Loop
from distvsd.run.planned import plan_run

QUICKSTART = "configs/quickstart.yaml"


def examine(config: Config, world: World, turns: int, rounds: int, warmup: int) -> dict[str, Any]:
    """The floor and the measurement of every part, as medians over the turns."""
    run = build_run(config, world, lambda done: False)
    settle(run)
    loop = dataclasses.replace(run.loop, lag_due=lambda step: False)
    loop.run(0, warmup)
    step, found = warmup, []
    for _ in range(turns):
        found.append(_turn(config, world, loop, step, rounds))
        step += rounds
    counted = Flops()
    measured(loop, counted).run(step, step + 1)
    return _joined(found, counted) | {
        "particles": config.particles.count,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "config_digest": digest(config),
        "machine": machine(),
    }


def _turn(config: Config, world: World, loop: Loop, step: int, rounds: int) -> dict[str, Any]:
    """The ceilings, the floor with them, and seconds of the parts of a round right after."""
    ceilings = measure_ceilings(config.prior.dtype, world.device)
    floors = plan_run(config, ceilings=ceilings)["floor"]["rounds"]
    resolution = config.render.resolution_at(step)
    floor = next(row for row in floors if row["resolution"] == resolution)
    clock = Clock(world.device)
    measured(loop, clock).run(step, step + rounds)
    clock.lap()
    seconds = {phase: total / rounds for phase, total in clock.seconds.items()}
    seconds["score training"] += seconds.pop("reduction")
    return {"ceilings": dataclasses.asdict(ceilings), "floor": floor, "seconds": seconds}


def _joined(found: list[dict[str, Any]], counted: Flops) -> dict[str, Any]:
    parts = []
    for name in (*PHASE_OF, "rest"):
        floors = [turn["floor"]["parts"].get(name, 0.0) for turn in found]
        seconds = [turn["seconds"][name] for turn in found]
        work = found[0]["floor"]["work"].get(name, {"flops": 0.0, "bytes": 0.0})
        row = {"part": name, **work, "counted_flops": counted.operations[name]}
        row |= {"floor_s": statistics.median(floors), "measured_s": statistics.median(seconds)}
        parts.append(row | {"ratio": _median_ratio(seconds, floors)})
    wholes = [sum(turn["seconds"].values()) for turn in found]
    least = [turn["floor"]["seconds"] for turn in found]
    return {
        "ratio": _median_ratio(wholes, least),
        "ratios": [whole / floor for whole, floor in zip(wholes, least, strict=True)],
        "round_s": statistics.median(wholes),
        "floor_s": statistics.median(least),
        "gflops": statistics.median(turn["ceilings"]["gflops"] for turn in found),
        "gbps": statistics.median(turn["ceilings"]["gbps"] for turn in found),
        "parts": parts,
    }


def _median_ratio(values: Sequence[float], floors: Sequence[float]) -> float | None:
    return statistics.median(v / f for v, f in zip(values, floors, strict=True)) if all(floors) else None


PAGE = """\
# A round and its floor

{machine}

    {command}

{particles} particles, {threads} thread(s), {device}. Ceilings: {gflops:.1f} GFLOP/s in large matrix products and
{gbps:.1f} GB/s in large copies (read and written), both measured between the rounds; medians. A part takes at least its
operations at the first rate and its bytes at the second, whichever is longer. `counted` are the operations of a real
round (torch.utils.flop_counter). Not in the floor: element-wise arithmetic and activations. Grids that fit into a cache
are read faster than a copy.

| part | GFLOP | counted | MB | floor ms | measured ms | times the floor |
|---|---:|---:|---:|---:|---:|---:|
{rows}

**A round takes {ratio:.2f} times its floor**: the median of {turns} turns ({least:.2f} to {most:.2f}),
{round_ms:.0f} ms against {floor_ms:.0f} ms.
"""


def page(found: dict[str, Any], command: str) -> str:
    """The results as a Markdown page."""
    rows = "\n".join(map(_row, found["parts"]))
    times = {"round_ms": 1000 * found["round_s"], "floor_ms": 1000 * found["floor_s"]}
    ratios = {"turns": len(found["ratios"]), "least": min(found["ratios"]), "most": max(found["ratios"])}
    return PAGE.format(command=command, rows=rows, **found, **times, **ratios)


def _row(part: dict[str, Any]) -> str:
    ratio = "-" if part["ratio"] is None else f"{part['ratio']:.1f}"
    numbers = [part["flops"] / 1e9, part["counted_flops"] / 1e9, part["bytes"] / 1e6]
    numbers += [1000 * part["floor_s"], 1000 * part["measured_s"]]
    return f"| {part['part']} | {' | '.join(f'{number:.2f}' for number in numbers)} | {ratio} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=QUICKSTART, help="a YAML file (default: the quickstart)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--turns", type=int, default=5, help="of ceilings and rounds (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of a turn (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a Markdown page")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides).stage_configs[0]
    with open_world(config.parallel.timeout_s) as world:
        found = examine(config, world, args.turns, args.rounds, args.warmup)
    given = " ".join(["python -m benchmarks.floor", args.config, *args.overrides])
    text = page(found, f"{given} --turns {args.turns} --rounds {args.rounds}")
    if args.page:
        args.page.write_text(text, encoding="utf-8")
    print(json.dumps(found) if args.json else text)


if __name__ == "__main__":
    main()
