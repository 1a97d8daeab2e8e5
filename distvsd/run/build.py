"""From a configuration to the objects of a run: the only place that knows every concrete class."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distvsd.cameras import OrbitSampler
from distvsd.config import Config
from distvsd.config.relations import refuse_small_latents
from distvsd.errors import BackendError
from distvsd.faults import poison
from distvsd.networks.folder import open_folder
from distvsd.parallel.assign import owners, share
from distvsd.parallel.collectives import all_reduce_sum_, gather_objects
from distvsd.parallel.exchange import Exchange, slice_for
from distvsd.parallel.reduce import reduce_gradients
from distvsd.parallel.world import World
from distvsd.particles import Ensemble, ImageParticle, NerfParticle, Particle, Views
from distvsd.particles.recompute import forgetful
from distvsd.plan.needs import refuse_too_large
from distvsd.prior.load import load_prior
from distvsd.prior.pipeline import Pipeline
from distvsd.prior.prompts import view_indices
from distvsd.render import HashGrid
from distvsd.render.volume import VolumeBackend
from distvsd.run.loop import Loop, Round
from distvsd.runtime.memory import host_memory
from distvsd.score.base import Strategy
from distvsd.score.lora import LoraScore
from distvsd.score.spread import SpreadObjective
from distvsd.score.strategies.choose import choose, refuse_missing, spreads_network
from distvsd.score.strategies.flat import Flat
from distvsd.score.training import ScoreTraining
from distvsd.vsd.objectives import Objective
from distvsd.vsd.samples import Samples


@dataclass(frozen=True)
class Run:
    """The parts of one rank of a run, wired together; `loop.run` is the algorithm."""

    config: Config
    world: World
    prior: Pipeline
    ensemble: Ensemble
    score: LoraScore
    loop: Loop


class Latents(Protocol):
    """What particles that are latents need of the prior; see `prior.base.Prior`."""

    def latent_shape(self, resolution: int) -> tuple[int, int, int]: ...

    def encode(self, images: Tensor) -> Tensor: ...


def build_run(
    config: Config,
    world: World,
    watch: Callable[[Round], bool],
    entered: Callable[[int, str], None] = lambda step, phase: None,
) -> Run:
    """Loads the prior and makes this rank's particles. Every rank calls it; it does not communicate.

    watch, entered: see `Loop`.

    Raises PriorError and BackendError where the configuration asks for what is not there, and ConfigError where it asks
    for more memory than there is, or where the UNet would see latents much smaller than those it was trained on.
    """
    _refuse_unfit(config, world)
    exact = config.parallel.numerics == "exact"
    views = config.particles.views
    refuse_missing(config.parallel)
    if exact:
        _fix_order_of_sums(world.device)
    # One particle a call makes its arithmetic independent of who else is on the rank, to the last bit.
    samples_a_call = views if exact else config.score.micro_batch
    prior = load_prior(
        config.prior.path,
        config.prompts,
        config.prior.negative_prompt,
        config.prior.view_dependent and config.particles.kind != "image",  # an image has no side
        config.prior.dtype,
        world.device,
        micro_batch=samples_a_call,
        # A UNet that is cut up may be one that fits on no device: it waits in the host's memory.
        unet_device="cpu" if spreads_network(config.parallel, world) else None,
    )
    assigned = owners(config.particles.count, world.size)
    ensemble = make_ensemble(config, prior, assigned[world.rank], world.device)
    score = LoraScore(
        prior.unet,
        prior.alphas_cumprod,
        prior.prediction_type,
        prior.texts.bare,
        config.score,
        config.run.seed,
        world.device,
        micro_batch=samples_a_call,
        reads_cameras=config.reads_cameras,
    )
    strategy, score.holder = choose(config.parallel, world, score.network, score.local, _flat(config, world, score))
    loop = Loop(
        ensemble,
        _encoder(prior, ensemble, config),
        _objective(config, world, prior, score, strategy),
        Exchange(world, [len(ids) * views for ids in assigned]).start,
        functools.partial(_exclude, world),
        None if config.objective.kind == "sds" else _score_training(config, world, score, strategy),
        config.render.resolution_at,
        watch,
        lambda step: (step + 1) % config.log.every == 0,
        entered,
    )
    return Run(config, world, prior, ensemble, score, loop)


def _refuse_unfit(config: Config, world: World) -> None:
    """Raises ConfigError where the prior's sizes do not suit the run or the machine; loads nothing. The share looked at
    is the first rank's, which is the largest, so that ranks of equal machines raise the same."""
    folder = open_folder(config.prior.path)
    native = folder.native_resolution
    refuse_small_latents(config, native)
    prior = {"latent_channels": folder.latent_channels, "downscale": folder.downscale, "resolution": native}
    own = len(share(config.particles.count, world.size, 0))
    if world.device.type == "cuda":
        refuse_too_large(config, prior, own, torch.cuda.get_device_properties(world.device).total_memory, "GPU")
    else:
        refuse_too_large(config, prior, own, host_memory(), "machine")


def _fix_order_of_sums(device: torch.device) -> None:
    """For this process and all that it computes from now on."""
    if device.type == "cpu":
        # torch may split a sum by the number of threads, and that depends on how many ranks share a machine.
        torch.set_num_threads(1)
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix is multiplied
    # Only warnings: torch counts cumsum among what has no fixed order, though it splits one shape one way.
    torch.use_deterministic_algorithms(True, warn_only=True)


def _objective(config: Config, world: World, prior: Pipeline, score: LoraScore, strategy: Strategy) -> Objective:
    arguments = (
        config.objective.kind,
        config.run.seed,
        config.particles.views,
        prior.alphas_cumprod,
        functools.partial(prior.eps, guidance_scale=config.prior.guidance_scale),
        score.eps,
        config.objective.t_min.at,
        config.objective.t_max.at,
        config.objective.esd_lambda,
    )
    if not spreads_network(config.parallel, world):
        return Objective(*arguments)
    prior.unet = score.as_prior()  # a second tree of modules would keep all of the network
    return SpreadObjective(*arguments, strategy=strategy)


def _flat(config: Config, world: World, score: LoraScore) -> Flat:
    numerics, length = config.parallel.numerics, sum(score.num_parameters)
    return Flat(lambda grads, sums: reduce_gradients(world, grads, length, numerics, sums), score.step)


def _score_training(config: Config, world: World, score: LoraScore, strategy: Strategy) -> ScoreTraining:
    return ScoreTraining(
        score,
        strategy,
        functools.partial(slice_for, world),
        config.score,
        config.run.seed,
        micro_batch=1 if config.parallel.numerics == "exact" else config.score.micro_batch,
        gather=functools.partial(gather_objects, world),
    )


def make_ensemble(config: Config, prior: Latents | None, ids: Sequence[int], device: torch.device | str) -> Ensemble:
    """Fresh particles `ids` of this configuration. prior: whose latents they are, where they are latents."""
    particles = config.particles
    micro_batch = 1 if config.parallel.numerics == "exact" else particles.micro_batch
    return Ensemble(
        make_particle(config, prior, torch.device(device)),
        ids,
        OrbitSampler(config.cameras.elevation, config.cameras.azimuth, config.cameras.distance, config.cameras.fovy),
        particles.views,
        config.run.seed,
        particles.betas,
        particles.eps,
        micro_batch,
        device,
        particles.health,
        particles.recompute,
    )


@torch.no_grad()
def _encode_plain(prior: Latents, size: int, colors: Tensor) -> Tensor:
    """Latents of plain pictures of `colors` `[P, 3, 1, 1]`; one a call: no bit depends on who else is on the rank."""
    encoded = [prior.encode(color.expand(1, 3, size, size)) for color in colors]
    return torch.cat(encoded) if encoded else prior.encode(colors.expand(0, 3, size, size))


def make_particle(config: Config, prior: Latents | None, device: torch.device) -> Particle:
    """The kind of particle of this configuration."""
    particles, exact = config.particles, config.parallel.numerics == "exact"
    match particles.kind:
        case "image":
            size = config.render.resolution_at(config.schedule.rounds - 1)
            image, rate = particles.image, particles.learning_rate.at
            if image.space == "pixel":
                return ImageParticle((3, size, size), False, image.init_scale, rate, image.init_color)
            assert prior is not None, "particles in latents need the prior whose latents they are"
            encode = functools.partial(_encode_plain, prior, size)
            return ImageParticle(prior.latent_shape(size), True, image.init_scale, rate, image.init_color, encode)
        case "nerf":
            nerf = particles.nerf
            # Reading a dense level on CUDA adds its gradients in no fixed order; gathering can be made deterministic.
            gather = exact and device.type != "cpu"
            grid = HashGrid(
                nerf.levels,
                nerf.features,
                2**nerf.log2_table_size,
                nerf.base_resolution,
                nerf.max_resolution,
                nerf.smoothstep,
                gather,
            )
            return NerfParticle(
                grid,
                nerf.samples_per_ray,
                nerf.bound,
                nerf.density_scale,
                nerf.blob_density,
                nerf.blob_radius,
                nerf.init_scale,
                nerf.init_color,
                nerf.density_noise,
                nerf.entropy,
                nerf.entropy_of,
                nerf.sparsity,
                nerf.coverage,
                nerf.coverage_range,
                nerf.background == "learned",
                nerf.random_background,
                nerf.random_background_kind == "grey",
                _volume_backend(config, device),
                particles.learning_rate.at,
                particles.network_learning_rate.at,
                deterministic=device.type == "cpu" or gather,
            )
    raise ValueError(f"particles.kind is {particles.kind!r}; known are 'nerf' and 'image'")


def _volume_backend(config: Config, device: torch.device) -> VolumeBackend:
    """The asked one; auto is plain torch where bits must not change or no GPU runs, nerfacc where it can be
    imported."""
    asked = config.render.backend
    exact = config.parallel.numerics == "exact"
    if asked == "nerfacc" and exact and device.type == "cuda":
        raise BackendError(
            "parallel.numerics is exact, but render.backend nerfacc adds in no fixed order on CUDA; "
            "set render.backend=torch"
        )
    if asked != "auto":
        return asked
    if exact or device.type != "cuda":
        return "torch"
    from importlib.util import find_spec

    return "nerfacc" if find_spec("nerfacc") else "torch"


def _encoder(prior: Pipeline, ensemble: Ensemble, config: Config) -> Callable[[list[Views], int], Samples]:
    """Renders of a resolution to samples: latents with the graph, camera matrices, ids, named views, and weights.

    The weight is 0 for latents that are not finite and for particles in quarantine, else 1. Where the score network
    reads no cameras the matrices are zero.
    """
    particle, num_views = ensemble.particle, config.particles.views
    encode_images = forgetful(prior.encode) if config.particles.recompute else prior.encode

    def encode(views: list[Views], resolution: int) -> Samples:
        edge = config.encoded_edge(resolution, prior.resolution)
        if not views:
            return _no_samples(prior, edge)
        parts = []
        absent = torch.tensor(ensemble.quarantined, dtype=torch.int64, device=prior.device)
        for view in views:
            images = view.rendered.images.flatten(0, 1)
            ids = view.ids.repeat_interleave(num_views)
            latents = poison("latent", images if particle.is_latent else encode_images(images, edge), ids)
            cameras = view.cameras.flatten()
            matrices = cameras.extrinsics.flatten(1).float()
            parts.append(
                Samples(
                    latents,
                    matrices if config.reads_cameras else torch.zeros_like(matrices),
                    ids,
                    view_indices(cameras.elevation, cameras.azimuth),
                    (_finite(latents, num_views) & ~torch.isin(ids, absent)).float(),
                )
            )
        return parts[0] if len(parts) == 1 else Samples.cat(parts)

    return encode


def _finite(latents: Tensor, num_views: int) -> Tensor:
    """Bool `[N]`: whether all views of the row's particle are finite."""
    rows = latents.detach().flatten(1).isfinite().all(1)
    return rows.reshape(-1, num_views).all(1).repeat_interleave(num_views)


def _exclude(world: World, union: Samples, absent: list[int]) -> Samples:
    """The union with weight 0 for the particles that any rank reports absent; one small sum over ranks."""
    rows = torch.isin(union.ids, torch.tensor(absent, dtype=torch.int64, device=union.ids.device))
    missed = all_reduce_sum_(world, rows.float())
    return dataclasses.replace(union, weight=union.weight * (missed == 0))


def _no_samples(prior: Pipeline, edge: int) -> Samples:
    """What a rank without particles gives to the exchange: no rows, of the width that the others' rows have."""
    shape = prior.latent_shape(edge)
    empty = torch.zeros(0, dtype=torch.int64, device=prior.device)
    return Samples(
        torch.zeros(0, *shape, device=prior.device),
        torch.zeros(0, 16, device=prior.device),
        empty,
        empty,
        torch.zeros(0, device=prior.device),
    )
