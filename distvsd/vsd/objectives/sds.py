"""Score distillation sampling (DreamFusion, arXiv 2209.14988)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distvsd.vsd.objectives.base import Draws, Part, Predictions, weighted_difference


@dataclass(frozen=True)
class SDS:
    """w(t) (eps_prior - eps) with the added noise eps, Eq. 3 (arXiv 2305.16213). Needs no score network."""

    needs: ClassVar[frozenset[Part]] = frozenset({"guided"})

    def gradient(self, predictions: Predictions, draws: Draws) -> Tensor:
        """See `Objective.gradient`."""
        return weighted_difference(predictions.of("guided"), draws.noise, draws)
