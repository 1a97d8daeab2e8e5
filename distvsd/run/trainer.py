"""One rank of a stage, with everything around the loop: what is due after each round, saving, stopping."""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from distvsd import __version__
from distvsd.checkpoint.format import particle_file
from distvsd.checkpoint.saver import Saver
from distvsd.checkpoint.snapshot import OnDemand
from distvsd.config import digest, to_dict, to_yaml
from distvsd.errors import CheckpointError, DivergedError, RunError
from distvsd.faults import fault
from distvsd.parallel.alike import Fact, refuse_unlike
from distvsd.parallel.collectives import agreed, max_flags, set_timeout
from distvsd.parallel.world import OPENING_TIMEOUT_S, World
from distvsd.plan.exchange import chosen_mode
from distvsd.run.build import Run, build_run
from distvsd.run.custom import Custom
from distvsd.run.journal import Journal
from distvsd.run.loop import Round
from distvsd.run.pictures import draw_finished, draw_round
from distvsd.run.resume import Source, largest_part, resume, source_of
from distvsd.runtime.heartbeat import Heartbeat
from distvsd.runtime.preempt import Preemption
from distvsd.runtime.profile import Profile, profiled_rounds
from distvsd.runtime.status import State
from distvsd.runtime.stragglers import tame_garbage_collector
from distvsd.runtime.tracker import Outcome
from distvsd.stages import Stage

_log = logging.getLogger("distvsd")
PICTURES_TIMEOUT_S = 86_400.0


class Order(enum.IntFlag):
    """What one rank found and all ranks must act on together after a round."""

    PREEMPTED = 1
    WRITING = 2


class Trainer:
    """Trains one stage. Every rank makes one and calls `run`; all of it is collective."""

    def __init__(
        self, stage: Stage, world: World, preemption: Preemption, heartbeat: Heartbeat, custom: Custom = Custom()
    ) -> None:
        self.stage, self.world, self.preemption, self.heartbeat = stage, world, preemption, heartbeat
        self.config, self.paths = stage.config, stage.paths
        config, paths = self.config, self.paths
        # Ranks take very different times to load from a shared disk and to run the first round. Until then heartbeats
        # tell a slow rank from a lost one; later a rank that does not answer in time is an error.
        self.patience_s = max(OPENING_TIMEOUT_S, config.parallel.timeout_s)
        set_timeout(world, self.patience_s, heartbeat.refuse_lost)
        agreed(world, lambda: stage.create() if world.rank == 0 else None)
        source = source_of(stage, world, custom)
        self.parts = agreed(world, lambda: self._load(source, custom))
        self._refuse_unlike_ranks()
        checkpoint = config.checkpoint
        # Copies of all particles in host memory are what paging avoids.
        beside = checkpoint.asynchronous and config.particles.turns == 1
        self.saver = Saver(paths.checkpoints, world, checkpoint.keep, beside, checkpoint.max_failures)
        self.saver.preflight(largest_part(self.parts))
        self.first, metrics_bytes, health_bytes = resume(self.parts, self.saver)
        self.journal = agreed(world, lambda: Journal(config, world, paths, self.first, metrics_bytes, health_bytes))
        agreed(world, lambda: self._adopt() if world.rank == 0 else None)
        self.profiled = profiled_rounds(self.first, config.schedule.rounds, config.log.profile)
        records = world.rank == 0 or config.log.profile_ranks == "all"
        self.profile = Profile(paths.profile, world.rank, self.profiled if records else range(0))
        self.saved = self.first if self.first else -1  # rounds completed in the newest checkpoint that was begun
        self.was_preempted = False
        self.collect_garbage = tame_garbage_collector()

    def _refuse_unlike_ranks(self) -> None:
        """Communicates. Every rank reads all files of its prior once more to compare their hashes: this takes seconds
        for each GB from a local disk."""
        identities = agreed(self.world, self.parts.identities)
        facts = {
            what: Fact(identity, f"{identity[:15]} ({path} seen from {Path.cwd()})")
            for what, (path, identity) in identities.items()
        } | {
            # Ranks that choose differently would wait for each other; each of them works it out alone.
            "exchange of renders": Fact(*[chosen_mode(self.config, self.world.size)] * 2),
            "version of distvsd": Fact(__version__, __version__),
            "version of torch": Fact(str(torch.__version__), str(torch.__version__)),
        }
        refuse_unlike(self.world, facts)

    def _load(self, source: Source | None, custom: Custom) -> Run:
        fault("load")
        return build_run(self.config, self.world, self._watch, self._entered, custom, source)

    def _adopt(self) -> None:
        """Writes the configurations that the run and the stage go on with; `--resume must` may have changed them."""
        self.paths.adopt(to_yaml(self.config))
        self.stage.run.adopt(to_yaml(self.stage.whole))

    def run(self) -> bool:
        """All rounds that are left, the last checkpoint, the contact sheet. False if the run was told to stop before
        its end; then its state is saved, and the same command line continues it."""
        rounds = self.config.schedule.rounds
        if self.stage.folder:
            name = self.stage.paths.root.name
            self.journal.progress.note(f"stage {self.stage.number} of {self.stage.count}, {name}: {rounds} rounds")
        self._status("running", self.first)
        outcome: Outcome = "failed"
        try:
            self.parts.loop.run(self.first, rounds)
            reached = self.saved if self.was_preempted else max(self.first, rounds)
            self._save_for_good(reached)
            outcome = "preempted" if self.was_preempted else "done"
            why = f"{self.preemption.requested or 'another rank was told to stop'}; the same command continues the run"
            self._status(outcome, reached, why if self.was_preempted else "")  # before what may take long, or fail
            if not self.was_preempted:
                set_timeout(self.world, PICTURES_TIMEOUT_S, self.heartbeat.refuse_lost)  # the others wait for rank 0
                draw_finished(self.parts, self.paths, self.journal)
        except DivergedError:
            with contextlib.suppress(CheckpointError):
                self._finish()  # all ranks stopped at the same place, so a save under way can be completed
            raise
        finally:
            self.profile.close()
            self.journal.close(outcome)
            self.parts.ensemble.close()
            gc.unfreeze()
            gc.enable()
        return not self.was_preempted

    def _entered(self, step: int, phase: str) -> None:
        self.heartbeat.at(step, phase)
        self.profile.enter(step, phase)

    def _watch(self, done: Round) -> bool:
        """Does what is due after a round; True stops the run. The round's number and the union of all ranks' orders
        decide, so every rank does the same."""
        completed = done.step + 1
        last = completed == self.config.schedule.rounds
        if done.step in self.profiled or completed in self.profiled:  # to start a profile or to write it takes seconds
            set_timeout(self.world, self.patience_s, self.heartbeat.refuse_lost)
        elif done.step in (self.first, self.profiled.stop):
            set_timeout(self.world, self.config.parallel.timeout_s)
        self.heartbeat.at(done.step, "watch", self.patience_s)  # a save may be in it
        self.profile.enter(done.step, "watch")
        self.journal.watch(done)
        if found := self.parts.sizes.after(done):
            self.journal.progress.note(found)
        self.collect_garbage(completed)
        if completed % self.config.log.every == 0 or last:
            self._log(done)
        orders = self._orders()
        if self.saver.pending is not None and Order.WRITING not in orders:
            self._finish()
        every = self.config.checkpoint.every
        ends = last or Order.PREEMPTED in orders
        # Ranks take very different times to write, and wait for each other: a slow disk is no dead rank.
        waits = ends or not self.saver.asynchronous
        if ends or (every and completed % every == 0):
            if waits:
                set_timeout(self.world, self.patience_s, self.heartbeat.refuse_lost)
            self._save(completed)
            if not ends:
                set_timeout(self.world, self.config.parallel.timeout_s)
        if self.config.log.images_every and completed % self.config.log.images_every == 0:
            draw_round(self.parts, self.paths, self.journal, completed)
        self.was_preempted = Order.PREEMPTED in orders and not last
        self.profile.end_round(done.step)
        return self.was_preempted

    def _orders(self) -> Order:
        """The union of all ranks' orders; communicates one word."""
        mine = Order.PREEMPTED if self.preemption.requested else Order(0)
        if self.saver.writing:
            mine |= Order.WRITING
        return Order(max_flags(self.world, mine))

    def _log(self, done: Round) -> None:
        """One line of metrics; communicates. Raises DivergedError on all ranks when no particle is left."""
        parts = self.parts
        absent = self.journal.log(done, len(parts.ensemble.quarantined), self.saver.failures, parts.sharing.sent)
        if absent == self.config.particles.count:
            raise DivergedError(
                f"all {absent} particles are quarantined after round {done.step + 1}; {self.paths.health} says why. "
                "Where gradients were not finite lower particles.learning_rate or prior.guidance_scale; where memory "
                "did not suffice set particles.recompute=true particles.micro_batch=1, or use more ranks. Start anew "
                "or from an older checkpoint"
            )

    def _save(self, completed: int) -> None:
        """Begins to save the state after `completed` rounds; communicates."""
        if self.saved == completed:
            return
        self.journal.settle()  # before the length of its file is noted
        began = time.perf_counter()
        ensemble = self.parts.ensemble
        metadata = {
            "config": to_dict(self.config),
            "config_digest": digest(self.config),
            **{f"{what}_identity": identity for what, (_, identity) in self.parts.identities().items()},
        } | self.journal.lengths()
        if names := self.parts.custom.names():
            metadata["custom"] = names
        if sizes := self.parts.sizes.state():
            metadata["sizes"] = sizes
        training = self.parts.training
        texts = training.score.texts() if training else {}
        files: dict[str, Callable[[], Mapping[str, Tensor]]] = {
            particle_file(own): functools.partial(ensemble.saved, own) for own in ensemble.ids
        }
        for file, tensors in (training.state() if training else {}).items():
            files[file] = functools.partial(dict, tensors)
        self.saver.begin(completed, OnDemand(files), texts, metadata, ensemble.health())
        self.saved = completed
        self.journal.stalled(time.perf_counter() - began)
        if self.saver.pending is None:
            self._report_save(completed)

    def _finish(self) -> None:
        """Publishes the checkpoint that all ranks have written; communicates."""
        began, step = time.perf_counter(), self.saver.pending
        self.saver.finish()
        self.journal.stalled(time.perf_counter() - began)
        if step is not None:
            self._report_save(step)

    def _report_save(self, step: int) -> None:
        """A failure was logged by the saver; the run goes on without that checkpoint."""
        if not self.saver.failures:
            self._status("running", step)

    def _save_for_good(self, completed: int) -> None:
        """The state after `completed` rounds is on the disk when this returns; communicates. Raises CheckpointError."""
        self.heartbeat.at(completed, "save", self.patience_s)
        self._finish()
        if self.saver.failures or self.saved != completed:
            self.saved = -1
            self._save(completed)
            self._finish()
        if self.saver.failures:
            raise CheckpointError(
                f"the last state, after {completed} rounds, could not be saved: {self.saver.last_failure}"
            )

    def _status(self, state: State, completed: int, message: str = "") -> None:
        if self.world.rank == 0:
            try:
                self.stage.report(state, completed, message)
            except RunError as error:  # the disk is full; only rank 0 knows, so it must not raise alone
                self.journal.progress.note(f"warning: {error}")
