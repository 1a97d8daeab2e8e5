"""Mesh particles: signed values on a tetrahedral lattice (DMTet, arXiv 2111.04276) and a colour field at the surface;
the paper's stages 2 and 3.

Shape legend: P particles, V views, H x W pixels, L points of the lattice, K pixels that see a face.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from distvsd.cameras import Cameras, Field, rays
from distvsd.config.mesh import MeshConfig
from distvsd.particles.base import Cost, Handed, Keys, Parameters, Rendered, parameter_counts
from distvsd.particles.nerf import NerfParticle
from distvsd.render.meshes import Meshes, Surface, laplacian, normal_consistency
from distvsd.render.raster import RasterBackend, rasterize
from distvsd.render.shade import Hits, antialias
from distvsd.render.tetrahedra import TetGrid, level_values, marching_tetrahedra, number_of_points, tet_grid

# The lattice's values are in units of its cells, so that a learning rate means the same on every lattice. Far from the
# surface they say only on which side they are.
_FARTHEST = 2.0
_log = logging.getLogger("distvsd")

_GEOMETRY = ("values", "offsets")


@dataclass(frozen=True, kw_only=True)
class MeshParticle:
    """A closed triangle mesh in the cube [-bound, bound]^3 of a field that colours it, batched over particles.

    values: `[P, L]`, positive inside, in cells of the lattice. offsets: `[P, L, 3]`, where the points of the lattice
    are, see `meshes`. The other parameters are those of `field_particle`, of which only the colours are used.

    config: the fields of `particles.mesh`. learning_rate: of a round, for values and offsets. backend: of the
    rasteriser. deterministic: see `Particle`.
    """

    config: MeshConfig
    field_particle: NerfParticle
    learning_rate: Callable[[int], float]
    backend: RasterBackend = "torch"
    deterministic: bool = True
    is_latent: ClassVar[bool] = False
    has_views: ClassVar[bool] = True

    @property
    def bound(self) -> float:
        return self.field_particle.config.bound

    def _grid(self, device: torch.device) -> TetGrid:
        return tet_grid(self.config.grid, device)

    def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
        """Without a source, the ball of `particles.nerf.blob_radius`. From a field with the same sizes, its isosurface
        and its colours; a particle without one has no positive value. From a mesh of the same sizes, its copy."""
        if source is not None and isinstance(source.particle, MeshParticle):
            return source.copied_for(self, ids)
        field = self.field_particle
        colors = field.init(seed, ids, source)
        count = number_of_points(self.config.grid)
        # For no ids only the shapes matter, and the lattice takes long to make.
        values = self._first_values(ids, source) if len(ids) else torch.zeros(0, count, device=ids.device)
        return {"values": values, "offsets": torch.zeros(len(ids), count, 3, device=ids.device)} | colors

    def _first_values(self, ids: Tensor, source: Handed | None) -> Tensor:
        grid = self._grid(ids.device)
        points = grid.points * self.bound
        if source is not None:
            return self._surface_of(source.density(self, points), grid, ids)
        ball: Tensor = (self.field_particle.config.blob_radius - points.norm(dim=1)) / (grid.cell * self.bound)
        return ball.clamp(-_FARTHEST, _FARTHEST).repeat(len(ids), 1)

    def _surface_of(self, density: Tensor, grid: TetGrid, ids: Tensor) -> Tensor:
        """Values `[P, L]` with the isosurface of the density `[P, L]`."""
        levels = level_values(grid, density, self.config.threshold)
        length = (grid.points[grid.edges[:, 0]] - grid.points[grid.edges[:, 1]]).norm(dim=1) / grid.cell
        rows = []
        for particle_id, row in zip(ids.tolist(), levels, strict=True):  # one by one: no bit depends on the others
            ends = row[grid.edges]
            crossed = (ends[:, 0] > 0) != (ends[:, 1] > 0)
            if not crossed.any():
                _log.warning(
                    "particle %d has no surface: its density is nowhere as high as particles.mesh.threshold %g, nor as "
                    "a 64th of it; it stays without a mesh and will be quarantined",
                    particle_id,
                    self.config.threshold,
                )
            slope = ((ends[:, 0] - ends[:, 1]).abs() / length)[crossed].mean() if crossed.any() else 1.0
            rows.append((row / slope).clamp(-_FARTHEST, _FARTHEST))
        return torch.stack(rows) if rows else levels

    def learning_rates(self, step: int) -> dict[str, float]:
        geometry = dict.fromkeys(_GEOMETRY, self.learning_rate(step))
        colors = self.field_particle.learning_rates(step)
        return {"geometry": geometry, "texture": colors, "both": geometry | colors}[self.config.trained]

    def meshes(self, parameters: Parameters) -> Meshes:
        """The triangle meshes; differentiable in values and offsets. A point of the lattice moves by at most half a
        cell."""
        grid = self._grid(parameters["values"].device)
        points = grid.points + torch.tanh(parameters["offsets"]) * (grid.cell / 2)
        return marching_tetrahedra(grid, parameters["values"], points * self.bound)

    def surface(self, parameters: Parameters, resolution: int, threshold: float) -> Surface:
        return Surface(self.meshes(parameters), lambda points: self.field_particle.evaluate(parameters, points)[1])

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        """A particle whose mesh is empty or not finite is NaN in all its views, as `particles.health` counts it."""
        _, directions = rays(cameras, resolution, resolution)
        behind = self.field_particle.backdrop.training(parameters, directions, keys)
        meshes = self.meshes(parameters)
        rendered = self._draw(parameters, meshes, cameras, behind, self.config.signal)
        nothing = torch.bincount(meshes.face_owners, minlength=len(meshes)) == 0
        images = torch.where(nothing[:, None, None, None, None], torch.nan, rendered.images)
        return Rendered(images, rendered.opacity, self._penalty(meshes))

    def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
        """Colours, whatever the prior sees; an empty mesh shows the background."""
        behind = cameras.fovy.new_full((*cameras.shape, resolution, resolution, 3), background)
        return self._draw(parameters, self.meshes(parameters), cameras, behind, "color")

    def _draw(self, parameters: Parameters, meshes: Meshes, cameras: Cameras, behind: Tensor, signal: str) -> Rendered:
        hits = Hits.of(meshes, rasterize(meshes, cameras, behind.shape[3], self.backend), cameras)
        colors = hits.normals * 0.5 + 0.5 if signal == "normal" else self._colors(parameters, hits)
        if signal == "shaded":
            lit = (hits.normals @ self._light.to(colors.device)).clamp_min(0)
            colors = colors * (self.config.ambient + (1 - self.config.ambient) * lit[:, None])
        behind = torch.cat((behind, torch.zeros_like(behind[..., :1])), dim=-1)
        images = hits.onto(behind, torch.cat((colors, torch.ones_like(colors[:, :1])), dim=1))
        images = antialias(images, hits, cameras).permute(0, 1, 4, 2, 3)
        lost = meshes.vertex_owners[~meshes.vertices.detach().isfinite().all(1)]
        broken = torch.bincount(lost, minlength=len(meshes)) > 0
        images = torch.where(broken[:, None, None, None, None], torch.nan, images)
        return Rendered(images[:, :, :3], images[:, :, 3:], images.new_zeros(len(meshes)))

    def _colors(self, parameters: Parameters, hits: Hits) -> Tensor:
        points, place = hits.by_particle(hits.positions)
        return self.field_particle.evaluate(parameters, points)[1].flatten(0, 1)[place]

    @cached_property
    def _light(self) -> Tensor:
        azimuth, elevation = (math.radians(angle) for angle in self.config.light)
        flat = math.cos(elevation)
        return torch.tensor([flat * math.cos(azimuth), flat * math.sin(azimuth), math.sin(elevation)])

    def _penalty(self, meshes: Meshes) -> Tensor:
        """The weighted regularisers of each particle `[P]`; 0 where the surface is frozen."""
        penalty = meshes.vertices.new_zeros(len(meshes))
        if self.config.trained == "texture":
            return penalty
        if self.config.normal_consistency > 0:
            penalty = penalty + self.config.normal_consistency * normal_consistency(meshes)
        if self.config.laplacian > 0:
            penalty = penalty + self.config.laplacian * laplacian(meshes)
        return penalty

    def field(self, parameters: Parameters) -> Field | None:
        return None

    def cost(self, resolution: int) -> Cost:
        return Cost(*parameter_counts(self), points=resolution**2)
