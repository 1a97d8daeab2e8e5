"""The gradients that move particles: one file for each objective, and the round that they share."""

from distvsd.vsd.objectives.base import Draws, Objective, Part, Predictions, PriorPart, weighted_difference
from distvsd.vsd.objectives.distillation import Distillation
from distvsd.vsd.objectives.esd import ESD
from distvsd.vsd.objectives.sds import SDS
from distvsd.vsd.objectives.vsd import VSD

__all__ = [
    "ESD",
    "SDS",
    "VSD",
    "Distillation",
    "Draws",
    "Objective",
    "Part",
    "Predictions",
    "PriorPart",
    "weighted_difference",
]
