"""SIGKILL at random instants of real trainings: what is lost, what cannot be read, what hangs, what comes out.

    python -m benchmarks.kill_campaign --kills 300 [--seed 0] [--ranks 2] [--page benchmarks/kill_campaign.md]

Each training saves after every round. At an instant drawn uniformly from the length of an undisturbed training, rank 0,
another rank or all ranks are killed; then the newest checkpoint is opened and every file of it verified, and the same
command resumes, until the training is done. Its final state must have the same bits as one that was never disturbed.
Half of the kills save in the background, where a save is nearly always under way; of those that save in the foreground
every second one waits for the next save to begin and strikes within it. Prints the sums; --page writes them down.
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
from distvsd.checkpoint import newest, verify_run
from distvsd.config import Config, load_config
from distvsd.errors import CheckpointError, RankError
from distvsd.parallel.world import World
from distvsd.run.build import build_run
from distvsd.run.train import train
from distvsd.testing.pipelines import tiny_pipeline
from distvsd.testing.ranks import run_ranks

SMOKE = Path(__file__).parents[1] / "configs" / "smoke.yaml"
ROUNDS, PARTICLES = 10, 2
TIMEOUT_S = 120.0
# A training that is killed this often without an end has stopped getting anywhere.
MOST_ATTEMPTS = 60


@dataclass
class Tally:
    """What the kills did. lost: of each kill, rounds reported and not in the newest checkpoint after it."""

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
    """A real training of three image particles that saves after every round; seconds long. changes: by dotted key."""
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
    """Loads in this process what a training imports, so that ranks forked from it start in a fraction of a second."""
    build_run(config, World(0, 1, 0, 1, torch.device("cpu")), lambda done: False)


def campaign(
    folder: Path, config_in: Callable[[Path], Config], kills: int, draw: random.Random, ranks: int = 2
) -> Tally:
    """At least `kills` kills of trainings in `folder`, each training to its end. config_in: the training in a run.dir.

    Forks, so the caller must have one thread; `warm_up` makes it fast. Raises RankError where a training fails that
    nobody killed.
    """
    undisturbed = config_in(folder / "undisturbed")
    began = time.monotonic()
    run_ranks(lambda world: train(undisturbed), ranks, timeout_s=TIMEOUT_S)
    seconds = time.monotonic() - began
    expected = verify_run(Path(undisturbed.run.dir), digest=True)
    save_s = statistics.median(line["save_stall_s"] for line in reported(Path(undisturbed.run.dir)))
    total = Tally()
    while total.kills < kills:
        config = config_in(folder / f"killed-{total.trainings}")
        tally = Tally(trainings=1)
        for attempts in range(MOST_ATTEMPTS):
            victims = draw.choice([[0], [ranks - 1], list(range(ranks))])
            # Later and later, or a machine that has become slower since would never come to the end.
            kill = Kill(victims, draw.uniform(0, seconds * (1 + attempts / 10)))
            if not config.checkpoint.asynchronous and draw.random() < 0.5:
                kill = Kill(victims, kill.after_s, Path(config.run.dir) / "checkpoints", draw.uniform(0, save_s))
            if attempt(config, folder / "pids", ranks, kill, tally):
                break
        else:
            raise RankError(f"{MOST_ATTEMPTS} attempts and no end: kills come faster than rounds ({seconds:.1f} s)")
        if verify_run(Path(config.run.dir), digest=True) != expected:
            tally.different += 1
        total += tally
        shutil.rmtree(config.run.dir)
    return total


@dataclass(frozen=True)
class Kill:
    """SIGKILL to some ranks, `after_s` seconds after all have started; with `saves`, the folder of the checkpoints, it
    waits then for a save to begin, and for `within_s` seconds more."""

    victims: list[int]
    after_s: float
    saves: Path | None = None
    within_s: float = 0.0

    def strike(self, pids: Path, ranks: int) -> None:
        """Waits for all that and kills. pids: a folder into which the ranks write their process ids."""
        while len(list(pids.glob("*.pid"))) < ranks:
            time.sleep(0.001)
        time.sleep(self.after_s)
        if self.saves is not None:
            while not any(self.saves.glob(".staged-*")):
                time.sleep(0.001)
            time.sleep(self.within_s)
        for victim in self.victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((pids / f"{victim}.pid").read_text()), signal.SIGKILL)


def attempt(config: Config, pids: Path, ranks: int, kill: Kill, tally: Tally) -> bool:
    """Trains until the end (True), or until the kill (False), which is then looked at and counted."""
    shutil.rmtree(pids, ignore_errors=True)
    pids.mkdir()

    def rank(world: World) -> None:
        (pids / f"{world.rank}.part").write_text(str(os.getpid()))
        (pids / f"{world.rank}.part").rename(pids / f"{world.rank}.pid")
        train(config)

    # Forked before the ranks, as threads and forks do not go together; it ends with the attempt.
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
    """What a kill left: is the newest checkpoint sound in every file, and how old is it?"""
    tally.kills += 1
    checkpoints = run / "checkpoints"
    unfinished = (".staged-", ".replaced-", ".removed-")
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    tally.in_a_save += any(name.startswith(unfinished) for name in names)
    try:
        checkpoint = newest(checkpoints)
    except CheckpointError:
        tally.unreadable += 1
        return
    # `newest` passes over what is damaged; a kill may leave nothing that has to be passed over.
    if checkpoint is not None and any(name > checkpoint.folder.name for name in names if name.startswith("step-")):
        tally.unreadable += 1
    tally.lost.append(max(0, last_reported(run) - (checkpoint.manifest.step if checkpoint else 0)))


def reported(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_reported(run: Path) -> int:
    """The round of the last whole line of metrics.jsonl; 0 before the first."""
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

{machine()} On one of the cores, {seconds / 60:.0f} minutes.

    {command} --ranks {arguments.ranks} --page benchmarks/kill_campaign.md

Real trainings of {PARTICLES} image particles with a tiny prior, {ROUNDS} rounds on {arguments.ranks} ranks, saved after
every round. Each is killed at instants drawn uniformly from the length of an undisturbed training (a tenth more after
each kill; rank 0, the last rank, or all), and resumed with the same configuration until it is done. Of the kills of
trainings that save in the foreground, every second one waits from that instant for the next save to begin, and strikes
within it.

| saves | trainings | kills | of these in a save | unreadable checkpoints | most rounds lost | rounds lost, mean \
| hangs | other bits at the end |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
{rows}

- **In a save**: an unfinished folder was there after the kill.
- **Unreadable**: no sound checkpoint, or one that had to be passed over. Every file is verified after every kill.
- **Rounds lost**: the last round reported in `metrics.jsonl` minus the round of the newest checkpoint. A save in the
  background ends when the next round has been reported, so that it can be two.
- **Hangs**: ranks that did not notice within 5 s that another one had died.
- **Other bits**: the final state differs from that of a training that nobody disturbed, in any tensor.
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
