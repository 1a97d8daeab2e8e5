"""The entry of a training: world, run directory, parts, loop. `python -m distvsd.train CONFIG` under any launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distvsd.build import Restored, Run, build_run, load_particles
from distvsd.checkpoint.format import particle_file
from distvsd.checkpoint.saver import Saver
from distvsd.config import Config, diff, digest, load_config, to_dict, to_yaml
from distvsd.config.canonical import BOOKKEEPING
from distvsd.errors import CheckpointError, RunError
from distvsd.loop import Round
from distvsd.parallel.collectives import gather_objects
from distvsd.parallel.world import World, open_world
from distvsd.render_run import SHEET_ROWS, contact_sheets
from distvsd.runtime.metrics import JsonLines
from distvsd.runtime.paths import Resume, RunLock, RunPaths
from distvsd.runtime.progress import Progress
from distvsd.runtime.status import read_status, write_status


def train(config: Config, resume: Resume = "auto") -> int:
    """Trains to `schedule.rounds` and returns the exit code 0; every rank of a launch calls it.

    resume: 'auto' continues the run in `run.dir` if there is one, 'must' demands one and accepts a changed
    configuration, 'never' demands a fresh directory. Raises DistvsdError with the same text on every rank.
    """
    with open_world(config.parallel.timeout_s) as world:
        paths = RunPaths(Path(config.run.dir))
        with _claimed(world, paths, config, resume):
            _Training(config, world, paths).run()
    return 0


class _Training:
    """One rank of a run with all that surrounds the loop: checkpoints, metrics, progress, pictures."""

    def __init__(self, config: Config, world: World, paths: RunPaths) -> None:
        self.config, self.world, self.paths = config, world, paths
        self.parts: Run = build_run(config, world, self._watch)
        self.saver = Saver(paths.checkpoints, world, config.checkpoint.keep)
        self.first, metrics_bytes, health_bytes = self._resume()
        rounds = config.schedule.rounds
        is_first = world.rank == 0
        self.progress = Progress(rounds, config.particles.count, config.log.every, is_first)
        self.metrics = JsonLines(paths.metrics, metrics_bytes) if is_first else None
        self.health = JsonLines(paths.health, health_bytes) if is_first else None
        self.unhealthy: list[tuple[int, int]] = []
        self.healthy = config.particles.count
        self.seconds: dict[str, float] = {}
        self.saved = self.first if self.first else -1
        self.logged_round, self.logged_at = self.first, time.monotonic()

    def run(self) -> None:
        """All rounds that are left, the last checkpoint, the contact sheet."""
        rounds = self.config.schedule.rounds
        self._status("running", self.first)
        try:
            self.parts.loop.run(self.first, rounds)
            if self.saved < rounds:
                self._save(rounds)
            if self.world.rank == 0:
                finished = load_particles(self.paths.root)
                first_page = dataclasses.replace(finished, ids=finished.ids[:SHEET_ROWS])
                for sheet in contact_sheets(first_page, self.paths.renders):
                    self.progress.note(f"written {sheet}")
        finally:
            self.progress.close()
            for file in (self.metrics, self.health):
                if file is not None:
                    file.close()
        self._status("done", max(self.first, rounds))

    def _watch(self, done: Round) -> bool:
        """After each round: what is due by now. The same on every rank, because only the round's number decides."""
        completed = done.step + 1
        last = completed == self.config.schedule.rounds
        self.unhealthy += [(done.step, particle_id) for particle_id in done.update.unhealthy]
        for phase, seconds in done.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        if completed % self.config.log.every == 0 or last:
            self._log(done)
        every = self.config.checkpoint.every
        if last or (every and completed % every == 0):
            self._save(completed)
        if self.config.log.images_every and completed % self.config.log.images_every == 0:
            self._draw(completed)
        return False

    def _log_health(self) -> list[tuple[int, int]]:
        """Who was unhealthy since the last call, as (step, particle), also into health.jsonl; communicates."""
        reports: list[list[list[int]]] = gather_objects(self.world, self.unhealthy)
        events = sorted((step, particle_id) for report in reports for step, particle_id in report)
        self.unhealthy = []
        if self.health is not None:
            for step, particle_id in events:
                self.health.append({"round": step + 1, "particle": particle_id, "event": "gradient not finite"})
        return events

    def _log(self, done: Round) -> None:
        """One line of metrics; communicates."""
        events = self._log_health()
        completed, now = done.step + 1, time.monotonic()
        rounds = completed - self.logged_round
        rate = rounds * self.config.particles.count / max(now - self.logged_at, 1e-9)
        self.healthy = self.config.particles.count - sum(step == done.step for step, _ in events)
        loss = done.fit.loss if done.fit else None
        record: dict[str, Any] = {
            "round": completed,
            "time_s": time.time(),
            "updates_per_s": rate,
            "score_loss": loss,
            "score_steps_skipped": done.fit.skipped if done.fit else 0,
            "lag": done.lag,
            "healthy": self.healthy,
            "resolution": self.config.render.resolution_at(done.step),
            "t_max": self.config.objective.t_max.at(done.step),
            "phase_s": {phase: seconds / rounds for phase, seconds in self.seconds.items()},
        }
        if self.metrics is not None:
            self.metrics.append(record)
        self.progress.update(completed, rate, float("nan") if loss is None else loss, self.healthy)
        self.seconds, self.logged_round, self.logged_at = {}, completed, now

    def _draw(self, completed: int) -> None:
        """Contact sheets on the way: each rank draws its own first particles, so that nothing is gathered."""
        ensemble = self.parts.ensemble
        ids = ensemble.ids[:SHEET_ROWS]
        if ids:
            decode = self.parts.prior.decode if ensemble.particle.is_latent else None
            folder = self.paths.renders / f"round-{completed:08d}" / f"particles-{ids[0]:06d}-{ids[-1]:06d}"
            contact_sheets(Restored(self.config, ids, completed, ensemble, decode), folder)

    def _save(self, completed: int) -> None:
        """The state after `completed` rounds; communicates."""
        self._log_health()  # before the length of its file is noted
        files = {particle_file(particle_id): state for particle_id, state in self.parts.ensemble.state().items()}
        metadata = {
            "config": to_dict(self.config),
            "config_digest": digest(self.config),
            "prior_identity": self.parts.prior.identity() if self.world.rank == 0 else "",
            "metrics_bytes": self.metrics.bytes if self.metrics is not None else 0,
            "health_bytes": self.health.bytes if self.health is not None else 0,
        }
        self.saver.save(completed, files | self.parts.score.state(), self.parts.score.texts(), metadata)
        self.saved = completed
        self._status("running", completed)

    def _resume(self) -> tuple[int, int, int | None]:
        """Restores the newest sound checkpoint; returns its round and its lengths of metrics.jsonl, health.jsonl."""
        checkpoint = self.saver.load()
        if checkpoint is None:
            return 0, 0, 0
        manifest, parts = checkpoint.manifest, self.parts

        def restore() -> None:
            if manifest.prior_identity != parts.prior.identity():
                raise CheckpointError(
                    f"{checkpoint.folder} was trained against another prior than {self.config.prior.path} "
                    "holds now; resume with that prior, or choose another run.dir"
                )
            stored = {entry.id for entry in manifest.particles}
            if stored != set(range(self.config.particles.count)):
                raise CheckpointError(
                    f"{checkpoint.folder} holds {len(stored)} particles, but particles.count is "
                    f"{self.config.particles.count}; resume with that count, or choose another run.dir"
                )
            for particle_id in parts.ensemble.ids:
                parts.ensemble.load_state(particle_id, checkpoint.read(particle_file(particle_id)))
            score_files = [
                file for file in manifest.files if file.startswith("score/") and file.endswith(".safetensors")
            ]
            parts.score.load_state({file: checkpoint.read(file) for file in score_files})

        _agreed(self.world, restore)
        return manifest.step, manifest.metrics_bytes, manifest.more.get("health_bytes")

    def _status(self, state: Any, completed: int) -> None:
        if self.world.rank == 0:
            write_status(self.paths.status, state, completed, self.config.schedule.rounds)


@contextlib.contextmanager
def _claimed(world: World, paths: RunPaths, config: Config, resume: Resume) -> Iterator[None]:
    """Makes the run directory this run's own for the block; rank 0 acts, and all ranks learn how it went."""
    lock = RunLock(paths.lock)

    def claim() -> None:
        if world.rank != 0:
            return
        paths.create()
        lock.acquire()
        try:
            paths.claim(to_yaml(config), resume, _differences(paths, config))
        except Exception:
            lock.release()
            raise

    _agreed(world, claim)
    try:
        yield
    except BaseException as error:
        if world.rank == 0:
            with contextlib.suppress(RunError):
                reached = (read_status(paths.status) or {}).get("round", 0)
                message = f"{type(error).__name__}: {error}"
                write_status(paths.status, "failed", reached, config.schedule.rounds, message)
        raise
    finally:
        if world.rank == 0:
            lock.release()


def _differences(paths: RunPaths, config: Config) -> list[str]:
    """What changed against the run in this directory and would change its mathematics, in words."""
    if not paths.config.is_file():
        return []
    before = load_config(paths.config)
    changed = diff(before, config)
    return [f"{key}: {old!r} became {new!r}" for key, old, new in changed if not key.startswith(BOOKKEEPING)]


def _agreed(world: World, action: Callable[[], None]) -> None:
    """Runs `action` on every rank; where any rank's fails, all raise the first one's error. Communicates."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:  # whatever it is: the others wait in the next line, and must not wait for ever
        problem = error
    reports = gather_objects(world, None if problem is None else [type(problem).__name__, str(problem)])
    failed = next((report for report in reports if report is not None), None)
    if failed is None:
        return
    if problem is not None and str(problem) == failed[1]:
        raise problem
    raise (RunError if failed[0] == "RunError" else CheckpointError)(failed[1]) from problem


class _CallableModule(types.ModuleType):
    """`distvsd.train` names this module, for `python -m`, and `train`, for `import distvsd`: Python puts a submodule in
    the place of whatever its package calls so, hence the module itself can be called."""

    def __call__(self, config: Config, resume: Resume = "auto") -> int:
        return train(config, resume)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    from distvsd.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
