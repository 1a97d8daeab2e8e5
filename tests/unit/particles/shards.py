"""Small particles and shards of them for the tests of this room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distvsd.cameras import CameraSampler, OrbitSampler
from distvsd.config import CamerasConfig, HealthConfig, ImageConfig, NerfConfig, ParticlesConfig
from distvsd.particles import Ensemble, Handed, ImageParticle, NerfParticle, Particle, Resident, Update

FIXED = OrbitSampler(CamerasConfig(elevation=(0.0, 0.0), azimuth=(0.0, 0.0), distance=(1.0, 1.0), fovy=(50.0, 50.0)))
AROUND = OrbitSampler(CamerasConfig(elevation=(0.0, 30.0), distance=(1.2, 1.5), fovy=(40.0, 50.0)))
PATIENT = HealthConfig()
SMALL = NerfConfig(
    levels=2,
    log2_table_size=12,
    base_resolution=4,
    max_resolution=8,
    smoothstep=False,
    samples_per_ray=16,
    bound=0.6,
    init_scale=0.1,
)


def image(
    shape: tuple[int, int, int] = (3, 4, 4), rate: Callable[[int], float] = lambda step: 0.1, **fields: Any
) -> ImageParticle:
    """Pixels where the shape has three channels, else latents."""
    space = "pixel" if shape[0] == 3 else "latent"
    return ImageParticle(config=ImageConfig(space=space, **fields), shape=shape, learning_rate=rate)


def nerf(config: NerfConfig = SMALL, **members: Any) -> NerfParticle:
    rates = {"learning_rate": lambda step: 1e-2, "network_learning_rate": lambda step: 1e-3}
    return NerfParticle(config=config, **(rates | members))


def shard(
    particle: Particle,
    ids: Sequence[int] = (0, 1, 2),
    *,
    sampler: CameraSampler = FIXED,
    source: Handed | None = None,
    health: HealthConfig = PATIENT,
    **fields: Any,
) -> Ensemble:
    """fields: those of `particles` in the configuration."""
    config = ParticlesConfig(health=health, **fields)
    return Ensemble(Resident(particle, ids, config, seed=7, source=source), sampler, config)


def one_round(
    particles: Ensemble,
    step: int,
    resolution: int = 4,
    gradient_of: Callable[[Tensor, Tensor], Tensor] = lambda latents, ids: latents,
) -> Update:
    """One round in which pictures are latents. gradient_of(latents `[N, C, h, w]`, ids `[N]`): at the latents; towards
    black unless given."""
    for views in particles.render(step, resolution):
        if not views:
            continue
        latents = torch.cat([view.rendered.images.flatten(0, 1) for view in views])
        ids = torch.cat([view.ids for view in views]).repeat_interleave(particles.num_views)
        particles.update(views, latents, gradient_of(latents.detach().clone(), ids), step)
    return particles.finish(step)


def poisoned(latents: Tensor, ids: Tensor, poison: Sequence[int]) -> Tensor:
    """The latents with NaN in the rows of the particles `poison`."""
    hit = torch.isin(ids, torch.tensor(poison, dtype=torch.int64))
    return torch.where(hit.reshape(-1, 1, 1, 1), torch.nan, latents)
