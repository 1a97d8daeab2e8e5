"""The triangle meshes at which densities have a given value, for export and for the stages after a field."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distvsd.cameras import Field
from distvsd.particles.base import Parameters
from distvsd.render.meshes import Meshes
from distvsd.render.tetrahedra import level_values, marching_tetrahedra, tet_grid

_AT_ONCE = 2**18  # points


@torch.no_grad()
def isosurface(
    field: Callable[[Parameters], Field], parameters: Parameters, bound: float, resolution: int, threshold: float
) -> Meshes:
    """Of the particles with these parameters `[P, ...]`, one after the other, in the cube [-bound, bound]^3.

    field: makes the density of its parameters. resolution, threshold: see `Particle.surface`. Not differentiable.
    """
    first = next(iter(parameters.values()))
    grid = tet_grid(resolution, first.device)
    points = grid.points * bound
    parts = []
    for row in range(len(first)):
        own = field({name: value[row : row + 1] for name, value in parameters.items()})
        density = torch.cat([own(chunk[None]) for chunk in points.split(_AT_ONCE)], dim=1)
        parts.append(marching_tetrahedra(grid, level_values(grid, density, threshold), points).one(0))
    return Meshes.of(parts)
