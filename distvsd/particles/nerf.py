"""Radiance-field particles: a hash grid, one linear layer, a learned background; the paper's stage 1.

Shape legend: P particles, V views, H x W pixels, S samples a ray, R = V H W rays of a particle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from distvsd.cameras import Cameras, Field, rays
from distvsd.config import NerfConfig
from distvsd.particles.base import Cost, Handed, Keys, Parameters, Rendered, parameter_counts
from distvsd.render import HashGrid, composite, sample_intervals
from distvsd.render.volume import Composited, VolumeBackend
from distvsd.vsd.rng import Purpose, normal, uniform

_DIRECTION_BANDS = 4
_BACKGROUND_WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class NerfParticle:
    """A radiance field in the cube [-bound, bound]^3, batched over particles; colour does not depend on the view.

    config: the fields of `particles.nerf`; meanings and ranges are documented there. learning_rate,
    network_learning_rate: of a round, for the grid and for the small networks. backend: of the volume rendering.
    gather: see `HashGrid`. deterministic: see `Particle`.
    """

    config: NerfConfig
    learning_rate: Callable[[int], float]
    network_learning_rate: Callable[[int], float]
    backend: VolumeBackend = "torch"
    gather: bool = False
    deterministic: bool = True
    is_latent: ClassVar[bool] = False
    has_views: ClassVar[bool] = True

    @cached_property
    def grid(self) -> HashGrid:
        return HashGrid(self.config, self.gather)

    def init(self, seed: int, ids: Tensor, source: Handed | None = None) -> Parameters:
        if source is not None:
            return source.copied_for(self, ids)
        width = self.config.levels * self.config.features
        parameters = self.grid.init(seed, ids, self.config.init_scale)
        parameters["decoder_weight"] = _linear_init(seed, ids, 4, width, lane=100)
        colour = (uniform(seed, Purpose.INIT, ids, 0, (3,), lane=103) * 2 - 1) * self.config.init_color
        parameters["decoder_bias"] = torch.cat((torch.zeros_like(colour[:, :1]), colour), dim=1)
        if self.config.background == "learned":
            parameters["background_weight0"] = _linear_init(
                seed, ids, _BACKGROUND_WIDTH, 3 * 2 * _DIRECTION_BANDS, lane=101
            )
            parameters["background_bias0"] = torch.zeros(len(ids), _BACKGROUND_WIDTH, device=ids.device)
            parameters["background_weight1"] = _linear_init(seed, ids, 3, _BACKGROUND_WIDTH, lane=102)
            parameters["background_bias1"] = torch.zeros(len(ids), 3, device=ids.device)
        return parameters

    def learning_rates(self, step: int) -> dict[str, float]:
        grid, network = self.learning_rate(step), self.network_learning_rate(step)
        names = [f"grid{level}" for level in range(self.config.levels)]
        networks = ["decoder_weight", "decoder_bias"]
        if self.config.background == "learned":
            networks += [f"background_{part}{layer}" for layer in (0, 1) for part in ("weight", "bias")]
        return dict.fromkeys(names, grid) | dict.fromkeys(networks, network)

    def render(self, parameters: Parameters, cameras: Cameras, resolution: int, keys: Keys) -> Rendered:
        views = cameras.shape[1]
        jitter = uniform(keys.seed, Purpose.RAY_JITTER, keys.ids, keys.step, (views, resolution, resolution))
        draws = uniform(keys.seed, Purpose.BACKGROUND, keys.ids, keys.step, (views, 4))
        colour = draws[..., 1:]
        if self.config.random_background_kind == "grey":
            colour = colour[..., :1].expand(-1, -1, 3)
        plain = draws[..., 0] < self.config.random_background
        return self._draw(parameters, cameras, resolution, jitter, colour, plain, keys)

    def view(self, parameters: Parameters, cameras: Cameras, resolution: int, background: float) -> Rendered:
        like = cameras.fovy
        jitter = torch.full((*cameras.shape, resolution, resolution), 0.5, device=like.device)
        colour = torch.full((*cameras.shape, 3), background, device=like.device)
        plain = torch.ones(cameras.shape, dtype=torch.bool, device=like.device)
        return self._draw(parameters, cameras, resolution, jitter, colour, plain, None)

    def field(self, parameters: Parameters) -> Field | None:
        return lambda points_PN3: self.evaluate(parameters, points_PN3)[0]

    def cost(self, resolution: int) -> Cost:
        return Cost(*parameter_counts(self), points=resolution**2 * self.config.samples_per_ray)

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
        plain_colour_PV3: Tensor,
        is_plain_PV: Tensor,
        keys: Keys | None,
    ) -> Rendered:
        particles, config = cameras.shape[0], self.config
        origins, directions = rays(cameras, resolution, resolution)
        origins = origins[:, :, None, None].expand_as(directions)
        starts, ends = sample_intervals(origins, directions, config.bound, config.samples_per_ray, jitter_PVHW)
        points = origins[..., None, :] + directions[..., None, :] * ((starts + ends) / 2)[..., None]
        shape = points.shape[:-1]
        noise = None
        if keys is not None and config.density_noise > 0:
            count = (points[0].numel() // 3,)
            noise = config.density_noise * normal(keys.seed, Purpose.DENSITY_NOISE, keys.ids, keys.step, count)
        density, colour = self.evaluate(parameters, points.reshape(particles, -1, 3), noise)
        out = composite(starts, ends, density.reshape(shape), colour.reshape(*shape, 3), self.backend)
        background = plain_colour_PV3[:, :, None, None].expand_as(directions)
        if self.config.background == "learned":
            learned = self._background(parameters, directions.reshape(particles, -1, 3)).reshape(directions.shape)
            background = torch.where(is_plain_PV[..., None, None, None], background, learned)
        images = out.color + (1 - out.opacity) * background
        return Rendered(images.permute(0, 1, 4, 2, 3), out.opacity.permute(0, 1, 4, 2, 3), self.penalty(out, particles))

    def _background(self, parameters: Parameters, directions_PR3: Tensor) -> Tensor:
        """Colours `[P, R, 3]` of the learned background along unit directions."""
        bands = 2.0 ** torch.arange(_DIRECTION_BANDS, device=directions_PR3.device)
        angles = (directions_PR3[..., None] * bands).flatten(2)
        encoded = torch.cat((angles.sin(), angles.cos()), dim=-1)
        hidden = torch.relu(
            torch.baddbmm(
                parameters["background_bias0"][:, None], encoded, parameters["background_weight0"].transpose(1, 2)
            )
        )
        return torch.sigmoid(
            torch.baddbmm(
                parameters["background_bias1"][:, None], hidden, parameters["background_weight1"].transpose(1, 2)
            )
        )

    def penalty(self, rendered: Composited, particles: int) -> Tensor:
        """The weighted regularisers of each particle `[P]`, over its rays: entropy (rays clear or solid), sparsity of
        the opacity (no clutter), and coverage (the object covers part of a view, not all and not nothing)."""
        opacity, config = rendered.opacity.reshape(particles, -1), self.config
        penalty = torch.zeros(particles, device=opacity.device)
        if config.entropy > 0:
            of_rays = config.entropy_of == "opacity"
            of = opacity if of_rays else rendered.weights.reshape(particles, -1)
            penalty = penalty + config.entropy * _binary_entropy(of) / (1 if of_rays else math.log(2))
        if config.sparsity > 0:
            # Mean over root mean square (Hoyer 2004). It has no gradient in the overall strength, and nearly none on
            # solid rays: it removes fog, and neither thins the object nor fades all of it out.
            penalty = penalty + config.sparsity * opacity.mean(1) / (opacity.square().mean(1) + 1e-4).sqrt()
        if config.coverage > 0:
            # Against the two states that sparsity does not see: a field that fills the view, which the prior takes for
            # a background, and one that has faded. An opacity near 1 and a softplus near 0 have vanishing slopes; the
            # logarithms make up for that.
            covered, (low, high) = opacity.mean(1), config.coverage_range
            inside = ((covered + 1e-4) / low).clamp_max(1) * ((1 - covered + 1e-4) / (1 - high)).clamp_max(1)
            penalty = penalty - config.coverage * inside.log()
        return penalty


def _binary_entropy(share_PN: Tensor) -> Tensor:
    """Mean entropy `[P]` of coins that fall with these probabilities, nats."""
    safe = share_PN.clamp(1e-5, 1 - 1e-5)
    return -(safe * safe.log() + (1 - safe) * (1 - safe).log()).mean(1)


def _linear_init(seed: int, ids: Tensor, rows: int, columns: int, lane: int) -> Tensor:
    """Weights `[P, rows, columns]`, uniform in +-sqrt(3 / columns): unit gain for inputs of unit variance."""
    values = uniform(seed, Purpose.INIT, ids, 0, (rows, columns), lane=lane)
    return (values * 2 - 1) * math.sqrt(3 / columns)
