"""Where cameras are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from distvsd.config.ranges import Angles, Increasing, Range


@dataclass(frozen=True)
class CamerasConfig:
    """Where cameras are drawn from, uniformly; they look at the origin."""

    elevation: Annotated[tuple[float, float], Range(-90, 90, above=True, below=True), Increasing()] = (-10.0, 45.0)
    """Degrees above the horizon, [low, high]."""
    azimuth: Angles = (-180.0, 180.0)
    """Degrees around the vertical axis, [low, high]; 0 is the front."""
    distance: Annotated[tuple[float, float], Range(0, 1000, above=True), Increasing()] = (1.0, 1.5)
    """Distance from the origin, world units, [low, high]."""
    fovy: Annotated[tuple[float, float], Range(0, 180, above=True, below=True), Increasing()] = (40.0, 70.0)
    """Vertical field of view, degrees, [low, high]."""
