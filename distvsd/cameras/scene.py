"""Cameras inside a scene, at ranges that are the same for all particles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distvsd.cameras.base import Cameras, Field, look_at_origin
from distvsd.cameras.orbit import OrbitSampler
from distvsd.config import CamerasConfig


@dataclass(frozen=True)
class SceneSampler:
    """Uniform in each range of the configuration's `cameras`, as on an orbit. The distance is less than that of the
    walls, so that a camera looks past the centre at the far wall. Reads no field: nothing keeps it out of matter."""

    config: CamerasConfig

    def sample(self, seed: int, ids: Tensor, step: int, views: int, field: Field | None) -> Cameras:
        return OrbitSampler(self.config).sample(seed, ids, step, views, field)

    def inspection(self, views: int) -> Cameras:
        return from_centre(views, self.config.fovy)


def from_centre(views: int, fovy_deg: tuple[float, float]) -> Cameras:
    """Cameras `[1, views]` at the origin that look horizontally, evenly around, the first towards -x; with the middle
    field of view."""
    azimuth = torch.arange(views, dtype=torch.float32)[None] * (2 * math.pi / views)
    level = torch.zeros_like(azimuth)
    return look_at_origin(level, azimuth, level, level + math.radians(sum(fovy_deg) / 2))
