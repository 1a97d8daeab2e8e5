"""Where cameras are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Angles, Increasing, Range


@dataclass(frozen=True)
class AdaptiveConfig:
    """Cameras in each particle's own free space, which is read from its density in every round."""

    bound: Annotated[float, Range(0, 1000, above=True)] = 1.0
    """Half the edge of the cube around the origin in which cameras are placed, world units; at most that of the
    particles."""
    cells: Annotated[int, Range(2, 64)] = 16
    """Cells of the coarse grid along an edge of that cube; walls must be thicker than a cell to hold cameras in."""
    optical_depth: Annotated[float, Range(0, 1000, above=True)] = 0.1
    """A point is free where its density times the edge of a cell, the optical depth of a cell, is below this."""
    start: Annotated[float, Range(0, 1000)] = 0.0
    """Free space is what can be reached from the free cell whose distance from the origin is nearest to this; 0 for a
    hollow scene, more than its radius around an object."""
    height: Annotated[tuple[float, float], Range(-1000, 1000), Increasing()] = (-1000.0, 1000.0)
    """Heights at which cameras are placed, world units, [low, high]: of the middles of cells. For priors that know
    scenes at eye level only."""
    clearance: Annotated[float, Range(0, 1000)] = 0.5
    """Least distance to what a camera looks at, along the middle of its view, world units."""


@dataclass(frozen=True)
class CamerasConfig:
    """Where cameras are drawn from, uniformly; orbit and scene cameras look at the origin."""

    kind: Literal["orbit", "scene", "adaptive"] = "orbit"
    """orbit: around an object; scene: inside a scene, looking past its centre; adaptive: inside a scene, in the free
    space of each particle."""
    elevation: Annotated[tuple[float, float], Range(-90, 90, above=True, below=True), Increasing()] = (-10.0, 45.0)
    """Degrees above the horizon, [low, high]; adaptive cameras look down by as much, in any direction."""
    azimuth: Angles = (-180.0, 180.0)
    """Degrees around the vertical axis, [low, high]; 0 is the front. Adaptive cameras are turned by as much."""
    distance: Annotated[tuple[float, float], Range(0, 1000), Increasing()] = (1.0, 1.5)
    """Distance from the origin, world units, [low, high]. Not of adaptive cameras, unless a particle has no free space:
    its cameras are those of kind scene."""
    fovy: Annotated[tuple[float, float], Range(0, 180, above=True, below=True), Increasing()] = (40.0, 70.0)
    """Vertical field of view, degrees, [low, high]."""
    antithetic: bool = False
    """Views come in pairs that are turned by 180 degrees about the vertical axis: opposite sides of an object, opposite
    directions inside a scene. Needs an even particles.views."""
    adaptive: AdaptiveConfig = AdaptiveConfig()
    """Read when kind is adaptive."""
