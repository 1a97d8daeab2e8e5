"""What the rules of particles are tried on: a few particles of one kind, and the cameras that see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras import Cameras, CameraSampler
from distvsd.particles.base import Handed, Keys, Parameters, Particle, Rendered
from distvsd.testing.rules import require


@dataclass(frozen=True)
class Trial:
    """Particles `ids` `[P]` of one kind, made from a source or from nothing, seen by a sampler's cameras."""

    particle: Particle
    ids: Tensor
    source: Handed | None
    sampler: CameraSampler
    resolution: int
    num_views: int
    seed: int = 7

    def init(self, rows: slice = slice(None), seed: int | None = None) -> Parameters:
        source = self.source and self.source.rows(rows)
        return self.particle.init(self.seed if seed is None else seed, self.ids[rows], source)

    def trained(self) -> list[str]:
        rates = self.particle.learning_rates(0)
        return [name for name in self.init() if name in rates]

    def leaves(self) -> Parameters:
        """Parameters as an update sees them: the trained ones require gradients."""
        trained = set(self.trained())
        return {name: value.detach().clone().requires_grad_(name in trained) for name, value in self.init().items()}

    def cameras(self, step: int = 0) -> Cameras:
        with torch.no_grad():
            field = self.particle.field(self.init())
            return self.sampler.sample(self.seed, self.ids, step, self.num_views, field)

    def keys(self, step: int = 0, rows: slice = slice(None)) -> Keys:
        return Keys(self.seed, self.ids[rows], step)

    def render(self, parameters: Parameters | None = None, step: int = 0, resolution: int = 0) -> Rendered:
        chosen = self.init() if parameters is None else parameters
        return self.particle.render(chosen, self.cameras(step), resolution or self.resolution, self.keys(step))

    def view(self, parameters: Parameters | None = None, step: int = 0, resolution: int = 0) -> Rendered:
        chosen = self.init() if parameters is None else parameters
        return self.particle.view(chosen, self.cameras(step), resolution or self.resolution, 0.5)

    def backward(self, parameters: Parameters, rendered: Rendered) -> Parameters:
        """Gradients of a sum that weighs every pixel differently, so that none cancels; zeros where there is none."""
        images = rendered.images
        weights = torch.linspace(-1, 2, images.numel(), device=images.device).reshape(images.shape)
        # Not nansum, which would hide the fault: a lost row's terms stay NaN, and must not reach the others' gradients.
        target = (images * weights).sum() + rendered.penalty.sum()
        require(target.requires_grad, "images have no gradient to any parameter; is the render detached?")
        leaves = {name: value for name, value in parameters.items() if value.requires_grad}
        found = torch.autograd.grad(target, list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(leaves.items(), found, strict=True)
        }
