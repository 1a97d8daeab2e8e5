"""Cameras and the samplers that draw them. World axes: z is up, azimuth 0 looks from +x at the origin."""

from distvsd.cameras.base import Cameras, CameraSampler, Field, look_at_origin, rays
from distvsd.cameras.orbit import OrbitSampler

__all__ = ["CameraSampler", "Cameras", "Field", "OrbitSampler", "look_at_origin", "rays"]
