"""What a run reports while it trains: metrics.jsonl, health.jsonl, the progress line, stragglers, Weights and Biases.

Rank 0 writes; the others only send their numbers, in one gather per logged round. A failed report never ends a run.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distvsd.config import Config, to_dict
from distvsd.parallel.assign import owners
from distvsd.parallel.collectives import gather_objects
from distvsd.parallel.world import World
from distvsd.run.loop import Round
from distvsd.runtime.metrics import JsonLines
from distvsd.runtime.paths import RunPaths
from distvsd.runtime.progress import Progress
from distvsd.runtime.stragglers import Stragglers
from distvsd.runtime.tracker import Outcome, Tracker, open_tracker

# The phases in which no rank waits for another. In the other phases every rank looks as slow as the slowest.
LOCAL_PHASES = ("render", "encode", "objective", "update")
EVENTS = {
    "unhealthy": "gradient not finite",
    "crowded_out": "no memory for its render or its gradients",
    "restored": "went back to its last good state",
    "quarantined": "quarantined",
    "found_again": "its page on the disk was lost; the same state was read again",
    "set_back": "its page on the disk was lost; went back to its last saved state",
}


class Journal:
    """The reports of a run, on one rank. `log` and `settle` are collective; everything else is local."""

    def __init__(
        self, config: Config, world: World, paths: RunPaths, first: int, metrics_bytes: int, health_bytes: int | None
    ) -> None:
        """first: the round the run begins or continues with. *_bytes: length of each file up to that round."""
        self._config, self._world = config, world
        is_first = world.rank == 0
        particles = config.particles
        self.progress = Progress(
            config.schedule.rounds, particles.count, config.log.every, is_first, turns=particles.turns
        )
        self._metrics = JsonLines(paths.metrics, metrics_bytes) if is_first else None
        self._health = JsonLines(paths.health, health_bytes) if is_first else None
        self._tracker = self._open_tracker(paths) if is_first else None
        self._stragglers = Stragglers([len(ids) for ids in owners(config.particles.count, world.size)])
        self._updates_a_round = config.particles.count / config.particles.turns  # on average
        self._events: list[tuple[int, int, str]] = []
        self._seconds: dict[str, float] = {}
        self._stall = 0.0
        self._sent = 0
        self._logged_round, self._logged_at = first, time.monotonic()

    def watch(self, done: Round) -> None:
        """Takes note of a finished round on this rank."""
        update = done.update
        named = {
            "unhealthy": [particle_id for particle_id in update.unhealthy if particle_id not in update.out_of_memory],
            "crowded_out": update.out_of_memory,
            "restored": update.restored,
            "quarantined": update.quarantined,
            "found_again": update.found_again,
            "set_back": update.set_back,
        }
        for kind, ids in named.items():
            self._events += [(done.step, particle_id, kind) for particle_id in ids]
        for phase, seconds in done.seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def stalled(self, seconds: float) -> None:
        """Notes the seconds for which the loop stopped for a checkpoint."""
        self._stall += seconds

    def settle(self) -> None:
        """Writes what happened to particles since the last call into health.jsonl; communicates."""
        self._write_events(gather_objects(self._world, self._take_events()))

    def log(self, done: Round, quarantined: int, save_failures: int, sent: int) -> int:
        """One line of metrics; returns how many particles of all ranks are quarantined. Communicates.

        quarantined: of this rank. save_failures: saves that failed one after another. sent: bytes that this rank has
        sent to share renders since the process began.
        """
        local = sum(self._seconds.get(phase, 0.0) for phase in LOCAL_PHASES)
        report = [self._take_events(), local, socket.gethostname(), quarantined, sent - self._sent]
        reports = gather_objects(self._world, report)
        events = self._write_events([events for events, *_ in reports])
        absent = sum(int(report[3]) for report in reports)
        now_bad = [(particle, kind) for step, particle, kind in events if step == done.step]
        unwell = {particle for particle, kind in now_bad if kind in ("unhealthy", "crowded_out")}
        unwell -= {particle for particle, kind in now_bad if kind == "quarantined"}  # `absent` counts them
        warning = self._stragglers.observe([seconds for _, seconds, *_ in reports], [report[2] for report in reports])
        if warning:
            self.progress.note(f"warning: {warning}")
        completed, now = done.step + 1, time.monotonic()
        rounds = max(completed - self._logged_round, 1)
        rate = rounds * self._updates_a_round / max(now - self._logged_at, 1e-9)
        loss = done.fit.loss if done.fit else None
        healthy = self._config.particles.count - absent - len(unwell)
        record: dict[str, Any] = {
            "round": completed,
            "time_s": time.time(),
            "updates_per_s": rate,
            "score_loss": loss,
            "score_steps_skipped": done.fit.skipped if done.fit else 0,
            "lag": done.lag,
            "healthy": healthy,
            "quarantined": absent,
            "resolution": self._config.render.resolution_at(done.step),
            "t_max": self._config.objective.t_max.at(done.step),
            "phase_s": {phase: seconds / rounds for phase, seconds in self._seconds.items()},
            "exchanged_bytes": sum(int(report[4]) for report in reports) / rounds,
            "save_stall_s": self._stall,
            "save_failures": save_failures,
            "imbalance": self._stragglers.ratio,
        }
        if self._metrics is not None:
            self._metrics.append(record)
        if self._tracker is not None:
            self._tracker.log(record, completed)
        self.progress.update(completed, rate, float("nan") if loss is None else loss, healthy)
        self._seconds, self._stall, self._sent = {}, 0.0, sent
        self._logged_round, self._logged_at = completed, now
        return absent

    def lengths(self) -> dict[str, int]:
        """Bytes of the two files at this moment, for the manifest of a checkpoint; of use on rank 0."""
        return {
            "metrics_bytes": self._metrics.bytes if self._metrics is not None else 0,
            "health_bytes": self._health.bytes if self._health is not None else 0,
        }

    def pictures(self, files: Sequence[Path], completed: int) -> None:
        """Says where pictures were written, and hands them to the tracker."""
        if self._tracker is not None:
            self._tracker.images(files, completed)

    def particles(self, rows: list[dict[str, Any]], completed: int) -> None:
        """A table of the particles, for the tracker."""
        if self._tracker is not None:
            self._tracker.particles(rows, completed)

    def close(self, outcome: Outcome) -> None:
        """Ends the progress line, closes the files, and waits a little for the tracker."""
        self.progress.close()
        for file in (self._metrics, self._health):
            if file is not None:
                file.close()
        if self._tracker is not None:
            self._tracker.close(outcome=outcome)

    def _open_tracker(self, paths: RunPaths) -> Tracker:
        log = self._config.log
        name = log.wandb_name or paths.root.resolve().name
        return open_tracker(
            log.wandb, paths.root, log.wandb_project, name, log.wandb_group, to_dict(self._config), self.progress.note
        )

    def _take_events(self) -> list[tuple[int, int, str]]:
        events, self._events = self._events, []
        return events

    def _write_events(self, reports: list[list[list[Any]]]) -> list[tuple[int, int, str]]:
        """The events of all ranks in the order of rounds and particles."""
        events = sorted((step, particle, kind) for report in reports for step, particle, kind in report)
        if self._health is not None:
            for step, particle, kind in events:
                self._health.append({"round": step + 1, "particle": particle, "event": EVENTS[kind]})
        return events
