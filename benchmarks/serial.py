"""A round of this project against the same updates one after the other, as the authors' code makes them.

The serial way: one random particle, one view of it, one call of each network on that one render. Render; the prior with
and without the prompt; the score; Adam on that particle; one LoRA step on that render. Both ways use the same parts of
this package, the same weights, configuration and seed, in one process, and take turns. An update is one particle moved
once, and the score trained once on its render:

    python -m benchmarks.serial --particles 16 --json
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.phases import settle
from distvsd.config import Config, digest, load_config
from distvsd.parallel.world import World, open_world
from distvsd.run.build import Run, build_run
from distvsd.run.encode import Encoder
from distvsd.run.loop import Loop
from distvsd.run.parts import make_ensemble

QUICKSTART = "configs/quickstart.yaml"


class Serial:
    """One particle an iteration, drawn at random. parts: a run of its own, so that its score is not the other's."""

    def __init__(self, parts: Run, seed: int) -> None:
        self._loops = [_alone(parts, particle) for particle in range(parts.config.particles.count)]
        self._order, self._iteration = random.Random(seed), 0

    def updates(self, count: int) -> None:
        for _ in range(count):
            self._order.choice(self._loops).round(self._iteration)
            self._iteration += 1


def _alone(parts: Run, particle: int) -> Loop:
    """The round of a single particle, with the networks of `parts`."""
    config = parts.config
    ensemble = make_ensemble(config, parts.prior, [particle], parts.world.device)
    return replace(
        parts.loop,
        ensemble=ensemble,
        encode=Encoder(config, parts.prior, ensemble),
        exchange=lambda samples, step: samples,
        lag_due=lambda step: False,
    )


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds, with the device's queue empty at both ends."""
    _synchronise(device)
    began = time.perf_counter()
    action()
    _synchronise(device)
    return time.perf_counter() - began


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(config: Config, world: World, pairs: int, warmup: int) -> dict[str, Any]:
    """Times `pairs` rounds and as many times the same number of serial updates, in turn."""
    make = functools.partial(build_run, config, world, lambda done: False)
    together, serial = make(), Serial(make(), config.run.seed)
    settle(together)
    loop, count = replace(together.loop, lag_due=lambda step: False), config.particles.count
    loop.run(0, warmup)
    serial.updates(2 * warmup)
    found: dict[str, list[float]] = {"round_s": [], "serial_s": []}
    for step in range(warmup, warmup + pairs):
        found["serial_s"].append(timed(lambda: serial.updates(count), world.device))
        found["round_s"].append(timed(functools.partial(loop.run, step, step + 1), world.device))
    ratios = [one / other for one, other in zip(found["serial_s"], found["round_s"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "serial_updates_per_s": count / statistics.median(found["serial_s"]),
        "round_updates_per_s": count / statistics.median(found["round_s"]),
        **found,
        "particles": count,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "config_digest": digest(config),
        "machine": machine(),
    }


PAGE = """\
# A round against the serial way

{machine}

    {command}

{particles} particles, {threads} thread(s), {device}. The serial way is that of the authors' code: each iteration
draws one particle, renders one view, asks the prior (with and without the prompt) and the score about that one render,
moves the particle with Adam and trains the LoRA once on the render. The round does this for all particles with one call
of each network; its LoRA takes one step on all renders. Same parts, weights, configuration and process; the two take
turns.

| way | particle updates/s | ms an update |
|---|---:|---:|
| one particle after the other | {serial_updates_per_s:.2f} | {serial_ms:.1f} |
| a round of all | {round_updates_per_s:.2f} | {round_ms:.1f} |

**The round makes {ratio:.2f} times the updates a second**: the median of {pairs} pairs of measurements
({least:.2f} to {most:.2f}).
"""


def page(found: dict[str, Any], command: str) -> str:
    """The results as a Markdown page."""
    each = {f"{way}_ms": 1000 / found[f"{way}_updates_per_s"] for way in ("serial", "round")}
    ratios = {"pairs": len(found["ratios"]), "least": min(found["ratios"]), "most": max(found["ratios"])}
    return PAGE.format(command=command, **found, **each, **ratios)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=QUICKSTART, help="a YAML file (default: the quickstart)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--particles", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each way (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a Markdown page")
    args = parser.parse_args(argv)
    settings = [f"particles.count={args.particles}", "particles.views=1", "score.steps_per_round=1", *args.overrides]
    config = load_config(args.config, settings).stage_configs[0]
    with open_world(config.parallel.timeout_s) as world:
        found = compare(config, world, args.pairs, args.warmup)
    given = ["python -m benchmarks.serial", args.config, *args.overrides, f"--particles {args.particles}"]
    text = page(found, " ".join([*given, f"--pairs {args.pairs}"]))
    if args.page:
        args.page.write_text(text, encoding="utf-8")
    print(json.dumps(found) if args.json else text)


if __name__ == "__main__":
    main()
