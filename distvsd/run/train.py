"""A training from its configuration to its exit code: world, run directory, one stage after the other."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distvsd.config import Config, diff, load_config, to_dict, to_yaml
from distvsd.config.canonical import is_bookkeeping, recorded_keys
from distvsd.config.scalars import printable
from distvsd.errors import PREEMPTED, ConfigError, RankError, RunError
from distvsd.parallel.collectives import agreed, gather_objects, max_flags
from distvsd.parallel.world import World, open_world
from distvsd.run.custom import Custom
from distvsd.run.resume import refuse_impossible_hand_overs
from distvsd.run.trainer import Trainer
from distvsd.runtime.heartbeat import Heartbeat, forget_ranks
from distvsd.runtime.launcher import Watch, watched
from distvsd.runtime.paths import Resume, RunLock, RunPaths
from distvsd.runtime.preempt import Preemption
from distvsd.runtime.status import read_status
from distvsd.stages import Stage, refuse_other_stages, stages_of

_log = logging.getLogger("distvsd")


def train(config: Config, resume: Resume = "auto", custom: Custom = Custom()) -> int:
    """Trains all stages, each to its `schedule.rounds`, and returns the exit code; every rank of a launch calls it, on
    its main thread.

    0: done. 3: told to stop by SIGTERM, SIGUSR1 or SIGINT on any rank; saved, and the same call continues. resume:
    'auto' continues the run in `run.dir` if there is one, 'must' demands one and accepts a changed configuration,
    'never' demands a fresh directory. custom: parts that the caller makes, the same on every rank. Raises DistvsdError
    with the same text on every rank; where a rank was lost, the text names the silent one.
    """
    run, timeout_s = RunPaths(Path(config.run.dir)), config.parallel.timeout_s
    with watched() as watch, Preemption() as preemption, open_world(timeout_s, preemption.nothing_begun) as world:
        _refuse_other_configurations(world, config)
        agreed(world, lambda: refuse_impossible_hand_overs(config, custom))
        with (
            _claimed(world, run, config, resume),
            Heartbeat(run.heartbeats, world.rank, world.size, timeout_s) as heartbeat,
        ):
            process = _Process(world, preemption, heartbeat, watch, custom)
            stages = stages_of(config)
            first = _newest_begun(world, stages)
            for stage in stages[first:]:
                if not _train_stage(stage, process):
                    return PREEMPTED
    return 0


@dataclass(frozen=True)
class _Process:
    """What a rank keeps for the whole run, whatever the stage."""

    world: World
    preemption: Preemption
    heartbeat: Heartbeat
    watch: Watch | None
    custom: Custom


def _newest_begun(world: World, stages: list[Stage]) -> int:
    """Index of the stage to go on with: the last one that has a checkpoint, or the first. Collective: rank 0 looks at
    the disk, and every rank gets its answer. A complete stage only draws its pictures again before the next begins."""

    def look() -> int:
        if world.rank != 0:
            return 0
        begun = max((index for index, stage in enumerate(stages) if stage.has_begun()), default=0)
        for over in stages[:begun]:
            _warn_of_changes(over)
        return begun

    found: int = gather_objects(world, agreed(world, look))[0]
    return found


def _warn_of_changes(over: Stage) -> None:
    """Warns of changed settings of a finished stage: they no longer have an effect."""
    before = load_config(over.paths.known_config())
    changed = [key for key, *_ in diff(before, over.config) if not is_bookkeeping(key)]
    if changed:
        _log.warning("%s is over and stays as it is, whatever %s is now", over.folder, ", ".join(changed[:8]))


def _train_stage(stage: Stage, process: _Process) -> bool:
    """Trains one stage to its end; False where the run was told to stop. Every rank calls it."""
    world, preemption = process.world, process.preemption
    with _failure_reported(stage, process):
        trainer = Trainer(stage, world, preemption, process.heartbeat, process.custom)
        if process.watch is not None:  # from here on there is something to save
            process.watch.spare(lambda: preemption.request("the launcher died"), process.heartbeat.is_stuck)
        is_done = trainer.run()
        if not is_done or stage.number == stage.count:
            return is_done
        del trainer
        gc.collect()  # its networks and particles form reference cycles; the next stage needs their memory
        if not max_flags(world, int(preemption.requested is not None)):
            return True
        if world.rank == 0:
            why = preemption.requested or "another rank was told to stop"
            stage.report_run("preempted", stage.config.schedule.rounds, f"{why}; the same command continues the run")
        return False


def _refuse_other_configurations(world: World, config: Config) -> None:
    """Raises ConfigError on all ranks, with the keys, where ranks were started with different configurations."""
    given = gather_objects(world, to_dict(config))
    for rank, other in enumerate(given):
        if other != given[0]:
            keys = _differing_keys(given[0], other)
            raise ConfigError(
                f"ranks 0 and {rank} were started with different configurations: {'; '.join(keys[:8])}; give every "
                "node the same configuration file and the same key=value arguments"
            )


def _differing_keys(one: object, other: object, prefix: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [text for key in keys for text in _differing_keys(one.get(key), other.get(key), f"{prefix}.{key}")]
    return [] if one == other else [f"{prefix.removeprefix('.')} is {_shown(one)} and {_shown(other)}"]


def _shown(value: object) -> str:
    return printable(repr(value), 200)  # a list of prompts may be a megabyte


@contextlib.contextmanager
def _failure_reported(stage: Stage, process: _Process) -> Iterator[None]:
    """Writes an error that ends the run into STATUS.json. For a lost rank it adds which rank it was, where it was, and
    what it was doing."""
    rank = process.world.rank
    try:
        yield
    except RankError as error:
        silent = process.heartbeat.silent()
        named = RankError(f"{error}; {silent}") if silent else error
        if rank == 0 or "rank 0 (" in silent:  # no other rank is left to write it
            _report_failure(stage, named)
        raise named from error
    except BaseException as error:
        if rank == 0:
            _report_failure(stage, error)
        raise


def _report_failure(stage: Stage, error: BaseException) -> None:
    with contextlib.suppress(RunError):
        reached = (read_status(stage.paths.status) or {}).get("round", 0)
        stage.report("failed", reached, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _claimed(world: World, paths: RunPaths, config: Config, resume: Resume) -> Iterator[None]:
    """Locks and claims the run directory for the block. Collective: rank 0 acts; an error is raised on all ranks."""
    lock = RunLock(paths.lock, paths.heartbeats)

    def claim() -> None:
        if world.rank != 0:
            return
        paths.create()
        lock.acquire()
        try:
            refuse_other_stages(config)
            paths.claim(to_yaml(config), resume, _differences(paths, config))
            forget_ranks(paths.heartbeats)
        except Exception:
            lock.release()
            raise

    try:
        agreed(world, claim)
        yield
    finally:
        if world.rank == 0:
            lock.release()  # only if it is this run's


def _differences(paths: RunPaths, config: Config) -> list[str]:
    """The changes from the configuration of the run in this directory that would change its results, in words.

    A run of an older version takes this configuration's values for the fields that the version lacked.
    """
    text = paths.previous_config()
    if text is None:
        return []
    before, recorded = load_config(paths.config), recorded_keys(text)
    recorded |= {key for key, *_ in diff(before, config) if key.startswith("stages.")}
    changed = [each for each in diff(before, config) if not is_bookkeeping(each[0])]
    added = [f"{key}={_shown(new)}" for key, _, new in changed if key not in recorded]
    if added:
        _log.warning("%s was begun by a version without %s; it goes on with these", paths.root, ", ".join(added))
    return [f"{key}: {_shown(old)} became {_shown(new)}" for key, old, new in changed if key in recorded]
