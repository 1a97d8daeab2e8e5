"""Wires the parts of one rank of a run together."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

import torch

from distvsd.config import Config
from distvsd.config.relations import refuse_small_latents
from distvsd.errors import ConfigError
from distvsd.networks.base import Adaptable
from distvsd.networks.folder import open_folder
from distvsd.networks.identity import Identity
from distvsd.parallel.assign import owners, share
from distvsd.parallel.collectives import gather_objects
from distvsd.parallel.numerics import fix_order_of_sums
from distvsd.parallel.reduce import reduce_gradients
from distvsd.parallel.world import World
from distvsd.particles import Ensemble, HandedRows
from distvsd.plan.exchange import chosen_mode
from distvsd.plan.needs import particle_bytes, places_of, refuse_too_large, refuse_unpaged
from distvsd.prior.guidance import ClassifierFree
from distvsd.prior.load import load_prior
from distvsd.prior.pipeline import Pipeline
from distvsd.prior.teacher import Teacher
from distvsd.run.custom import Custom
from distvsd.run.encode import Encoder
from distvsd.run.loop import Loop, Round
from distvsd.run.paging import paging_of, place_of
from distvsd.run.parts import Latents, blank_particle, make_ensemble, make_objective
from distvsd.run.sizes import Sizes
from distvsd.runtime.memory import host_memory
from distvsd.score.lora import LoraScore
from distvsd.score.other_base import load_other_base
from distvsd.score.replay import Replay
from distvsd.score.scattered import Renders
from distvsd.score.sharing import Sharing, share_renders
from distvsd.score.spread import SpreadDistillation
from distvsd.score.strategies.choose import choose, refuse_missing, spreads_network
from distvsd.score.strategies.flat import Flat
from distvsd.score.training import ScoreTraining
from distvsd.vsd.objectives import Distillation, Objective
from distvsd.vsd.objectives.base import ScorePart
from distvsd.vsd.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts of one rank of a run, wired together; `loop.run` is the algorithm.

    training: trains the score network; None where the objective needs none. sharing: of the renders that it trains on.
    sizes: how much a call takes. custom: the parts that the caller made.
    """

    config: Config
    world: World
    prior: Pipeline
    ensemble: Ensemble
    training: ScoreTraining | None
    sharing: Sharing
    sizes: Sizes
    loop: Loop
    custom: Custom

    def identities(self) -> dict[str, tuple[str, str]]:
        """Path and hash of every frozen pipeline of the run: `prior`, and `score_base` where it has one. Local; the
        first call reads their files."""
        found = {"prior": (self.config.prior.path, self.prior.identity())}
        if self.config.score.base and self.training is not None:
            found["score_base"] = (self.config.score.base, self._score_base.current())
        return found

    @cached_property
    def _score_base(self) -> Identity:
        return Identity(open_folder(self.config.score.base))


def build_run(
    config: Config,
    world: World,
    watch: Callable[[Round], bool],
    entered: Callable[[int, str], None] = lambda step, phase: None,
    custom: Custom = Custom(),
    source: Callable[[Latents, Sequence[int]], HandedRows] | None = None,
) -> Run:
    """Loads the prior and makes this rank's particles. Every rank calls it; it does not communicate.

    watch, entered: see `Loop`. source(prior, ids): these particles as the stage before left them; their latents, if
    any, are the prior's.

    Raises PriorError and BackendError where the prior or a backend cannot be used. Raises ConfigError where the run
    needs more memory than there is, or where the network would see latents much smaller than those it was trained on.
    """
    objective = custom.objective or make_objective(config)
    learns = bool(objective.needs & set(get_args(ScorePart)))
    _refuse_unfit(config, world, custom, learns)
    refuse_missing(config.parallel)
    if config.parallel.numerics == "exact":
        fix_order_of_sums(world.device)
    # Teacher and student are one network; where ranks split it, a second module tree would hold the whole of it again.
    is_split = learns and not config.score.base and spreads_network(config.parallel, world)
    prior = _load_prior(config, world, custom, is_split)
    sharing = share_renders(chosen_mode(config, world.size), world, config.particles.count)
    training = _score_training(config, world, prior, custom, sharing) if learns else None
    if training is not None and is_split:
        prior = replace(prior, denoiser=training.score.without_adapter())
    assigned = owners(config.particles.count, world.size)
    own = assigned[world.rank]
    begun = source and source(prior, own)
    paging = paging_of(config, world, own)
    ensemble = make_ensemble(config, prior, own, world.device, begun, custom=custom, paging=paging)
    sizes = Sizes(config, world, ensemble, training)
    loop = Loop(
        ensemble=ensemble,
        encode=Encoder(config, prior, ensemble),
        objective=_distillation(config, world, objective, prior, training),
        exchange=_exchange(sharing, ensemble, assigned),
        exclude=sharing.exclude,
        training=training,
        resolution=config.render.resolution_at,
        watch=watch,
        lag_due=lambda step: (step + 1) % config.log.every == 0,
        entered=sizes.entered(entered),
    )
    return Run(
        config=config,
        world=world,
        prior=prior,
        ensemble=ensemble,
        training=training,
        sharing=sharing,
        sizes=sizes,
        loop=loop,
        custom=custom,
    )


def _load_prior(config: Config, world: World, custom: Custom, is_split: bool) -> Pipeline:
    """is_split: ranks will hold parts of its network."""
    prior = load_prior(
        config.prior.path,
        config.prompts,
        config.prior.negative_prompt,
        config.prior.view_dependent and _has_views(config, custom),  # an image has no side
        config.prior.dtype,
        world.device,
        # With one particle a call, no bit of a particle depends on which others are on its rank.
        micro_batch=_samples_a_call(config),
        # A network that is split over ranks may not fit on one device, so it is loaded into the host's memory.
        unet_device="cpu" if is_split else None,
    )
    return prior if custom.denoiser is None else replace(prior, denoiser=custom.denoiser(prior.denoiser))


def _has_views(config: Config, custom: Custom) -> bool:
    """Whether another camera sees another picture of a particle."""
    return custom.particle.has_views if custom.particle is not None else config.has_views


def _exchange(
    sharing: Sharing, ensemble: Ensemble, assigned: Sequence[Sequence[int]]
) -> Callable[[Samples, int], Renders]:
    """The exchange of the samples of all ranks' active particles."""

    def gather(samples: Samples, step: int) -> Renders:
        rows = [len(ensemble.store.active(ids, step)) * ensemble.num_views for ids in assigned]
        return sharing.start(samples, rows).wait()

    return gather


def _refuse_unfit(config: Config, world: World, custom: Custom, learns: bool) -> None:
    """Raises ConfigError where the prior's sizes do not suit the run or the machine, or where a strategy has no score
    network to spread; loads nothing. The share looked at is the first rank's, which is the largest, so that ranks of
    equal machines raise the same."""
    if not learns and config.parallel.strategy != "flat":
        raise ConfigError(
            f"parallel.strategy is {config.parallel.strategy}, but the objective trains no score network; set "
            "parallel.strategy=flat"
        )
    folder = open_folder(config.prior.path)
    native = folder.native_resolution
    refuse_small_latents(config, native)
    least = config.encoded_edge(min(config.render.corners(config.schedule.rounds)), native)
    particle = custom.particle or blank_particle(config, folder.latent_shape(config.final_resolution))
    latents, own = math.prod(folder.latent_shape(least)), len(share(config.particles.count, world.size, 0))
    if world.device.type == "cuda":
        room, where = torch.cuda.get_device_properties(world.device).total_memory, "GPU"
    else:
        room, where = host_memory(), "machine"
    refuse_too_large(config, particle, latents, own, room, where)
    together = places_of(config, particle, own * world.local_size)
    if config.particles.turns > 1:
        slots = 0 if world.device.type == "cuda" else together.device * particle_bytes(particle, config)
        disk, _ = place_of(config)
        there = next(folder for folder in (disk, *disk.resolve().parents) if folder.exists())
        refuse_unpaged(together, host_memory() - slots, shutil.disk_usage(there).free, disk)


def _base_of_score(config: Config, world: World, prior: Pipeline) -> Adaptable:
    if not config.score.base:
        return prior.denoiser
    waits = spreads_network(config.parallel, world)  # in the host's memory, see `build_run`
    return load_other_base(
        config.score.base,
        prior=prior.folder,
        process=prior.process,
        dtype=prior.dtype,
        device=world.device,
        network_device=torch.device("cpu") if waits else world.device,
    )


def _distillation(
    config: Config, world: World, objective: Objective, prior: Pipeline, training: ScoreTraining | None
) -> Distillation | SpreadDistillation:
    views = config.particles.views
    distillation = Distillation(
        objective=objective,
        process=prior.process,
        prior=Teacher(prior, ClassifierFree(config.prior.guidance_scale, *config.prior.guidance_range), views),
        score=training.score.eps if training is not None else None,
        seed=config.run.seed,
        num_views=views,
        t_min=config.objective.t_min.at,
        t_max=config.objective.t_max.at,
    )
    if training is None or not spreads_network(config.parallel, world):
        return distillation
    return SpreadDistillation(distillation, training.strategy)


def _samples_a_call(config: Config) -> int:
    """0 for all; what is measured begins with that."""
    if config.parallel.numerics == "exact":
        return config.particles.views
    return 0 if config.score.micro_batch == "auto" else config.score.micro_batch


def _score_training(config: Config, world: World, prior: Pipeline, custom: Custom, sharing: Sharing) -> ScoreTraining:
    """The score network, how ranks train it, and its replay."""
    views = config.particles.views
    score = LoraScore(
        base=_base_of_score(config, world, prior),
        text_of=prior.texts.bare,
        config=config.score,
        seed=config.run.seed,
        device=world.device,
        num_views=views,
        micro_batch=_samples_a_call(config),
        reads_cameras=_has_views(config, custom) and config.score.camera_drop < 1,
    )
    length, numerics = sum(score.num_parameters), config.parallel.numerics
    flat = Flat(functools.partial(reduce_gradients, world, length=length, numerics=numerics), score.local)
    return ScoreTraining(
        score=score,
        strategy=choose(config.parallel, world, score, flat),
        sharing=sharing,
        config=config.score,
        seed=config.run.seed,
        num_particles=config.particles.count,
        num_views=views,
        micro_batch=_samples_a_call(config),
        replay=Replay(config.score.replay_rounds, views, world.device),
        gather=functools.partial(gather_objects, world),
    )
