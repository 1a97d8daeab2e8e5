"""Variational score distillation (arXiv 2305.16213)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distvsd.vsd.objectives.base import Draws, Part, Predictions, weighted_difference


@dataclass(frozen=True)
class VSD:
    """w(t) (eps_prior - eps_score), Eq. 9 (arXiv 2305.16213)."""

    needs: ClassVar[frozenset[Part]] = frozenset({"guided", "score"})

    def gradient(self, predictions: Predictions, draws: Draws) -> Tensor:
        """See `Objective.gradient`."""
        return weighted_difference(predictions.of("guided"), predictions.of("score"), draws)
