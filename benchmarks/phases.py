"""Measures time, floating-point operations and peak memory of each phase of a round, and particle updates per second.

It runs the trainer's own loop (`distvsd.run.loop`) with any configuration, on CPU or GPU, on one rank or several. It
writes no run directory. A stage after the first begins with fresh particles of its kind:

    python benchmarks/phases.py configs/quickstart.yaml particles.count=16 --ranks 1 2 --json phases.json

All ranks run on this machine, and each gets an equal part of its cores. `_measure` says how each column is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from distvsd.config import digest, load_config
from distvsd.parallel.collectives import barrier, gather_objects
from distvsd.parallel.world import World, open_world
from distvsd.particles import Ensemble
from distvsd.particles.ensemble import Views
from distvsd.run.build import Run, build_run
from distvsd.run.loop import Loop
from distvsd.score.spread import SpreadDistillation
from distvsd.score.strategies.flat import Flat
from distvsd.score.training import ScoreTraining
from distvsd.vsd.objectives import Distillation

PHASES = ("render", "encode", "exchange", "prior", "score", "update", "score training", "reduction", "rest")
MARK = "phase of a round: "
Meter = Callable[[str], AbstractContextManager[None]]


# torch 2.13 counts every fused attention except the CPU's. The first arguments are the shapes of the operands.
CPU_ATTENTION: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *of, **_: sdpa_flop_count(*of[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *of, **_: sdpa_backward_flop_count(
        *of[:4]
    ),
}


class Clock:
    """Seconds by phase, each without the phases nested in it. Synchronises the device at every phase boundary."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)
        self._open, self._last = ["rest"], self._now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.lap()
        self._open.append(phase)
        yield
        self.lap()
        self._open.pop()

    def lap(self) -> None:
        """Adds the time since the last boundary to the innermost open phase."""
        now = self._now()
        self.seconds[self._open[-1]] += now - self._last
        self._last = now

    def _now(self) -> float:
        synchronise(self.device)
        return time.perf_counter()


class Flops:
    """Operations by phase with backward passes: matrix products, convolutions and attention, 2 per multiply-add.

    Element-wise operations and gathers are not counted. The render of a hash grid consists mostly of those.
    """

    def __init__(self) -> None:
        self.operations = dict.fromkeys(PHASES, 0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            yield
        self.operations[phase] += counter.get_total_flops()


class CudaPeaks:
    """Peak of allocated bytes during each phase, minus the bytes allocated when the round began."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, dict.fromkeys(PHASES, 0)
        synchronise(device)
        self._before = torch.cuda.memory_allocated(device)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(self.device)
        yield
        synchronise(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - self._before
        self.bytes[phase] = max(self.bytes[phase], peak)


@contextmanager
def marked(phase: str) -> Iterator[None]:
    """Marks a phase in a profile and measures nothing."""
    with record_function(MARK + phase):
        yield


def cpu_peaks(recorded: profile) -> dict[str, int]:
    """The peaks of `CudaPeaks` for the host, from the allocations in a profile with `marked` phases."""
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events: list[Any] = list(recorded.profiler.kineto_results.events())
    spans = [(e.name().removeprefix(MARK), e.start_ns(), e.end_ns()) for e in events if e.name().startswith(MARK)]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peaks, live = dict.fromkeys(PHASES, 0), 0
    for at, change in changes:
        live += change
        for phase, first, last in spans:
            if first <= at <= last:
                peaks[phase] = max(peaks[phase], live)
    return peaks


def measured(loop: Loop, meter: Meter) -> Loop:
    """The same loop with every part inside `meter`. The reduction of the score's gradients is a phase of its own."""

    def within(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def metered(*args: Any, **kwargs: Any) -> Any:
            with meter(phase):
                return call(*args, **kwargs)

        return metered

    ensemble, training = loop.ensemble, loop.training

    def render(step: int, resolution: int) -> Iterator[list[Views]]:
        parts = ensemble.render(step, resolution)
        while (views := within("render", next)(parts, None)) is not None:
            yield views

    parts = SimpleNamespace(render=render, update=within("update", ensemble.update), finish=ensemble.finish)
    spread = loop.objective if isinstance(loop.objective, SpreadDistillation) else None
    distillation = spread.distillation if spread else loop.objective
    assert isinstance(distillation, Distillation), "expected a Distillation, spread over ranks or not"
    distillation = dataclasses.replace(
        distillation,
        prior=within("prior", distillation.prior),
        score=within("score", distillation.score) if distillation.score is not None else None,
    )
    learner = None
    if training is not None:
        if isinstance(training.strategy, Flat):  # the others reduce within a step
            reduce = within("reduction", training.strategy.reduce)
            # `list` computes the lazy gradients before the reduction starts, so their time does not count as reduction.
            flat = dataclasses.replace(
                training.strategy, reduce=lambda vectors, *, extra_sums: reduce(list(vectors), extra_sums=extra_sums)
            )
            training = dataclasses.replace(training, strategy=flat)
        learner = cast(ScoreTraining, SimpleNamespace(round=within("score training", training.round)))
    return dataclasses.replace(
        loop,
        ensemble=cast(Ensemble, parts),
        encode=within("encode", loop.encode),
        objective=dataclasses.replace(spread, distillation=distillation) if spread else distillation,
        exchange=within("exchange", loop.exchange),
        training=learner,
    )


def settle(run: Run) -> None:
    """Rounds until the sizes of calls are chosen, as in the first rounds of a training; every rank calls it."""
    for step in itertools.count():
        if not run.sizes.measuring:
            return
        run.sizes.after(run.loop.round(step))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(world: World, loop: Loop, warmup: int, rounds: int) -> dict[str, Any]:
    """This rank's figures; every rank calls it. Each column has its own rounds, because measuring slows a round down.

    First `rounds` rounds without any meter give the throughput. As many with `Clock` give the seconds of the phases.
    One round counts the operations, and one records the allocations.
    """
    loop = dataclasses.replace(loop, lag_due=lambda step: False)
    loop.run(0, warmup)
    synchronise(world.device)
    barrier(world)
    began = time.perf_counter()
    loop.run(warmup, warmup + rounds)
    synchronise(world.device)
    barrier(world)
    seconds, step = (time.perf_counter() - began) / rounds, warmup + rounds
    on_cuda, resident = world.device.type == "cuda", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    allocated = torch.cuda.max_memory_allocated(world.device) if on_cuda else resident
    clock = Clock(world.device)
    measured(loop, clock).run(step, step + rounds)
    clock.lap()
    step += rounds
    flops = Flops()
    measured(loop, flops).run(step, step + 1)
    return {
        "round_s": seconds,
        "phase_s": {phase: total / rounds for phase, total in clock.seconds.items()},
        "flops": flops.operations,
        "peak_allocated_bytes": allocated,
        "peak_bytes": _peaks(world.device, loop, step + 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _peaks(device: torch.device, loop: Loop, step: int) -> dict[str, int]:
    if device.type == "cuda":
        peaks = CudaPeaks(device)
        measured(loop, peaks).run(step, step + 1)
        return peaks.bytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        measured(loop, marked).run(step, step + 1)
    return cpu_peaks(recorded)


def work(args: argparse.Namespace) -> None:
    """One rank: builds the run and measures it. Rank 0 writes the figures of all ranks to the file `args.worker`."""
    config = load_config(args.config, args.overrides).stage_configs[args.stage - 1]
    with open_world(config.parallel.timeout_s) as world:
        run = build_run(config, world, lambda done: False)
        settle(run)
        found = gather_objects(world, _measure(world, run.loop, args.warmup, args.rounds))
        if world.rank == 0:
            total = {
                "ranks": world.size,
                "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
                "threads": torch.get_num_threads(),
                "particles": config.particles.count,
                "config_digest": digest(config),
                "round_s": max(rank["round_s"] for rank in found),
                "updates_per_s": config.particles.count / max(rank["round_s"] for rank in found),
                "phase_s": _by_phase(found, "phase_s", lambda values: sum(values) / len(values)),
                "flops": _by_phase(found, "flops", sum),
                "peak_bytes": _by_phase(found, "peak_bytes", max),
                "peak_allocated_bytes": max(rank["peak_allocated_bytes"] for rank in found),
                "peak_rss_bytes": max(rank["peak_rss_bytes"] for rank in found),
            }
            Path(args.worker).write_text(json.dumps(total), encoding="utf-8")


def _by_phase(found: list[dict[str, Any]], column: str, join: Callable[[list[Any]], Any]) -> dict[str, Any]:
    return {phase: join([rank[column][phase] for rank in found]) for phase in PHASES}


def launch(args: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Starts `work` on `ranks` ranks of this machine, through torchrun if there are several."""
    cores = len(os.sched_getaffinity(0))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // ranks))}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        options = ["--worker", str(out), "--rounds", str(args.rounds), "--warmup", str(args.warmup)]
        options += ["--stage", str(args.stage)]
        command = [sys.executable, *torchrun, __file__, args.config, *args.overrides, *options]
        subprocess.run(command, env=environment, check=True)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def table(found: dict[str, Any]) -> str:
    """A Markdown table: mean milliseconds per rank, their share, operations of all ranks, largest peak of any rank."""
    lines = [
        f"{found['ranks']} rank(s) x {found['threads']} thread(s), {found['device']}, {found['particles']} particles: "
        f"{found['updates_per_s']:.2f} particle updates/s, {1000 * found['round_s']:.1f} ms per round, "
        f"peak RSS {found['peak_rss_bytes'] / 2**20:.0f} MiB per rank",
        "",
        "| phase | ms | share | GFLOP | GFLOP/s | peak MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    whole = sum(found["phase_s"].values())
    for phase in PHASES:
        seconds, operations = found["phase_s"][phase], found["flops"][phase]
        rate = f"{operations / seconds / found['ranks'] / 1e9:.1f}" if operations and seconds else "-"
        lines.append(
            f"| {phase} | {1000 * seconds:.2f} | {seconds / whole:.1%} | {operations / 1e9:.3f} | {rate} "
            f"| {found['peak_bytes'][phase] / 2**20:.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    default = [1, 2] if not torch.cuda.is_available() or torch.cuda.device_count() > 1 else [1]
    parser.add_argument("--ranks", type=int, nargs="+", default=default, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each measurement (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before measurements (default: %(default)s)")
    parser.add_argument("--stage", type=int, default=1, help="of a run of stages, from 1 (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args)
        return
    found = [launch(args, ranks) for ranks in args.ranks]
    print("\n\n".join(map(table, found)))
    text = json.dumps({"torch": torch.__version__, "worlds": found})
    print(f"\n{text}")
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
