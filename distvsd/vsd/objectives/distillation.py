"""One round of any objective: draws times and noise, calls the networks, and computes the gradient.

Shape legend: N rows (views of particles), C latent channels, H x W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, get_args

import torch
from torch import Tensor

from distvsd.faults import poison
from distvsd.vsd.objectives.base import Draws, Objective, Predictions, PriorPart
from distvsd.vsd.process import Process, add_noise
from distvsd.vsd.rng import Purpose, normal, uniform
from distvsd.vsd.samples import Samples


class AskPrior(Protocol):
    """The prior's predictions of the named parts for `noisy` `[N, C, H, W]` at `times` `[N]`."""

    def __call__(self, noisy: Tensor, times: Tensor, samples: Samples, parts: frozenset[PriorPart]) -> Predictions: ...


AskScore = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(noisy, times of the score's process, particle ids, cameras `[N, 16]` or None) -> eps `[N, C, H, W]`."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """An objective's gradient at latents. Called on each rank with its own samples only; does not communicate.

    process: the prior's. score: called with the prior's times; None where the objective needs no score network.
    t_min, t_max: shares of the process's range as functions of the round. num_views: rows of a particle.
    """

    objective: Objective
    process: Process
    prior: AskPrior
    score: AskScore | None
    seed: int
    num_views: int
    t_min: Callable[[int], float]
    t_max: Callable[[int], float]

    @torch.no_grad()
    def __call__(self, samples: Samples, step: int) -> Tensor:
        """The gradient at the latents, float32 `[N, C, H, W]`; zero where a sample is masked.

        Where a network's prediction for a row is not finite, the gradient of that row is not finite either, and the
        particle does not move (`Ensemble.update`). The rows of a particle must be adjacent: draws are keyed by
        (particle, view, step).
        """
        if len(samples) == 0:
            return torch.zeros_like(samples.latents)
        draws, valid = self._draw(samples, step)
        gradient = self.objective.gradient(self._ask(draws), draws)
        return torch.where(valid, gradient, torch.zeros_like(gradient))

    def _draw(self, samples: Samples, step: int) -> tuple[Draws, Tensor]:
        """Times, noise and x_t; and which rows are valid, `[N, 1, 1, 1]`."""
        particles, views = samples.ids[:: self.num_views], self.num_views
        u = uniform(self.seed, Purpose.TIMESTEP, particles, step, (views,)).flatten()
        times = self.process.times(u, self.t_min(step), self.t_max(step))
        shape = (views, *samples.latents.shape[1:])
        noise = normal(self.seed, Purpose.NOISE, particles, step, shape).flatten(0, 1)
        valid = (samples.weight > 0).reshape(-1, 1, 1, 1)
        # A masked sample enters the networks as zeros: multiplying its result by zero would keep its NaN.
        latents = torch.where(valid, samples.latents, torch.zeros_like(samples.latents))
        noisy = add_noise(self.process, latents, noise, times)
        return Draws(samples, times, noise, noisy, self.process, views), valid

    def _ask(self, draws: Draws) -> Predictions:
        """Every prediction that the objective needs, and no other."""
        needs, samples = self.objective.needs, draws.samples
        of_prior = frozenset(part for part in get_args(PriorPart) if part in needs)
        found = Predictions()
        if of_prior:
            found = self.prior(draws.noisy, draws.times, samples, of_prior)
            struck = {part: poison("score", found.of(part), samples.ids) for part in of_prior}
            found = replace(found, **struck)
        for part, cameras in (("score", samples.cameras), ("score_without_camera", None)):
            if part in needs:
                found = replace(found, **{part: self._score(draws, cameras)})
        return found

    def _score(self, draws: Draws, cameras: Tensor | None) -> Tensor:
        assert self.score is not None, "an objective that needs the score network is given one"
        return self.score(draws.noisy, draws.times, draws.samples.ids, cameras)
