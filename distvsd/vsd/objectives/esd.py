"""Entropic score distillation (arXiv 2401.00909)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distvsd.vsd.objectives.base import Draws, Part, Predictions, weighted_difference


@dataclass(frozen=True)
class ESD:
    """VSD with (1 - lambda) eps_score(camera) + lambda eps_score(no camera) in place of eps_score.

    esd_lambda: lambda, in [0, 1]; 0 is VSD. At 0 and 1 the prediction that would be multiplied by zero is not computed.
    """

    esd_lambda: float

    @property
    def needs(self) -> frozenset[Part]:
        """See `Objective.needs`."""
        parts: set[Part] = {"guided"}
        if self.esd_lambda < 1:
            parts.add("score")
        if self.esd_lambda > 0:
            parts.add("score_without_camera")
        return frozenset(parts)

    def gradient(self, predictions: Predictions, draws: Draws) -> Tensor:
        """See `Objective.gradient`."""
        return weighted_difference(predictions.of("guided"), self._mixed(predictions), draws)

    def _mixed(self, predictions: Predictions) -> Tensor:
        if self.esd_lambda == 0:
            return predictions.of("score")
        if self.esd_lambda == 1:
            return predictions.of("score_without_camera")
        with_camera, without = predictions.of("score"), predictions.of("score_without_camera")
        return (1 - self.esd_lambda) * with_camera + self.esd_lambda * without
