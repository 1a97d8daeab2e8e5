"""Cameras and the samplers that draw them. World axes: z is up, azimuth 0 looks from +x at the origin."""

from distvsd.cameras.adaptive import AdaptiveSampler
from distvsd.cameras.base import Cameras, CameraSampler, Field, look_along, look_at_origin, rays
from distvsd.cameras.orbit import OrbitSampler
from distvsd.cameras.scene import SceneSampler

__all__ = [
    "AdaptiveSampler",
    "CameraSampler",
    "Cameras",
    "Field",
    "OrbitSampler",
    "SceneSampler",
    "look_along",
    "look_at_origin",
    "rays",
]
