"""A training from its configuration to its exit code: world, run directory, trainer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from distvsd.config import Config, diff, load_config, to_dict, to_yaml
from distvsd.config.canonical import BOOKKEEPING, recorded_keys
from distvsd.config.scalars import printable
from distvsd.errors import PREEMPTED, ConfigError, RankError, RunError
from distvsd.parallel.collectives import agreed, gather_objects
from distvsd.parallel.world import World, open_world
from distvsd.run.trainer import Trainer
from distvsd.runtime.heartbeat import Heartbeat, forget_ranks
from distvsd.runtime.launcher import watched
from distvsd.runtime.paths import Resume, RunLock, RunPaths
from distvsd.runtime.preempt import Preemption
from distvsd.runtime.status import read_status, write_status

_log = logging.getLogger("distvsd")


def train(config: Config, resume: Resume = "auto") -> int:
    """Trains to `schedule.rounds` and returns the exit code; every rank of a launch calls it, on its main thread.

    0: done. 3: told to stop by SIGTERM, SIGUSR1 or SIGINT on any rank; saved, and the same call continues. resume:
    'auto' continues the run in `run.dir` if there is one, 'must' demands one and accepts a changed configuration,
    'never' demands a fresh directory. Raises DistvsdError with the same text on every rank; where a rank was lost, the
    text names the silent one.
    """
    paths = RunPaths(Path(config.run.dir))
    timeout_s = config.parallel.timeout_s
    with watched() as watch, Preemption() as preemption, open_world(timeout_s, preemption.nothing_begun) as world:
        _refuse_other_configurations(world, config)
        with (
            _claimed(world, paths, config, resume),
            Heartbeat(paths.heartbeats, world.rank, world.size, timeout_s) as heartbeat,
            _naming_the_silent(heartbeat, world, paths, config),
        ):
            trainer = Trainer(config, world, paths, preemption, heartbeat)
            if watch is not None:  # from here on there is something to save
                watch.spare(lambda: preemption.request("the launcher died"), heartbeat.is_stuck)
            is_done = trainer.run()
    return 0 if is_done else PREEMPTED


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
def _naming_the_silent(heartbeat: Heartbeat, world: World, paths: RunPaths, config: Config) -> Iterator[None]:
    """Adds to the error of a lost rank which one it was, where it was, and what it was doing."""
    try:
        yield
    except RankError as error:
        silent = heartbeat.silent()
        named = RankError(f"{error}; {silent}") if silent else error
        if world.rank != 0 and "rank 0 (" in silent:  # nobody else is left to say so
            _report_failure(paths, config, named)
        raise named from error


@contextlib.contextmanager
def _claimed(world: World, paths: RunPaths, config: Config, resume: Resume) -> Iterator[None]:
    """Makes the run directory this run's own for the block; rank 0 acts, and all ranks learn how it went."""
    lock = RunLock(paths.lock, paths.heartbeats)

    def claim() -> None:
        if world.rank != 0:
            return
        paths.create()
        lock.acquire()
        try:
            paths.claim(to_yaml(config), resume, _differences(paths, config))
            forget_ranks(paths.heartbeats)
        except Exception:
            lock.release()
            raise

    try:
        agreed(world, claim)
    except BaseException:
        if world.rank == 0:
            lock.release()  # only if it is this run's: a rank was lost after rank 0 had taken it
        raise
    try:
        yield
    except BaseException as error:
        if world.rank == 0:
            _report_failure(paths, config, error)
        raise
    finally:
        if world.rank == 0:
            lock.release()


def _report_failure(paths: RunPaths, config: Config, error: BaseException) -> None:
    with contextlib.suppress(RunError):
        reached = (read_status(paths.status) or {}).get("round", 0)
        write_status(paths.status, "failed", reached, config.schedule.rounds, f"{type(error).__name__}: {error}")


def _differences(paths: RunPaths, config: Config) -> list[str]:
    """What changed against the run in this directory and would change its mathematics, in words.

    A run of an older version goes on with this configuration's values of the fields that it did not have.
    """
    text = paths.previous_config()
    if text is None:
        return []
    before, recorded = load_config(paths.config), recorded_keys(text)
    changed = [each for each in diff(before, config) if not each[0].startswith(BOOKKEEPING)]
    added = [f"{key}={_shown(new)}" for key, _, new in changed if key not in recorded]
    if added:
        _log.warning("%s was begun by a version without %s; it goes on with these", paths.root, ", ".join(added))
    return [f"{key}: {_shown(old)} became {_shown(new)}" for key, old, new in changed if key in recorded]
