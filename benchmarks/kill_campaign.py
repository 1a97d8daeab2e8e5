"""Kills real trainings at random instants, and counts lost rounds, unreadable checkpoints, hangs and wrong results.

    python -m benchmarks.kill_campaign --kills 300 [--seed 0] [--ranks 2] [--page benchmarks/kill_campaign.md]

Each training saves after every round. A kill ends rank 0, the last rank or all ranks, at an instant drawn uniformly
from the length of an undisturbed training. After each kill every file of the newest checkpoint is verified, and the
same configuration resumes, until the training is done. Its final state must have the same bits as that of an
undisturbed one.

Half of the kills hit trainings that save in the background, where a save is nearly always in progress. In the other
trainings, which save in the foreground, about half of the kills wait for the next save to begin and happen during it.
Prints the totals; --page also writes the results page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from distvsd.checkpoint import newest
from distvsd.config import Config, load_config
from distvsd.errors import CheckpointError, RankError
from distvsd.parallel.world import World
from distvsd.run.build import build_run
from distvsd.run.contents import verify
from distvsd.run.train import train
from distvsd.stages import newest_stage
from distvsd.testing.pipelines import tiny_pipeline
from distvsd.testing.ranks import run_ranks

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.yaml"
ROUNDS, PARTICLES = 10, 2
TIMEOUT_S = 120.0
# After this many kills of one training the campaign gives up, because the training makes no progress.
MOST_ATTEMPTS = 60


@dataclass
class Tally:
    """Counts over kills. lost: for each kill, how many reported rounds the newest checkpoint lacks."""

    trainings: int = 0
    kills: int = 0
    in_a_save: int = 0
    unreadable: int = 0
    hangs: int = 0
    different: int = 0
    lost: list[int] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.trainings + other.trainings,
            self.kills + other.kills,
            self.in_a_save + other.in_a_save,
            self.unreadable + other.unreadable,
            self.hangs + other.hangs,
            self.different + other.different,
            self.lost + other.lost,
        )

    def __str__(self) -> str:
        return (
            f"{self.kills} kills in {self.trainings} trainings ({self.in_a_save} in the middle of a save): "
            f"{self.unreadable} unreadable, at most {max(self.lost, default=0)} rounds lost, {self.hangs} hangs, "
            f"{self.different} trainings with other bits at the end"
        )


def small_training(prior: Path, run: Path, asynchronous: bool, rounds: int = ROUNDS, **changes: Any) -> Config:
    """A real training of three image particles that saves after every round. It takes seconds.

    changes: settings by dotted key.
    """
    settings = {
        "run.dir": run,
        "prior.path": prior,
        "particles.kind": "image",
        "particles.count": 3,
        "render.resolution": 16,
        "schedule.rounds": rounds,
        "score.replay_share": 0.25,
        "checkpoint.every": 1,
        "checkpoint.asynchronous": str(asynchronous).lower(),
        "parallel.numerics": "exact",
    } | changes
    return load_config(SMOKE, [f"{key}={value}" for key, value in settings.items()])


def warm_up(config: Config) -> None:
    """Imports in this process what a training needs, so that ranks forked from it start in a fraction of a second."""
    build_run(config, World(0, 1, 0, 1, torch.device("cpu")), lambda done: False)


def campaign(
    folder: Path, config_in: Callable[[Path], Config], kills: int, draw: random.Random, ranks: int = 2
) -> Tally:
    """Kills trainings in `folder` at least `kills` times, and resumes each until it is done.

    config_in: returns the configuration of the training in a run directory; it may have stages.

    It forks, so the caller must have one thread. Call `warm_up` first to make it fast. Raises RankError if a training
    fails without a kill.
    """
    undisturbed = config_in(folder / "undisturbed")
    began = time.monotonic()
    run_ranks(lambda world: train(undisturbed), ranks, timeout_s=TIMEOUT_S)
    seconds = time.monotonic() - began
    expected = verify(Path(undisturbed.run.dir), digest=True)
    save_s = statistics.median(line["save_stall_s"] for line in reported(newest_stage(Path(undisturbed.run.dir))))
    total = Tally()
    while total.kills < kills:
        config = config_in(folder / f"killed-{total.trainings}")
        tally = Tally(trainings=1)
        for attempts in range(MOST_ATTEMPTS):
            victims = draw.choice([[0], [ranks - 1], list(range(ranks))])
            # The range grows with each attempt. Otherwise a training on a machine that has become slower never ends.
            kill = Kill(victims, draw.uniform(0, seconds * (1 + attempts / 10)))
            if not config.checkpoint.asynchronous and draw.random() < 0.5:
                kill = Kill(victims, kill.after_s, Path(config.run.dir), draw.uniform(0, save_s))
            if attempt(config, folder / "pids", ranks, kill, tally):
                break
        else:
            raise RankError(
                f"a training was not done after {MOST_ATTEMPTS} attempts; undisturbed it took {seconds:.1f} s"
            )
        if verify(Path(config.run.dir), digest=True) != expected:
            tally.different += 1
        total += tally
        shutil.rmtree(config.run.dir)
    return total


@dataclass(frozen=True)
class Kill:
    """SIGKILL to some ranks, `after_s` seconds after all have started.

    run: the directory of the run. If it is given, the kill then also waits for a save to begin, and for `within_s`
    seconds more.
    """

    victims: list[int]
    after_s: float
    run: Path | None = None
    within_s: float = 0.0

    def strike(self, pids: Path, ranks: int) -> None:
        """Waits, then kills. pids: a folder into which the ranks write their process ids."""
        while len(list(pids.glob("*.pid"))) < ranks:
            time.sleep(0.001)
        time.sleep(self.after_s)
        if self.run is not None:
            staged = "checkpoints/.staged-*"
            while not any(self.run.glob(staged)) and not any(self.run.glob(f"stages/*/{staged}")):
                time.sleep(0.001)
            time.sleep(self.within_s)
        for victim in self.victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((pids / f"{victim}.pid").read_text()), signal.SIGKILL)


def attempt(config: Config, pids: Path, ranks: int, kill: Kill, tally: Tally) -> bool:
    """Trains. Returns True if the training ended, False if it was killed; a kill is examined and counted."""
    shutil.rmtree(pids, ignore_errors=True)
    pids.mkdir()

    def rank(world: World) -> None:
        (pids / f"{world.rank}.part").write_text(str(os.getpid()))
        (pids / f"{world.rank}.part").rename(pids / f"{world.rank}.pid")
        train(config)

    # Another process and not a thread, because this process must have one thread when it forks the ranks.
    killer = multiprocessing.get_context("fork").Process(target=kill.strike, args=(pids, ranks))
    killer.start()
    try:
        run_ranks(rank, ranks, timeout_s=TIMEOUT_S)
    except RankError as error:
        told = str(error)
        if "exit code -9" not in told:
            raise
        tally.hangs += "hangs: no result" in told or "did not notice" in told
    else:
        return True
    finally:
        killer.kill()
        killer.join()
    _examine(Path(config.run.dir), tally)
    return False


def _examine(run: Path, tally: Tally) -> None:
    """Counts one kill: verifies every file of the newest checkpoint and finds how old it is, in its stage."""
    tally.kills += 1
    run = newest_stage(run)
    checkpoints = run / "checkpoints"
    unfinished = (".staged-", ".replaced-", ".removed-")
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    tally.in_a_save += any(name.startswith(unfinished) for name in names)
    try:
        checkpoint = newest(checkpoints)
    except CheckpointError:
        tally.unreadable += 1
        return
    # `newest` skips damaged checkpoints without an error, but a kill must not leave any.
    if checkpoint is not None and any(name > checkpoint.folder.name for name in names if name.startswith("step-")):
        tally.unreadable += 1
    tally.lost.append(max(0, last_reported(run) - (checkpoint.manifest.step if checkpoint else 0)))


def reported(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_reported(run: Path) -> int:
    """The round of the last complete line of metrics.jsonl, 0 if there is none."""
    lines = reported(run)
    return int(lines[-1]["round"]) if lines else 0


def page(arguments: argparse.Namespace, tallies: dict[str, Tally], seconds: float) -> str:
    """The results page."""
    rows = "\n".join(
        f"| {name} | {tally.trainings} | {tally.kills} | {tally.in_a_save} | {tally.unreadable} | "
        f"{max(tally.lost, default=0)} | {sum(tally.lost) / max(len(tally.lost), 1):.2f} | {tally.hangs} | "
        f"{tally.different} |"
        for name, tally in tallies.items()
    )
    command = f"python -m benchmarks.kill_campaign --kills {arguments.kills} --seed {arguments.seed}"
    return f"""# SIGKILL at random instants

{machine()} It ran on one core for {seconds / 60:.0f} minutes.

    {command} --ranks {arguments.ranks} --page benchmarks/kill_campaign.md

Real trainings of {PARTICLES} image particles with a tiny prior, {ROUNDS} rounds on {arguments.ranks} ranks, saved
after every round. SIGKILL ends rank 0, the last rank, or all ranks. The instant is drawn uniformly from the length of
an undisturbed training; the range grows by a tenth of that length after each kill. The same configuration then resumes
the training, until it is done. In trainings that save in the foreground, about half of the kills wait from that instant
for the next save to begin, and happen during that save.

| saves | trainings | kills | of these in a save | unreadable checkpoints | most rounds lost | rounds lost, mean \
| hangs | final state differs |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}

- **In a save**: the kill left the folder of an unfinished save.
- **Unreadable**: the kill left no readable checkpoint, or a damaged one that had to be skipped. Every file of the
  newest checkpoint is verified after every kill.
- **Rounds lost**: the last round reported in `metrics.jsonl` minus the round of the newest checkpoint. A save in the
  background ends after the next round has been reported, so up to two rounds can be lost.
- **Hangs**: kills after which another rank did not notice within 5 s that a rank had died.
- **Final state differs**: any tensor of the final state differs from that of an undisturbed training.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw, began = random.Random(arguments.seed), time.monotonic()
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="distvsd-kills-") as name:
        folder = Path(name)
        tiny_pipeline(folder / "prior", "shapes", "v_prediction", 0)
        warm_up(small_training(folder / "prior", folder / "warm", True))
        for kind, is_asynchronous in (("in the foreground", False), ("in the background", True)):

            def config_in(run: Path, is_asynchronous: bool = is_asynchronous) -> Config:
                return small_training(folder / "prior", run, is_asynchronous, **{"particles.count": PARTICLES})

            tallies[kind] = campaign(folder / kind, config_in, arguments.kills // 2, draw, arguments.ranks)
            print(f"saves {kind}: {tallies[kind]}", flush=True)
    if arguments.page:
        arguments.page.write_text(page(arguments, tallies, time.monotonic() - began), encoding="ascii")


if __name__ == "__main__":
    main()
