"""The prior as the objective calls it: with the prompts of the particles and the guidance of the run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distvsd.prior.guidance import ClassifierFree
from distvsd.prior.pipeline import Pipeline
from distvsd.vsd.objectives.base import Predictions, PriorPart
from distvsd.vsd.samples import Samples


@dataclass(frozen=True)
class Teacher:
    """See `distvsd.vsd.objectives.distillation.AskPrior`. num_views: rows of a particle, which are adjacent."""

    prior: Pipeline
    guidance: ClassifierFree
    num_views: int

    def __call__(self, noisy: Tensor, times: Tensor, samples: Samples, parts: frozenset[PriorPart]) -> Predictions:
        condition = self.prior.condition(samples.ids, samples.views, samples.cameras, self.num_views)
        return self.prior.ask(noisy, times, condition, parts, self.guidance)
