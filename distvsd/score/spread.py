"""The objective where the networks are spread over ranks, so that every network call is collective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.score.base import Strategy
from distvsd.vsd.objectives import Distillation
from distvsd.vsd.samples import Samples


@dataclass(frozen=True)
class SpreadDistillation:
    """A distillation that calls the networks equally often on every rank; collective. strategy: what spreads them."""

    distillation: Distillation
    strategy: Strategy

    def __call__(self, samples: Samples, step: int) -> Tensor:
        """See `Distillation`. A rank without particles calls the networks on a masked one."""
        self.strategy.begin()
        with self.strategy.calling():
            gradient = self.distillation(samples if len(samples) else self._masked(samples), step)
        return gradient[: len(samples)]

    def _masked(self, samples: Samples) -> Samples:
        """The views of particle 0, all zero and of weight 0; samples: none, for shape and device."""
        count, device = self.distillation.num_views, samples.latents.device
        ids = torch.zeros(count, dtype=torch.int64, device=device)
        latents = torch.zeros(count, *samples.latents.shape[1:], device=device)
        return Samples(latents, torch.zeros(count, 16, device=device), ids, ids, torch.zeros(count, device=device))
