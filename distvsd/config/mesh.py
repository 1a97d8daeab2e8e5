"""Mesh particles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Range, Share, Weight


@dataclass(frozen=True)
class MeshConfig:
    """Triangle meshes from a tetrahedral lattice, coloured by the field that `particles.nerf` describes."""

    grid: Annotated[int, Range(4, 512)] = 64
    """Cubes of the lattice along an edge of the scene. It has twice as many points as cubes: 52 is the paper's grid of
    128. All stages of meshes need the same."""
    trained: Literal["geometry", "texture", "both"] = "geometry"
    """What moves: the surface, the colours on it, or both. The rest is frozen."""
    signal: Literal["color", "normal", "shaded"] = "color"
    """What the prior sees: colours, normals as colours, or colours under a light."""
    threshold: Annotated[float, Range(0, 1e6, above=True)] = 5.0
    """Density per world unit at which the surface of the stage before lies. Where a particle is nowhere as dense, it is
    halved for this particle, at most six times; a particle without a surface is quarantined."""
    normal_consistency: Weight = 0.0
    """Weight of 1 - cos of the angles between neighbouring faces; 5000 in the paper."""
    laplacian: Weight = 0.0
    """Weight of the length of the sum of the edges that leave a vertex, world units; 0.5 in the paper."""
    light: Annotated[tuple[float, float], Range(-360, 360)] = (34.0, 57.0)
    """Azimuth and elevation of the light, degrees; read when signal is shaded."""
    ambient: Share = 0.5
    """Brightness of what the light does not reach; read when signal is shaded."""
