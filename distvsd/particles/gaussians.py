"""Particles made of 3-D gaussians: a fixed number of them, drawn by splatting, grown by relocation.

Shape legend: P particles, V views, N gaussians a particle (`particles.gaussians.capacity`), K points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distvsd.cameras import Cameras, Field
from distvsd.config import GaussiansConfig
from distvsd.particles.backdrop import random_plain
from distvsd.particles.base import Adapted, Cost, Handed, Keys, Parameters, Rendered, parameter_counts
from distvsd.particles.growth import drawn, exploration, relocated
from distvsd.particles.isosurface import isosurface
from distvsd.particles.penalties import coverage, sparsity
from distvsd.render.meshes import Surface
from distvsd.render.splat import SplatBackend, Splats, rotations, splat
from distvsd.vsd.rng import Purpose, normal, uniform

_JITTER = 0.1  # of the first log scales: on a ball, a rotation would have no gradient
_CELLS = 48  # along an edge of the grid on which a density that is handed over is read
_MOST_LOGIT = 4.0  # of colours that are handed over; the slope of a sigmoid vanishes further out
_TERMS = 1 << 21  # pairs of point and gaussian that `field` evaluates at once


@dataclass(frozen=True, kw_only=True)
class GaussianParticle:
    """A set of gaussians, batched over particles; colour does not depend on the view.

    config: the fields of `particles.gaussians`; meanings and ranges are documented there. learning_rate: of a round;
    every parameter has a factor on it. backend: of the splatting. deterministic: see `Particle`.

    A gaussian whose opacity is below `min_opacity` is dead. The number of gaussians never changes: growth (`adapt`)
    moves the dead ones to where others are.
    """

    config: GaussiansConfig
    learning_rate: Callable[[int], float]
    backend: SplatBackend = "torch"
    deterministic: bool = True
    is_latent: ClassVar[bool] = False
    has_views: ClassVar[bool] = True

    def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
        """A ball of gaussians; from a source of this kind and size a copy. From any other gaussians where it has matter
        or, where it has no density, on its surface; in its colours if it offers some."""
        if source is not None and self._is_like(source):
            return source.copied_for(self, ids)
        config, count = self.config, self.config.capacity
        colour = (uniform(seed, Purpose.INIT, ids, 0, (1, 3), lane=4) * 2 - 1) * config.init_color
        color_logits = colour.expand(-1, count, -1).clone()
        if source is None:
            radius = _cube_root(uniform(seed, Purpose.INIT, ids, 0, (count, 1), lane=1))
            means = config.init_radius * radius * _directions(seed, ids, (count, 3), lane=0)
            spacing = (4 / 3 * math.pi / count) ** (1 / 3) * config.init_radius * torch.ones_like(means[:, 0, 0])
        else:
            means, spacing, found = self._from_other(seed, ids, source)
            if found is not None:
                color_logits = (found.log() - (1 - found).log()).clamp(-_MOST_LOGIT, _MOST_LOGIT)
        uneven = _JITTER * normal(seed, Purpose.INIT, ids, 0, (count, 3), lane=2)
        return {
            "means": means,
            "log_scales": (config.init_scale * spacing).log()[:, None, None] + uneven,
            "quaternions": _directions(seed, ids, (count, 4), lane=3),
            "opacity_logits": torch.full((len(ids), count), _logit(config.init_opacity), device=ids.device),
            "color_logits": color_logits,
        }

    def _is_like(self, source: Handed) -> bool:
        """Whether the source is of this kind and size."""
        means = source.parameters.get("means")
        return (
            isinstance(source.particle, GaussianParticle)
            and means is not None
            and means.shape[1] == (self.config.capacity)
        )

    def _from_other(self, seed: int, ids: Tensor, source: Handed) -> tuple[Tensor, Tensor, Tensor | None]:
        """Means `[P, N, 3]`, their mean spacing `[P]`, and RGB `[P, N, 3]` where the source has colours.

        The means are drawn where the source stops light, or evenly from its surface. A particle without matter, or
        without a surface, is taken for an even fog that fills the cube.
        """
        surfaces = source.surfaces(ids.device)
        if surfaces is None:
            means, volume = self._from_density(seed, ids, source)
            return means, _cube_root(volume / self.config.capacity), source.colors(means)
        count, bound = self.config.capacity, self.config.bound
        parts = []
        for row, surface in enumerate(surfaces):
            own = ids[row : row + 1]
            places = uniform(seed, Purpose.INIT, own, 0, (count, 3), lane=1)
            if not len(surface.meshes.faces):
                means = bound * (2 * places - 1)
                parts.append(
                    (means, torch.full_like(means[:, 0, 0], 2 * bound * count ** (-1 / 3)), surface.color(means))
                )
                continue
            areas = surface.meshes.area_normals.norm(dim=-1)[None] / 2
            faces = drawn(areas / areas.amax(), uniform(seed, Purpose.INIT, own, 0, (count,), lane=0))
            # Uniform in a triangle: a point of the parallelogram beyond the diagonal is mirrored into it.
            u, v = places[..., 0], places[..., 1]
            u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
            a, b, c = surface.meshes.corners[faces].unbind(2)
            means = a + u[..., None] * (b - a) + v[..., None] * (c - a)
            parts.append((means, (areas.sum(1) / count).sqrt(), surface.color(means)))
        means, spacing, colors = (torch.cat(values) for values in zip(*parts, strict=True))
        return means, spacing, colors

    def _from_density(self, seed: int, ids: Tensor, source: Handed) -> tuple[Tensor, Tensor]:
        """Means `[P, N, 3]`, and the volume of the matter `[P]`, cubic world units."""
        bound, count = self.config.bound, self.config.capacity
        edge = 2 * bound / _CELLS
        middles = (torch.arange(_CELLS, device=ids.device) + 0.5) * edge - bound
        points = torch.cartesian_prod(middles, middles, middles)
        # What a cell stops: in proportion to the density where that is low, and the same for all that is solid.
        stopped = -torch.expm1(-edge * source.density(self, points))
        stopped = torch.where(stopped.sum(1, keepdim=True) > 0.5, stopped, torch.ones_like(stopped))
        cells = drawn(stopped, uniform(seed, Purpose.INIT, ids, 0, (count,), lane=0))
        inside = uniform(seed, Purpose.INIT, ids, 0, (count, 3), lane=1) - 0.5
        return points[cells] + edge * inside, stopped.sum(1) * edge**3

    def learning_rates(self, step: int) -> dict[str, float]:
        rate, config = self.learning_rate(step), self.config
        return {
            "means": rate * config.means_rate,
            "log_scales": rate * config.scales_rate,
            "quaternions": rate * config.rotations_rate,
            "opacity_logits": rate * config.opacities_rate,
            "color_logits": rate * config.colors_rate,
        }

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        _, colour = random_plain(keys, cameras.shape[1], 1.0, self.config.random_background_kind)
        return self._draw(parameters, cameras, resolution, colour)

    def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
        colour = torch.full((*cameras.shape, 3), background, device=cameras.fovy.device)
        return self._draw(parameters, cameras, resolution, colour)

    def _draw(self, parameters: Parameters, cameras: Cameras, resolution: int, colour_PV3: Tensor) -> Rendered:
        splats, config = Splats(**parameters), self.config
        seen = splat(splats, cameras, resolution, resolution, self.backend)
        images = seen.color + (1 - seen.opacity) * colour_PV3[:, :, None, None]
        opacity = seen.opacity.reshape(len(splats.means), -1)
        penalty = config.opacity * splats.opacities.mean(1) + config.scale * splats.scales.mean((1, 2))
        if config.sparsity > 0:
            penalty = penalty + sparsity(config.sparsity, opacity)
        if config.coverage > 0:
            penalty = penalty + coverage(config.coverage, opacity, config.coverage_range)
        return Rendered(images.permute(0, 1, 4, 2, 3), seen.opacity.permute(0, 1, 4, 2, 3), penalty)

    def field(self, parameters: Parameters) -> Field:
        """A gaussian of opacity o has the density whose integral along a line through its middle is -log(1 - o), for
        the mean of its standard deviations; densities add."""
        return lambda points_PK3: self._mixture(parameters, points_PK3)[0]

    def colors(self, parameters: Parameters, points: Tensor) -> Tensor:
        return self._mixture(parameters, points)[1]

    def surface(self, parameters: Parameters, resolution: int, threshold: float) -> Surface:
        """Not differentiable in the parameters; the colours are."""
        meshes = isosurface(self.field, parameters, self.config.bound, resolution, threshold)
        return Surface(meshes, lambda points: self.colors(parameters, points))

    def splats(self, parameters: Parameters) -> Splats:
        return Splats(**parameters)

    def _mixture(self, parameters: Parameters, points_PK3: Tensor) -> tuple[Tensor, Tensor]:
        """Density `[P, K]` per world unit, and colour `[P, K, 3]` as the mean of that of the gaussians there."""
        splats = Splats(**parameters)
        width = splats.log_scales.mean(-1).exp()
        peak = -torch.log1p(-splats.opacities.clamp_max(1 - 1e-6)) / (math.sqrt(2 * math.pi) * width)
        # Columns that measure along the gaussian's own axes in standard deviations.
        measure = (rotations(splats.quaternions) / splats.scales[:, :, None]).permute(3, 0, 2, 1)  # [axis, P, 3, N]
        centres = torch.einsum("pni,apin->apn", splats.means, measure)
        values = torch.cat((torch.ones_like(splats.means[..., :1]), splats.colors), dim=-1)
        particles, count = peak.shape
        found = []
        for points in points_PK3.split(max(1, _TERMS // max(1, particles * count)), dim=1):
            squares = sum((points @ measure[axis] - centres[axis][:, None]).square() for axis in range(3))
            found.append((peak[:, None] * torch.exp(-0.5 * squares)) @ values)
        density, weighted = torch.cat(found, dim=1).split((1, 3), dim=-1)
        grey = 1e-6 * torch.full_like(weighted, 0.5)
        return density[..., 0], (weighted + grey) / (density + 1e-6)

    @torch.no_grad()
    def adapt(self, parameters: Parameters, keys: Keys, factors: Tensor) -> Adapted | None:
        """Relocation every `relocate_every` rounds, and the noise of each round; see `particles.growth`."""
        config = self.config
        relocates = config.relocate_every > 0 and (keys.step + 1) % config.relocate_every == 0
        if not relocates and config.noise == 0:
            return None
        changed, restarted = {name: value.detach() for name, value in parameters.items()}, {}
        count = (config.capacity,)
        if relocates:
            draws = uniform(keys.seed, Purpose.GROWTH, keys.ids, keys.step, count)
            new = relocated(Splats(**changed).opacities, config.min_opacity, draws)
            changed = {name: _taken(value, new.source) for name, value in changed.items()}
            changed["log_scales"] = changed["log_scales"] + new.shrunk.log()[..., None]
            logits = new.opacities.logit()
            changed["opacity_logits"] = torch.where(new.changed, logits, changed["opacity_logits"])
            restarted = {name: new.changed[..., *[None] * (value.ndim - 2)] for name, value in changed.items()}
        if config.noise > 0:
            splats = Splats(**changed)
            draws = normal(keys.seed, Purpose.GROWTH, keys.ids, keys.step, (*count, 3), lane=1)
            axes = rotations(splats.quaternions) * splats.scales[:, :, None]
            rate = config.noise * self.learning_rates(keys.step)["means"] * factors
            changed["means"] = changed["means"] + rate[:, None, None] * exploration(
                splats.opacities, config.min_opacity, axes, draws
            )
        return Adapted(changed if relocates else {"means": changed["means"]}, restarted)

    def cost(self, resolution: int) -> Cost:
        """points: about the pixels that the first gaussians cover, in a view that shows the whole ball."""
        spacing = (4 / 3 * math.pi / self.config.capacity) ** (1 / 3)  # in radii of the ball
        covered = math.pi * (3 * self.config.init_scale * spacing * resolution / 2.5) ** 2
        points = self.config.capacity * min(max(covered, 1), resolution**2)
        return Cost(*parameter_counts(self), points=round(points))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _cube_root(values: Tensor) -> Tensor:
    """Of values of at least 0. A power has other last bits at the end of a vector than inside it, so that a particle
    would depend on its neighbours; log and exp have not."""
    return (values.log() / 3).exp()


def _directions(seed: int, ids: Tensor, shape: tuple[int, int], lane: int) -> Tensor:
    """Even unit vectors `[P, *shape]`, along the last axis."""
    drawn = normal(seed, Purpose.INIT, ids, 0, shape, lane=lane)
    squares = [part * part for part in drawn.unbind(-1)]
    return drawn / sum(squares[1:], squares[0]).sqrt().clamp_min(1e-12)[..., None]


def _taken(values: Tensor, source_PN: Tensor) -> Tensor:
    """Row n of a particle's values `[P, N, ...]` becomes its row source[n]."""
    if values.ndim == 2:
        return values.gather(1, source_PN)
    return values.gather(1, source_PN[..., None].expand(-1, -1, values.shape[2]))
