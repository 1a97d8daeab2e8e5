"""Cameras and the samplers that draw them. World axes: z is up, azimuth 0 looks from +x at the origin."""

from distvsd.cameras.base import Cameras, orbit, rays
from distvsd.cameras.sampler import OrbitSampler

__all__ = ["Cameras", "OrbitSampler", "orbit", "rays"]
