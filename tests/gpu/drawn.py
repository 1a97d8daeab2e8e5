"""One training render on a device, to be compared with the same on another."""

from __future__ import annotations

import torch
from torch import Tensor

from distvsd.cameras import OrbitSampler
from distvsd.config import CamerasConfig
from distvsd.particles import Keys, Particle
from distvsd.vsd.rng import Purpose, normal

SAMPLER = OrbitSampler(CamerasConfig(elevation=(-10.0, 60.0), distance=(1.2, 1.5), fovy=(40.0, 50.0)))


def image_and_gradients(particle: Particle, device: torch.device | str) -> tuple[Tensor, dict[str, Tensor]]:
    """Renders three particles for training. Returns the images and the gradients of a weighted sum, on the CPU."""
    ids = torch.tensor([4, 0, 9], device=device)
    # Initialized on the CPU for both devices, so that only the render is compared.
    start = particle.init(5, ids.cpu())
    trained = particle.learning_rates(0)
    parameters = {name: value.to(device).requires_grad_(name in trained) for name, value in start.items()}
    rendered = particle.render(parameters, SAMPLER.sample(5, ids, 3, 2, None), 32, Keys(5, ids, 3))
    weights = normal(5, Purpose.SAMPLE, ids, 0, tuple(rendered.images.shape[1:]))
    target = (rendered.images * weights).sum() + rendered.penalty.sum()
    leaves = {name: value for name, value in parameters.items() if name in trained}
    found = torch.autograd.grad(target, list(leaves.values()))
    return rendered.images.detach().cpu(), {name: value.cpu() for name, value in zip(leaves, found, strict=True)}
