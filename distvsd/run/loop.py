"""The algorithm. One round: render, ask the prior and the score, move the particles, train the score on all renders.

It imports no diffusion library and uses no process group: what communicates is passed in as callables.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distvsd.faults import begin_round
from distvsd.particles.ensemble import Ensemble, Update, Views
from distvsd.score.scattered import Renders
from distvsd.score.training import Fit, ScoreTraining
from distvsd.vsd.samples import Samples


@dataclass(frozen=True)
class Round:
    """What happened: step (from 0), this rank's update, the score's fit, lag or None, and this rank's seconds by
    phase."""

    step: int
    update: Update
    fit: Fit | None
    lag: float | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class Loop:
    """The parts of a run on one rank; what may communicate is passed in as callables.

    encode(views, resolution): renders as samples, with the graph to the particles. objective(samples, step): the
    gradient at the latents, see `vsd.objectives.Distillation`. exchange(samples, step): gathers all ranks' samples
    (communicates). exclude(union, ids): the union with weight 0 for the particles that any rank
    names (communicates). training is None where no score network is learnt (SDS). watch(round): returns True to stop;
    every rank must return the same. entered(step, phase): called at the start of each phase.
    """

    ensemble: Ensemble
    encode: Callable[[list[Views], int], Samples]
    objective: Callable[[Samples, int], Tensor]
    exchange: Callable[[Samples, int], Renders]
    exclude: Callable[[Renders, list[int]], Renders]
    training: ScoreTraining | None
    resolution: Callable[[int], int]
    watch: Callable[[Round], bool]
    lag_due: Callable[[int], bool]
    entered: Callable[[int, str], None] = lambda step, phase: None

    def run(self, first: int, last: int) -> None:
        """Rounds first to last - 1; every rank calls it."""
        for step in range(first, last):
            if self.watch(self.round(step)):
                return

    def round(self, step: int) -> Round:
        begin_round(step)
        clock = _Clock(step, self.entered)
        clock.enter("render")
        resolution = self.resolution(step)
        rendered: list[Samples] = []
        for views in self.ensemble.render(step, resolution):  # local: some of this rank's particles after the other
            clock.enter("encode")
            samples = self.encode(views, resolution)  # local: latents with the graph to the particles
            clock.enter("objective")
            gradient = self.objective(samples, step)  # local unless networks are spread: w(t) (eps_prior - eps_score)
            clock.enter("update")
            self.ensemble.update(views, samples.latents, gradient, step)  # local: one Adam step a particle
            rendered.append(samples.detached())
            clock.enter("render")
        update = self.ensemble.finish(step)  # local: what became of each particle
        if self.training is None:
            return Round(step, update, None, None, clock.stop())
        clock.enter("exchange")
        union = self.exchange(Samples.cat(rendered), step)  # communicates: the samples of all ranks
        union = self.exclude(union, update.absent)  # communicates: a particle that did not move is not trained on
        clock.enter("score")
        lag = self.training.lag(union, step) if self.lag_due(step) else None  # local unless networks are spread
        fit = self.training.round(union, step)  # communicates: K flat reductions
        return Round(step, update, fit, lag, clock.stop())


class _Clock:
    """Seconds of each phase on this rank; a phase that comes twice adds up. Does not wait for a GPU's queue."""

    def __init__(self, step: int, entered: Callable[[int, str], None]) -> None:
        self._step, self._entered = step, entered
        self._seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._since = 0.0

    def enter(self, phase: str) -> None:
        self._entered(self._step, phase)
        self.stop()
        self._phase, self._since = phase, time.perf_counter()

    def stop(self) -> dict[str, float]:
        if self._phase is not None:
            elapsed = time.perf_counter() - self._since
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + elapsed
            self._phase = None
        return self._seconds
