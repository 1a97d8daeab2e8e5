"""Makes one part of a run from its configuration: the only file that names every kind of objective, particle and
camera sampler."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distvsd.cameras import AdaptiveSampler, CameraSampler, OrbitSampler, SceneSampler
from distvsd.config import CamerasConfig, Config, OccupancyConfig
from distvsd.errors import BackendError
from distvsd.particles import (
    Ensemble,
    GaussianParticle,
    HandedRows,
    ImageParticle,
    MeshParticle,
    NerfParticle,
    Paged,
    Paging,
    Particle,
    ParticleStore,
    Resident,
)
from distvsd.particles.encode import encode_plain
from distvsd.render import grid_backend, raster_backend, splat_backend, volume_backend
from distvsd.run.custom import Custom
from distvsd.vsd.objectives import ESD, SDS, VSD, Objective


class Latents(Protocol):
    """The part of a prior that latent particles use; see `prior.base.Prior`."""

    def latent_shape(self, resolution: int) -> tuple[int, int, int]: ...

    def encode(self, images: Tensor) -> Tensor: ...


def make_objective(config: Config) -> Objective:
    """The kind of objective of this configuration."""
    match config.objective.kind:
        case "vsd":
            return VSD()
        case "sds":
            return SDS()
        case "esd":
            # Both halves of ESD are the same prediction where the network reads no camera.
            return ESD(config.objective.esd_lambda) if config.reads_cameras else VSD()
    raise ValueError(f"objective.kind is {config.objective.kind!r}; known are 'vsd', 'sds' and 'esd'")


def make_ensemble(
    config: Config,
    prior: Latents | None,
    ids: Sequence[int],
    device: torch.device | str,
    source: HandedRows | None = None,
    blank: bool = False,
    custom: Custom = Custom(),
    paging: Paging | None = None,
) -> Ensemble:
    """Fresh particles `ids` of this configuration. prior: needed for latent particles only. source: what the stage
    before hands over, rows in the order of `ids`. blank: see `Resident`. paging: of particles that take turns; without
    it all are on the device and active.

    Raises ConfigError where the particles cannot begin from the source.
    """
    particles = config.particles
    if config.parallel.numerics == "exact":
        particles = dataclasses.replace(particles, micro_batch=1)  # no particle's bits may depend on its neighbours
    particle = custom.particle or make_particle(config, prior, torch.device(device))
    if config.parallel.numerics == "exact" and not particle.deterministic:
        raise BackendError(
            f"parallel.numerics is exact, but a {type(particle).__name__} does not give the same bits every time on "
            f"{device}; set parallel.numerics=fast"
        )
    seed = config.run.seed
    store: ParticleStore
    if paging is None:
        store = Resident(particle, ids, particles, seed=seed, device=device, source=source, blank=blank)
    else:
        store = Paged(particle, ids, particles, seed=seed, paging=paging, device=device, source=source)
    # Where a network is split, all ranks must call it equally often, and shards differ in size.
    whole = config.parallel.strategy != "flat"
    return Ensemble(store, custom.cameras or make_cameras(config.cameras), particles, whole)


def make_cameras(config: CamerasConfig) -> CameraSampler:
    """The kind of camera sampler of this configuration."""
    match config.kind:
        case "orbit":
            return OrbitSampler(config)
        case "scene":
            return SceneSampler(config)
        case "adaptive":
            return AdaptiveSampler(config)
    raise ValueError(f"cameras.kind is {config.kind!r}; known are 'orbit', 'scene' and 'adaptive'")


@dataclass(frozen=True)
class _Shape:
    """Stands in for a prior where only the shape of a particle matters."""

    shape: tuple[int, int, int]

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        return self.shape

    def encode(self, images: Tensor) -> Tensor:
        return images.new_empty(len(images), *self.shape)


def blank_particle(config: Config, latents: tuple[int, int, int] | None) -> Particle:
    """The kind of particle of this configuration, for its sizes only: needs no prior, and is not for rendering.

    latents: the shape of an image in latents in the last round, which `Config.are_latents` need.
    """
    return make_particle(config, None if latents is None else _Shape(latents), torch.device("cpu"))


def make_particle(config: Config, prior: Latents | None, device: torch.device) -> Particle:
    """The kind of particle of this configuration."""
    particles, exact, on_cpu = config.particles, config.parallel.numerics == "exact", device.type == "cpu"
    rate = particles.learning_rate.at
    match particles.kind:
        case "image":
            size = config.final_resolution
            if not config.are_latents:
                return ImageParticle(config=particles.image, shape=(3, size, size), learning_rate=rate)
            assert prior is not None, "particles in latents need the prior whose latents they are"
            encode = functools.partial(encode_plain, prior.encode, size)
            shape = prior.latent_shape(size)
            return ImageParticle(config=particles.image, shape=shape, learning_rate=rate, encode=encode)
        case "gaussians":
            return GaussianParticle(
                config=particles.gaussians,
                learning_rate=rate,
                backend=splat_backend(config.render.splat_backend, config.parallel.numerics, device),
                deterministic=exact or on_cpu,
            )
        case "nerf":
            return _make_field(config, device)
        case "mesh":
            return MeshParticle(
                config=particles.mesh,
                field_particle=_make_field(config, device),
                learning_rate=rate,
                backend=raster_backend(config.render.raster_backend, config.parallel.numerics, device),
                deterministic=exact or on_cpu,
            )
    raise ValueError(f"particles.kind is {particles.kind!r}; known are 'nerf', 'gaussians', 'image' and 'mesh'")


def _make_field(config: Config, device: torch.device) -> NerfParticle:
    particles, exact, on_cpu = config.particles, config.parallel.numerics == "exact", device.type == "cpu"
    nerf = particles.nerf
    if particles.kind != "nerf":
        nerf = dataclasses.replace(nerf, occupancy=OccupancyConfig())  # colours of a surface: nothing is marched
    return NerfParticle(
        config=nerf,
        learning_rate=particles.learning_rate.at,
        network_learning_rate=particles.network_learning_rate.at,
        backend=volume_backend(config.render.backend, config.parallel.numerics, device),
        grid_backend=grid_backend(config.render.grid_backend, config.parallel.numerics, device),
        # Reading a dense level on CUDA adds its gradients in no fixed order; gathering can be made deterministic.
        gather=exact and not on_cpu,
        deterministic=exact or on_cpu,
    )
