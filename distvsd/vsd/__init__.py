"""The mathematics of the method: pure functions on tensors, and the random streams that feed them."""

from distvsd.vsd.objectives import ESD, SDS, VSD, Distillation, Draws, Objective, Predictions
from distvsd.vsd.process import Diffusion, Flow, Process, add_noise
from distvsd.vsd.samples import Samples

__all__ = [
    "ESD",
    "SDS",
    "VSD",
    "Diffusion",
    "Distillation",
    "Draws",
    "Flow",
    "Objective",
    "Predictions",
    "Process",
    "Samples",
    "add_noise",
]
