"""The cameras of object runs: on spheres around the origin, each particle's from its own random stream."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from distvsd.cameras.base import Cameras, Field, look_at_origin, with_opposites
from distvsd.config import CamerasConfig
from distvsd.vsd.rng import Purpose, uniform

INSPECTION_ELEVATION_DEG: Final = 15.0


@dataclass(frozen=True)
class OrbitSampler:
    """Uniform in each range of the configuration's `cameras`; all cameras look at the origin. Reads no field."""

    config: CamerasConfig

    def sample(self, seed: int, ids: Tensor, step: int, views: int, field: Field | None) -> Cameras:
        if self.config.antithetic:
            return with_opposites(self._draw(seed, ids, step, -(-views // 2)))[:, :views]
        return self._draw(seed, ids, step, views)

    def inspection(self, views: int) -> Cameras:
        """Evenly around from the front, a little above the horizon, at the middle distance and field of view."""
        azimuth = torch.arange(views, dtype=torch.float32)[None] * (2 * math.pi / views)
        ones = torch.ones_like(azimuth)
        return look_at_origin(
            ones * math.radians(INSPECTION_ELEVATION_DEG),
            azimuth,
            ones * sum(self.config.distance) / 2,
            ones * math.radians(sum(self.config.fovy) / 2),
        )

    def _draw(self, seed: int, ids: Tensor, step: int, views: int) -> Cameras:
        u = uniform(seed, Purpose.CAMERA, ids, step, (4, views))
        radian = math.pi / 180
        return look_at_origin(
            spread(u[:, 0], self.config.elevation, radian),
            spread(u[:, 1], self.config.azimuth, radian),
            spread(u[:, 2], self.config.distance, 1.0),
            spread(u[:, 3], self.config.fovy, radian),
        )


def spread(uniform: Tensor, bounds: tuple[float, float], unit: float) -> Tensor:
    """Numbers in [0, 1) spread over `bounds`, times `unit`."""
    return (bounds[0] + (bounds[1] - bounds[0]) * uniform) * unit
