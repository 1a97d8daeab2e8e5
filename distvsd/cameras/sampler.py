"""The cameras of object runs: on spheres around the origin, each particle's from its own random stream."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras.base import Cameras, orbit
from distvsd.vsd.rng import Purpose, uniform


@dataclass(frozen=True)
class OrbitSampler:
    """Uniform in each range; elevation, azimuth and fovy in degrees, distance in world units."""

    elevation: tuple[float, float]
    azimuth: tuple[float, float]
    distance: tuple[float, float]
    fovy: tuple[float, float]

    def sample(self, seed: int, ids: Tensor, step: int, num_views: int) -> Cameras:
        """Cameras `[P, num_views]` keyed by (seed, particle, step); the same for every world size."""
        u = uniform(seed, Purpose.CAMERA, ids, step, (4, num_views))

        def spread(index: int, bounds: tuple[float, float], unit: float) -> Tensor:
            return (bounds[0] + (bounds[1] - bounds[0]) * u[:, index]) * unit

        radian = math.pi / 180
        return orbit(
            spread(0, self.elevation, radian),
            spread(1, self.azimuth, radian),
            spread(2, self.distance, 1.0),
            spread(3, self.fovy, radian),
        )

    def ring(self, num_particles: int, num_views: int, elevation_deg: float) -> Cameras:
        """Fixed cameras `[P, num_views]` for looking at results: even azimuths from the front, mid distance and
        fovy."""
        turn = torch.arange(num_views, dtype=torch.float32) * (2 * math.pi / num_views)
        azimuth = turn.expand(num_particles, num_views)
        ones = torch.ones_like(azimuth)
        return orbit(
            ones * math.radians(elevation_deg),
            azimuth,
            ones * sum(self.distance) / 2,
            ones * math.radians(sum(self.fovy) / 2),
        )
