"""A kind of particle for the tests: its geometry is handed over and frozen, its colour is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras import Cameras, Field, rays
from distvsd.errors import ConfigError
from distvsd.particles import Cost, Handed, Keys, Parameters, Rendered
from distvsd.particles.base import parameter_counts
from distvsd.render import Surface, composite, sample_intervals
from distvsd.vsd.rng import Purpose, normal

EDGE, BOUND, SAMPLES = 6, 0.6, 12


@dataclass(frozen=True)
class TintedVoxels:
    """A frozen density on EDGE^3 vertices, read from the previous stage's field, with one trained colour."""

    rate: float = 0.1
    is_latent: bool = False
    has_views: bool = True
    deterministic: bool = True

    def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
        color = normal(seed, Purpose.INIT, ids, 0, (3,))
        density = torch.zeros(len(ids), EDGE, EDGE, EDGE)
        if source is not None:
            axis = torch.linspace(-BOUND, BOUND, EDGE)
            z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
            points = torch.stack((x, y, z), dim=-1).reshape(-1, 3)
            density = source.density(self, points).reshape(density.shape)
        elif len(ids):
            raise ConfigError("voxels begin from the density of a stage before; name one")
        return {"density": density, "color": color}

    def learning_rates(self, step: int) -> dict[str, float]:
        return {"color": self.rate}

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        return self.view(parameters, cameras, resolution, 0.5)

    def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
        origins, directions = rays(cameras, resolution, resolution)
        origins = origins[:, :, None, None].expand_as(directions)
        starts, ends = sample_intervals(origins, directions, BOUND, SAMPLES, torch.full(directions.shape[:-1], 0.5))
        points = origins[..., None, :] + directions[..., None, :] * ((starts + ends) / 2)[..., None]
        field = self.field(parameters)
        density = field(points.flatten(1, -2)).reshape(points.shape[:-1])
        color = parameters["color"].sigmoid()[:, None, None, None, None].expand_as(points)
        out = composite(starts, ends, density, color)
        images = out.color + (1 - out.opacity) * background
        no_penalty = torch.zeros(len(images))
        return Rendered(images.permute(0, 1, 4, 2, 3), out.opacity.permute(0, 1, 4, 2, 3), no_penalty)

    def field(self, parameters: Parameters) -> Field:
        def density(points_PN3: Tensor) -> Tensor:
            at = points_PN3[:, None, None] / BOUND
            grid = parameters["density"][:, None]
            return torch.nn.functional.grid_sample(grid, at, align_corners=True, padding_mode="border")[:, 0, 0, 0]

        return density

    def surface(self, parameters: Parameters, resolution: int, threshold: float) -> Surface | None:
        return None

    def cost(self, resolution: int) -> Cost:
        return Cost(*parameter_counts(self), points=resolution**2 * SAMPLES)
