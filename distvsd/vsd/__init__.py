"""The mathematics of the method: pure functions on tensors, and the random streams that feed them."""

from distvsd.vsd.objectives import Objective, distillation_gradient, draw_timesteps, entropic_eps, weight
from distvsd.vsd.process import add_noise, target, to_eps, to_x0
from distvsd.vsd.samples import Samples

__all__ = [
    "Objective",
    "Samples",
    "add_noise",
    "distillation_gradient",
    "draw_timesteps",
    "entropic_eps",
    "target",
    "to_eps",
    "to_x0",
    "weight",
]
