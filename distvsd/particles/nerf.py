"""Radiance-field particles: a hash grid, one linear layer, a learned background; the paper's stage 1.

Shape legend: P particles, V views, H x W pixels, S samples a ray, R = V H W rays of a particle.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from distvsd.cameras import Cameras, Field, rays
from distvsd.config import NerfConfig
from distvsd.particles.backdrop import Backdrop, linear_init
from distvsd.particles.base import Adapted, Cost, Handed, Keys, Parameters, Rendered, parameter_counts
from distvsd.particles.isosurface import isosurface
from distvsd.particles.occupancy import Occupancy
from distvsd.particles.penalties import coverage, sparsity
from distvsd.render import HashGrid, composite, sample_intervals
from distvsd.render.hashgrid import GridBackend
from distvsd.render.meshes import Surface
from distvsd.render.packed import Packed, PackedComposited, composite_packed, march
from distvsd.render.volume import Composited, VolumeBackend
from distvsd.vsd.rng import Purpose, normal, uniform

_OCCUPANCY = "occupancy"


@dataclass(frozen=True, kw_only=True)
class NerfParticle:
    """A radiance field in the cube [-bound, bound]^3, batched over particles; colour does not depend on the view.

    config: the fields of `particles.nerf`; meanings and ranges are documented there. learning_rate,
    network_learning_rate: of a round, for the grid and for the small networks. backend: of the volume rendering.
    grid_backend, gather: see `HashGrid`. deterministic: see `Particle`.
    """

    config: NerfConfig
    learning_rate: Callable[[int], float]
    network_learning_rate: Callable[[int], float]
    backend: VolumeBackend = "torch"
    grid_backend: GridBackend = "torch"
    gather: bool = False
    deterministic: bool = True
    is_latent: ClassVar[bool] = False
    has_views: ClassVar[bool] = True

    @cached_property
    def grid(self) -> HashGrid:
        return HashGrid(self.config, self.gather, self.grid_backend)

    @cached_property
    def occupancy(self) -> Occupancy:
        return Occupancy(self.config.occupancy, self.config.bound)

    @cached_property
    def backdrop(self) -> Backdrop:
        return Backdrop(self.config)

    def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
        grid = {_OCCUPANCY: self.occupancy.init(ids)} if self.config.occupancy.resolution else {}
        if source is not None:
            return source.copied_for(self, ids, anew=(_OCCUPANCY,)) | grid
        width = self.config.levels * self.config.features
        parameters = self.grid.init(seed, ids, self.config.init_scale)
        parameters["decoder_weight"] = linear_init(seed, ids, 4, width, lane=100)
        colour = (uniform(seed, Purpose.INIT, ids, 0, (3,), lane=103) * 2 - 1) * self.config.init_color
        parameters["decoder_bias"] = torch.cat((torch.zeros_like(colour[:, :1]), colour), dim=1)
        return parameters | self.backdrop.init(seed, ids) | grid

    def learning_rates(self, step: int) -> dict[str, float]:
        grid, network = self.learning_rate(step), self.network_learning_rate(step)
        names = [f"grid{level}" for level in range(self.config.levels)]
        networks = ["decoder_weight", "decoder_bias", *self.backdrop.names]
        return dict.fromkeys(names, grid) | dict.fromkeys(networks, network)

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        views = cameras.shape[1]
        jitter = uniform(keys.seed, Purpose.RAY_JITTER, keys.ids, keys.step, (views, resolution, resolution))
        behind = functools.partial(self.backdrop.training, parameters, keys=keys)
        return self._draw(parameters, cameras, resolution, jitter, behind, keys)

    def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
        jitter = cameras.fovy.new_full((*cameras.shape, resolution, resolution), 0.5)
        behind = functools.partial(torch.full_like, fill_value=background)
        return self._draw(parameters, cameras, resolution, jitter, behind, None)

    def field(self, parameters: Parameters) -> Field:
        return lambda points_PN3: self.evaluate(parameters, points_PN3)[0]

    def colors(self, parameters: Parameters, points: Tensor) -> Tensor:
        return self.evaluate(parameters, points)[1]

    def surface(self, parameters: Parameters, resolution: int, threshold: float) -> Surface:
        """Not differentiable in the parameters; the colours are."""
        meshes = isosurface(self.field, parameters, self.config.bound, resolution, threshold)
        return Surface(meshes, lambda spots: self.evaluate(parameters, spots)[1])

    def cost(self, resolution: int) -> Cost:
        points, width = resolution**2 * self.config.samples_per_ray, self.config.levels * self.config.features
        # Of a sample: eight corners of every level, and density and colour, which are written once and read once.
        touched = 8 * width + 2 * 4
        return Cost(*parameter_counts(self), points=points, flops=2.0 * 4 * width * points, touched=touched * points)

    def evaluate(
        self, parameters: Parameters, points_PN3: Tensor, noise_PN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Density `[P, N]` (per world unit) and colour `[P, N, 3]` at world points; differentiable.

        noise: added to the density before its softplus.
        """
        config = self.config
        features_PFN = self.grid.encode(parameters, points_PN3 / (2 * config.bound) + 0.5)
        raw_P4N = torch.baddbmm(parameters["decoder_bias"][..., None], parameters["decoder_weight"], features_PFN)
        raw_density = raw_P4N[:, 0] + self._initial_density(points_PN3.norm(dim=-1))
        if noise_PN is not None:
            raw_density = raw_density + noise_PN
        density = config.density_scale * torch.nn.functional.softplus(raw_density)
        return density, torch.sigmoid(raw_P4N[:, 1:]).transpose(1, 2)

    def _initial_density(self, radius: Tensor) -> Tensor:
        """Before the softplus, by the distance from the centre: the paper's appendix."""
        config = self.config
        # A soft ball or, with a negative density, a hollow around the camera.
        blob = config.blob_density * (1 - radius / config.blob_radius)
        if config.init == "blob":
            return blob
        # The paper changes from object to scene at |x| = 5/6, where its two are equal; with any numbers, this is that.
        return torch.maximum(blob, config.shell_density * (1 - radius / config.shell_radius))

    def _draw(
        self,
        parameters: Parameters,
        cameras: Cameras,
        resolution: int,
        jitter_PVHW: Tensor,
        behind: Callable[[Tensor], Tensor],
        keys: Keys | None,
    ) -> Rendered:
        """behind: unit directions `[P, V, H, W, 3]` to the colours of the background. keys: None for looking, which
        reads all of the cube."""
        centres, directions = rays(cameras, resolution, resolution)
        origins = centres[:, :, None, None].expand_as(directions)
        occupied = None if keys is None else self._occupied(parameters)
        out: Composited | PackedComposited
        if keys is None or occupied is None:
            out = self._all_of(parameters, origins, directions, jitter_PVHW, keys)
        else:
            out = self._matter_of(parameters, occupied, origins, directions, jitter_PVHW, keys)
        opacity = out.opacity.reshape(*directions.shape[:-1], 1)
        images = out.color.reshape(directions.shape) + (1 - opacity) * behind(directions)
        penalty = self.penalty(out, cameras.shape[0])
        return Rendered(images.permute(0, 1, 4, 2, 3), opacity.permute(0, 1, 4, 2, 3), penalty)

    def _occupied(self, parameters: Parameters) -> Tensor | None:
        """`[P, G, G, G]` bool; None where nothing is empty."""
        if not self.config.occupancy.resolution:
            return None
        occupied = self.occupancy.cells(parameters[_OCCUPANCY])
        return None if occupied.all() else occupied

    def _all_of(
        self, parameters: Parameters, origins: Tensor, directions: Tensor, jitter_PVHW: Tensor, keys: Keys | None
    ) -> Composited:
        config = self.config
        starts, ends = sample_intervals(origins, directions, config.bound, config.samples_per_ray, jitter_PVHW)
        points = origins[..., None, :] + directions[..., None, :] * ((starts + ends) / 2)[..., None]
        shape, particles = points.shape[:-1], len(points)
        noise = None if keys is None else self._noise(keys, points[0].numel() // 3)
        density, colour = self.evaluate(parameters, points.reshape(particles, -1, 3), noise)
        return composite(starts, ends, density.reshape(shape), colour.reshape(*shape, 3), self.backend)

    def _matter_of(
        self,
        parameters: Parameters,
        occupied: Tensor,
        origins: Tensor,
        directions: Tensor,
        jitter_PVHW: Tensor,
        keys: Keys,
    ) -> PackedComposited:
        """The same of the samples in occupied cells, and of flattened rays."""
        steps = self.config.samples_per_ray
        origins_PR3, directions_PR3 = origins.flatten(1, 3), directions.flatten(1, 3)
        packed = march(occupied, origins_PR3, directions_PR3, self.config.bound, steps, jitter_PVHW.flatten(1))
        middles = ((packed.starts + packed.ends) / 2)[:, None]
        points = origins_PR3.flatten(0, 1)[packed.ray] + directions_PR3.flatten(0, 1)[packed.ray] * middles
        noise = self._noise(keys, origins_PR3.shape[1] * steps)
        if noise is not None:
            noise = noise.flatten()[packed.places]
        density, colour = self._evaluate_packed(parameters, packed, points, noise)
        return composite_packed(packed, density, colour, directions[..., 0].numel())

    def _evaluate_packed(
        self, parameters: Parameters, packed: Packed, points_K3: Tensor, noise_K: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Density `[K]` and colour `[K, 3]` at the samples."""
        batches = packed.batches()
        each = {name: value.unbind(0) for name, value in parameters.items()}  # one gradient for all batches
        parts = []
        for rows in batches:
            own = parameters
            if len(batches) > 1:
                own = {name: torch.stack([value[row] for row in rows.particles]) for name, value in each.items()}
            noise = None if noise_K is None else rows.spread(noise_K[rows.samples])
            parts.append([rows.take(of) for of in self.evaluate(own, rows.spread(points_K3[rows.samples]), noise)])
        order = torch.cat([rows.samples for rows in batches])
        density, colour = (torch.cat(of) for of in zip(*parts, strict=True))
        # A permutation, by a copy: the gradient of indexing would add.
        density, colour = (torch.zeros_like(of).index_copy(0, order, of) for of in (density, colour))
        return density, colour

    def _noise(self, keys: Keys, points: int) -> Tensor | None:
        """On the density, `[P, points]`; the points are all steps of all rays."""
        if self.config.density_noise == 0:
            return None
        drawn = normal(keys.seed, Purpose.DENSITY_NOISE, keys.ids, keys.step, (points,))
        return self.config.density_noise * drawn

    @torch.no_grad()
    def adapt(self, parameters: Parameters, keys: Keys, factors: Tensor) -> Adapted | None:
        """Reads the density into the occupancy grid, every `occupancy.every` rounds."""
        if not self.occupancy.is_due(keys.step):
            return None
        return Adapted({_OCCUPANCY: self.occupancy.refreshed(parameters[_OCCUPANCY], self.field(parameters), keys)}, {})

    def penalty(self, rendered: Composited | PackedComposited, particles: int) -> Tensor:
        """The weighted regularisers of each particle `[P]`, over its rays: entropy (rays clear or solid), sparsity of
        the opacity (no clutter), and coverage (the object covers part of a view, not all and not nothing)."""
        opacity, config = rendered.opacity.reshape(particles, -1), self.config
        penalty = torch.zeros(particles, device=opacity.device)
        if config.entropy > 0:
            of_rays = config.entropy_of == "opacity"
            of = opacity if of_rays else rendered.weights.reshape(particles, -1)
            penalty = penalty + config.entropy * _binary_entropy(of) / (1 if of_rays else math.log(2))
        if config.sparsity > 0:
            penalty = penalty + sparsity(config.sparsity, opacity)
        if config.coverage > 0:
            penalty = penalty + coverage(config.coverage, opacity, config.coverage_range)
        return penalty


def _binary_entropy(share_PN: Tensor) -> Tensor:
    """Mean entropy `[P]` of coins that fall with these probabilities, nats."""
    safe = share_PN.clamp(1e-5, 1 - 1e-5)
    return -(safe * safe.log() + (1 - safe) * (1 - safe).log()).mean(1)
